"""Another node: a process that changes and ends sessions when a test says so.

Run by `started`: each line of its input is an order, and each line of its output the answer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import django
from django.conf import settings
from django.core.signals import setting_changed

from tests.children import line, python


class Elsewhere:
    """A process that works with the store at ``url``, past any proxy."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self._process, self.url = process, url

    def write(self, key: str, **values: Any) -> None:
        """Change a session; it has been stored when this returns."""
        self._order(key, values)

    def end(self, key: str) -> None:
        """End a session; it has ended when this returns."""
        self._order(key, None)

    def _order(self, key: str, values: dict[str, Any] | None) -> None:
        assert self._process.stdin is not None
        print(json.dumps([self.url, key, values]), file=self._process.stdin, flush=True)
        assert line(self._process) == "done\n"


@contextmanager
def started(url: str) -> Iterator[Elsewhere]:
    """Run the process, for a store at ``url``."""
    options = {"stdin": subprocess.PIPE}
    with python("-W", "error", "-m", __name__, life_s=250.0, **options) as process:
        yield Elsewhere(process, url)


def main() -> None:
    """Follow orders until there are none."""
    os.environ["DJANGO_SETTINGS_MODULE"] = "tests.settings"
    django.setup()
    from django_clustered_sessions.backend import SessionStore  # noqa: PLC0415

    at = ""
    for order in sys.stdin:
        url, key, values = json.loads(order)
        if url != at:
            entry = {"BACKEND": "django_redis.cache.RedisCache", "LOCATION": url}
            settings.CACHES = settings.CACHES | {"sessions": entry}
            setting_changed.send(None, setting="CACHES", value=settings.CACHES, enter=True)
            at = url
        session = SessionStore(key)
        if values is None:
            session.flush()
        else:
            session.load()
            session.update(values)
            session.save()
        print("done", flush=True)


if __name__ == "__main__":
    main()
