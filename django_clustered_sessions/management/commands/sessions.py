"""``manage.py sessions``: list sessions, show one, end some, by the start of an id or filters."""

from __future__ import annotations

import json
import os
import re
import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NoReturn

from django.contrib.auth import get_user_model
from django.core.checks import Tags
from django.core.exceptions import ImproperlyConfigured, ValidationError
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.utils import timezone
from django.utils.dateparse import parse_date, parse_datetime
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from django_clustered_sessions import registry
from django_clustered_sessions.exceptions import (
    SessionIdAmbiguous,
    SessionNotReplicated,
    SessionStoreUnavailable,
)
from django_clustered_sessions.protocol.effects import batches
from django_clustered_sessions.registry import SessionInfo

#: Sessions that are ended before the progress is shown again.
_BATCH: Final = 200

#: Exit codes. Done is 0; a CommandError without one is 1.
_USAGE, _NONE, _SEVERAL, _DECLINED, _BROKEN_OFF = 2, 3, 4, 5, 130

_DASHED = re.compile(r"-[A-Za-z0-9_][\w-]{2,41}|--(?=.*[A-Z0-9_])[\w-]{2,41}", re.ASCII)
_AGO = re.compile(r"([0-9]{1,9})([mhd])")
_UNITS: Final = {"m": "minutes", "h": "hours", "d": "days"}

_LINE: Final = "{:12}  {:16}  {:16}  {:16}  {:10}  {}"
_HEADINGS: Final = ("session", "last seen", "created", "expires", "user", "address")


