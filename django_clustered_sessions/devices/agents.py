"""Browsers by the names that people know them by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from django.utils.translation import gettext as _

_parse: Callable[[str], Any] | None
try:
    from ua_parser import parse
except ImportError:
    # Without the extra "devices" what a browser says of itself is shown as it is.
    _parse = None
else:
    _parse = parse

#: No browser's own words are longer; what is longer is not looked at any further.
LONGEST: Final = 512

#: Characters shown of a browser that is not known by name.
SHOWN: Final = 60


def readable(user_agent: str) -> str:
    """Return ``Firefox on Linux`` for what a browser sends as its User-Agent.

    What is not known by name is returned as it is, cut to SHOWN characters. Empty: empty.
    """
    known = _parse(user_agent[:LONGEST]) if _parse else None
    browser, system = (
        (known.user_agent and known.user_agent.family, known.os and known.os.family)
        if known
        else (None, None)
    )
    if browser and system:
        return _("%(browser)s on %(system)s") % {"browser": browser, "system": system}
    if browser or system:
        return str(browser or system)
    plain = " ".join(user_agent.split())
    return plain if len(plain) <= SHOWN else f"{plain[: SHOWN - 1]}…"
