"""From where a session is used: the address and the browser of a request.

What a client says itself, such as ``X-Forwarded-For``, counts only as far as proxies of the site
have said it. ``python-ipware`` reads that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Self

from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed
from django.dispatch import receiver

from django_clustered_sessions.conf import PREFIX, conf

#: Longer ones are cut, in characters.
_LONGEST_ADDRESS: Final = 64
_LONGEST_AGENT: Final = 200

#: The peer of a unix socket is on this machine.
_HERE: Final = "127.0.0.1"
_HOPS: Final = "HOPS"


@dataclass(frozen=True, slots=True)
class Client:
    """From where a session was used: address and user agent, each empty where unknown.

    The user agent is what the browser said, 200 characters at most: good to recognise a device, and
    no proof of anything.
    """

    address: str
    user_agent: str

    @classmethod
    def of(cls, meta: Mapping[str, Any]) -> Self:
        """Return the client of a request by its ``META``."""
        agent = str(meta.get("HTTP_USER_AGENT", ""))[:_LONGEST_AGENT]
        printable = "".join(one if one.isprintable() else " " for one in agent)
        return cls(_address(meta)[:_LONGEST_ADDRESS], printable.strip())

    @classmethod
    def parse(cls, stored: bytes) -> Self | None:
        """Read what ``pack`` made, None for anything else."""
        try:
            address, agent = json.loads(stored)
            return cls(str(address), str(agent))
        except (TypeError, ValueError, RecursionError):
            return None

    def pack(self) -> bytes:
        """Return this as it is stored."""
        parts = [self.address, self.user_agent]
        text = json.dumps(parts, ensure_ascii=False, separators=(",", ":"))
        return text.encode("utf-8", "replace")


class _Proxies:
    """The proxies that CLUSTERED_SESSIONS_TRUSTED_PROXIES tells of."""

    @cached_property
    def reader(self) -> Any:
        """The reader of a request's hops, None where there are no proxies."""
        proxies = conf.trusted_proxies
        if not proxies:
            return None
        try:
            from python_ipware import IpWare
        except ImportError as error:
            raise ImproperlyConfigured(
                f"{PREFIX}TRUSTED_PROXIES needs python-ipware: install "
                "django-clustered-sessions[clients]."
            ) from error
        if isinstance(proxies, int):
            return IpWare(precedence=(_HOPS,), proxy_count=proxies)
        return IpWare(precedence=(_HOPS,), proxy_list=list(proxies))


proxies = _Proxies()


@receiver(setting_changed)
def _on_setting_changed(**kwargs: Any) -> None:
    vars(proxies).clear()


def _address(meta: Mapping[str, Any]) -> str:
    peer = str(meta.get("REMOTE_ADDR") or "")
    if proxies.reader is None:
        return peer
    # An open quotation mark of the client's would swallow what the proxies have added.
    forwarded = str(meta.get("HTTP_X_FORWARDED_FOR", "")).replace('"', "")
    # The last hop is the one that no client can forge.
    hops = {_HOPS: f"{forwarded},{peer or _HERE}"}
    address, is_trusted = proxies.reader.get_client_ip(hops)
    return str(address) if is_trusted else peer
