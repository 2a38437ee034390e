"""``manage.py sessionrekey``: encrypt all sessions with the key that writes now."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from typing import Any, Final

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from django_clustered_sessions.conf import PREFIX, conf
from django_clustered_sessions.encryption import keys
from django_clustered_sessions.exceptions import SessionStoreUnavailable
from django_clustered_sessions.protocol.record import BUCKETS
from django_clustered_sessions.protocol.rekey import Rekeyed, rekey
from django_clustered_sessions.protocol.sealing import Seal
from django_clustered_sessions.store import runner

#: Most passes over all sessions: a session may move meanwhile, from a bucket that is still to come
#: into one that is done.
_MOST_PASSES: Final = 5

#: Exit codes: all done; done except some values or sessions; interrupted by Ctrl-C.
#: A CommandError is 1.
_DONE, _IN_PART, _BROKEN_OFF = 0, 3, 130


class Command(BaseCommand):
    """Encrypt all sessions with the first of CLUSTERED_SESSIONS_ENCRYPTION_KEYS."""

    help = (
        "Encrypts all sessions with the first key of CLUSTERED_SESSIONS_ENCRYPTION_KEYS, or writes "
        "them plain where that says 'plain'. Run it when each node has that setting; run it again "
        "where it was broken off. Exit codes: 0 all done, 1 stopped by an error, 3 done but for "
        "values that no key opens or that other nodes go on writing with another key, 130 Ctrl-C."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the command's options."""
        parser.add_argument(
            "--dry-run", action="store_true", help="Change nothing, and print what would be done."
        )
        parser.add_argument(
            "--format", choices=["table", "json"], default="table", help="Default: table."
        )

    def handle(self, *args: Any, dry_run: bool, format: str, **options: Any) -> None:
        """Write the sessions anew, and print the numbers.

        Raises CommandError if the store is away, or the setting cannot be used.
        """
        done, code = Rekeyed(), _BROKEN_OFF
        try:
            seal_of = _seal_of()
            for number in range(_MOST_PASSES):
                before, of_pass = done, Rekeyed()
                for some in _progress(number):
                    found = runner.run(rekey(conf.key_prefix, some, seal_of, is_dry=dry_run))
                    of_pass = of_pass.plus(found)
                    done = of_pass._replace(
                        renewed=before.renewed + of_pass.renewed,
                        fields=before.fields + of_pass.fields,
                    )
                if dry_run or not of_pass.renewed:
                    break
            is_left = (of_pass.renewed and not dry_run) or done.unopened or done.skipped
            code = _IN_PART if is_left else _DONE
        except KeyboardInterrupt:
            self.stderr.write("Broken off. Run it again: what is done is not done twice.")
        except (SessionStoreUnavailable, ImproperlyConfigured) as error:
            self._tell(done, format, dry_run=dry_run, code=1)
            raise CommandError(str(error)) from error
        self._tell(done, format, dry_run=dry_run, code=code)
        if code:
            sys.exit(code)

    def _tell(self, done: Rekeyed, format: str, *, dry_run: bool, code: int) -> None:
        if format == "json":
            document = done._asdict() | {"dry_run": dry_run, "finished": code in (_DONE, _IN_PART)}
            self.stdout.write(json.dumps(document, indent=2))
            return
        mood = "would be " if dry_run else ""
        names = {
            "sessions": "sessions looked at",
            "renewed": f"of them {mood}written anew",
            "fields": f"values {mood}written anew",
            "unopened": "values that no key opens, left alone",
            "skipped": "sessions of a newer release, left alone",
        }
        for name, text in names.items():
            count = getattr(done, name)
            if count or name in ("sessions", "renewed"):
                self.stdout.write(f"{count:>10,}  {text}")


def _seal_of() -> Callable[[str, bytes], Seal]:
    found = keys()
    if found is None:
        raise CommandError(
            f"{PREFIX}ENCRYPTION_KEYS has no key: there is nothing to encrypt with. To write "
            "encrypted sessions plain, have 'plain' before the keys."
        )
    return lambda public_id, past: Seal(found, public_id, past)


def _progress(number: int) -> Iterator[int]:
    """Yield the buckets; show the progress on standard error, if that is a terminal."""
    name = TextColumn("Sessions" if number == 0 else f"Sessions, pass {number + 1}")
    columns = name, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield from progress.track(range(BUCKETS))
