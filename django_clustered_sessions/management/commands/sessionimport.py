"""``manage.py sessionimport``: take over all sessions of the old engine, or write them back."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from typing import Any, Final, cast

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.conf import PREFIX, conf
from django_clustered_sessions.exceptions import SessionStoreUnavailable
from django_clustered_sessions.importing import bulk, old_engine
from django_clustered_sessions.protocol.effects import Flow, batches
from django_clustered_sessions.protocol.record import HiddenKey, Serializer
from django_clustered_sessions.store import runner

#: Sessions moved on one round trip.
_BATCH: Final = 100

#: Exit codes: all done; done except some sessions or values; interrupted by Ctrl-C.
#: A CommandError is 1.
_DONE, _IN_PART, _BROKEN_OFF = 0, 3, 130


class Command(BaseCommand):
    """Move all sessions from CLUSTERED_SESSIONS_MIGRATE_FROM at once, or back."""

    help = (
        "Takes over all sessions of the engine that CLUSTERED_SESSIONS_MIGRATE_FROM names. Run it "
        "when no node uses that engine any more; run it again where it was broken off. Exit "
        "codes: 0 all done, 1 stopped by an error, 3 done but for some sessions or values, "
        "130 Ctrl-C."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the command's options."""
        parser.add_argument(
            "--dry-run", action="store_true", help="Change nothing, and print what would be done."
        )
        parser.add_argument(
            "--back",
            action="store_true",
            help="Write the sessions that were taken over back to the old engine, and delete "
            "there those that have ended here.",
        )

    def handle(self, *args: Any, dry_run: bool, back: bool, **options: Any) -> None:
        """Move the sessions, and print the number of each outcome.

        Raises CommandError if the store or the old engine is away, or cannot be used.
        """
        came: Counter[str] = Counter()
        code = _BROKEN_OFF
        try:
            self._refuse()
            for some in _progress(old_engine.keys(), old_engine.count()):
                came += runner.run(_step(some, back=back, dry_run=dry_run))
            code = _IN_PART if came["unreadable"] or _lost(came) else _DONE
        except KeyboardInterrupt:
            self.stderr.write("Broken off. Run it again: what is done is not done twice.")
        except (SessionStoreUnavailable, ImproperlyConfigured) as error:
            self._tell(came, back=back, dry_run=dry_run)
            raise CommandError(str(error)) from error
        self._tell(came, back=back, dry_run=dry_run)
        if code:
            sys.exit(code)

    def _refuse(self) -> None:
        if not conf.migrate_from:
            raise CommandError(
                f"{PREFIX}MIGRATE_FROM is not set: name the engine that the site used before, such "
                "as 'django.contrib.sessions.backends.db'."
            )
        engine = import_module(settings.SESSION_ENGINE).SessionStore
        if not issubclass(engine, SessionStore):
            raise CommandError(
                f"SESSION_ENGINE is {settings.SESSION_ENGINE}: sessions that are moved while "
                "the site still uses the old engine are out of date at once. Switch first."
            )

    def _tell(self, came: Counter[str], *, back: bool, dry_run: bool) -> None:
        mood = "would be " if dry_run else ""
        moved = f"{mood}brought up to date there" if back else f"{mood}taken over"
        ended = f"ended here, {mood}deleted there" if back else "ended here since"
        names = {
            "moved": moved,
            "here already": "here already",
            "ended here": ended,
            "never moved": "never taken over, left alone",
            "gone there": "gone there meanwhile",
            "expired or empty": "expired or empty",
            "unreadable": "unreadable, left alone: see the log",
        }
        for name, text in names.items():
            if came[name] or name == "moved":
                self.stdout.write(f"{came[name]:>10,}  {text}")
        for name in _lost(came):
            key = name.removeprefix("lost ")
            self.stdout.write(
                f"{came[name]:>10,}  {mood}without {key}, which SESSION_SERIALIZER cannot write"
            )


def _lost(came: Counter[str]) -> list[str]:
    return sorted(name for name in came if name.startswith("lost "))


def _step(session_keys: list[str], *, back: bool, dry_run: bool) -> Flow[Counter[str]]:
    session = SessionStore()
    serializer = cast(Serializer, session.serializer())
    keys = [HiddenKey(key) for key in session_keys]
    if back:
        return bulk.write_back(keys, conf.key_prefix, serializer, is_dry=dry_run)
    options = session.state.write_options()
    return bulk.take_over_all(keys, conf.key_prefix, options, serializer, is_dry=dry_run)


def _progress(keys: Iterator[str], total: int | None) -> Iterator[list[str]]:
    """Yield the keys in batches; show the progress on standard error, if that is a terminal."""
    columns = TextColumn("Sessions"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        for some in batches(keys, _BATCH):
            yield some
            progress.advance(task, len(some))
