"""Checks of the settings: each by itself, and those that do not go together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from itertools import takewhile
from typing import Any, Final

from django.apps import AppConfig
from django.conf import settings
from django.contrib.sessions.middleware import SessionMiddleware
from django.core.checks import CheckMessage, Error, Warning
from django.core.exceptions import ImproperlyConfigured
from django.urls import NoReverseMatch, reverse
from django.utils.module_loading import import_string

from django_clustered_sessions import encryption
from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.conf import PREFIX, conf
from django_clustered_sessions.importing import old_engine
from django_clustered_sessions.middleware import ClusteredSessionMiddleware

from .entry import shared_database, store_entry
from .values import unknown_names, values_allowed

_OURS: Final = f"{ClusteredSessionMiddleware.__module__}.{ClusteredSessionMiddleware.__qualname__}"

#: Middlewares that look for a session before the view does. By their names: the module of one
#: cannot be imported where its app is not installed.
_NEED_A_SESSION: Final = frozenset(
    {
        "django.contrib.auth.middleware.AuthenticationMiddleware",
        "django.contrib.messages.middleware.MessageMiddleware",
    }
)


def check_settings(
    app_configs: Sequence[AppConfig] | None = None, **kwargs: Any
) -> list[CheckMessage]:
    """Check the settings; only SESSION_ENGINE and MIDDLEWARE while another engine is in use."""
    try:
        engine = _engine()
    except ImproperlyConfigured as error:
        return [
            Error(
                str(error),
                hint=f"This package's engine is '{SessionStore.__module__}'.",
                id="clustered_sessions.E008",
            )
        ]
    if not issubclass(engine, SessionStore):
        return list(_another_engine())
    wrong_values = list(values_allowed())
    return [
        *_middleware(),
        *unknown_names(),
        *wrong_values,
        *store_entry(buildable=not wrong_values),
        *shared_database(),
        *(
            []
            if wrong_values
            else [
                *_migrate_from(),
                *_idle_timeout(),
                *_locks(),
                *_nonstop(),
                *_near_reads(),
                *_proxies(),
                *_encryption(),
                *_sign_in_mail(),
            ]
        ),
        *_renewer(),
        *_serializer(),
    ]


def is_our_engine() -> bool:
    """Return whether SESSION_ENGINE is this package's, or one that is made of it."""
    try:
        return issubclass(_engine(), SessionStore)
    except ImproperlyConfigured:
        return False


def _engine() -> type[Any]:
    path = settings.SESSION_ENGINE
    try:
        found: type[Any] = import_module(_dotted(path)).SessionStore
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ImproperlyConfigured(
            f"SESSION_ENGINE is {path!r}, which is no session engine: {error}."
        ) from error
    return found


def _dotted(path: Any) -> str:
    """Return a setting's value that names a class. Raises ImportError for none that is text."""
    if not isinstance(path, str):
        raise ImportError(f"a {type(path).__name__} is no dotted path")
    return path


def _another_engine() -> Iterator[CheckMessage]:
    for path, cls in _middleware_classes().items():
        if issubclass(cls, ClusteredSessionMiddleware):
            yield Warning(
                f"MIDDLEWARE has {path}, and SESSION_ENGINE is {settings.SESSION_ENGINE!r}: "
                "nothing of this package is in use.",
                hint=f"Set SESSION_ENGINE = '{SessionStore.__module__}', or put "
                f"'{SessionMiddleware.__module__}.{SessionMiddleware.__qualname__}' in the "
                "middleware's place.",
                id="clustered_sessions.W020",
            )


