"""The runbook quotes log lines as the code writes them, and commands that there are."""

from __future__ import annotations

import ast
import logging
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
import redis
from redis.exceptions import ConnectionError, ResponseError

import django_clustered_sessions
from django_clustered_sessions.exceptions import (
    ClusteredSessionError,
    SessionConflict,
    SessionLimitReached,
    SessionLockLost,
    SessionLockRefused,
    SessionLockTimeout,
)
from django_clustered_sessions.session.error_responses import answer_to
from django_clustered_sessions.store.errors import unavailable
from tests.children import bound
from tests.conftest import require
from tests.pages import page
from tests.servers import StoreServer

PACKAGE: Final = Path(django_clustered_sessions.__file__).parent

#: Errors whose answers the runbook quotes; what a store says is by the store.
ERRORS: Final[list[ClusteredSessionError]] = [
    unavailable(ConnectionError("Error 111 connecting to 10.0.0.1:6379. Connection refused.")),
    unavailable(ResponseError("OOM command not allowed when used memory > 'maxmemory'.")),
    unavailable(ResponseError("CLUSTERDOWN The cluster is down")),
    unavailable(ResponseError("TRYAGAIN Multiple keys request during rehashing of slot")),
    SessionLockLost("a" * 43, "web-2 POST /checkout/"),
    SessionConflict("a" * 43, ["cart"]),
    SessionLockRefused("a" * 43, "web-1", 2.5, "16 requests wait for it already", "Advice."),
    SessionLockTimeout("a" * 43, "web-1", 2.5, "waited 10.0 s in vain", "Advice."),
    SessionLimitReached(3),
]


def quoted() -> list[str]:
    """Return the lines of the runbook's blocks: log lines, and commands after ``$``."""
    found = re.findall(r"^```\n(.*?)^```$", page("runbook.md"), re.DOTALL | re.MULTILINE)
    return [line for text in found for line in text.splitlines()]


def log_lines() -> list[str]:
    return [line for line in quoted() if not line.startswith("$ ")]


def redis_commands() -> list[list[str]]:
    """Return the arguments of each ``redis-cli`` with which the runbook asks a store."""
    found = [line.removeprefix("$ redis-cli ") for line in quoted() if "$ redis-cli " in line]
    return [shlex.split(re.sub(r"-[hp] \S+ ", "", line)) for line in found]


def texts() -> Iterator[str]:
    """Yield the texts in the package's source, with ``...`` for what they are filled with."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(
                    str(part.value) if isinstance(part, ast.Constant) else "..."
                    for part in node.values
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.sub(r"%(\.\d)?[sdrf]", "...", node.value)


def answers(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what the log says of the answers to the errors."""
    caplog.set_level(logging.WARNING, "django_clustered_sessions")
    for error in ERRORS:
        error.is_answered = False
        answer_to(error)
    return [record.getMessage() for record in caplog.records]


def test_log_lines_are_as_the_code_writes_them(caplog: pytest.LogCaptureFixture) -> None:
    written, known = answers(caplog), set(texts())
    problem = "has had its lock for longer than CLUSTERED_SESSIONS_LOCK_MAX_HOLD"
    assert problem in known
    for line in log_lines():
        pattern = re.escape(line).replace(re.escape("..."), ".+")
        is_answer = any(re.fullmatch(pattern, one) for one in written)
        # The renewal of leases puts two texts together.
        assert is_answer or {line, line.replace(problem, "...")} & known, line


def test_each_answer_with_an_error_has_its_line(caplog: pytest.LogCaptureFixture) -> None:
    patterns = [re.escape(line).replace(re.escape("..."), ".+") for line in log_lines()]
    for one in answers(caplog):
        assert any(re.fullmatch(pattern, one) for pattern in patterns), one


def test_words_of_a_refusal_are_those_that_the_code_knows() -> None:
    table = page("runbook.md").partition("| the line has")[2].partition("\n\n")[0]
    words = set(re.findall(r"^\| (`[A-Z].*?`) \|", table, re.MULTILINE))
    words = {word for found in words for word in re.findall(r"`([A-Z]+)`", found)}
    assert len(words) == 10 and words <= set(texts())


def test_commands_for_the_store_exist(store: redis.Redis, tmp_path: Path) -> None:
    asked = [words for words in redis_commands() if not words[0].startswith("-")]
    assert len(asked) > 10
    config = "sentinel monitor main 127.0.0.1 1 1\n"
    with StoreServer("--sentinel", config=config) as sentinel, sentinel.client() as sentinels:
        for name, *rest in asked:
            client = sentinels if name == "SENTINEL" else store
            # Others have arguments in place of subcommands.
            is_one_of_many = name in {"CLUSTER", "CONFIG", "SENTINEL", "SLOWLOG"}
            full = f"{name}|{rest[0]}" if is_one_of_many else name
            assert client.execute_command("COMMAND DOCS", full), full


def test_options_of_redis_cli_exist() -> None:
    program = require(shutil.which("redis-cli"), "redis-server")
    done = subprocess.run(
        bound([program, "--help"]), capture_output=True, text=True, timeout=30, check=False
    )
    options = {word for words in redis_commands() for word in words if word.startswith("--")}
    assert options and all(option in done.stdout + done.stderr for option in options)
