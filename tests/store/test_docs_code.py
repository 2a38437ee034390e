"""Code in README.md and docs/: settings pass the checks, examples run, templates compile."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import shlex
import subprocess
import sys
import textwrap
import types
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, NamedTuple

import httpx
import pytest
import redis
import yaml
from django.contrib.auth import get_user_model, update_session_auth_hash
from django.contrib.sessions.backends.base import UpdateError
from django.core.checks import ERROR
from django.core.management import get_commands, load_command_class
from django.http import HttpResponse
from django.template import engines
from django.test import RequestFactory
from django.urls import include, path
from django.utils.decorators import method_decorator
from django.views import View

from django_clustered_sessions import registry
from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.checks.settings import check_settings
from django_clustered_sessions.decorators import recent_login, session_locked
from tests.children import ROOT, finish, python
from tests.pages import block
from tests.servers import free_port, wait_for

#: Pages whose code has tests of its own: tests/request/test_recipes.py,
#: tests/example/test_tutorial.py and tests/store/test_pytest_plugin.py.
TESTED_ELSEWHERE: Final = {"recipes.md", "testing.md", "tutorial.md"}


class Block(NamedTuple):
    """A fenced block of a page: its language, its text, and the line where it begins."""

    language: str
    text: str
    place: str


def blocks() -> Iterator[Block]:
    for path_ in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = path_.read_text(encoding="utf-8")
        fence = re.compile(r"^( *)```(\S*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
        for found in fence.finditer(text):
            line = text[: found.start()].count("\n") + 1
            yield Block(found[2], textwrap.dedent(found[3]), f"{path_.name}:{line}")


def of(language: str) -> Any:
    """Return a mark that gives a test each block of a language."""
    found = [
        pytest.param(one.text, id=one.place)
        for one in blocks()
        if one.language == language
        and one.place.partition(":")[0] not in TESTED_ELSEWHERE
        # It serves for ever, so a test below runs it in a process of its own.
        and "start_http_server" not in one.text
    ]
    return pytest.mark.parametrize("text", found)


#: Entry of CACHES that an example leaves out.
LOCAL: Final = {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}

#: Languages that a test reads, and those that only browsers and other programs can.
KNOWN: Final = {"", "python", "html+django", "yaml", "json", "ini", "css", "javascript"} | {
    "{toctree}",
    "{include}",
    "{eval-rst}",
    # Without a language GitHub draws it as a picture.
    "mermaid",
}


def test_each_block_names_a_known_language() -> None:
    assert {one.language for one in blocks()} <= KNOWN


@pytest.fixture
def given(store: redis.Redis, settings: Any, db: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the names that examples take for granted."""
    monkeypatch.setenv("DJANGO_ALLOW_ASYNC_UNSAFE", "1")
    monkeypatch.setenv("SESSION_KEY_2026", "0" * 64)
    user = get_user_model().objects.create_user("ada")
    request = RequestFactory().get("/")
    request.user = user
    request.session = SessionStore()
    request.session.update({"cart": {}, "balance": 10, "used": [], "_auth_user_id": str(user.pk)})
    request.session.create()
    return {
        "CACHES": dict(settings.CACHES),
        "INSTALLED_APPS": [*settings.INSTALLED_APPS],
        "MIDDLEWARE": ["django.contrib.sessions.middleware.SessionMiddleware"],
        "View": View,
        "give_discount": lambda request: None,
        "include": include,
        "last_month": request.session.get_expiry_date() - timedelta(days=60),
        "method_decorator": method_decorator,
        "path": path,
        "price": 3,
        "public_id": request.session.public_id,
        "public_ids": [request.session.public_id],
        "registry": registry,
        "request": request,
        "reserve": list,
        "recent_login": recent_login,
        "session": request.session,
        "session_locked": session_locked,
        "slow_answer": HttpResponse,
        "update_session_auth_hash": update_session_auth_hash,
        "urlpatterns": [],
        "user": user,
    }