def _middleware() -> Iterator[CheckMessage]:
    classes = _middleware_classes()
    found = {path: cls for path, cls in classes.items() if issubclass(cls, SessionMiddleware)}
    ours = [path for path, cls in found.items() if issubclass(cls, ClusteredSessionMiddleware)]
    if not found:
        yield Warning(
            "SESSION_ENGINE is django_clustered_sessions.backend, and MIDDLEWARE has no session "
            "middleware: requests have no session.",
            hint=f"Add '{_OURS}' to MIDDLEWARE, before AuthenticationMiddleware.",
            id="clustered_sessions.W001",
        )
    for path in found:
        if path in ours:
            continue
        if ours:
            yield Warning(
                f"MIDDLEWARE has both {path} and {ours[0]}: each gives a request a session of its "
                "own, and the inner one's is used.",
                hint=f"Take '{path}' out.",
                id="clustered_sessions.W002",
            )
        else:
            yield Warning(
                f"MIDDLEWARE has {path}. Under it a store that is away is an error 500 instead of "
                "a 503 with Retry-After, sliding expiry costs a round trip of its own instead of "
                "riding on the load, each request under ASGI takes a hop to a thread, a request "
                "whose session gets a new key meanwhile is an error 400, and no request is locked.",
                hint=f"Put '{_OURS}' in its place.",
                id="clustered_sessions.W002",
            )
    if found:
        yield from _before(next(iter(found)), classes)


def _before(session_middleware: str, classes: Mapping[str, type[Any]]) -> Iterator[CheckMessage]:
    for path in takewhile(lambda path: path != session_middleware, classes):
        if any(
            f"{cls.__module__}.{cls.__qualname__}" in _NEED_A_SESSION
            for cls in classes[path].__mro__
        ):
            yield Error(
                f"MIDDLEWARE has {path} before {session_middleware}: it finds no session, and "
                "every request is an error.",
                hint=f"Put '{session_middleware}' before it.",
                id="clustered_sessions.E009",
            )


def _middleware_classes() -> dict[str, type[Any]]:
    """Return the classes among MIDDLEWARE, in its order."""
    found: dict[str, type[Any]] = {}
    for path in settings.MIDDLEWARE:
        with suppress(ImportError):
            if isinstance(one := import_string(path), type):
                found[path] = one
    return found


def _idle_timeout() -> Iterator[CheckMessage]:
    idle, age = conf.idle_timeout, settings.SESSION_COOKIE_AGE
    if idle and idle > age:
        yield Warning(
            f"{PREFIX}IDLE_TIMEOUT ({idle} s) is larger than SESSION_COOKIE_AGE ({age} s), which "
            "ends every session before that.",
            hint="Raise SESSION_COOKIE_AGE, or leave the idle timeout out.",
            id="clustered_sessions.W005",
        )


def _migrate_from() -> Iterator[CheckMessage]:
    if not conf.migrate_from:
        return
    try:
        old_engine.engine()
    except old_engine.Pickled as error:
        yield Error(
            f"Sessions cannot be taken over: {error}.",
            hint=f"Set {PREFIX}MIGRATE_PICKLE = True if nobody but this site can write there, and "
            f"take it away with {PREFIX}MIGRATE_FROM; or name the cache in {PREFIX}MIGRATE_FROM, "
            '{"ENGINE": ..., "CACHE": ...}, if it is another one.',
            id="clustered_sessions.E006",
        )
    except ImproperlyConfigured as error:
        yield Error(
            f"Sessions cannot be taken over: {error}.",
            hint="Name the engine that the site used before, as SESSION_ENGINE had it, or "
            '{"ENGINE": the same, "CACHE": what SESSION_CACHE_ALIAS was}, and leave its settings '
            "and its app in place.",
            id="clustered_sessions.E005",
        )


def _locks() -> Iterator[CheckMessage]:
    if conf.lock_max_hold < conf.lock_lease:
        yield Error(
            f"{PREFIX}LOCK_MAX_HOLD ({conf.lock_max_hold} s) is shorter than {PREFIX}LOCK_LEASE "
            f"({conf.lock_lease} s).",
            hint="It has to be as long as the lease at least: a lease is renewed for so long.",
            id="clustered_sessions.E003",
        )
    if conf.locking != "off" and conf.lock_lease >= conf.lock_wait:
        yield Warning(
            f"{PREFIX}LOCK_LEASE ({conf.lock_lease} s) is not shorter than {PREFIX}LOCK_WAIT "
            f"({conf.lock_wait} s): where a process dies that holds a lock, the requests that wait "
            "for it give up before its lease ends.",
            hint="Make the lease shorter than the wait by a second or two.",
            id="clustered_sessions.W011",
        )


def _nonstop() -> Iterator[CheckMessage]:
    if conf.nonstop.startswith("local_reads") and not conf.near_cache_bytes:
        yield Error(
            f"{PREFIX}NONSTOP is {conf.nonstop!r}, and {PREFIX}NEAR_CACHE_BYTES is 0: there is "
            "nothing to read from while the store is away.",
            hint="Give the near cache some memory, or choose 'exception' or 'noop'.",
            id="clustered_sessions.E003",
        )


