"""Statistics as tables for a terminal, by rich."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from itertools import groupby
from types import MappingProxyType
from typing import Any, Final

from django.utils import timezone
from rich.console import Group, RenderableType
from rich.table import Table

from django_clustered_sessions.monitoring import history
from django_clustered_sessions.monitoring.history import History

from . import json_document
from .held_locks import HeldLocks
from .server_info import Clock
from .statistics import LIVES_S, Distribution, Node, Statistics

#: Counters in the tables of nodes, with their headings; two tables, to fit 80 columns.
_USE: Final = {
    "requests": "requests",
    "loads": "loads",
    "commits": "commits",
    "created": "created",
    "ended": "ended",
}

_WRITES: Final = {
    "fields_written": "written",
    "fields_held": "held",
    "conflicts_merged": "merged",
    "conflicts_overwritten": "overwritten",
    "values_set_aside": "set aside",
    "store_errors": "errors",
}

_LIVES: Final = {
    "created": "created",
    "ended": "ended",
    "expired": "expired",
    "node_hops": "node\nhops",
}

_LOCKS: Final = {
    "locks_acquired": "acquired",
    "lock_waits": "waits",
    "lock_handoffs": "handed\non",
    "lock_timeouts": "timed\nout",
    "lock_refusals": "refused\nat cap",
    "locks_lost": "lost",
    "writes_refused": "commits\nrefused",
}

_OUTAGES: Final = {
    "store_errors": "errors",
    "nonstop_trips": "refused\nat once",
    "local_reads": "read\nlocally",
    "breaker_opened": "found\naway",
}

_TAKEOVERS: Final = {
    "takeovers_asked": "looked\nup",
    "takeovers": "taken\nover",
    "takeovers_failed": "failed",
    "takeover_values_lost": "values\nlost",
}

_UNKNOWN: Final = "?"


def page(figures: Statistics) -> RenderableType:
    """Return all statistics of the cluster."""
    return Group(
        _sessions(figures),
        *_users(figures),
        "",
        _sizes(figures),
        "",
        _lives(figures),
        "",
        _nodes(figures, "Nodes", _USE, with_report=True),
        "",
        _nodes(figures, "Fields, conflicts, values set aside, store errors", _WRITES),
        *_written_share(figures),
        *_near_share(figures),
        *_sync_share(figures),
        *_ends(figures),
        *_locks(figures),
        *_outages(figures),
        *_takeovers(figures),
        "",
        _store(figures),
        "",
        topology(figures),
    )


def _table(title: str, first: str = "", *headings: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column(first, overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _sessions(figures: Statistics) -> RenderableType:
    table = _table("Sessions", "", "")
    table.show_header = False
    table.add_row("logged in", f"{figures.logged_in:,}")
    table.add_row("anonymous", f"{figures.anonymous:,}")
    table.add_row("total", f"{figures.total:,}", style="bold")
    return table


def _users(figures: Statistics) -> list[RenderableType]:
    """Return the number of users and the highest session counts; nothing if not requested."""
    if figures.users is None:
        return []
    most = ", ".join(f"{count:,}" for count in figures.users.most_sessions) or "-"
    return ["", f"Users logged in: {figures.users.users:,}. Most sessions of a user: {most}."]


def _sizes(figures: Statistics) -> RenderableType:
    measured = figures.sizes.count
    sample = "" if figures.exact else "a sample of "
    title = f"Size, of {sample}{measured:,} session{'' if measured == 1 else 's'}"
    if figures.unreadable:
        title += f" ({figures.unreadable:,} more cannot be read)"
    table = _table(title, "bytes", "min", "median", "p95", "max", "mean")
    table.add_row("values, as stored", *_summary(figures.sizes))
    table.add_row("memory of a record", *_summary(figures.memory))
    records = figures.record_memory
    if records is None:
        return table
    about = "" if figures.exact else "about "
    return Group(
        table,
        f"All records: {about}{_bytes(records)}. Indexes: {_bytes(figures.index_memory)}. "
        f"Together: {about}{_bytes(records + figures.index_memory)}.",
    )


def _summary(distribution: Distribution | None) -> list[str]:
    if distribution is None:
        return [_UNKNOWN] * 5
    summary = distribution.summary()
    return [f"{value:,}" for value in summary.values()] if summary else ["-"] * 5


def _lives(figures: Statistics) -> RenderableType:
    table = _table("Time left", "", "sessions", "")
    table.show_header = False
    table.columns[2].justify = "left"
    labels = [f"up to {_span(up_to)}" for up_to in LIVES_S] + [f"over {_span(LIVES_S[-1])}"]
    whole = sum(figures.lives)
    for label, count in zip(labels, figures.lives, strict=True):
        share = count / whole if whole else 0.0
        table.add_row(label, f"{share:.1%}" if whole else "-", "█" * round(share * 40))
    return table


def _nodes(
    figures: Statistics,
    title: str,
    headings: dict[str, str],
    *,
    with_report: bool = False,
    more: Mapping[str, Callable[[Counter[str]], str]] = MappingProxyType({}),
) -> RenderableType:
    """Return a row for each node: counters with headings, and columns computed by ``more``."""
    report = ("reported", "clock") if with_report else ()
    table = _table(title, "", *report, *headings.values(), *more)

    def add(name: str, node: Node | None, counts: Any, style: str = "") -> None:
        said = (
            ("", "")
            if node is None
            else (
                _ago(figures, node.reported_ms),
                _offset(node.clock_offset_ms),
            )
        )
        table.add_row(
            name,
            *(said if with_report else ()),
            *(_short(counts[counter]) for counter in headings),
            *(make(counts) for make in more.values()),
            style=style,
        )

    for name, node in sorted(figures.nodes.items()):
        add(name, node, node.counts)
    if figures.former.counts:
        add("former nodes", None, figures.former.counts)
    add("all", None, figures.counts, "bold")
    return table


def _ends(figures: Statistics) -> list[RenderableType]:
    """Return created, ended and expired sessions, node hops, and lifetimes of ended sessions."""
    table = _table("Lives of sessions", "", *_LIVES.values(), "shortest", "mean", "longest")

    def add(name: str, counts: Counter[str], style: str = "") -> None:
        lived = json_document.lifetimes(counts)
        shown = ["-"] * 3 if lived is None else [_span(ms / 1000) for ms in lived.values()]
        table.add_row(name, *(_short(counts[counter]) for counter in _LIVES), *shown, style=style)

    for name, node in sorted(figures.nodes.items()):
        add(name, node.counts)
    if figures.former.counts:
        add("former nodes", figures.former.counts)
    add("all", figures.counts, "bold")
    return ["", table]


def history_page(found: History) -> RenderableType:
    """Return the history with a row for each hour."""
    title = f"The last {found.hours} h, by hours"
    table = _table(
        title,
        "from",
        *("sessions", "requests", "created", "ended", "expired", "lock\nwaits", "errors"),
    )
    table.columns[0].no_wrap = True
    names = ("requests", "created", "ended", "expired", "lock_waits", "store_errors")
    levels = {level.at: level.sessions for level in found.levels}
    for hour, starts in groupby(found.starts, lambda start: start.replace(minute=0)):
        # The level at the end of the hour; for the current hour, now.
        level = levels[min(list(starts)[-1] + history.SLOT, max(levels))]
        rows = [row for row in found.rows if row.start.replace(minute=0) == hour]
        table.add_row(
            f"{timezone.localtime(hour):%H:%M}",
            "-" if level is None else _short(level),
            *(_short(sum(getattr(row, name) for row in rows)) for name in names),
        )
    by_node = _table("By nodes", "", "requests", "lock waits", "waited", "errors")
    for node in found.nodes:
        mine = [row for row in found.rows if row.node == node]
        waited_ms = sum(row.lock_wait_ms for row in mine)
        by_node.add_row(
            node,
            _short(sum(row.requests for row in mine)),
            _short(sum(row.lock_waits for row in mine)),
            _seconds(waited_ms),
            _short(sum(row.store_errors for row in mine)),
        )
    return Group(table, "", by_node)


def _locks(figures: Statistics) -> list[RenderableType]:
    """Return the lock statistics; nothing if no lock was ever requested."""
    if not any(figures.counts[counter] for counter in _LOCKS):
        return []
    times = _table(
        "Waits for locks, and the longest hold",
        *("ms", "p50", "p95", "p99", "max", "mean", "longest hold"),
    )

    def add(name: str, counts: Counter[str], style: str = "") -> None:
        waited = json_document.waits(counts)
        shown = ["-"] * 5 if waited is None else [_short(number) for number in waited.values()]
        times.add_row(name, *shown, _short(counts["lock_longest_hold_ms"]), style=style)

    for name, node in sorted(figures.nodes.items()):
        add(name, node.counts)
    if figures.former.counts:
        add("former nodes", figures.former.counts)
    add("all", figures.counts, "bold")
    return ["", _nodes(figures, "Locks", _LOCKS), "", times]


def _outages(figures: Statistics) -> list[RenderableType]:
    """Return the outages of the store by node; nothing if there were none."""
    if not figures.counts["breaker_opened"]:
        return []

    def longest(counts: Counter[str]) -> str:
        return _seconds(counts["store_longest_away_ms"]) if counts["breaker_opened"] else "-"

    def last(counts: Counter[str]) -> str:
        return _ago(figures, counts["store_last_away_ms"]) if counts["breaker_opened"] else "-"

    more = {"longest": longest, "last": last}
    return ["", _nodes(figures, "Outages of the store", _OUTAGES, more=more)]


def _ago(figures: Statistics, at_ms: int) -> str:
    return f"{_span(max(figures.store.now_ms - at_ms, 0) / 1000)} ago"


def _takeovers(figures: Statistics) -> list[RenderableType]:
    """Return the take-overs from the old engine; nothing if it was never asked."""
    if not any(figures.counts[counter] for counter in _TAKEOVERS):
        return []
    return ["", _nodes(figures, "Taken over from the old engine", _TAKEOVERS)]


def locks_page(held: HeldLocks) -> RenderableType:
    """Return the locks with their holders and waiters."""
    waiting = sum(len(lock.waiting) for lock in held.locks)
    title = f"Locks: {len(held.locks):,} held, {waiting:,} waiting"
    table = _table(title, "session", "place", "for", "lease left", "node and route")
    table.columns[0].no_wrap = True
    table.columns[-1].justify, table.columns[-1].no_wrap = "left", False
    table.columns[-1].overflow = "fold"

    def add(session: str, keys: str, since_ms: int, lease: str, name: str) -> None:
        table.add_row(session, keys, _seconds(held.now_ms - since_ms), lease, name)

    for lock in held.locks:
        left_ms = lock.lease_end_ms - held.now_ms
        lease = _seconds(left_ms) if left_ms > 0 else "over"
        add(lock.session, "holds", lock.since_ms, lease, lock.holder or _UNKNOWN)
        for position, waiter in enumerate(lock.waiting, 1):
            add("", f"{position:,}", waiter.since_ms, "", waiter.name or _UNKNOWN)
    return table


def _seconds(ms: int) -> str:
    return f"{max(ms, 0) / 1000:,.1f} s"


def _written_share(figures: Statistics) -> list[str]:
    written, held = (figures.counts[name] for name in ("fields_written", "fields_held"))
    return [f"Commits wrote {written / held:.0%} of the fields that they held."] if held else []


def _near_share(figures: Statistics) -> list[str]:
    ratio = json_document.near_hit_ratio(figures.counts)
    if ratio is None:
        return []
    saved = _bytes(figures.counts["near_bytes_saved"])
    lines = [f"Near cache: {ratio:.0%} of the loads had not changed; {saved} were not sent."]
    if free := figures.counts["near_reads"]:
        share, ages_ms = free / figures.counts["loads"], json_document.ages(figures.counts) or {}
        shown = ", ".join(f"{name} {ages_ms[name]:,}" for name in ("p50", "p99", "max"))
        lines += [
            f"Tracked reads: {share:.0%} of the loads took no round trip.",
            f"Ages of what they found, in ms: {shown}.",
        ]
    return lines


def _sync_share(figures: Statistics) -> list[str]:
    """Return the statistics of synchronous writes; nothing if there were none."""
    waits, short = (figures.counts[name] for name in ("sync_waits", "sync_shortfalls"))
    if not waits:
        return []
    after_ms = json_document.acknowledged_after_ms(figures.counts)
    after = "" if after_ms is None else f", after {after_ms:.2f} ms in the mean"
    return [f"Synchronous writes: {waits - short:,} of {waits:,} were acknowledged{after}."]


def _store(figures: Statistics) -> RenderableType:
    facts = figures.store
    replicas = facts.number("connected_slaves")
    used, most = facts.number("used_memory"), facts.number("maxmemory")
    kept = [
        name
        for name, kept in (("append-only file", facts.appendonly), ("snapshots", facts.save))
        if kept
    ]
    known = facts.appendonly is not None and facts.save is not None
    table = _table("Store", "", "")
    table.show_header = False
    table.columns[1].justify = "left"
    for name, value in (
        ("version", f"{facts.product.capitalize()} {facts.version}" if facts.version else None),
        ("role", f"{facts.primaries} primaries" if facts.others else facts.role),
        ("replicas", None if replicas is None else str(replicas)),
        ("memory", None if used is None else f"{_bytes(used)} of {_limit(most)}"),
        ("eviction policy", facts.info.get("maxmemory_policy")),
        ("on disk", ", ".join(kept) or ("nothing" if known else None)),
        ("key prefix", figures.prefix),
    ):
        table.add_row(name, value or _UNKNOWN)
    return table


def topology(figures: Statistics) -> RenderableType:
    has_slots = any(one.slots for one in figures.primaries)
    headings = ("role", "lag", "clock", *(("slots",) if has_slots else ()))
    table = _table("Topology", "", *headings)
    first = figures.primaries[0].clock

    def add(name: str, role: str | None, lag: str, clock: Clock | None, slots: str = "") -> None:
        told = _UNKNOWN if clock is None else _offset(clock.ahead_of(first)[0])
        table.add_row(name, role or _UNKNOWN, lag, told, *((slots,) if has_slots else ()))

    for one in figures.primaries:
        ranges = (f"{low}-{high}" for low, high in one.slots or ())
        add(one.address, one.role, "", one.clock, "\n".join(ranges))
        for replica in one.replicas or ():
            # A replica that is not online sends no acknowledgements, so its lag is meaningless.
            is_online = replica.state == "online"
            role = "replica" if is_online else f"replica: {replica.state}"
            lag = f"{_bytes(replica.lag_bytes)}, {replica.lag_s} s" if is_online else _UNKNOWN
            add(f"  {replica.address}", role, lag, replica.clock)
        if one.replicas is None:
            table.add_row("  replicas", _UNKNOWN)
    said = [
        f"The clock of {address} is {abs(ahead_ms) / 1000:,.1f} s "
        f"{'ahead of' if ahead_ms > 0 else 'behind'} that of {figures.primaries[0].address}: "
        "if it becomes the primary, sessions end and leases run out by its clock."
        for address, ahead_ms in json_document.clocks_apart(figures)
    ]
    if (of := figures.sentinels) is not None:
        known, quorum = (_UNKNOWN if n is None else str(n) for n in (of.known, of.quorum))
        said.insert(
            0,
            f"Sentinels of {of.service}: {of.answering} of the {of.named} in the entry answer; "
            f"{known} know of each other, quorum {quorum}.",
        )
    return Group(table, *said)


def _offset(ms: int) -> str:
    return f"{ms / 1000:+,.0f} s" if abs(ms) >= 10_000 else f"{ms:+d} ms"


def _limit(maxmemory: int | None) -> str:
    if maxmemory is None:
        return _UNKNOWN
    return _bytes(maxmemory) if maxmemory else "what the machine has (no maxmemory)"


def _short(number: int) -> str:
    """Return a count in at most seven characters."""
    if number < 1_000_000:
        return f"{number:,}"
    scaled = number / 1e6
    for unit in "MGT":
        # Above this, four digits would round to 1000.
        if scaled < 999.95:
            return f"{scaled:.4g} {unit}"
        scaled /= 1000
    return f"{scaled:.4g} P"


def _bytes(number: int) -> str:
    size = float(number)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:,.4g} TiB"


def _span(seconds: float) -> str:
    for unit, length in (("day", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            number = int(seconds // length)
            return f"{number} {unit}{'s' * (unit == 'day' and number > 1)}"
    return f"{int(seconds)} s"
