"""Checks of each setting by itself: its name and its value."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from functools import cached_property
from ipaddress import ip_network
from typing import Any, Final, get_args

from django.conf import settings
from django.core.checks import CheckMessage, Error, Warning

from django_clustered_sessions.conf import (
    PREFIX,
    Locking,
    NearReads,
    Nonstop,
    OnConflict,
    OnSessionLimit,
    OnSyncShortfall,
    Settings,
    SignInMail,
)
from django_clustered_sessions.session.replication import SHARE

#: Bytes of a session are counted in 32 bits.
_MAX_BYTES: Final = 2**32 - 1

#: Answers and renewals take their time, so a shorter idle timeout would cut people off.
_SHORTEST_IDLE_S: Final = 2

#: A round trip has to fit into the least age of a session that is read without one; the longest is
#: that of an outage that nobody notices.
_SHORTEST_AGE_S: Final = 0.05
_LONGEST_AGE_S: Final = 60

#: Similarity to the prefix from which on a name is taken for one of this package's settings. It
#: leaves out CLUSTERED_CACHES_...
_LIKENESS: Final = 0.85

Rule = tuple[Callable[[Any], bool], str]


def _are_networks(value: object) -> bool:
    try:
        return isinstance(value, list | tuple) and all(
            isinstance(one, str) and ip_network(one, strict=False) for one in value
        )
    except ValueError:
        return False


def _is_old_engine(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"ENGINE", "CACHE"}
        and all(isinstance(name, str) for name in value.values())
    )


def _one_of(*allowed: str | None) -> Rule:
    return lambda value: value in allowed, "one of " + ", ".join(map(repr, allowed))


_SECONDS: Final[Rule] = (
    lambda value: _is_number(value) and value > 0,
    "a number of seconds above 0",
)

_COUNT: Final[Rule] = (
    lambda value: _is_number(value) and isinstance(value, int) and value >= 0,
    "a whole number, 0 or more",
)

_SWITCH: Final[Rule] = (lambda value: isinstance(value, bool), "True or False")

#: Rule of each setting: a test of its value, and the same in words.
RULES: Final[Mapping[str, Rule]] = {
    "KEY_PREFIX": (
        lambda value: isinstance(value, str) and bool(value) and not set(value) & set("{}"),
        "a string that is not empty and has no { or }",
    ),
    "ON_CONFLICT": _one_of(*get_args(OnConflict)),
    "STORE_TIMEOUT": _SECONDS,
    "MAX_BYTES": (
        lambda value: _is_number(value) and isinstance(value, int) and 0 < value <= _MAX_BYTES,
        f"a whole number of bytes from 1 to {_MAX_BYTES}",
    ),
    "ENCRYPTION_KEYS": (
        lambda value: isinstance(value, list | tuple),
        "a list or a tuple of keys",
    ),
    "IDLE_TIMEOUT": (
        lambda value: value is None or (_is_number(value) and value >= _SHORTEST_IDLE_S),
        f"None or a number of seconds, {_SHORTEST_IDLE_S} at least",
    ),
    "ABSOLUTE_TIMEOUT": (
        lambda value: value is None or (_is_number(value) and value > 0),
        "None or a number of seconds above 0",
    ),
    "MAX_SESSIONS_PER_USER": (
        lambda value: value is None or (_COUNT[0](value) and value > 0),
        "None or a whole number, 1 or more",
    ),
    "ON_SESSION_LIMIT": _one_of(*get_args(OnSessionLimit)),
    "TRACK_CLIENTS": _SWITCH,
    "TRUSTED_PROXIES": (
        lambda value: _COUNT[0](value) or _are_networks(value),
        "how many proxies, or a list with the network of each as a string",
    ),
    "SIGN_IN_MAIL": _one_of(*get_args(SignInMail)),
    "NEAR_CACHE_BYTES": _COUNT,
    "NEAR_READS": _one_of(*get_args(NearReads)),
    "NEAR_MAX_AGE": (
        lambda value: _is_number(value) and _SHORTEST_AGE_S <= value <= _LONGEST_AGE_S,
        f"a number of seconds from {_SHORTEST_AGE_S} to {_LONGEST_AGE_S}",
    ),
    "LOCKING": _one_of(*get_args(Locking)),
    "LOCK_WAIT": _SECONDS,
    "LOCK_LEASE": _SECONDS,
    "LOCK_MAX_HOLD": _SECONDS,
    "LOCK_MAX_WAITERS": _COUNT,
    "SYNC_REPLICAS": _COUNT,
    "SYNC_FSYNC": _SWITCH,
    "ON_SYNC_SHORTFALL": _one_of(*get_args(OnSyncShortfall)),
    "NONSTOP": _one_of(*get_args(Nonstop)),
    "MIGRATE_FROM": (
        lambda value: value is None or isinstance(value, str) or _is_old_engine(value),
        "None; the session engine that the site used before, as SESSION_ENGINE had it; or "
        '{"ENGINE": the same, "CACHE": what SESSION_CACHE_ALIAS was}',
    ),
    "MIGRATE_PICKLE": _SWITCH,
    "EVENTS_KEPT": _COUNT,
    "NODE_NAME": (
        lambda value: value is None or isinstance(value, str),
        "a string, or None for the name of the host",
    ),
}

#: Settings whose values no message shows.
_SECRET: Final = frozenset({"ENCRYPTION_KEYS"})

#: Settings of early versions, and what to do without each.
REMOVED: Final[Mapping[str, str]] = {
    "LOCK_PROCESS_WAITERS": f"Set {PREFIX}LOCK_MAX_WAITERS: an eighth of that, rounded up, may "
    "wait in one process.",
    "MIGRATE_CACHE": f"Name the cache in {PREFIX}MIGRATE_FROM: "
    '{"ENGINE": "django.contrib.sessions.backends.cache", "CACHE": "default"}.',
    "ON_LOCK_LOST": "Leave it out: a write under a lost lock always raises SessionLockLost.",
    "ON_READ_ONLY_CHANGE": "Leave it out: a change is an error under DEBUG, and otherwise a "
    "warning in the log.",
    "SYNC_TIMEOUT": f"Set {PREFIX}STORE_TIMEOUT: a write waits for {SHARE} of what is left of "
    "that.",
}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def unknown_names() -> Iterator[CheckMessage]:
    """Warn of settings that look like this package's and are none, a mistyped prefix included."""
    known = [PREFIX + name for name in names()]
    for name in dir(settings):
        is_like_ours = get_close_matches(name[: len(PREFIX)], [PREFIX], cutoff=_LIKENESS)
        if is_like_ours and name not in known:
            nearest = get_close_matches(name, known, n=1, cutoff=0.0)[0]
            yield Warning(
                f"There is no setting {name}; it has no effect.",
                hint=REMOVED.get(name.removeprefix(PREFIX)) or f"The nearest one is {nearest}.",
                id="clustered_sessions.W003",
            )


def names() -> list[str]:
    return [
        name.upper() for name, kind in vars(Settings).items() if isinstance(kind, cached_property)
    ]


def values_allowed() -> Iterator[CheckMessage]:
    """Refuse values that settings cannot have."""
    for name, (is_allowed, words) in RULES.items():
        if hasattr(settings, PREFIX + name):
            value = getattr(settings, PREFIX + name)
            if not is_allowed(value):
                shown = f"a {type(value).__name__}" if name in _SECRET else repr(value)
                yield Error(
                    f"{PREFIX}{name} is {shown}.",
                    hint=f"It has to be {words}.",
                    id="clustered_sessions.E003",
                )
