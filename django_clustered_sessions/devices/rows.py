"""Sessions as rows of a page."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from django.utils import timezone
from django.utils.formats import date_format
from django.utils.timesince import timesince
from django.utils.translation import gettext as _

from django_clustered_sessions.registry import SessionInfo
from django_clustered_sessions.session.client_info import Client

from .agents import readable


@dataclass(frozen=True)
class Row:
    """Session as a page shows it."""

    entry: SessionInfo

    @property
    def client(self) -> Client | None:
        """Return the client of the last use, else of the login; None if neither is known."""
        return self.entry.last or self.entry.first

    @cached_property
    def browser(self) -> str:
        """The browser's name, empty if unknown."""
        return readable(self.user_agent)

    @property
    def name(self) -> str:
        """The name that tells the session from others: its browser, else its times of use."""
        if self.browser:
            return self.browser
        if self.entry.is_current:
            return _("This device")
        created = date_format(timezone.localtime(self.entry.created))
        return _("Logged in on %(date)s, last seen %(seen)s") % {"date": created, "seen": self.seen}

    @property
    def user_agent(self) -> str:
        """The browser's User-Agent, empty if unknown."""
        return self.client.user_agent if self.client else ""

    @property
    def address(self) -> str:
        """The browser's IP address, empty if unknown."""
        return self.client.address if self.client else ""

    @property
    def seen(self) -> str:
        """Return in words how long ago the session was used."""
        ago_s = (datetime.now(UTC) - self.entry.last_seen).total_seconds()
        # The store's clock may be ahead of this node's.
        if self.entry.is_current or ago_s < 60:
            return _("just now")
        return _("%(span)s ago") % {"span": timesince(self.entry.last_seen, depth=1)}


def rows(entries: Iterable[SessionInfo]) -> list[Row]:
    """Return the rows of a list: the current session first, the others in the given order."""
    return [Row(entry) for entry in sorted(entries, key=lambda entry: not entry.is_current)]


def belongs_to(entry: SessionInfo, user: Any) -> bool:
    """Return whether a session belongs to a user."""
    return entry.user_id == str(user._meta.pk.value_to_string(user))
