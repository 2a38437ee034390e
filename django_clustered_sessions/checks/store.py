"""Checks of the store, which is asked with ``check --deploy`` only."""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Final

from django.apps import AppConfig
from django.conf import settings
from django.core.checks import CheckMessage, Info, Warning

from django_clustered_sessions.conf import PREFIX, conf
from django_clustered_sessions.exceptions import SessionStoreUnavailable
from django_clustered_sessions.monitoring import server_info
from django_clustered_sessions.monitoring.server_info import Refused, StoreFacts
from django_clustered_sessions.protocol.effects import plain
from django_clustered_sessions.store import connections, runner, tracking
from django_clustered_sessions.store.budget import Budget

from .settings import check_settings, is_our_engine

#: Oldest supported release of each store.
OLDEST: Final = {"redis": (7, 0), "valkey": (7, 2)}

#: Commands by what is off where the store lacks one: a setting that asks for it, or None where
#: none does, and the words for it.
_NEEDED: Final[Mapping[Sequence[str], tuple[str | None, str]]] = {
    ("EVALSHA", "TIME", "HGETALL", "PEXPIREAT", "ZADD"): (None, "no session can be kept there"),
    ("BLPOP",): (None, "a request that waits for a lock asks again and again, and is not woken"),
    ("WAIT",): ("SYNC_REPLICAS", "no write will be acknowledged"),
    ("XADD", "XREADGROUP", "XAUTOCLAIM"): ("EVENTS_KEPT", "what makes an event fails"),
}

#: First release with WAITAOF, of both stores.
_WAITAOF: Final = (7, 2)


def check_store(
    app_configs: Sequence[AppConfig] | None = None, **kwargs: Any
) -> list[CheckMessage]:
    """Check the store within STORE_TIMEOUT; skip that while the settings have errors."""
    if not is_our_engine() or any(message.is_serious() for message in check_settings()):
        return []
    budget = Budget(conf.store_timeout)
    try:
        facts = runner.run(server_info.store_facts(time.time), budget)
        asked = ["EVALSHA_RO", *(word for words in _NEEDED for word in words)]
        lacking = runner.run(server_info.lacking(asked), budget)
        text = secrets.token_hex(12)
        pinged = runner.run(server_info.unless_refused((plain("PING", text),)), budget)
    except SessionStoreUnavailable as error:
        return [_unasked(error)]
    return [
        *eviction(facts),
        *persistence(facts),
        *clock(facts),
        *version(facts),
        *commands(lacking),
        *sync(facts),
        *topology(facts),
        *isolation(facts),
        *tracking_works(),
        *sharing_works(text, pinged),
    ]


def _unasked(error: SessionStoreUnavailable) -> CheckMessage:
    where = f"CACHES[{settings.SESSION_CACHE_ALIAS!r}]"
    if error.is_away is False:
        # The store's own words, which say what is to be done.
        what = f"The store refused: {str(error).partition(': ')[2]}"
        hint = f"It is up, and has answered: see {where}, and the store's own settings."
    elif connections.entry().is_tls:
        what = f"The session store could not be asked by TLS: {error}"
        hint = (
            f"LOCATION in {where} is for TLS: see that this port speaks TLS, or write redis:// in "
            "place of rediss://; and that the store is up."
        )
    else:
        what = f"The session store could not be asked: {error}"
        hint = (
            f"See that the store is up, by manage.py sessionserver in development, and that "
            f"LOCATION in {where} leads to it: a port that speaks TLS is rediss://."
        )
    return Warning(what, hint=hint, id="clustered_sessions.W006")


def _unchecked(what: str, why: str) -> CheckMessage:
    return Info(
        f"It could not be checked {what}: {why}.",
        hint="Look it up in the store's own settings, or let the store's user run INFO and "
        "CONFIG GET.",
        id="clustered_sessions.I001",
    )


def eviction(facts: StoreFacts) -> Iterator[CheckMessage]:
    policy = facts.info.get("maxmemory_policy")
    if policy is None:
        yield _unchecked("whether the store evicts sessions", facts.why_no_info)
    elif policy != "noeviction":
        yield Warning(
            f"The session store's maxmemory-policy is {policy}: when it is full it drops "
            "sessions, and people are logged out.",
            hint="Set maxmemory-policy noeviction; volatile-... drops sessions too, for each has "
            "a time to live. Keep caches on a server of their own.",
            id="clustered_sessions.W007",
        )


def persistence(facts: StoreFacts) -> Iterator[CheckMessage]:
    if facts.appendonly:
        return
    if facts.appendonly is None:
        yield _unchecked("whether the store keeps sessions on disk", facts.why_no_info)
    elif facts.save is None:
        yield _unchecked("whether the store keeps sessions on disk", facts.why_no_config)
    elif not facts.save:
        yield Warning(
            "The session store keeps nothing on disk: a restart ends every session.",
            hint="Set appendonly yes (a second's writes are lost at most), or save for snapshots.",
            id="clustered_sessions.W008",
        )


def clock(facts: StoreFacts) -> Iterator[CheckMessage]:
    if abs(facts.clock_offset_ms) - facts.clock_error_ms > server_info.CLOCK_TOLERANCE_MS:
        yield Warning(
            f"This node's clock is {abs(facts.clock_offset_ms) / 1000:.1f} s "
            f"{'ahead of' if facts.clock_offset_ms > 0 else 'behind'} the session store's.",
            hint="Sessions follow the store's clock; let NTP set both all the same: browsers are "
            "told by this node's clock when the cookie ends.",
            id="clustered_sessions.W009",
        )


