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

#: Names of browsers and systems that are in the parser, and are no part of the User-Agent: of some,
#: such as ``<anything>Bot/1``, it takes the name from there.
USUAL: Final = frozenset(
    {
        "Amazon Silk",
        "Android",
        "Chrome",
        "Chrome Mobile",
        "Chrome Mobile iOS",
        "Chrome Mobile WebView",
        "Chrome OS",
        "Chromium",
        "Debian",
        "DuckDuckGo",
        "DuckDuckGo Mobile",
        "Edge",
        "Edge Mobile",
        "Epiphany",
        "Facebook",
        "Fedora",
        "Firefox",
        "Firefox iOS",
        "Firefox Mobile",
        "FreeBSD",
        "HarmonyOS",
        "HeadlessChrome",
        "IE",
        "Instagram",
        "iOS",
        "Linux",
        "Mac OS X",
        "Mobile Safari",
        "Mobile Safari UI/WKWebView",
        "NetBSD",
        "OpenBSD",
        "Opera",
        "Opera Mini",
        "Opera Mobile",
        "QQ Browser",
        "QQ Browser Mobile",
        "Safari",
        "Samsung Internet",
        "Tizen",
        "Ubuntu",
        "UC Browser",
        "Vivaldi",
        "Windows",
        "Windows Phone",
        "Yandex Browser",
    }
)


def readable(user_agent: str) -> str:
    """Return the ``name`` of a browser; if it has none, the User-Agent, cut to SHOWN characters."""
    plain = " ".join(user_agent.split())
    return name(user_agent) or (plain if len(plain) <= SHOWN else f"{plain[: SHOWN - 1]}…")


def name(user_agent: str) -> str:
    """Return a browser's name and system by its User-Agent, such as ``Firefox on Linux``.

    It is empty for a User-Agent that the parser does not know, and without the extra "devices".
    It may have words of the User-Agent, which is anybody's text.
    """
    return _joined(*_parsed(user_agent))


def usual_name(user_agent: str) -> str:
    """Return the ``name`` of a browser, without words of the User-Agent's own: the USUAL alone."""
    return _joined(*(one if one in USUAL else "" for one in _parsed(user_agent)))


def _parsed(user_agent: str) -> tuple[str, str]:
    """Return the names of browser and system, empty where they are not known."""
    known = parse_agent(user_agent[:LONGEST]) if parse_agent else None
    if known is None:
        return "", ""
    return known.user_agent.family if known.user_agent else "", known.os.family if known.os else ""


def _joined(browser: str, system: str) -> str:
    if browser and system:
        return _("%(browser)s on %(system)s") % {"browser": browser, "system": system}
    return browser or system
