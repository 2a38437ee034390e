"""The clock for ages: of what the store has told, and of what is believed for so long.

It goes on while the machine is suspended, where the system has such a clock; ``time.monotonic()``
stands still on Linux then, and what was told before would look as new as it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

#: Return the seconds since a fixed moment, by a clock that is never set. A call takes as long as
#: one of time.monotonic().
now_s: Callable[[], float] = (
    partial(time.clock_gettime, time.CLOCK_BOOTTIME)
    if hasattr(time, "CLOCK_BOOTTIME")
    else time.monotonic
)