def _near_reads() -> Iterator[CheckMessage]:
    if conf.near_reads == "tracked" and not conf.near_cache_bytes:
        yield Error(
            f"{PREFIX}NEAR_READS is 'tracked', and {PREFIX}NEAR_CACHE_BYTES is 0: there is nothing "
            "to read from without a round trip.",
            hint="Give the near cache some memory, or leave NEAR_READS out.",
            id="clustered_sessions.E003",
        )


def _proxies() -> Iterator[CheckMessage]:
    if conf.trusted_proxies and find_spec("python_ipware") is None:
        yield Error(
            f"{PREFIX}TRUSTED_PROXIES needs python-ipware, which is not installed.",
            hint="Install django-clustered-sessions[clients].",
            id="clustered_sessions.E007",
        )


def _encryption() -> Iterator[CheckMessage]:
    for number, fault in encryption.faults(conf.encryption_keys):
        yield Error(
            f"{PREFIX}ENCRYPTION_KEYS: entry {number} {fault}.",
            hint="A key is 32 random bytes, as base64 or hexadecimal: python -c 'import secrets; "
            "print(secrets.token_urlsafe(32))'. The first entry may be 'plain'.",
            id="clustered_sessions.E011",
        )
    if conf.encryption_keys and find_spec("cryptography") is None:
        yield Error(
            f"{PREFIX}ENCRYPTION_KEYS needs cryptography, which is not installed.",
            hint="Install django-clustered-sessions[encryption].",
            id="clustered_sessions.E012",
        )


def _sign_in_mail() -> Iterator[CheckMessage]:
    if conf.sign_in_mail == "off":
        return
    try:
        reverse("clustered_sessions:end_sign_in", args=["link"])
    except NoReverseMatch:
        yield Warning(
            f"{PREFIX}SIGN_IN_MAIL is {conf.sign_in_mail!r}, and ROOT_URLCONF has no page for the "
            "link in the mail: none is sent.",
            hint="Add path('sessions/', include('django_clustered_sessions.urls')).",
            id="clustered_sessions.W023",
        )
    if conf.sign_in_mail == "new" and not conf.track_clients:
        yield Warning(
            f"{PREFIX}SIGN_IN_MAIL is 'new', and {PREFIX}TRACK_CLIENTS is off: no session says of "
            "which browser it is, so there is a mail for each login.",
            hint=f"Set {PREFIX}TRACK_CLIENTS = True, or SIGN_IN_MAIL = 'all' if that is wanted.",
            id="clustered_sessions.W024",
        )


def _renewer() -> Iterator[CheckMessage]:
    try:
        uwsgi = import_module("uwsgi")
    except ImportError:
        return
    # Not its options: later releases have threads by default.
    if not getattr(uwsgi, "has_threads", True):
        yield Warning(
            "This uWSGI has no support for Python's threads: no thread renews the leases of locks, "
            f"and a request that holds one for longer than {PREFIX}LOCK_LEASE may lose it.",
            hint="Set enable-threads = true in uWSGI's configuration.",
            id="clustered_sessions.W012",
        )


def _serializer() -> Iterator[CheckMessage]:
    path = settings.SESSION_SERIALIZER
    try:
        serializer = import_string(_dotted(path))()
        for value in ("x", 1, ["x", 1], None):
            stored = serializer.dumps(value)
            if not isinstance(stored, bytes) or serializer.loads(stored) != value:
                raise TypeError(f"{value!r} does not come back as it was")
    except (ImportError, ImproperlyConfigured) as error:
        yield Error(
            f"SESSION_SERIALIZER {path} cannot be imported: {error}",
            hint="Correct the name, or install what it needs.",
            id="clustered_sessions.E004",
        )
    except Exception as error:
        yield Error(
            f"SESSION_SERIALIZER {path} cannot take single values: {type(error).__name__}: {error}",
            hint="Each key of a session is serialised by itself: dumps() has to take any value, "
            "not only a dict, and return bytes that loads() reads.",
            id="clustered_sessions.E004",
        )
