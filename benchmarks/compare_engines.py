"""Compare this engine with Django's own on one store: print the README's table of figures.

    python -m benchmarks.compare_engines

Round trips are counted by a proxy. Lost updates: eight threads add one 25 times each to a value of
one session, so 200 would be right. Outage: what a logged-in visitor gets while the store is away.
Memory: per logged-in session, what belongs to it in indexes included, on a server with its
defaults. ``db`` runs on SQLite, its round trips are statements.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import django
from django.conf import settings

ENGINES = {
    "cache on Redis": "django.contrib.sessions.backends.cache",
    "cached_db": "django.contrib.sessions.backends.cached_db",
    "db": "django.contrib.sessions.backends.db",
    "clustered": "django_clustered_sessions.backend",
}
DJANGO_MIDDLEWARE = "django.contrib.sessions.middleware.SessionMiddleware"
OUR_MIDDLEWARE = "django_clustered_sessions.middleware.ClusteredSessionMiddleware"


def configure(location: str, database: str) -> None:
    """Set Django up with the store at ``location`` and a database file."""
    settings.configure(
        SECRET_KEY="for a benchmark",
        ALLOWED_HOSTS=["*"],
        USE_TZ=True,
        ROOT_URLCONF="benchmarks.compare_urls",
        INSTALLED_APPS=[
            "django.contrib.auth",
            "django.contrib.contenttypes",
            "django.contrib.sessions",
            "django_clustered_sessions",
        ],
        DATABASES={
            "default": {
                "ENGINE": "django.db.backends.sqlite3",
                "NAME": database,
                "OPTIONS": {"timeout": 30, "transaction_mode": "IMMEDIATE"},
            }
        },
        CACHES={"default": {"BACKEND": "django_redis.cache.RedisCache", "LOCATION": location}},
        LOGGING={"version": 1, "disable_existing_loggers": True},
    )
    django.setup()


class Measured:
    """One engine on one store, measured."""

    def __init__(self, name: str, proxy: Any, store: Any) -> None:
        self.name = name
        self._proxy = proxy
        self._store = store

    @contextmanager
    def trips(self) -> Iterator[list[int]]:
        """Count round trips to the store and statements to the database."""
        from django.db import connection
        from django.test.utils import CaptureQueriesContext

        counted: list[int] = []
        self._proxy.reset()
        with CaptureQueriesContext(connection) as queries:
            yield counted
        statements = [q["sql"] for q in queries if "django_session" in q["sql"]]
        counted.append(self._proxy.round_trips + len(statements))

    def request(self, path: str, client: Any) -> int:
        """Return the round trips of one request."""
        with self.trips() as counted:
            client.get(path)
        return counted[0]

    def round_trips(self) -> dict[str, int]:
        """Return the round trips of each kind of request, on warm connections."""
        from django.contrib.auth.models import User
        from django.test import Client

        User.objects.get_or_create(username="visitor")
        found = {}
        for _ in range(2):  # the first round warms connections and scripts up
            client = Client()
            found["first write"] = self.request("/write", client)
            found["read"] = self.request("/read", client)
            found["change"] = self.request("/write", client)
            with settings_as(SESSION_SAVE_EVERY_REQUEST=True):
                found["sliding read"] = self.request("/read", client)
            found["login"] = self.request("/login", client)
            found["logout"] = self.request("/logout", client)
        return found

    def lost_updates(self) -> int:
        """Return what is left of 200 additions by eight threads at once."""
        from importlib import import_module

        store_class = import_module(settings.SESSION_ENGINE).SessionStore
        session = store_class()
        session["n"] = 0
        session.save()

        def add() -> None:
            from django.db import connection

            for _ in range(25):
                mine = store_class(session.session_key)
                if hasattr(mine, "increment"):
                    mine.increment("n")
                else:
                    mine["n"] += 1
                mine.save()
            connection.close()

        threads = [threading.Thread(target=add) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return int(store_class(session.session_key)["n"])

    def outage(self) -> str:
        """Return what a logged-in visitor gets while the store is away."""
        from django.test import Client

        client = Client(raise_request_exception=False)
        client.get("/login")
        self._proxy.refuse()
        try:
            response = client.get("/read")
        finally:
            self._proxy.accept()
        cookie = response.cookies.get("sessionid")
        logged_out = "cookie deleted" if cookie is not None and not cookie.value else "cookie kept"
        return f"{response.status_code}, {logged_out}"

    def bytes_per_session(self, count: int = 5000) -> int | None:
        """Return the bytes that a logged-in session takes in the store."""
        from importlib import import_module

        store_class = import_module(settings.SESSION_ENGINE).SessionStore
        self._store.execute_command("FLUSHALL", "SYNC")
        before = self._store.info("memory")["used_memory"]
        for number in range(count):
            session = store_class()
            session["_auth_user_id"] = str(number)
            session["_auth_user_backend"] = "django.contrib.auth.backends.ModelBackend"
            session["_auth_user_hash"] = os.urandom(32).hex()
            session.save()
        used = self._store.info("memory")["used_memory"] - before
        return round(used / count) if self.name != "db" else None


@contextmanager
def settings_as(**values: Any) -> Iterator[None]:
    """Change settings for a while."""
    from django.test import override_settings

    with override_settings(**values):
        yield


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return a Markdown table, an engine a column."""
    lines = [
        "| | " + " | ".join(rows) + " |",
        "|---|" + "---|" * len(rows),
    ]
    for what in next(iter(rows.values())):
        cells = (str(row[what]) for row in rows.values())
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measure(name: str, engine: str, proxy: Any, store: Any) -> dict[str, Any]:
    """Return all figures of one engine."""
    middleware = OUR_MIDDLEWARE if name == "clustered" else DJANGO_MIDDLEWARE
    stack = [middleware, "django.contrib.auth.middleware.AuthenticationMiddleware"]
    with settings_as(SESSION_ENGINE=engine, MIDDLEWARE=stack):
        measured = Measured(name, proxy, store)
        figures: dict[str, Any] = {
            f"round trips: {what}": trips for what, trips in measured.round_trips().items()
        }
        figures["200 additions by 8 threads"] = measured.lost_updates()
        if name != "db":
            figures["store away, logged in"] = measured.outage()
        else:
            figures["store away, logged in"] = "-"
        figures["bytes per logged-in session"] = measured.bytes_per_session() or "-"
        return figures


def main(show: Callable[[str], None] = print) -> None:
    """Start a store and a proxy, measure every engine, show the table."""
    from tempfile import TemporaryDirectory

    from django_clustered_sessions.embedded import bundled_binary
    from tests.servers import CountingProxy, StoreServer

    binary = bundled_binary()
    if binary is None:
        raise SystemExit("The comparison needs the extra 'embedded'.")
    with (
        TemporaryDirectory() as folder,
        StoreServer(binary=binary) as server,
        CountingProxy(server.port) as proxy,
        server.client() as store,
    ):
        configure(f"{proxy.url}/0", f"{folder}/db.sqlite3")
        from django.core.management import call_command

        call_command("migrate", verbosity=0)
        show(table({n: measure(n, e, proxy, store) for n, e in ENGINES.items()}))


if __name__ == "__main__":
    main()