def version(facts: StoreFacts) -> Iterator[CheckMessage]:
    if not facts.version:
        yield _unchecked("which version the store has", facts.why_no_info)
        return
    oldest = OLDEST[facts.product]
    if _is_older(facts, oldest):
        name = facts.product.capitalize()
        yield Warning(
            f"The session store is {name} {facts.version}.",
            hint=f"Use {name} {oldest[0]}.{oldest[1]} or newer.",
            id="clustered_sessions.W010",
        )


def commands(lacking: Collection[str] | Refused) -> Iterator[CheckMessage]:
    """Name what the store lacks; one that does not tell has a user that may do less, mostly."""
    if isinstance(lacking, Refused):
        return
    for words, (setting, outcome) in _NEEDED.items():
        missing = [word for word in words if word in lacking]
        asked_for = getattr(conf, setting.lower()) if setting else True
        if missing and asked_for:
            of_setting = f", and {PREFIX}{setting} is {asked_for!r}" if setting else ""
            yield Warning(
                f"The session store has no {', '.join(missing)}{of_setting}: {outcome}.",
                hint="Take a store that has it (docs/stores.md)"
                + (f", or leave {PREFIX}{setting} out." if setting else "."),
                id="clustered_sessions.W022",
            )
    if "EVALSHA_RO" in lacking:
        yield Info(
            "The session store has no EVALSHA_RO: sessions are read by EVALSHA.",
            hint="Nothing is to be done; the first read of each connection pool is sent twice.",
            id="clustered_sessions.I002",
        )


def sync(facts: StoreFacts) -> Iterator[CheckMessage]:
    if not conf.sync_replicas and not conf.sync_fsync:
        return
    if not facts.info:
        yield _unchecked("whether the store can do synchronous writes", facts.why_no_info)
        return
    replicas = facts.fewest_replicas
    if replicas < conf.sync_replicas:
        where = "A primary of the session store" if facts.others else "The session store"
        yield Warning(
            f"{where} has {replicas} replicas, and {PREFIX}SYNC_REPLICAS is "
            f"{conf.sync_replicas}: no write will be acknowledged.",
            hint="See to the replicas, or ask for fewer.",
            id="clustered_sessions.W014",
        )
    if conf.sync_fsync and (not facts.appendonly or _is_older(facts, _WAITAOF)):
        yield Warning(
            f"{PREFIX}SYNC_FSYNC is on, and the session store has no append-only file or is older "
            "than 7.2: no write will be acknowledged.",
            hint="Set appendonly yes on the primary and its replicas, or leave SYNC_FSYNC out.",
            id="clustered_sessions.W014",
        )


def _is_older(facts: StoreFacts, oldest: tuple[int, ...]) -> bool:
    parts = (facts.version or "").split(".")
    return all(map(str.isdigit, parts)) and tuple(map(int, parts)) < oldest


def topology(facts: StoreFacts) -> Iterator[CheckMessage]:
    enabled = facts.info.get("cluster_enabled")
    if enabled is not None and (enabled == "1") != connections.is_cluster():
        yield Warning(
            "The session store is a node of a cluster, and the sessions' CACHES entry does not "
            "say so: sessions on other nodes cannot be reached."
            if enabled == "1"
            else "The sessions' CACHES entry is for a cluster, and the session store is none.",
            hint=f"{connections.entry().cluster_is} for a cluster, and for no other store.",
            id="clustered_sessions.W019",
        )


def tracking_works() -> Iterator[CheckMessage]:
    if conf.near_reads != "tracked":
        return
    try:
        tracking.try_out(conf.store_timeout)
    except SessionStoreUnavailable as error:
        yield Warning(
            f"{PREFIX}NEAR_READS is 'tracked', and the session store does not track what is read: "
            f"{error}",
            hint="Each read asks the store, as with 'checked'. Let the store's user run CLIENT "
            "TRACKING and PING, connect to the store itself and not to a proxy that does not "
            "know RESP3, or leave NEAR_READS out.",
            id="clustered_sessions.W021",
        )


def sharing_works(text: str, pinged: Any) -> Iterator[CheckMessage]:
    if pinged != [text.encode()]:
        why = pinged.why if isinstance(pinged, Refused) else "PING is answered without its text"
        yield Info(
            f"Asynchronous requests that run at once do not share connections: {why}",
            hint="Nothing is to be done without ASGI. Otherwise let the store's user run PING, and "
            "connect to the store itself and not to a proxy that answers PING; or each request "
            "that runs at once has a connection of its own.",
            id="clustered_sessions.I003",
        )


def isolation(facts: StoreFacts) -> Iterator[CheckMessage]:
    if connections.watcher() is None:
        return
    if facts.min_replicas is None:
        why = facts.why_no_config or "CONFIG GET does not tell"
        yield _unchecked("whether a primary without replicas takes writes", why)
    elif not facts.min_replicas:
        yield Warning(
            "The primary that the Sentinels name has min-replicas-to-write 0: one that is cut "
            "off from its replicas goes on taking writes, which are lost when another is promoted.",
            hint="Set min-replicas-to-write 1 and min-replicas-max-lag 10 on each server.",
            id="clustered_sessions.W017",
        )
