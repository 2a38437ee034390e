"""``manage.py sessionevents``: handle events of sessions, each by one worker."""

from __future__ import annotations

import json
import logging
import random
import signal
import threading
import time
from argparse import ArgumentParser
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from inspect import isasyncgen, isawaitable, isgenerator
from typing import Any, Final, TypeVar, cast

from asgiref.sync import async_to_sync
from django.conf import settings
from django.core.checks import Tags
from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError
from django.db import close_old_connections
from django.utils.module_loading import import_string

from django_clustered_sessions import events
from django_clustered_sessions.conf import conf
from django_clustered_sessions.encryption import user_told
from django_clustered_sessions.events import Event, StreamEntry
from django_clustered_sessions.exceptions import SessionStoreUnavailable
from django_clustered_sessions.monitoring.counters import counters
from django_clustered_sessions.protocol.record import Serializer
from django_clustered_sessions.signals import session_expired
from django_clustered_sessions.store import runner

T = TypeVar("T")

logger = logging.getLogger("django_clustered_sessions")

Handler = Callable[[Event], object]

#: Seconds between two polls for events, and between two sweeps for expired sessions.
POLL_S: Final = 1.0
SWEEP_S: Final = 20.0

#: A worker claims as many events at once as it handles in this time (s), and at most _MOST.
_PACE_S: Final = 1.0
_MOST: Final = 256


class Command(BaseCommand):
    """Handle events of all sessions of the cluster, until a signal stops it."""

    help = (
        "Handles what happens to sessions on all nodes: created, ended, expired. Run one or more "
        "anywhere; each event is handled by one of them, and again by another if that one dies. "
        "SIGTERM and Ctrl-C end it after the event at hand."
    )
    requires_system_checks = [Tags.security]

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the command's options."""
        parser.add_argument(
            "--handler",
            metavar="DOTTED.PATH",
            help="A function, synchronous or asynchronous, that is called with each event "
            "(default: print it as a line of JSON).",
        )
        parser.add_argument(
            "--lease",
            type=int,
            default=60,
            metavar="SECONDS",
            help="Time to handle an event: an event that is not finished after it is handled "
            "again (default: 60).",
        )
        parser.add_argument(
            "--once", action="store_true", help="Handle the present events and end; for cron."
        )

    def handle(self, *args: Any, **options: Any) -> None:
        """Handle the present events with ``--once``, else all events until stopped.

        Raises CommandError if no events are kept or the handler is invalid; with ``--once`` also
        if the store is away or the handler fails.
        """
        if not conf.events_kept:
            raise CommandError(
                "CLUSTERED_SESSIONS_EVENTS_KEPT is 0, so no events are written. Set it, on all "
                "nodes, to the number of events to keep while no worker runs."
            )
        if options["lease"] < 1:
            raise CommandError("--lease is 1 second at least.")
        handler = _imported(options["handler"]) if options["handler"] else self._print
        worker = Worker(handler, options["lease"])
        try:
            with worker.stopped_by(signal.SIGTERM, signal.SIGINT):
                worker.run(once=options["once"])
        except (ImproperlyConfigured, SessionStoreUnavailable) as error:
            raise CommandError(str(error)) from error
        if options["once"] and worker.failures:
            raise CommandError(
                f"{worker.failures} events could not be handled; the log has why. They are handled "
                f"again {options['lease']} seconds after they were taken."
            )

    def _print(self, event: Event) -> None:
        self.stdout.write(json.dumps(asdict(event) | {"time": event.time.isoformat()}))
        self.stdout.flush()


