"""Event worker for tests: ``python -m tests.event_worker URL HANDLER FOLDER LEASE``.

Its handlers write to the file ``log`` in the folder.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import django
from django.conf import settings
from django.core.management import call_command

from django_clustered_sessions.events import Event
from tests.conftest import use_store
from tests.servers import wait_for

KEPT = 100_000
WAIT_S = 30.0


def append(line: str) -> None:
    """Append a line to the log."""
    with (folder() / "log").open("a") as log:
        log.write(line + "\n")


def folder() -> Path:
    """Return the folder that the test named."""
    return Path(sys.argv[3])


def note(event: Event) -> None:
    """Log the process and the event that it handles."""
    append(f"{os.getpid()} {event.kind} {event.session_id}")


def note_and_hang(event: Event) -> None:
    """Log an event, and hang beyond the bounds of the test."""
    note(event)
    # The hang outlasts the wait of the other worker.
    time.sleep(2 * WAIT_S)


def note_when_allowed(event: Event) -> None:
    """Log an event, and wait for the file ``go`` in the folder."""
    note(event)
    wait_for((folder() / "go").exists, "the test lets it go on", timeout_s=WAIT_S)
    append("done")


if __name__ == "__main__":
    os.environ["DJANGO_SETTINGS_MODULE"] = "tests.settings"
    django.setup()
    _, location, handler, _, lease = sys.argv
    use_store(settings, location)
    settings.CLUSTERED_SESSIONS_EVENTS_KEPT = KEPT
    call_command("sessionevents", handler=f"__main__.{handler}", lease=int(lease))
