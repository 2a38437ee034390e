"""What becomes of updates at the same time, and of a visitor while the store is away."""

from __future__ import annotations

import threading
from importlib import import_module
from typing import Any, Final

from django.conf import settings

from .engines import Engine
from .scenarios import LOGGED_IN

THREADS: Final = 8


def additions_left(engine: Engine, additions: int) -> int:
    """Return what is left when each of THREADS threads adds one to one value so many times.

    They do it by ``increment()`` where there is one, else by ``session["n"] += 1``.
    """
    engine.use()
    store_class = import_module(engine.module).SessionStore
    key = engine.save({"n": 0})

    def add() -> None:
        from django.db import connection

        for _ in range(additions):
            session = store_class(key)
            if hasattr(session, "increment"):
                session.increment("n")
            else:
                session["n"] += 1
            session.save()
        connection.close()

    threads = [threading.Thread(target=add) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return int(store_class(key)["n"])


def answer_without_store(engine: Engine, proxy: Any) -> str:
    """Return what a logged-in visitor gets from a whole site while the store is away.

    The engine has to be pointed at the proxy.
    """
    from django.test import Client, override_settings

    with override_settings(MIDDLEWARE=[engine.middleware]):
        engine.use()
        client = Client(raise_request_exception=False)
        client.cookies[settings.SESSION_COOKIE_NAME] = engine.save(LOGGED_IN)
        proxy.refuse()
        try:
            response = client.get("/read")
        finally:
            proxy.accept()
    cookie = response.cookies.get(settings.SESSION_COOKIE_NAME)
    is_logged_out = cookie is not None and not cookie.value
    return f"{response.status_code}, {'cookie deleted' if is_logged_out else 'cookie kept'}"
