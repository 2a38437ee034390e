"""Settings, read when they are first used, and anew after ``override_settings``."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from functools import cache, cached_property
from math import ceil
from typing import Any, Literal, cast

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed
from django.dispatch import receiver

PREFIX = "CLUSTERED_SESSIONS_"

OnConflict = Literal["merge", "overwrite", "error"]
Locking = Literal["off", "write", "all"]
OnSyncShortfall = Literal["error", "warn"]
OnSessionLimit = Literal["end_oldest", "refuse"]
NearReads = Literal["checked", "tracked"]
SignInMail = Literal["off", "new", "all"]
Nonstop = Literal["exception", "noop", "local_reads", "local_reads_exception_on_write"]

_host_name = cache(socket.gethostname)


def _read(name: str, default: Any) -> Any:
    return getattr(settings, PREFIX + name, default)


class Settings:
    """Settings of this package, with their names, types and defaults.

    Each cached property ``x`` is the setting ``CLUSTERED_SESSIONS_X``; ``docs/settings.md`` says
    what each one does, and a test holds that page to this class. The plain properties follow from
    these. A setting is read once, and again after a change: each request asks a dozen times.
    """

    @cached_property
    def key_prefix(self) -> str:
        """First part of every key in the store."""
        return cast(str, _read("KEY_PREFIX", "session"))

    @cached_property
    def on_conflict(self) -> OnConflict:
        """Outcome where two requests changed one session key."""
        return cast(OnConflict, _read("ON_CONFLICT", "merge"))

    @cached_property
    def store_timeout(self) -> float:
        """Seconds that all store operations of one request may take together."""
        return float(_read("STORE_TIMEOUT", 2.0))

    @cached_property
    def max_bytes(self) -> int:
        """Largest session, in stored bytes."""
        return cast(int, _read("MAX_BYTES", 1024 * 1024))

    @cached_property
    def encryption_keys(self) -> Sequence[str]:
        """Keys with which values are encrypted in the store: the first one writes, all read."""
        return cast("Sequence[str]", _read("ENCRYPTION_KEYS", ()))

    @cached_property
    def idle_timeout(self) -> float | None:
        """Seconds without a request after which a session ends, or None."""
        return cast("float | None", _read("IDLE_TIMEOUT", None))

    @cached_property
    def absolute_timeout(self) -> float | None:
        """Seconds after which a session ends, however much it is used, or None."""
        return cast("float | None", _read("ABSOLUTE_TIMEOUT", None))

    @cached_property
    def max_sessions_per_user(self) -> int | None:
        """Most sessions in which a user may be logged in, or None."""
        return cast("int | None", _read("MAX_SESSIONS_PER_USER", None))

    @cached_property
    def on_session_limit(self) -> OnSessionLimit:
        """Outcome where a user logs in once more than that."""
        return cast(OnSessionLimit, _read("ON_SESSION_LIMIT", "end_oldest"))

    @cached_property
    def track_clients(self) -> bool:
        """Switch for keeping the addresses and user agents that use a session."""
        return cast(bool, _read("TRACK_CLIENTS", False))

    @cached_property
    def trusted_proxies(self) -> int | Sequence[str]:
        """The site's proxies: their number, or the network of each."""
        return cast("int | Sequence[str]", _read("TRUSTED_PROXIES", 0))

    @cached_property
    def sign_in_mail(self) -> SignInMail:
        """Logins of which their owner is told by mail."""
        return cast(SignInMail, _read("SIGN_IN_MAIL", "off"))

    @cached_property
    def near_cache_bytes(self) -> int:
        """Bytes of sessions that each process keeps at hand."""
        return cast(int, _read("NEAR_CACHE_BYTES", 16 * 1024 * 1024))

    @cached_property
    def near_reads(self) -> NearReads:
        """Proof that a session at hand is the store's: asked for by each read, or tracked."""
        return cast(NearReads, _read("NEAR_READS", "checked"))

    @cached_property
    def near_max_age(self) -> float:
        """Seconds within which a session that is read without a trip was the store's."""
        return float(_read("NEAR_MAX_AGE", 0.5))

    @cached_property
    def locking(self) -> Locking:
        """Requests that take their session's lock: none, those that write, or all."""
        return cast(Locking, _read("LOCKING", "off"))

    @cached_property
    def lock_wait(self) -> float:
        """Seconds that a request waits for a lock."""
        return float(_read("LOCK_WAIT", 10.0))

    @cached_property
    def lock_lease(self) -> float:
        """Seconds that a holder keeps its lock after it was last heard of."""
        return float(_read("LOCK_LEASE", 8.0))

    @cached_property
    def lock_max_hold(self) -> float:
        """Seconds that a lock's lease is renewed for."""
        return float(_read("LOCK_MAX_HOLD", 120.0))

    @cached_property
    def lock_max_waiters(self) -> int:
        """Most requests that may wait for one session's lock."""
        return cast(int, _read("LOCK_MAX_WAITERS", 16))

    @property
    def lock_process_waiters(self) -> int:
        """Most requests of one process that may wait for one session's lock."""
        return ceil(self.lock_max_waiters / 8)

    @cached_property
    def sync_replicas(self) -> int:
        """Number of replicas that have to acknowledge a write."""
        return cast(int, _read("SYNC_REPLICAS", 0))

    @cached_property
    def sync_fsync(self) -> bool:
        """Switch for waiting until a write is on disk."""
        return cast(bool, _read("SYNC_FSYNC", False))

    @cached_property
    def on_sync_shortfall(self) -> OnSyncShortfall:
        """Outcome where too few replicas have acknowledged a write."""
        return cast(OnSyncShortfall, _read("ON_SYNC_SHORTFALL", "error"))

    @cached_property
    def nonstop(self) -> Nonstop:
        """Behaviour of a request while the store is away."""
        return cast(Nonstop, _read("NONSTOP", "exception"))

    @cached_property
    def migrate_from(self) -> str | None:
        """Session engine that unknown sessions are taken over from."""
        setting = _read("MIGRATE_FROM", None)
        if isinstance(setting, dict) and "ENGINE" not in setting:
            raise ImproperlyConfigured(
                f'{PREFIX}MIGRATE_FROM has no "ENGINE": name the session engine that the site used '
                "before, as SESSION_ENGINE had it."
            )
        return cast("str | None", setting["ENGINE"] if isinstance(setting, dict) else setting)

    @property
    def migrate_cache(self) -> str | None:
        """Entry of CACHES that this engine uses, or None for SESSION_CACHE_ALIAS."""
        setting = _read("MIGRATE_FROM", None)
        return cast("str | None", setting.get("CACHE") if isinstance(setting, dict) else None)

    @cached_property
    def migrate_pickle(self) -> bool:
        """Switch for taking over sessions that are stored as pickles."""
        return cast(bool, _read("MIGRATE_PICKLE", False))

    @cached_property
    def events_kept(self) -> int:
        """Most events that wait to be handled; 0 turns events off."""
        return cast(int, _read("EVENTS_KEPT", 0))

    @cached_property
    def node_name(self) -> str:
        """Name of this machine in statistics and errors."""
        return cast(str, _read("NODE_NAME", None)) or _host_name()


class SiteSettings:
    """Settings of Django's, each as ``settings`` has it now, however it was changed.

    To ask ``settings`` costs as much as ten calls of a function, and each request asks often. So
    this shares the dict in which ``settings`` keeps what it was asked for.
    """

    def __init__(self) -> None:
        self.__dict__ = vars(settings)

    def __getattr__(self, name: str) -> Any:
        return getattr(settings, name)


conf = Settings()
site = SiteSettings()


@receiver(setting_changed)
def _on_setting_changed(*, setting: str, **kwargs: Any) -> None:
    if setting.startswith(PREFIX):
        vars(conf).clear()