class _ActionParser(CommandParser):
    """Parser of an action's arguments, one of which may be an id that begins with ``-``."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """See ArgumentParser.parse_known_args()."""
        return super().parse_known_args([_no_option(argument) for argument in args], namespace)


class Command(BaseCommand):
    """List sessions, show one, or end some, wherever they were used last."""

    help = (
        "Lists, shows and ends sessions of all nodes. Exit codes: 0 done, 1 stopped by an error, "
        "2 wrong usage, 3 no session fits, 4 the start of an id fits several, 5 not confirmed, "
        "130 Ctrl-C."
    )
    requires_system_checks = [Tags.security]

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the command's actions and their options."""
        actions = parser.add_subparsers(dest="action", required=True, parser_class=_ActionParser)
        listing = actions.add_parser("list", help="List the sessions that pass all filters.")
        showing = actions.add_parser("show", help="Show one session.")
        ending = actions.add_parser(
            "end", help="End sessions, by ids or by filters. It tells how many first, and asks."
        )
        start = "A session's id, or its first 4 characters or more: logs have 12."
        showing.add_argument("session", type=str.strip, help=start)
        ending.add_argument("session", type=str.strip, nargs="*", help=start)
        for each in (listing, ending):
            _add_filters(each)
        ending.add_argument("--all", action="store_true", help="End all sessions there are.")
        ending.add_argument("--yes", action="store_true", help="End them without asking.")
        for each in (listing, showing, ending):
            each.add_argument("--format", choices=("table", "json"), default="table")

    def handle(self, *args: Any, action: str, **options: Any) -> None:
        """List, show or end sessions.

        Raises CommandError if the store is away, options do not fit together, or no session does.
        """
        for_json = options["format"] == "json"
        try:
            match action:
                case "list":
                    self._list(_filters(options), for_json=for_json)
                case "show":
                    self._show(self._find(options["session"]), for_json=for_json)
                case "end":
                    self._end(options, for_json=for_json)
        except (SessionStoreUnavailable, ImproperlyConfigured) as error:
            raise CommandError(str(error)) from error

    def _list(self, filters: dict[str, Any], *, for_json: bool) -> None:
        count = 0
        try:
            with _progress("looking") as progress:
                for found in registry.matching(progress=progress, **filters):
                    if for_json:
                        lead = ",\n " if count else "[\n "
                        self.stdout.write(lead + json.dumps(_document(found)), ending="")
                    else:
                        if not count:
                            self.stdout.write(_LINE.format(*_HEADINGS))
                        self.stdout.write(_line(found))
                    count += 1
        except BrokenPipeError:
            # As by "| head". Python flushes once more at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return
        except KeyboardInterrupt:
            if for_json:
                self.stdout.write("")
            self._break_off(f"Broken off after {_sessions(count)}: there may be more.")
        if for_json:
            self.stdout.write("\n]" if count else "[]")
        else:
            self.stderr.write(f"{_sessions(count)} found.", self.style.SUCCESS)

    def _show(self, found: SessionInfo, *, for_json: bool) -> None:
        if for_json:
            self.stdout.write(json.dumps(_document(found), indent=2))
            return
        facts = {
            "session": found.id,
            "user": found.user_id or "nobody is logged in",
            "last seen": _local(found.last_seen),
            "created": _local(found.created),
            "expires": _local(found.expires),
        }
        for name, client in (("first used", found.first), ("last used", found.last)):
            if client is not None:
                facts[name] = f"{client.address}  {client.user_agent}"
        for name, fact in facts.items():
            self.stdout.write(f"{name:10}  {_printable(fact)}")

    def _find(self, start: str) -> SessionInfo:
        try:
            found = registry.find(start)
        except SessionIdAmbiguous as error:
            self.stderr.write(_LINE.format(*_HEADINGS), lambda text: text)
            for one in map(registry.find, error.ids):
                if one is not None:
                    self.stderr.write(_line(one), lambda text: text)
            raise CommandError(str(error), returncode=_SEVERAL) from error
        except ValueError as error:
            raise CommandError(str(error), returncode=_USAGE) from error
        if found is None:
            raise CommandError(
                f"no session has an id that begins with {start!r}: it has ended, or expired.",
                returncode=_NONE,
            )
        return found

    def _end(self, options: dict[str, Any], *, for_json: bool) -> None:
        starts, filters = options["session"], _filters(options)
        if sum(map(bool, (starts, filters, options["all"]))) != 1:
            raise CommandError(
                "say which sessions to end: by their ids, by filters, or --all", returncode=_USAGE
            )
        ended, is_ending, unreplicated = 0, False, None
        try:
            if starts:
                chosen = {found.id: found for found in map(self._find, starts)}
                ids: Iterable[str] = chosen
                count = len(chosen)
                for found in chosen.values():
                    self.stderr.write(_line(found), lambda text: text)
            else:
                with _progress("counting") as progress:
                    count = sum(1 for _ in registry.matching(progress=progress, **filters))
                # They are looked for once more: what was used meanwhile may not fit any more.
                ids = (found.id for found in registry.matching(**filters))
            if count and not options["yes"] and not self._is_confirmed(count):
                raise CommandError("nothing was ended.", returncode=_DECLINED)
            is_ending = True
            with _progress("ending") as progress:
                for some in batches(ids if count else (), _BATCH):
                    try:
                        ended += registry.end_sessions(some)
                    except SessionNotReplicated as error:
                        unreplicated = error
                        ended += len(some)
                    progress(ended, max(ended, count))
        except KeyboardInterrupt:
            at_most = f"{_sessions(ended)} ended, and at most {_BATCH} more"
            self._break_off(f"Broken off: {at_most if is_ending else 'nothing was ended'}.")
        if for_json:
            self.stdout.write(json.dumps({"matched": count, "ended": ended}))
        elif count:
            self.stdout.write(f"{_sessions(ended)} ended.")
        if unreplicated:
            raise CommandError(str(unreplicated)) from unreplicated
        if not count:
            raise CommandError("no session fits.", returncode=_NONE)

    def _is_confirmed(self, count: int) -> bool:
        text = f"End {_sessions(count)}? Their next requests are logged out, on every node. [y/N] "
        self.stderr.write(text, lambda text: text, ending="")
        self.stderr.flush()
        return sys.stdin.readline().strip().lower() in {"y", "yes"}

    def _break_off(self, text: str) -> NoReturn:
        self.stderr.write(text)
        sys.exit(_BROKEN_OFF)


