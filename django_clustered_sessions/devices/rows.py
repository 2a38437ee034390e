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
    """One session as a page shows it."""

    entry: SessionInfo

    @property
    def client(self) -> Client | None:
        """Return what is known of the browser, as it was last or else first; None: nothing."""
        return self.entry.last or self.entry.first

    @cached_property
    def browser(self) -> str:
        """The browser by its name, empty where it is not known."""
        return readable(self.user_agent)

    @property
    def name(self) -> str:
        """What tells it from the others: its browser, else when it was used."""
        if self.browser:
            return self.browser
        if self.entry.is_current:
            return _("This device")
        created = date_format(timezone.localtime(self.entry.created))
        return _("Logged in on %(date)s, last seen %(seen)s") % {"date": created, "seen": self.seen}

    @property
    def user_agent(self) -> str:
        """The browser in its own words, empty where they are not known."""
        return self.client.user_agent if self.client else ""

    @property
    def address(self) -> str:
        """The browser's address, empty where it is not known."""
        return self.client.address if self.client else ""

    @property
    def seen(self) -> str:
        """Return how long ago it was used, in words."""
        ago_s = (datetime.now(UTC) - self.entry.last_seen).total_seconds()
        # The store's clock may be ahead of this node's.
        if self.entry.is_current or ago_s < 60:
            return _("just now")
        return _("%(span)s ago") % {"span": timesince(self.entry.last_seen, depth=1)}


def rows(entries: Iterable[SessionInfo]) -> list[Row]:
    """Return what a list shows: the session in use first, the others as they come."""
    return [Row(entry) for entry in sorted(entries, key=lambda entry: not entry.is_current)]


def belongs_to(entry: SessionInfo, user: Any) -> bool:
    """Tell whether a session is that user's, who may be a user object."""
    return entry.user_id == str(user._meta.pk.value_to_string(user))
