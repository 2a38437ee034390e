"""Readable names of browsers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from django.utils.translation import gettext as _

parse_agent: Callable[[str], Any] | None
try:
    from ua_parser import parse
except ImportError:
    # Without the extra "devices" the User-Agent is shown unparsed.
    parse_agent = None
else:
    parse_agent = parse

#: Characters of a User-Agent that are parsed; no real browser sends more.
LONGEST: Final = 512

#: Characters shown of a User-Agent that the parser does not know.
SHOWN: Final = 60


def readable(user_agent: str) -> str:
    """Return a browser's name and system by its User-Agent, such as ``Firefox on Linux``.

    An unknown User-Agent is returned as it is, cut to SHOWN characters; an empty one is empty.
    """
    known = parse_agent(user_agent[:LONGEST]) if parse_agent else None
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
