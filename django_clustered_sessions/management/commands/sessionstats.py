"""``manage.py sessionstats``: statistics of the sessions of the whole cluster."""

from __future__ import annotations

import json
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any, TextIO, TypeVar, cast

from django.core.checks import Tags
from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from django_clustered_sessions.conf import conf
from django_clustered_sessions.exceptions import SessionStoreUnavailable
from django_clustered_sessions.monitoring import collect, held_locks, history, json_document, tables
from django_clustered_sessions.monitoring.held_locks import HeldLocks
from django_clustered_sessions.monitoring.statistics import Statistics
from django_clustered_sessions.store import runner

T = TypeVar("T")


class Command(BaseCommand):
    """Print statistics of all sessions, nodes and the store, or the locks that are held now."""

    help = "Print statistics of the cluster's sessions: how many, how large, what each node did."
    requires_system_checks = [Tags.security]

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the command's options."""
        parser.add_argument("--format", choices=("table", "json", "prometheus"), default="table")
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
            help="Print the locks of sessions with holders and waiters, nothing else.",
        )
        measured.add_argument(
            "--history",
            nargs="?",
            type=_hours,
            const=history.LONGEST_HOURS,
            metavar="HOURS",
            help="Print what happened in the last hours (default: 24, the most), nothing else.",
        )
        parser.add_argument(
            "--top-users",
            type=_positive(int),
            default=0,
            metavar="N",
            help="Count users as well, and the sessions of the N users with most of them.",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        """Print the statistics once, or repeatedly with ``--watch``.

        Raises CommandError if the store is away, or options exclude each other.
        """
        for_prometheus, top = options["format"] == "prometheus", options["top_users"]
        only = next((name for name in ("locks", "history") if options[name]), "")
        if for_prometheus and (only or options["watch"] or top):
            raise CommandError(
                "--format prometheus prints the metrics once: "
                "not with --locks, --history, --watch or --top-users"
            )
        if only and top:
            raise CommandError(f"--{only} prints nothing else: not with --top-users")
        sample = None if options["exact"] else options["sample"]
        try:
            if for_prometheus:
                self._print_metrics(sample)
            elif options["history"]:
                hours = options["history"]
                found = _again_and_again(
                    lambda: history.recent(hours), lambda: history.recent(hours), options["watch"]
                )
                self._print(found, history.document, tables.history_page, options)
            elif options["locks"]:
                locks = _again_and_again(_collect_locks, _collect_locks, options["watch"])
                self._print(locks, json_document.locks_document, tables.locks_page, options)
            else:
                figures = _again_and_again(
                    lambda: _collect_with_progress(sample, top),
                    lambda: collect.figures(sample, top_users=top),
                    options["watch"],
                )
                self._print(figures, json_document.document, tables.page, options)
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

    def _print_metrics(self, sample: int | None) -> None:
        try:
            from django_clustered_sessions import prometheus
        except ModuleNotFoundError as error:
            if error.name != "prometheus_client":
                raise
            raise CommandError(
                "--format prometheus needs prometheus_client: "
                'pip install "django-clustered-sessions[prometheus]"'
            ) from error
        self.stdout.write(prometheus.text(collect.figures(sample)), ending="")

    def _console(self, options: dict[str, Any]) -> Console:
        # Rich writes its own line ends, and cursor movements without a line end.
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


def _hours(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= history.LONGEST_HOURS):
        raise ArgumentTypeError(f"{text!r} is not 1 to {history.LONGEST_HOURS} hours")
    return int(text)


def _again_and_again(
    first: Callable[[], T], later: Callable[[], T], interval_s: float | None
) -> Iterator[T]:
    """Yield each collected result; report an outage of the store on standard error instead.

    Raises SessionStoreUnavailable if the store is away at the first time.
    """
    yield first()
    away_since: datetime | None = None
    while interval_s:
        time.sleep(interval_s)
        try:
            found = later()
        except SessionStoreUnavailable as error:
            away_since = away_since or datetime.now()
            print(f"no figures since {away_since:%H:%M:%S}: {error}", file=sys.stderr, flush=True)
        else:
            away_since = None
            yield found


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
        # Live has restored the terminal's screen; print the last page there.
        console.print(page)


def _collect_locks() -> HeldLocks:
    return runner.run(held_locks.collect_locks(conf.key_prefix))


def _collect_with_progress(sample: int | None, top_users: int) -> Statistics:
    if not sys.stderr.isatty():
        return collect.figures(sample, top_users=top_users)
    columns = (
        TextColumn("measuring sessions"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        return collect.figures(
            sample,
            top_users=top_users,
            progress=lambda done, of: bar.update(task, completed=done, total=of),
        )