def _no_option(argument: str) -> str:
    """Return an argument, with a space before it if it is an id that looks like an option.

    Options have lower case alone after two hyphens, and fewer than three characters after one.
    """
    return f" {argument}" if _DASHED.fullmatch(argument) else argument


def _add_filters(parser: ArgumentParser) -> None:
    since = "a date, a time, or how long ago: 90m, 12h, 30d"
    parser.add_argument("--user", help="Sessions of a user, by user name or primary key.")
    parser.add_argument(
        "--address",
        help="Sessions that logged in or were last used from an IP address or a network; "
        "needs CLUSTERED_SESSIONS_TRACK_CLIENTS.",
    )
    parser.add_argument(
        "--idle-since", type=_time, metavar="TIME", help=f"Sessions not seen since {since}."
    )
    parser.add_argument(
        "--created-before",
        type=_time,
        metavar="TIME",
        help=f"Sessions that began, or whose user logged in, before {since}.",
    )


def _filters(options: dict[str, Any]) -> dict[str, Any]:
    names = ("user", "address", "idle_since", "created_before")
    given = {name: options[name] for name in names if options[name] is not None}
    if "user" in given:
        given["user"] = _user_key(given["user"])
    try:
        registry.matching(**given)
    except ValueError as error:
        raise CommandError(str(error), returncode=_USAGE) from error
    return given


def _user_key(named: str) -> str:
    """Return the primary key of a user, who may be deleted, by name or by that key."""
    model = get_user_model()
    users = model._default_manager
    key = model._meta.pk
    by_name = users.filter(**{model.USERNAME_FIELD: named}).first()
    try:
        by_key = users.filter(pk=key.to_python(named)).first()
    except ValidationError:
        by_key = None
    if by_name is not None and by_key is not None and by_name != by_key:
        raise CommandError(
            f"{named!r} is the name of one user and the primary key of another: give the first "
            f"one's primary key, {key.value_to_string(by_name)}, or the other one's name, "
            f"{by_key.get_username()!r}.",
            returncode=_USAGE,
        )
    found = by_name or by_key
    return named if found is None else str(key.value_to_string(found))


def _time(text: str) -> datetime:
    try:
        if match := _AGO.fullmatch(text):
            return datetime.now(UTC) - timedelta(**{_UNITS[match[2]]: int(match[1])})
        if at := parse_datetime(text):
            return at
        if day := parse_date(text):
            return datetime(day.year, day.month, day.day, tzinfo=timezone.get_current_timezone())
    except (ValueError, OverflowError):
        pass
    raise ArgumentTypeError(
        f"{text!r} is no time: 2026-11-29, 2026-11-29T12:00, or how long ago, such as 90m, 12h, 30d"
    )


def _document(found: SessionInfo) -> dict[str, Any]:
    facts = asdict(found)
    del facts["is_current"]
    return {
        name: fact.isoformat() if isinstance(fact, datetime) else fact
        for name, fact in facts.items()
    }


def _line(found: SessionInfo) -> str:
    client = found.last or found.first
    return _LINE.format(
        found.id[:12],
        *(f"{_local(at):%Y-%m-%d %H:%M}" for at in (found.last_seen, found.created, found.expires)),
        _printable(found.user_id or "-"),
        _printable(client.address if client else "-"),
    )


def _local(at: datetime) -> datetime:
    return at.astimezone(timezone.get_current_timezone())


def _printable(fact: object) -> str:
    """Return text without control characters, which a terminal would obey."""
    return "".join(one if one.isprintable() else "?" for one in str(fact))


def _sessions(count: int) -> str:
    return f"{count:,} session{'s' * (count != 1)}"


@contextmanager
def _progress(doing: str) -> Iterator[registry.Progress]:
    """Show the progress on standard error, if that is a terminal."""
    columns = TextColumn(doing), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, disable=not console.is_terminal, transient=True
    ) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)