def run(text: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run an example, with ``await`` at its top, and return what it defines."""
    before = dict(names)
    code = compile(text, "example", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    if code.co_flags & inspect.CO_COROUTINE:
        asyncio.run(eval(code, names))
    else:
        exec(code, names)
    return {name: value for name, value in names.items() if before.get(name) is not value}


def complete(value: Any, default: Any) -> Any:
    """Put ``default`` in the place of each ``...``, and leave it out of lists."""
    if isinstance(value, dict):
        return {name: complete(item, default) for name, item in value.items()}
    if isinstance(value, list):
        return [item for item in value if item is not ...]
    return default if value in (..., {...}) else value


@of("python")
def test_python_runs(
    text: str, given: dict[str, Any], settings: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if "shop.routing" in text:
        routing = types.ModuleType("shop.routing")
        exec(block("channels.md", "class Prices"), routing.__dict__)
        monkeypatch.setitem(sys.modules, "shop", types.ModuleType("shop"))
        monkeypatch.setitem(sys.modules, "shop.routing", routing)
    defined = run(text, given)
    if logging_ := defined.pop("LOGGING", None):
        # In a process of its own, because it changes the loggers of all tests.
        code = f"import logging.config; logging.config.dictConfig({logging_!r})"
        with python("-c", code, cwd=tmp_path) as process:
            finish(process)
    named = {name: value for name, value in defined.items() if name.isupper()}
    for name, value in named.items():
        setattr(settings, name, complete(value, LOCAL))
    if named:
        settings.CLUSTERED_SESSIONS_NODE_NAME = "web-1"
        assert [found for found in check_settings() if found.level >= ERROR] == []
    request = given["request"]
    for function in defined.values():
        # Those that ask another site are run by tests/request/test_locking.py, against a real one.
        if inspect.isfunction(function) and "shop.example" not in text:
            if list(inspect.signature(function).parameters) != ["request"]:
                continue
            answer = function(request)
            if inspect.iscoroutine(answer):
                asyncio.run(asyncio.wait_for(answer, 30))
    if not named:
        # No middleware gives up the lock of a view that an example locks.
        with suppress(UpdateError):
            request.session.commit()


@of("html+django")
def test_templates_compile(text: str, db: None) -> None:
    engines["django"].from_string(text)


@of("yaml")
def test_yaml_can_be_read(text: str) -> None:
    assert yaml.safe_load(text)


def commands() -> Iterator[tuple[str, str]]:
    """Yield the commands of ``manage.py`` in the documentation, with their places."""
    for one in blocks():
        for line in one.text.splitlines() if not one.language else ():
            found = re.match(r"(?:\$ )?(?:python )?manage\.py (.*?)(?: *#.*| && .*| >.*)?$", line)
            if found:
                yield one.place, found[1]


@pytest.mark.parametrize(("place", "line"), list(commands()))
def test_commands_take_their_options(place: str, line: str) -> None:
    name, *arguments = shlex.split(line)
    command = load_command_class(get_commands()[name], name)
    command.create_parser("manage.py", name).parse_args(arguments)


def test_exporter_of_the_docs_serves_metrics(
    store: redis.Redis, settings: Any, tmp_path: Path
) -> None:
    session = SessionStore()
    session["n"] = 1
    session.save()
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "settings.py").write_text(
        f'SECRET_KEY = "not secret"\nINSTALLED_APPS = ["django_clustered_sessions"]\n'
        f"CACHES = {settings.CACHES!r}\nSESSION_CACHE_ALIAS = {settings.SESSION_CACHE_ALIAS!r}\n"
        f"SESSION_ENGINE = {settings.SESSION_ENGINE!r}\n"
    )
    port = free_port()
    (tmp_path / "exporter.py").write_text(
        block("monitoring.md", "start_http_server").replace("9108", str(port))
    )
    environment = {"DJANGO_SETTINGS_MODULE": "shop.settings", "PYTHONPATH": f"{ROOT}"}

    def metrics() -> str:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/metrics").text
        except httpx.TransportError:
            return ""

    with python("exporter.py", cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL):
        wait_for(lambda: "clustered_sessions_store_up 1.0" in metrics(), "metrics", timeout_s=30)
        assert 'clustered_sessions_sessions{kind="anonymous"} 1.0' in metrics()
