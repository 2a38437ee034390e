"""``manage.py sessionevents``: what happens to sessions, each event handled by one worker."""

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
from django_clustered_sessions.events import Event, StreamEntry
from django_clustered_sessions.exceptions import SessionStoreUnavailable
from django_clustered_sessions.monitoring.counters import counters
from django_clustered_sessions.protocol.record import Serializer, user_id
from django_clustered_sessions.signals import session_expired
from django_clustered_sessions.store import runner

T = TypeVar("T")

logger = logging.getLogger("django_clustered_sessions")

Handler = Callable[[Event], object]

#: How often a worker looks for events, and for sessions that have expired, in seconds.
POLL_S: Final = 1.0
SWEEP_S: Final = 20.0

#: A worker takes as many events at once as it handles in this time, in seconds; and at most.
_PACE_S: Final = 1.0
_MOST: Final = 256


class Command(BaseCommand):
    """Handle what happens to the sessions of the whole cluster, until it is told to stop."""

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
            help="How long handling one event may take: one that was taken that long ago and is "
            "not handled is handled again (default: 60).",
        )
        parser.add_argument(
            "--once", action="store_true", help="Handle what there is, and end; for cron."
        )

    def handle(self, *args: Any, **options: Any) -> None:
        """Handle events, those that there are or all that will be.

        Raises CommandError where no events are kept or the handler is none; with ``--once`` also
        where the store is away, and where the handler failed.
        """
        if not conf.events_kept:
            raise CommandError(
                "CLUSTERED_SESSIONS_EVENTS_KEPT is 0, so no events are written. Set it to how many "
                "are to wait while no worker runs, on all nodes."
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
    """Takes events and hands them to a handler, one after the other.

    An event that was taken ``lease_s`` seconds ago and is not finished is taken again.
    """

    def __init__(self, handler: Handler, lease_s: int) -> None:
        self._handler, self._lease_s = handler, lease_s
        self._stop = threading.Event()
        self._serializer = cast(Serializer, import_string(settings.SESSION_SERIALIZER)())
        self._sender = cast(type, import_string(f"{settings.SESSION_ENGINE}.SessionStore"))
        self._swept_at = float("-inf")
        self._pace = 1
        #: Handled, and the store does not know yet.
        self._handled: list[StreamEntry] = []
        #: How many events the handler has failed on.
        self.failures = 0

    @contextmanager
    def stopped_by(self, *numbers: signal.Signals) -> Iterator[None]:
        """Let signals end the work after the event at hand."""
        before = {number: signal.getsignal(number) for number in numbers}

        def stop(number: int, frame: object) -> None:
            self._stop.set()
            # A second one is for a handler that hangs.
            signal.signal(number, before[signal.Signals(number)])

        for number in numbers:
            signal.signal(number, stop)
        try:
            yield
        finally:
            for number, action in before.items():
                signal.signal(number, action)

    def run(self, *, once: bool = False) -> None:
        """Handle events until it is stopped; with ``once``, those that there are.

        With ``once``, raises SessionStoreUnavailable. Otherwise a store that is away is waited for.
        """
        was_away = False
        while not self._stop.is_set():
            try:
                self._handle_all()
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
            self._stop.wait(POLL_S)

    def _handle_all(self) -> None:
        """Handle events until there are none that nobody has."""
        self._finish()
        self._sweep_if_due()
        buckets = runner.run(events.waiting(conf.key_prefix))
        # Each worker begins elsewhere.
        random.shuffle(buckets)
        while buckets and not self._stop.is_set():
            some = buckets[: self._pace]
            most = -(-self._pace // len(some))
            began = time.monotonic()
            taken = runner.run(events.take(conf.key_prefix, some, most, self._lease_s * 1000))
            self._handle(taken, began)
            # A bucket with more than was taken stays on the list.
            full = {
                bucket for bucket in some if sum(entry.bucket == bucket for entry in taken) == most
            }
            buckets = [*buckets[len(some) :], *full]
            self._sweep_if_due()

    def _handle(self, taken: Sequence[StreamEntry], began: float) -> None:
        """Handle events that were taken at a time; those that would be late are given back."""
        handled = 0
        for entry in taken:
            spent = time.monotonic() - began
            if self._stop.is_set() or spent > self._lease_s / 2:
                break
            self._handle_one(entry)
            handled += 1
        spent = time.monotonic() - began
        self._pace = min(2 * self._pace, _MOST) if spent < _PACE_S else max(self._pace // 2, 1)
        if (left := taken[handled:]) and spent < self._lease_s:
            runner.run(events.give_back(conf.key_prefix, left, self._lease_s * 1000))

    def _handle_one(self, entry: StreamEntry) -> None:
        try:
            event = entry.event(user_id(entry.user, self._serializer))
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
        """Let the store forget what was handled."""
        if self._handled:
            runner.run(events.finish(conf.key_prefix, self._handled))
            self._handled.clear()

    def _sweep_if_due(self) -> None:
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
    """Run what a handler has returned, where that is its work still to do.

    Raises what the work raises, and TypeError for a generator, of which nothing has run.
    """
    if isawaitable(outcome):
        async_to_sync(_awaited)(outcome)
    elif isgenerator(outcome) or isasyncgen(outcome):
        raise TypeError(f"the handler has returned {outcome!r}: one that yields cannot be run")


async def _awaited(work: Awaitable[object]) -> None:
    await work
