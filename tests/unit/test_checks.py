"""Each system check: raised once, and silent where all is well; a store answers in tests/store."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from django.contrib.auth.middleware import AuthenticationMiddleware
from django.contrib.sessions.middleware import SessionMiddleware
from django.contrib.sessions.serializers import JSONSerializer
from django.core.checks import CheckMessage
from django.core.management import call_command
from django.urls import include, path

from django_clustered_sessions.checks import settings as settings_checks
from django_clustered_sessions.checks import store as store_checks
from django_clustered_sessions.checks.settings import check_settings
from django_clustered_sessions.checks.store import check_store
from django_clustered_sessions.checks.values import REMOVED, RULES, names
from django_clustered_sessions.conf import PREFIX
from django_clustered_sessions.monitoring.server_info import Refused, StoreFacts
from django_clustered_sessions.store import connections
from django_clustered_sessions.store.entries import django_redis
from tests.conftest import use_store

OURS = "django_clustered_sessions.middleware.ClusteredSessionMiddleware"
DJANGOS = "django.contrib.sessions.middleware.SessionMiddleware"
AUTHENTICATION = "django.contrib.auth.middleware.AuthenticationMiddleware"
MESSAGES = "django.contrib.messages.middleware.MessageMiddleware"
LOCATION = "redis://127.0.0.1:6379/1"
REDIS = "django_redis.cache.RedisCache"
SENTINEL = "django_redis.pool.SentinelConnectionFactory"


class SomebodysMiddleware(SessionMiddleware):
    pass


class SomebodysUser(AuthenticationMiddleware):
    pass


def plain(get_response: Any) -> Any:
    return get_response


class DictsOnly(JSONSerializer):
    def dumps(self, obj: Any) -> bytes:
        return super().dumps(dict(obj))


class Text:
    def dumps(self, obj: Any) -> str:
        return repr(obj)

    def loads(self, data: str) -> Any:
        return eval(data)


class Forgetful(JSONSerializer):
    def loads(self, data: bytes) -> Any:
        return str(super().loads(data))


def entry(location: Any = LOCATION, **options: Any) -> dict[str, Any]:
    return {"sessions": {"BACKEND": REDIS, "LOCATION": location, "OPTIONS": options}}


def beside(location: Any, backend: str = REDIS, **options: Any) -> dict[str, Any]:
    return {**entry(), "pages": {"BACKEND": backend, "LOCATION": location, "OPTIONS": options}}


DJANGOS_REDIS = "django.core.cache.backends.redis.RedisCache"
LOCMEM_BACKEND = "django.core.cache.backends.locmem.LocMemCache"
LOCMEM = {"default": {"BACKEND": LOCMEM_BACKEND}}

#: Values that each setting refuses, whatever the others are.
WRONG: dict[str, tuple[Any, ...]] = {
    "KEY_PREFIX": ("", 1, None, "a{b}"),
    "ON_CONFLICT": ("Merge", None, ["merge"]),
    "STORE_TIMEOUT": (0, -1, "2", None, float("nan")),
    "MAX_BYTES": (0, 1.5, "1 MiB", None, True, 2**32),
    "ENCRYPTION_KEYS": ("0f" * 32, None, {}),
    "IDLE_TIMEOUT": (0, 1, "600", float("inf")),
    "ABSOLUTE_TIMEOUT": (0, -1, "600", True, float("inf")),
    "MAX_SESSIONS_PER_USER": (0, -1, True, "3", 1.0),
    "ON_SESSION_LIMIT": ("end", None, True),
    "TRACK_CLIENTS": (1, "yes", None),
    "TRUSTED_PROXIES": (-1, True, None, 1.0, "10.0.0.1", ["proxy"], [""], ["10.1."], [10]),
    "SIGN_IN_MAIL": (True, None, "New", "on"),
    "NEAR_CACHE_BYTES": (-1, None, "16 MiB", 1.5),
    "NEAR_READS": (True, None, "Tracked"),
    "NEAR_MAX_AGE": (0, 0.01, 61, None, "0.5", float("nan")),
    "LOCKING": ("on", True, None, ["all"]),
    "LOCK_WAIT": (0, -1, "10", None, True, float("inf")),
    "LOCK_LEASE": (0, -1, "10", None, True, float("inf")),
    "LOCK_MAX_HOLD": (0, -1, "10", None, True, float("inf")),
    "LOCK_MAX_WAITERS": (-1, 1.5, "2", None, False),
    "SYNC_REPLICAS": (-1, 1.5, "1", None, True),
    "SYNC_FSYNC": (1, "yes", None),
    "ON_SYNC_SHORTFALL": ("log", None),
    "NONSTOP": ("localReads", None, True, ["noop"]),
    "MIGRATE_FROM": (
        7,
        {},
        {"CACHE": "default"},
        {"ENGINE": "django.contrib.sessions.backends.cache", "CACHE": None},
        {"ENGINE": "django.contrib.sessions.backends.cache", "ALIAS": "default"},
    ),
    "MIGRATE_PICKLE": (1, "yes", None),
    "EVENTS_KEPT": (-1, 1.5, "2", None, False),
    "NODE_NAME": (7,),
}

RAISED = [
    ("E001", {"SESSION_CACHE_ALIAS": "nowhere"}),
    ("E001", {"SESSION_CACHE_ALIAS": "default"}),
    ("E001", {"CACHES": entry("127.0.0.1:6379")}),
    ("E001", {"CACHES": entry("redis://:secret/x@127.0.0.1/1")}),
    ("E001", {"CACHES": entry("redis://name/1", CONNECTION_FACTORY=SENTINEL)}),
    ("E002", {"CACHES": entry(CONNECTION_FACTORY="site.Factory")}),
    ("E002", {"DJANGO_REDIS_CONNECTION_FACTORY": "site.Factory", "CACHES": entry()}),
    ("E002", {"CACHES": entry(CONNECTION_POOL_CLASS="site.Pool")}),
    ("E002", {"CACHES": entry(REDIS_CLIENT_CLASS="redis.cluster.RedisCluster")}),
    ("E002", {"CACHES": entry(PARSER_CLASS="site.Parser")}),
    ("E002", {"CACHES": entry(CLIENT_CLASS="django_redis.client.ShardClient")}),
    ("E002", {"CACHES": entry(CONNECTION_POOL_KWARGS={"connection_class": "site.Connection"})}),
    *(
        ("E003", {PREFIX + "NONSTOP": value, PREFIX + "NEAR_CACHE_BYTES": 0})
        for value in ("local_reads", "local_reads_exception_on_write")
    ),
    ("E003", {PREFIX + "NEAR_READS": "tracked", PREFIX + "NEAR_CACHE_BYTES": 0}),
    ("E003", {PREFIX + "LOCK_MAX_HOLD": 7.9}),
    ("E003", {PREFIX + "LOCK_LEASE": 121, PREFIX + "LOCK_WAIT": 200}),
    *(
        ("E004", {"SESSION_SERIALIZER": f"{__name__}.{name}"})
        for name in ("DictsOnly", "Text", "Forgetful", "NoSuchClass")
    ),
    ("E008", {"SESSION_ENGINE": "django_clustered_sessions.backends"}),
    ("E008", {"SESSION_ENGINE": "no.such.engine", "MIDDLEWARE": []}),
    ("E008", {"SESSION_ENGINE": "json"}),
    ("E008", {"SESSION_ENGINE": ""}),
    ("E008", {"SESSION_ENGINE": 7}),
    ("E004", {"SESSION_SERIALIZER": None}),
    ("E009", {"MIDDLEWARE": [AUTHENTICATION, OURS]}),
    ("E009", {"MIDDLEWARE": [f"{__name__}.SomebodysUser", OURS, AUTHENTICATION]}),
    ("E009", {"MIDDLEWARE": ["no.such.Middleware", MESSAGES, OURS, AUTHENTICATION]}),
    ("W020", {"SESSION_ENGINE": "django.contrib.sessions.backends.db"}),
    ("W001", {"MIDDLEWARE": []}),
    ("W001", {"MIDDLEWARE": [AUTHENTICATION]}),
    ("W001", {"MIDDLEWARE": ["no.such.Middleware"]}),
    ("W002", {"MIDDLEWARE": [DJANGOS]}),
    ("W002", {"MIDDLEWARE": [OURS, DJANGOS]}),
    ("W002", {"MIDDLEWARE": [f"{__name__}.SomebodysMiddleware"]}),
    ("W003", {PREFIX + "MAXBYTES": 1}),
    ("W003", {"CLUSTERED_SESSION_LOCKING": "all"}),
    ("W003", {"CLUSTERD_SESSIONS_LOCKING": "all"}),
    ("W003", {"CLUSTER_SESSIONS_LOCKING": "all"}),
    ("W004", {"CACHES": beside(LOCATION)}),
    ("W004", {"CACHES": beside("redis://localhost/1")}),
    ("W004", {"CACHES": beside(["redis://127.0.0.1/0?db=1", "redis://replica/1"])}),
    ("W004", {"CACHES": beside("redis://127.0.0.1", DJANGOS_REDIS, db=1)}),
    ("W004", {"CACHES": beside(LOCATION, DJANGOS_REDIS)}),
    ("W004", {"CACHES": {"default": entry()["sessions"]}, "SESSION_CACHE_ALIAS": "default"}),
    (
        "W004",
        {
            "CACHES": {
                **entry("unix:///run/store.sock?db=1"),
                "pages": {"BACKEND": REDIS, "LOCATION": "unix:///run/store.sock?db=1"},
            }
        },
    ),
    ("W005", {PREFIX + "IDLE_TIMEOUT": 601, "SESSION_COOKIE_AGE": 600}),
    ("W011", {PREFIX + "LOCKING": "all", PREFIX + "LOCK_LEASE": 10}),
    ("W011", {PREFIX + "LOCKING": "write", PREFIX + "LOCK_WAIT": 7.5}),
    *(
        ("E005", {PREFIX + "MIGRATE_FROM": name})
        for name in (
            "django_clustered_sessions.backend",
            "no.such.engine",
            "no spaces",
            ".relative",
            "json",
        )
    ),
    (
        "E005",
        {
            PREFIX + "MIGRATE_FROM": {
                "ENGINE": "django.contrib.sessions.backends.cache",
                "CACHE": "nowhere",
            },
        },
    ),
    *(
        ("E006", {PREFIX + "MIGRATE_FROM": old})
        for old in (
            "django.contrib.sessions.backends.cache",
            {"ENGINE": "django.contrib.sessions.backends.cache", "CACHE": "default"},
        )
    ),
]

SILENT = [
    *(
        {PREFIX + "MIGRATE_FROM": f"django.contrib.sessions.backends.{name}"}
        for name in ("db", "cached_db", "file", "signed_cookies")
    ),
    {
        PREFIX + "MIGRATE_FROM": "django.contrib.sessions.backends.cache",
        PREFIX + "MIGRATE_PICKLE": True,
    },
    {},
    {"SESSION_ENGINE": "django.contrib.sessions.backends.cache", "MIDDLEWARE": []},
    {"SESSION_ENGINE": "django.contrib.sessions.backends.cache", "MIDDLEWARE": [DJANGOS]},
    {"MIDDLEWARE": [f"{__name__}.plain", OURS, AUTHENTICATION, MESSAGES]},
    {"CLUSTERED_CACHES_URL": "redis://127.0.0.1", "SESSION_LIMIT": 7},
    {"CACHES": entry(["redis://127.0.0.1/1", "redis://replica/1"])},
    {"CACHES": entry("redis://name/1", CONNECTION_FACTORY=SENTINEL, SENTINELS=[("127.0.0.1", 1)])},
    {"CACHES": entry(CONNECTION_POOL_CLASS="redis.BlockingConnectionPool")},
    {"CACHES": entry(REDIS_CLIENT_CLASS="redis.client.Redis")},
    {"CACHES": entry(PARSER_CLASS="redis.connection.HiredisParser")},
    {"CACHES": entry(CLIENT_CLASS="django_redis.client.DefaultClient")},
    {"CACHES": beside("redis://127.0.0.1:6379/2")},
    {"CACHES": beside("redis://127.0.0.1:6380/1")},
    {"CACHES": beside("redis://elsewhere/1")},
    {"CACHES": beside("unix:///run/store.sock?db=1")},
    {"CACHES": beside("redis://:pass:word@127.0.0.1/x")},
    {"CACHES": beside("/var/cache/pages", "django.core.cache.backends.filebased.FileBasedCache")},
    {PREFIX + "IDLE_TIMEOUT": 600, "SESSION_COOKIE_AGE": 600},
    {PREFIX + "KEY_PREFIX": "shop:session", PREFIX + "NODE_NAME": None},
    {PREFIX + "STORE_TIMEOUT": 0.5, PREFIX + "MAX_BYTES": 1, PREFIX + "ON_CONFLICT": "error"},
    {"SESSION_SERIALIZER": "django.contrib.sessions.serializers.JSONSerializer"},
    *({PREFIX + "LOCKING": value} for value in ("off", "write", "all")),
    {PREFIX + "LOCKING": "off", PREFIX + "LOCK_LEASE": 10},
    {PREFIX + "LOCK_LEASE": 0.5, PREFIX + "LOCK_MAX_HOLD": 0.5},
    {PREFIX + "NEAR_CACHE_BYTES": 0},
    {PREFIX + "SYNC_REPLICAS": 2, PREFIX + "SYNC_FSYNC": True},
    *({PREFIX + "ON_SYNC_SHORTFALL": value} for value in ("error", "warn")),
    {PREFIX + "LOCK_MAX_WAITERS": 0},
]


def ids(messages: list[CheckMessage]) -> list[str]:
    return [message.id.removeprefix("clustered_sessions.") for message in messages if message.id]


def configure(settings: Any, changed: dict[str, Any]) -> None:
    for name, value in changed.items():
        setattr(settings, name, value)


@pytest.mark.parametrize("name", WRONG)
def test_setting_refuses_wrong_values(name: str, settings: Any) -> None:
    for value in WRONG[name]:
        configure(settings, {PREFIX + name: value})
        (message,) = check_settings()
        shown = f"a {type(value).__name__}" if name == "ENCRYPTION_KEYS" else repr(value)
        assert (ids([message]), message.msg) == (["E003"], f"{PREFIX}{name} is {shown}.")
        assert message.hint


@pytest.mark.parametrize(("id_", "changed"), RAISED)
def test_wrong_settings_raise_one_message(id_: str, changed: dict[str, Any], settings: Any) -> None:
    configure(settings, changed)
    messages = check_settings()
    assert ids(messages) == [id_]
    assert all(message.hint for message in messages)
    assert "secret" not in str(messages)


@pytest.mark.parametrize("changed", SILENT)
def test_right_settings_raise_nothing(changed: dict[str, Any], settings: Any) -> None:
    configure(settings, changed)
    assert check_settings() == []


@pytest.mark.parametrize(
    ("uwsgi", "expected"), [({"has_threads": 0}, ["W012"]), ({"has_threads": 1}, []), ({}, [])]
)
def test_uwsgi_needs_threads(
    uwsgi: dict[str, int], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uwsgi", SimpleNamespace(**uwsgi))
    messages = check_settings()
    assert ids(messages) == expected
    assert all(message.hint for message in messages)


def test_trusted_proxies_need_a_library(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for proxies in (1, ["10.0.0.0/8", "2001:db8::1"], ("10.0.0.5",)):
        settings.CLUSTERED_SESSIONS_TRUSTED_PROXIES = proxies
        assert check_settings() == []
    monkeypatch.setattr(settings_checks, "find_spec", lambda name: None)
    messages = check_settings()
    assert ids(messages) == ["E007"]
    assert all(message.hint for message in messages)


KEY, OTHER_KEY = "0f" * 32, "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVowMTIzNDU="


@pytest.mark.parametrize(
    "keys",
    [
        [KEY],
        (OTHER_KEY, KEY.upper()),
        [OTHER_KEY.rstrip("="), KEY],
        ["plain", KEY],
        ["plain"],
    ],
)
def test_keys_are_base64_or_hexadecimal(keys: Any, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_ENCRYPTION_KEYS = keys
    assert check_settings() == []


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["", KEY], "entry 1 is 0 bytes when decoded, and not 32"),
        ([KEY[:62]], "entry 1 is 46 bytes when decoded, and not 32"),
        ([KEY, "secret secret!"], "entry 2 is neither base64 nor hexadecimal"),
        ([KEY, OTHER_KEY, KEY.upper()], "entry 3 is the same as entry 1"),
        ([KEY, "plain"], "entry 2 is neither base64 nor hexadecimal"),
        ([KEY.encode()], "entry 1 is no string but bytes"),
        ([None, KEY], "entry 1 is no string but NoneType"),
    ],
)
def test_wrong_keys_are_named_by_their_number(keys: Any, words: str, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_ENCRYPTION_KEYS = keys
    (message,) = check_settings()
    assert (ids([message]), message.msg) == (["E011"], f"{PREFIX}ENCRYPTION_KEYS: {words}.")
    assert not any(str(key) in str(message) for key in keys if key and key != "plain")


def test_encryption_needs_a_library(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings.CLUSTERED_SESSIONS_ENCRYPTION_KEYS = [KEY]
    monkeypatch.setattr(settings_checks, "find_spec", lambda name: None)
    (message,) = check_settings()
    assert ids([message]) == ["E012"]
    assert "[encryption]" in (message.hint or "")


def test_mail_about_sign_ins_needs_its_page_and_clients(settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_SIGN_IN_MAIL = "new"
    no_page, no_clients = check_settings()
    assert ids([no_page, no_clients]) == ["W023", "W024"]
    assert "include('django_clustered_sessions.urls')" in (no_page.hint or "")
    assert "CLUSTERED_SESSIONS_TRACK_CLIENTS = True" in (no_clients.hint or "")
    settings.ROOT_URLCONF = (path("", include("django_clustered_sessions.urls")),)
    settings.CLUSTERED_SESSIONS_TRACK_CLIENTS = True
    assert check_settings() == []
    settings.CLUSTERED_SESSIONS_TRACK_CLIENTS = False
    settings.CLUSTERED_SESSIONS_SIGN_IN_MAIL = "all"
    assert check_settings() == []


MSGSPEC = "django_clustered_sessions.serializers.MsgspecSerializer"

#: What a message says, in one line: what is wrong, and what to do about it.
WORDS: dict[str, tuple[dict[str, Any], str, str]] = {
    "engine": (
        {"SESSION_ENGINE": "django_clustered_sessions.backends"},
        "SESSION_ENGINE is 'django_clustered_sessions.backends', which is no session engine",
        "'django_clustered_sessions.backend'",
    ),
    "another engine": (
        {"SESSION_ENGINE": "django.contrib.sessions.backends.db"},
        "SESSION_ENGINE is 'django.contrib.sessions.backends.db': nothing of this package",
        "Set SESSION_ENGINE = 'django_clustered_sessions.backend'",
    ),
    "behind": ({"MIDDLEWARE": [AUTHENTICATION, OURS]}, f"{AUTHENTICATION} before {OURS}", OURS),
    "behind Django's": (
        {"MIDDLEWARE": [AUTHENTICATION, DJANGOS]},
        f"{AUTHENTICATION} before {DJANGOS}",
        f"Put '{DJANGOS}' before it",
    ),
    "both": ({"MIDDLEWARE": [OURS, DJANGOS]}, f"both {DJANGOS} and {OURS}", f"Take '{DJANGOS}'"),
    "both, turned": (
        {"MIDDLEWARE": [DJANGOS, OURS]},
        f"both {DJANGOS} and {OURS}",
        f"Take '{DJANGOS}'",
    ),
    "singular": (
        {"CLUSTERED_SESSION_LOCK_WAIT": 5},
        "no setting CLUSTERED_SESSION_LOCK_WAIT",
        "CLUSTERED_SESSIONS_LOCK_WAIT",
    ),
    "alias": (
        {"SESSION_CACHE_ALIAS": "session", "CACHES": beside(LOCATION)},
        "SESSION_CACHE_ALIAS is 'session', and CACHES has no such entry. "
        "The nearest entry that would do is 'sessions'.",
        "",
    ),
    "alias that is not set": (
        {"SESSION_CACHE_ALIAS": "default", "CACHES": {**LOCMEM, **entry()}},
        f"'{LOCMEM_BACKEND}' there, which keeps its values in the memory of one process. The "
        "nearest entry that would do is 'sessions'.",
        "",
    ),
    "backend": (
        {"SESSION_CACHE_ALIAS": "default", "CACHES": LOCMEM},
        f"'{LOCMEM_BACKEND}' there, which keeps its values in the memory of one process. Name an "
        "entry of django-redis, django-valkey, django-cachex or Django's own RedisCache, for "
        f"example 'BACKEND': '{REDIS}'",
        "",
    ),
    "scheme": (
        {"CACHES": entry("user:secret@127.0.0.1:6379")},
        "LOCATION begins with none of redis://, rediss://, valkey://, valkeys://, unix://",
        "LOCATION is redis://HOST:6379/1",
    ),
    "serializer": (
        {"SESSION_SERIALIZER": f"{__name__}.NoSuchClass"},
        "NoSuchClass cannot be imported",
        "Correct the name",
    ),
}


@pytest.mark.parametrize("case", WORDS)
def test_message_says_what_to_do(case: str, settings: Any) -> None:
    changed, what, hint = WORDS[case]
    configure(settings, changed)
    found = {message.msg: message.hint for message in check_settings()}
    (msg,) = (msg for msg in found if what in msg)
    assert hint in (found[msg] or "")
    assert "\n" not in msg + (found[msg] or "")
    assert "secret" not in msg


def test_serializer_without_its_library_names_the_extra(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.SESSION_SERIALIZER = MSGSPEC
    assert check_settings() == []
    monkeypatch.setitem(sys.modules, "msgspec", None)
    monkeypatch.delitem(sys.modules, MSGSPEC.rpartition(".")[0])
    (message,) = check_settings()
    assert message.id == "clustered_sessions.E004"
    assert "needs msgspec: install django-clustered-sessions[msgspec]" in message.msg
    assert "\n" not in message.msg


def test_other_middleware_is_said_to_lock_nothing(settings: Any) -> None:
    settings.MIDDLEWARE = [DJANGOS]
    (message,) = check_settings()
    assert "no request is locked" in message.msg


def test_engine_derived_from_ours_is_checked(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SessionStore(settings_checks.SessionStore):
        pass

    settings.SESSION_ENGINE = "tests.urls"
    monkeypatch.setattr("tests.urls.SessionStore", SessionStore, raising=False)
    settings.MIDDLEWARE = []
    assert ids(check_settings()) == ["W001"]


def test_every_setting_has_a_rule() -> None:
    assert sorted(RULES) == sorted(WRONG) == sorted(names())


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("MAXBYTES", "MAX_BYTES"), ("ON_CONFLICTS", "ON_CONFLICT"), ("IDLE_TIME", "IDLE_TIMEOUT")],
)
def test_unknown_setting_is_told_the_nearest_name(wrong: str, right: str, settings: Any) -> None:
    setattr(settings, PREFIX + wrong, 1)
    (message,) = check_settings()
    assert message.hint == f"The nearest one is {PREFIX}{right}."


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("LOCK_PROCESS_WAITERS", "Set CLUSTERED_SESSIONS_LOCK_MAX_WAITERS: an eighth of that"),
        ("MIGRATE_CACHE", "Name the cache in CLUSTERED_SESSIONS_MIGRATE_FROM: {"),
        ("ON_LOCK_LOST", "always raises SessionLockLost"),
        ("ON_READ_ONLY_CHANGE", "an error under DEBUG"),
        ("SYNC_TIMEOUT", "Set CLUSTERED_SESSIONS_STORE_TIMEOUT: a write waits for 0.4 of"),
    ],
)
def test_removed_setting_is_told_what_to_do_instead(name: str, instead: str, settings: Any) -> None:
    setattr(settings, PREFIX + name, None)
    (message,) = check_settings()
    assert (message.id, message.msg) == (
        "clustered_sessions.W003",
        f"There is no setting {PREFIX}{name}; it has no effect.",
    )
    assert instead in (message.hint or "")


def test_no_removed_setting_is_a_setting() -> None:
    assert not REMOVED.keys() & set(names())


def test_check_command_runs_them(settings: Any) -> None:
    settings.MIDDLEWARE = []
    # Django's admin misses its own middleware too.
    settings.SILENCED_SYSTEM_CHECKS = ["admin.E408", "admin.E409", "admin.E410"]
    stderr = io.StringIO()
    call_command("check", stdout=io.StringIO(), stderr=stderr)
    assert "clustered_sessions.W001" in stderr.getvalue()
    assert "clustered_sessions.W006" not in stderr.getvalue()


def test_store_is_not_asked_while_the_settings_are_wrong(settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = "soon"
    assert check_store() == []


def test_store_is_not_asked_for_another_engine(settings: Any) -> None:
    settings.SESSION_ENGINE = "django.contrib.sessions.backends.db"
    assert check_store() == []


def facts(**info: str) -> StoreFacts:
    return StoreFacts(0, 0, 0, info, "")


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"maxmemory_policy": "noeviction"}, []),
        ({"maxmemory_policy": "volatile-lru"}, ["W007"]),
        ({"maxmemory_policy": "allkeys-lru"}, ["W007"]),
        ({}, ["I001"]),
    ],
)
def test_store_that_evicts_is_warned_of(info: dict[str, str], expected: list[str]) -> None:
    messages = list(store_checks.eviction(facts(**info)))
    assert ids(messages) == expected
    assert all(message.hint for message in messages)


@pytest.mark.parametrize(
    ("info", "save", "expected"),
    [
        ({"aof_enabled": "1"}, None, []),
        ({"aof_enabled": "0"}, "3600 1", []),
        ({"aof_enabled": "0"}, "", ["W008"]),
        ({"aof_enabled": "0"}, None, ["I001"]),
        ({}, "3600 1", ["I001"]),
    ],
)
def test_store_without_a_file_is_warned_of(
    info: dict[str, str], save: str | None, expected: list[str]
) -> None:
    messages = list(store_checks.persistence(replace(facts(**info), save=save)))
    assert ids(messages) == expected
    assert all(message.hint for message in messages)


@pytest.mark.parametrize(
    ("offset_ms", "words"),
    [(3_600_000, "3600.0 s ahead of"), (-3_600_000, "3600.0 s behind"), (500, None)],
)
def test_clock_that_is_off_is_warned_of(offset_ms: int, words: str | None) -> None:
    messages = list(store_checks.clock(replace(facts(), clock_offset_ms=offset_ms)))
    assert [words in message.msg for message in messages] == ([True] if words else [])
    assert ids(messages) == (["W009"] if words else [])
    assert all(message.hint for message in messages)


@pytest.mark.parametrize(
    ("lacking", "changed", "expected"),
    [
        (set(), {}, []),
        ({"EVALSHA_RO"}, {}, ["I002"]),
        ({"EVALSHA", "TIME"}, {}, ["W022"]),
        ({"BLPOP"}, {}, ["W022"]),
        ({"WAIT", "XADD"}, {}, []),
        ({"WAIT", "XADD"}, {"SYNC_REPLICAS": 1, "EVENTS_KEPT": 9}, ["W022", "W022"]),
        # A user that may not ask: the other checks say so.
        (Refused("NOPERM"), {"SYNC_REPLICAS": 1}, []),
    ],
)
def test_commands_that_a_store_lacks_are_named(
    lacking: Any, changed: dict[str, Any], expected: list[str], settings: Any
) -> None:
    configure(settings, {PREFIX + name: value for name, value in changed.items()})
    messages = list(store_checks.commands(lacking))
    assert ids(messages) == expected
    assert all(message.hint for message in messages)


@pytest.mark.parametrize(
    ("watched", "min_replicas", "expected"),
    [(True, 0, ["W017"]), (True, 1, []), (True, None, ["I001"]), (False, 0, [])],
)
def test_sentinels_primary_needs_replicas_to_write(
    watched: bool, min_replicas: int | None, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "watcher", lambda: object() if watched else None)
    messages = list(store_checks.isolation(replace(facts(), min_replicas=min_replicas)))
    assert ids(messages) == expected
    assert all(message.hint for message in messages)


@pytest.mark.parametrize(
    ("enabled", "configured", "expected"),
    [
        ("1", True, []),
        ("0", False, []),
        ("1", False, ["W019"]),
        ("0", True, ["W019"]),
        (None, True, []),
    ],
)
def test_cluster_and_its_cache_entry_go_together(
    enabled: str | None, configured: bool, expected: list[str], settings: Any
) -> None:
    if configured:
        use_store(settings, LOCATION, CONNECTION_FACTORY=django_redis.CLUSTER)
    info = {} if enabled is None else {"cluster_enabled": enabled}
    messages = list(store_checks.topology(facts(**info)))
    assert ids(messages) == expected
    assert all(message.hint for message in messages)


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"redis_version": "6.2.14"}, ["W010"]),
        ({"redis_version": "7.0"}, []),
        ({"redis_version": "10.0.0"}, []),
        ({"redis_version": "7.2.4", "valkey_version": "7.1.9"}, ["W010"]),
        ({"redis_version": "7.2.4", "valkey_version": "7.2.0"}, []),
        ({"redis_version": "unstable"}, []),
        ({}, ["I001"]),
    ],
)
def test_oldest_supported_store_is_asked_for(info: dict[str, str], expected: list[str]) -> None:
    messages = list(store_checks.version(facts(**info)))
    assert ids(messages) == expected
    assert all(message.hint for message in messages)


@pytest.mark.parametrize(
    ("replicas", "fsync", "info", "expected"),
    [
        (0, False, {"connected_slaves": "0"}, []),
        (1, False, {"connected_slaves": "1"}, []),
        (2, False, {"connected_slaves": "1"}, ["W014"]),
        (0, True, {"aof_enabled": "1", "redis_version": "7.2.0"}, []),
        (0, True, {"aof_enabled": "1", "redis_version": "7.2.4", "valkey_version": "9.1.0"}, []),
        (0, True, {"aof_enabled": "1", "redis_version": "7.0.15"}, ["W014"]),
        (0, True, {"aof_enabled": "0", "redis_version": "7.2.0"}, ["W014"]),
        (1, False, {}, ["I001"]),
    ],
)
def test_synchronous_writes_need_what_the_store_has(
    settings: Any, replicas: int, fsync: bool, info: dict[str, str], expected: list[str]
) -> None:
    settings.CLUSTERED_SESSIONS_SYNC_REPLICAS = replicas
    settings.CLUSTERED_SESSIONS_SYNC_FSYNC = fsync
    messages = list(store_checks.sync(facts(**info)))
    assert ids(messages) == expected
    assert all(message.hint for message in messages)


def test_every_primary_needs_replicas(settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_SYNC_REPLICAS = 1
    for others in (["3", "0"], ["3", ""], ["1", "1"]):
        told = facts(connected_slaves="2")
        told = replace(told, others=[{"connected_slaves": number} for number in others])
        assert ids(list(store_checks.sync(told))) == ([] if others == ["1", "1"] else ["W014"])


def test_clock_within_its_uncertainty_is_not_reported() -> None:
    slow = StoreFacts(0, clock_offset_ms=1500, clock_error_ms=600, info={}, save="")
    assert list(store_checks.clock(slow)) == []
