"""Two releases of the shop, as ``RELEASE`` says: settings, and what each keeps in a session.

Release 2 removes the key ``greeted`` of release 1, has dropped its ``theme``, and has a new key
``coupon``. A ``Theme`` and a ``Coupon`` are values that only the release with that class can read.
"""

from __future__ import annotations

import os
import pickle
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from django.http import HttpRequest, HttpResponse
from shop.health import leaving
from shop.settings import *  # noqa: F403
from shop.settings import MIDDLEWARE as _MIDDLEWARE

RELEASE = os.environ["RELEASE"]

MIDDLEWARE = [*_MIDDLEWARE, "tests.example.release.keys"]
SESSION_SERIALIZER = "tests.example.release.Pickled"

# Users log in by the dozen.
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]

# The machine that runs the tests may stand still for a while.
CLUSTERED_SESSIONS_STORE_TIMEOUT = 10.0

#: What a long request takes from SIGTERM on, in seconds: longer than DRAIN_S of gunicorn.conf.py.
LONG_S = 5.5

if RELEASE == "1":

    @dataclass
    class Theme:
        """Value that the old release keeps for each user."""

        name: str

    OWN_KEY, OTHER_KEY, OWN_VALUE = "theme", "coupon", Theme
else:

    @dataclass
    class Coupon:
        """Value that the new release keeps for each user."""

        code: str

    OWN_KEY, OTHER_KEY, OWN_VALUE = "coupon", "theme", Coupon


class Pickled:
    """A serialiser of values that name their class."""

    def dumps(self, obj: Any) -> bytes:
        return pickle.dumps(obj)

    def loads(self, data: bytes) -> Any:
        return pickle.loads(data)


def keys(get_response: Callable[[HttpRequest], HttpResponse]) -> Any:
    """Use the release's own keys in each request of a user, and look for the other one's.

    ``X-Value`` is the release's own value, which is made once for each user. A request that names a
    file in ``X-Long`` makes it, and takes until after its process has stopped to accept others:
    where only the test sees that, it makes a second file, whose name ends with ``.left``.
    """

    def middleware(request: HttpRequest) -> HttpResponse:
        value = None
        if request.user.is_authenticated:
            session = request.session
            if RELEASE == "1":
                session["greeted"] = True
            else:
                session.pop("greeted", None)
            session.get(OTHER_KEY)
            value = session.setdefault(OWN_KEY, OWN_VALUE(secrets.token_hex(4)))
        if path := request.headers.get("X-Long"):
            Path(path).touch()
            left = Path(path).with_suffix(".left")
            deadline = time.monotonic() + 60
            # Where the server tells nobody that it was told to leave, the test does.
            while not leaving.wait(0.05) and not left.exists() and time.monotonic() < deadline:
                pass
            # The rest of the work of a view that was under way when its node was told to leave.
            time.sleep(LONG_S)
        response = get_response(request)
        response["X-Release"] = RELEASE
        response["X-Value"] = repr(value)
        return response

    return middleware
