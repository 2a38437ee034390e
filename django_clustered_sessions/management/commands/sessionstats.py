"""``manage.py sessionstats``: the sessions of the whole cluster in figures."""

from __future__ import annotations

import json
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError
from collections import Counter
from collections.abc import Callable, Iterator
from random import Random
from typing import Any, Final, TextIO, TypeVar, cast

from django.core.checks import Tags
from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from django_clustered_sessions import connections, drivers, statistics
from django_clustered_sessions.commands import Flow
from django_clustered_sessions.conf import conf
from django_clustered_sessions.exceptions import SessionStoreUnavailable
from django_clustered_sessions.statistics import (
    LIVES_S,
    Clock,
    Distribution,
    HeldLocks,
    Node,
    Primary,
    Replica,
    Statistics,
    StoreFacts,
)

T = TypeVar("T")

#: Counters in the tables of nodes, with their headings; two tables, so that 80 columns do.
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
_UNKNOWN: Final = "?"


class Command(BaseCommand):
    """Print statistics of all sessions, nodes and the store, or who holds locks now."""

    help = "Print statistics of the cluster's sessions: how many, how large, what each node did."
    requires_system_checks = [Tags.security]

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the command's options."""
        parser.add_argument("--format", choices=("table", "json"), default="table")
        parser.add_argument(
            "--watch",
            type=_positive(float),
            metavar="SECONDS",
            help="Start anew every so many seconds until Ctrl-C; JSON is one line each time.",
        )
        measured = parser.add_mutually_exclusive_group()
        measured.add_argument(
            "--sample",
            type=_positive(int),
            default=1000,
            metavar="N",
            help="Measure N sessions, chosen evenly (default: 1000).",
        )
        measured.add_argument("--exact", action="store_true", help="Measure all sessions.")
        measured.add_argument(
            "--locks",
            action="store_true",
            help="Print who holds sessions' locks now and who waits for them, nothing else.",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        """Print the statistics, once or again and again.

        Raises CommandError where the store is away.
        """
        sample = None if options["exact"] else options["sample"]
        try:
            if options["locks"]:
                locks = _again_and_again(_collect_locks, _collect_locks, options["watch"])
                self._print(locks, statistics.locks_document, _locks_page, options)
            else:
                figures = _again_and_again(
                    lambda: _collect_with_progress(sample),
                    lambda: _collect(sample),
                    options["watch"],
                )
                self._print(figures, statistics.document, _page, options)
        except (SessionStoreUnavailable, ImproperlyConfigured) as error:
            raise CommandError(str(error)) from error
        except KeyboardInterrupt:
            if not options["watch"]:
                sys.exit(130)

    def _print(
        self,
        figures: Iterator[T],
        document: Callable[[T], dict[str, Any]],
        page: Callable[[T], RenderableType],
        options: dict[str, Any],
    ) -> None:
        if options["format"] == "json":
            for each in figures:
                indent = None if options["watch"] else 2
                self.stdout.write(json.dumps(document(each), indent=indent))
                self.stdout.flush()
        else:
            pages = map(page, figures)
            _show(pages, self._console(options), on_screen=bool(options["watch"]))

    def _console(self, options: dict[str, Any]) -> Console:
        # Rich ends its lines itself, and moves the cursor without one.
        self.stdout.ending = ""
        return Console(
            file=cast(TextIO, self.stdout),
            no_color=options["no_color"] or None,
            force_terminal=options["force_color"] or None,
            highlight=False,
            # A route may have brackets and colons.
            markup=False,
            emoji=False,
        )


def _positive(number: type[int] | type[float]) -> Any:
    def parse(text: str) -> int | float:
        try:
            value = number(text)
        except ValueError:
            value = number(0)
        if not 0 < value < float("inf"):
            raise ArgumentTypeError(f"{text!r} is no number above 0")
        return value

    return parse


def _again_and_again(
    first: Callable[[], T], later: Callable[[], T], interval_s: float | None
) -> Iterator[T]:
    yield first()
    while interval_s:
        time.sleep(interval_s)
        yield later()


def _show(pages: Iterator[RenderableType], console: Console, *, on_screen: bool) -> None:
    page = next(pages)
    if not (on_screen and console.is_terminal):
        console.print(page)
        for page in pages:
            console.print(page)
        return
    try:
        with Live(page, console=console, screen=True, auto_refresh=False) as live:
            for page in pages:
                live.update(page, refresh=True)
    finally:
        # The screen that was watched is gone by now; its last state stays.
        console.print(page)


def _collect(
    sample: int | None, progress: statistics.Progress = lambda done, of: None
) -> Statistics:
    figures = drivers.run(
        statistics.collect(
            conf.key_prefix, time.time, sample=sample, random=Random(), progress=progress
        ),
        connections.pool,
        drivers.PerTrip(conf.store_timeout),
    )
    figures.primaries = _primaries(figures.store)
    for one in figures.primaries:
        for replica in one.replicas or ():
            replica.clock = _clock(replica)
    if (watcher := connections.watcher()) is not None:
        figures.sentinels = statistics.sentinels(watcher.service, watcher.survey())
    return figures


def _primaries(store: StoreFacts) -> list[Primary]:
    """Return the one primary, or all of a cluster, each by its own account."""
    nodes = connections.nodes()
    if not nodes:
        return [statistics.primary(connections.address(), store)]
    found = []
    for node, slots in nodes.items():
        facts = _ask(node, statistics.store_facts(time.time))
        one = statistics.primary(f"{node.host}:{node.port}", facts)
        one.slots = slots
        found.append(one)
    return found


def _clock(replica: Replica) -> Clock | None:
    """Ask a replica for its time; None where it cannot be asked, from here at least."""
    try:
        return _ask((replica.host, replica.port), statistics.clock(time.time))
    except SessionStoreUnavailable:
        return None


def _ask(server: tuple[str, int], flow: Flow[T]) -> T:
    """Run a flow on one server of several."""
    pool = connections.pool_at(server)
    try:
        return drivers.run(flow, lambda step: pool, drivers.Budget(conf.store_timeout))
    finally:
        pool.disconnect()


def _collect_locks() -> HeldLocks:
    return drivers.run(
        statistics.collect_locks(conf.key_prefix),
        connections.pool,
        drivers.PerTrip(conf.store_timeout),
    )


def _collect_with_progress(sample: int | None) -> Statistics:
    if not sys.stderr.isatty():
        return _collect(sample)
    columns = (
        TextColumn("measuring sessions"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        return _collect(sample, lambda done, of: bar.update(task, completed=done, total=of))


def _page(figures: Statistics) -> RenderableType:
    return Group(
        _sessions(figures),
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
        *_locks(figures),
        *_outages(figures),
        "",
        _store(figures),
        "",
        _topology(figures),
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


def _sizes(figures: Statistics) -> RenderableType:
    measured = figures.sizes.count
    title = f"Size, of {'all' if figures.exact else 'a sample of'} {measured:,} sessions"
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
    figures: Statistics, title: str, headings: dict[str, str], *, with_report: bool = False
) -> RenderableType:
    report = ("reported", "clock") if with_report else ()
    table = _table(title, "", *report, *headings.values())

    def add(name: str, node: Node | None, counts: Any, style: str = "") -> None:
        said = (
            ("", "")
            if node is None
            else (
                f"{_span(max(figures.store.now_ms - node.reported_ms, 0) / 1000)} ago",
                _offset(node.clock_offset_ms),
            )
        )
        table.add_row(
            name,
            *(said if with_report else ()),
            *(_short(counts[counter]) for counter in headings),
            style=style,
        )

    for name, node in sorted(figures.nodes.items()):
        add(name, node, node.counts)
    if figures.former.counts:
        add("former nodes", None, figures.former.counts)
    add("all", None, figures.counts, "bold")
    return table


def _locks(figures: Statistics) -> list[RenderableType]:
    """Return what there is to tell of locks: nothing where none was ever asked for."""
    if not any(figures.counts[counter] for counter in _LOCKS):
        return []
    times = _table(
        "Waits for locks, and the longest hold",
        *("ms", "p50", "p95", "p99", "max", "mean", "longest hold"),
    )

    def add(name: str, counts: Counter[str], style: str = "") -> None:
        waited = statistics.waits(counts)
        shown = ["-"] * 5 if waited is None else [_short(number) for number in waited.values()]
        times.add_row(name, *shown, _short(counts["lock_longest_hold_ms"]), style=style)

    for name, node in sorted(figures.nodes.items()):
        add(name, node.counts)
    if figures.former.counts:
        add("former nodes", figures.former.counts)
    add("all", figures.counts, "bold")
    return ["", _nodes(figures, "Locks", _LOCKS), "", times]


def _outages(figures: Statistics) -> list[RenderableType]:
    """Return what the nodes had of a store that was away: nothing where it never was."""
    if not figures.counts["breaker_opened"]:
        return []
    return ["", _nodes(figures, "Outages of the store", _OUTAGES)]


def _locks_page(held: HeldLocks) -> RenderableType:
    waiting = sum(len(lock.waiting) for lock in held.locks)
    title = f"Locks: {len(held.locks):,} held, {waiting:,} waiting"
    table = _table(title, "session", "place", "for", "lease left", "node and route")
    table.columns[0].no_wrap = True
    table.columns[-1].justify, table.columns[-1].no_wrap = "left", False
    table.columns[-1].overflow = "fold"

    def add(session: str, place: str, since_ms: int, lease: str, name: str) -> None:
        table.add_row(session, place, _seconds(held.now_ms - since_ms), lease, name)

    for lock in held.locks:
        left_ms = lock.lease_end_ms - held.now_ms
        lease = _seconds(left_ms) if left_ms > 0 else "over"
        holder = lock.holder.name if lock.holder else ""
        add(lock.session, "holds", lock.since_ms, lease, holder or _UNKNOWN)
        for place, waiter in enumerate(lock.waiting, 1):
            add("", f"{place:,}", waiter.since_ms, "", waiter.name or _UNKNOWN)
    return table


def _seconds(ms: int) -> str:
    return f"{max(ms, 0) / 1000:,.1f} s"


def _written_share(figures: Statistics) -> list[str]:
    written, held = (figures.counts[name] for name in ("fields_written", "fields_held"))
    return [f"Commits wrote {written / held:.0%} of the fields that they held."] if held else []


def _near_share(figures: Statistics) -> list[str]:
    ratio = statistics.near_hit_ratio(figures.counts)
    if ratio is None:
        return []
    saved = _bytes(figures.counts["near_bytes_saved"])
    return [f"Near cache: {ratio:.0%} of the loads had not changed; {saved} were not sent."]


def _sync_share(figures: Statistics) -> list[str]:
    """Return what there is to tell of synchronous writes: nothing where there were none."""
    waits, short = (figures.counts[name] for name in ("sync_waits", "sync_shortfalls"))
    if not waits:
        return []
    after_ms = statistics.acknowledged_after_ms(figures.counts)
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


def _topology(figures: Statistics) -> RenderableType:
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
            # What is not online sends nothing, so its lag means nothing.
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
        for address, ahead_ms in statistics.clocks_apart(figures)
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
    """Return a count in seven characters at most."""
    if number < 1_000_000:
        return f"{number:,}"
    scaled = number / 1e6
    for unit in "MGT":
        # From there on four digits would round to a thousand.
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