class Worker:
    """Worker that claims events and calls a handler with each in turn.

    An unfinished event is claimed again ``lease_s`` seconds after its claim.
    """

    def __init__(self, handler: Handler, lease_s: int) -> None:
        self._handler, self._lease_s = handler, lease_s
        self.stop = threading.Event()
        self._serializer = cast(Serializer, import_string(settings.SESSION_SERIALIZER)())
        self._sender = cast(type, import_string(f"{settings.SESSION_ENGINE}.SessionStore"))
        self._swept_at = float("-inf")
        self.pace = 1
        #: Events that are handled and not yet removed from the store.
        self._handled: list[StreamEntry] = []
        #: Number of events on which the handler has failed.
        self.failures = 0

    @contextmanager
    def stopped_by(self, *numbers: signal.Signals) -> Iterator[None]:
        """Let signals end the work after the current event."""
        before = {number: signal.getsignal(number) for number in numbers}

        def stop(number: int, frame: object) -> None:
            self.stop.set()
            # A second signal has its default action, to end a handler that hangs.
            signal.signal(number, before[signal.Signals(number)])

        for number in numbers:
            signal.signal(number, stop)
        try:
            yield
        finally:
            for number, action in before.items():
                signal.signal(number, action)

    def run(self, *, once: bool = False) -> None:
        """Handle events until stopped; with ``once``, the present ones.

        With ``once``, raises SessionStoreUnavailable; else waits until the store is back.
        """
        was_away = False
        while not self.stop.is_set():
            try:
                self.handle_all()
            except SessionStoreUnavailable as error:
                if once:
                    raise
                if not was_away:
                    logger.warning("events wait: %s", error)
                was_away = True
            else:
                was_away = False
                if once:
                    break
            self.stop.wait(POLL_S)

    def handle_all(self) -> None:
        """Handle events until all are claimed."""
        self._finish()
        self.sweep_if_due()
        buckets = runner.run(events.waiting(conf.key_prefix))
        # Workers start at different buckets, to claim different events.
        random.shuffle(buckets)
        while buckets and not self.stop.is_set():
            some = buckets[: self.pace]
            most = -(-self.pace // len(some))
            began = time.monotonic()
            taken = runner.run(events.claim(conf.key_prefix, some, most, self._lease_s * 1000))
            self.handle(taken, began)
            # A bucket that gave as many as asked may have more.
            full = {
                bucket for bucket in some if sum(entry.bucket == bucket for entry in taken) == most
            }
            buckets = [*buckets[len(some) :], *full]
            self.sweep_if_due()

    def handle(self, taken: Sequence[StreamEntry], began: float) -> None:
        """Handle events that were claimed together; release those that would be late."""
        handled = 0
        for entry in taken:
            spent = time.monotonic() - began
            if self.stop.is_set() or spent > self._lease_s / 2:
                break
            self._handle_one(entry)
            handled += 1
        spent = time.monotonic() - began
        self.pace = min(2 * self.pace, _MOST) if spent < _PACE_S else max(self.pace // 2, 1)
        if (left := taken[handled:]) and spent < self._lease_s:
            runner.run(events.release(conf.key_prefix, left, self._lease_s * 1000))

    def _handle_one(self, entry: StreamEntry) -> None:
        try:
            user = user_told(entry.session_id, entry.user, self._serializer)
            event = entry.event(user)
        except ValueError as error:
            logger.warning("an event is left out: %s", error)
        else:
            close_old_connections()
            try:
                if event.kind == "expired":
                    told = session_expired.send(
                        self._sender,
                        session_id=event.session_id,
                        user_id=event.user_id,
                        event=event,
                    )
                    for _, outcome in told:
                        _run(outcome)
                _run(self._handler(event))
            except Exception:
                self.failures += 1
                logger.exception(
                    "event %s could not be handled; it will be again in %s s",
                    event.id,
                    self._lease_s,
                )
                return
            finally:
                close_old_connections()
        self._handled.append(entry)
        self._finish()

    def _finish(self) -> None:
        """Remove handled events from the store."""
        if self._handled:
            runner.run(events.finish(conf.key_prefix, self._handled))
            self._handled.clear()

    def sweep_if_due(self) -> None:
        if time.monotonic() - self._swept_at >= SWEEP_S:
            counters.add(expired=runner.run(events.sweep(conf.key_prefix, conf.events_kept)))
            self._swept_at = time.monotonic()


def _imported(path: str) -> Handler:
    try:
        found = import_string(path)
    except ImportError as error:
        raise CommandError(f"--handler: {error}") from error
    if not callable(found):
        raise CommandError(f"--handler: {path} cannot be called.")
    return cast(Handler, found)


def _run(outcome: object) -> None:
    """Run the awaitable that a handler has returned, if any.

    Raises the errors of the awaitable, and TypeError for a generator, which would never run.
    """
    if isawaitable(outcome):
        async_to_sync(_awaited)(outcome)
    elif isgenerator(outcome) or isasyncgen(outcome):
        raise TypeError(f"the handler has returned {outcome!r}, and a generator cannot be run")


async def _awaited(work: Awaitable[object]) -> None:
    await work
