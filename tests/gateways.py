"""Browser for both protocols, and access to the store's records, for tests of whole requests."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from typing import Any

import pytest
import redis
from asgiref.sync import async_to_sync
from django.test import AsyncClient, Client
from django.urls import path

from django_clustered_sessions.conf import conf
from django_clustered_sessions.protocol.record import SessionKeys
from django_clustered_sessions.protocol.scripts import script
from django_clustered_sessions.session import replication

#: View of a test: synchronous or asynchronous.
View = Callable[..., Any]

#: Gateways that the ``browser`` of a module's tests may use.
GATEWAYS = ["wsgi", "asgi"]


def on(*cases: tuple[str, Any], name: str = "view") -> pytest.MarkDecorator:
    """Return a mark that gives each gateway a different value, if the two are independent.

    ``name`` is the name of the parameter; the fixture ``browser`` takes a gateway as parameter.
    """
    return pytest.mark.parametrize(("browser", name), cases, indirect=["browser"])


class Browser:
    """Browser that visits views with the same cookies, under WSGI or ASGI.

    Under ASGI each visit has an event loop of its own, as under ``async_to_sync`` anywhere, so
    that the database of the test is reached from its own thread. Errors become responses.
    """

    def __init__(self, settings: Any, *, asgi: bool = False) -> None:
        self.settings = settings
        self.asgi = asgi
        kind = AsyncClient if asgi else Client
        self.client: Any = kind(raise_request_exception=False)

    def visit(self, view: View, method: str = "get", **arguments: Any) -> Any:
        """Return the response of ``view`` as the site's only page."""
        self.settings.ROOT_URLCONF = (path("", view),)
        return self.request("/", method, **arguments)

    def request(self, url: str, method: str = "get", **arguments: Any) -> Any:
        """Return the response of the page under ``url``."""
        send = getattr(self.client, method)
        return async_to_sync(send)(url, **arguments) if self.asgi else send(url, **arguments)

    @property
    def key(self) -> str:
        """The session cookie's value, empty if there is none."""
        cookie = self.client.cookies.get(self.settings.SESSION_COOKIE_NAME)
        return cookie.value if cookie else ""

    @key.setter
    def key(self, value: str) -> None:
        self.client.cookies[self.settings.SESSION_COOKIE_NAME] = value

    def another_tab(self) -> Browser:
        """Return a browser with a copy of the current cookies."""
        other = Browser(self.settings, asgi=self.asgi)
        other.client.cookies.load(self.client.cookies.output(header="", sep=";"))
        return other


def place(session_key: str) -> SessionKeys:
    """Return the session's keys under the default KEY_PREFIX."""
    return SessionKeys.of("session", session_key)


def load_scripts(store: redis.Redis) -> None:
    """Load the scripts into the store, so that no request meets NOSCRIPT."""
    for file in files("django_clustered_sessions.protocol").joinpath("lua").iterdir():
        if file.read_bytes().startswith(b"#!lua"):
            store.script_load(script(file.name.removesuffix(".lua")).source)


def records(store: redis.Redis) -> list[bytes]:
    """Return the keys of all living records in the store."""
    keys = [key for key in store.scan_iter("session:*") if store.type(key) == b"hash"]
    return [key for key in keys if store.hexists(key, "m:")]


def wait_for_replicas(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let a write wait for its replicas so long, however long STORE_TIMEOUT is now."""
    monkeypatch.setattr(replication, "SHARE", seconds / conf.store_timeout)
