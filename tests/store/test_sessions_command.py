"""``manage.py sessions``: what it prints, asks, ends, and its exit codes."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime, timedelta
from secrets import token_hex
from typing import Any

import pytest
import redis
from django.conf import settings as django_settings
from django.contrib.auth.models import User
from django.core.management import call_command
from django.core.management.base import CommandError

from django_clustered_sessions import registry
from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.protocol.record import SessionKeys, session_id
from tests.children import python

USAGE, NONE, SEVERAL, DECLINED = 2, 3, 4, 5


def new(user: str | None = None) -> str:
    """Return the id of a new session."""
    session = SessionStore()
    session["x"] = 1
    if user:
        session["_auth_user_id"] = user
    session.save()
    return session_id(session.session_key or "")


def ids() -> set[str]:
    return {one.id for one in registry.matching()}


def run(*arguments: str, answer: str | None = None, monkeypatch: Any = None) -> tuple[str, str]:
    """Run the command; return what it writes on standard output and on standard error."""
    stdout, stderr = io.StringIO(), io.StringIO()
    if answer is not None:
        monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
    call_command("sessions", *arguments, stdout=stdout, stderr=stderr)
    return stdout.getvalue(), stderr.getvalue()


def refused(*arguments: str, **options: Any) -> tuple[int, str]:
    with pytest.raises(CommandError) as caught:
        run(*arguments, **options)
    return caught.value.returncode, str(caught.value)


def seen_days_ago(store: redis.Redis, public_id: str, days: int) -> None:
    record = SessionKeys.of_id("session", public_id).record
    packed = store.hget(record, "m:")
    at_ms = int((datetime.now(UTC) - timedelta(days=days)).timestamp() * 1000)
    store.hset(record, "m:", packed[:32] + at_ms.to_bytes(6) + packed[38:])


def test_list_has_a_line_for_each_session(store: Any) -> None:
    first, second = new("7"), new()
    stdout, stderr = run("list")
    heading, *lines = stdout.splitlines()
    assert heading.split()[:2] == ["session", "last"]
    assert {line[:12] for line in lines} == {first[:12], second[:12]}
    assert stderr == "2 sessions found.\n"
    assert run("list", "--created-before", "1h") == ("", "0 sessions found.\n")


def test_list_as_json_is_one_document(store: Any, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_TRACK_CLIENTS = True
    public_id = new("7")
    record = SessionKeys.of_id("session", public_id).record
    store.hset(record, b"m:last", b'["10.0.0.7","Lynx"]')
    new()
    stdout, _ = run("list", "--format", "json")
    (one,) = (one for one in json.loads(stdout) if one["user_id"])
    assert one["id"] == public_id
    assert one["last"] == {"address": "10.0.0.7", "user_agent": "Lynx"}
    assert datetime.fromisoformat(one["expires"]) > datetime.now(UTC)
    stdout, _ = run("list", "--address", "10.0.0.0/8", "--format", "json")
    assert [one["id"] for one in json.loads(stdout)] == [public_id]
    assert json.loads(run("list", "--address", "::1", "--format", "json")[0]) == []


def test_show_finds_a_session_by_its_start(store: Any) -> None:
    public_id = new("7")
    assert public_id in run("show", public_id[:12])[0]
    assert json.loads(run("show", public_id, "--format", "json")[0])["user_id"] == "7"
    assert refused("show", "A" * 12)[0] == NONE
    assert refused("show", "abc")[0] == USAGE


def test_start_of_several_ids_is_refused_with_a_list(store: Any) -> None:
    seen: dict[str, str] = {}
    for n in range(10**6):
        key = f"{n:032x}"
        start = session_id(key)[:4]
        if (other := seen.setdefault(start, key)) != key:
            break
    for each in (key, other):
        SessionStore(each).save(must_create=True)
    for action in (["show"], ["end", "--yes"]):
        stderr = io.StringIO()
        with pytest.raises(CommandError, match="2 sessions have ids that begin with") as caught:
            call_command("sessions", *action, start, stderr=stderr)
        assert caught.value.returncode == SEVERAL
        assert session_id(key)[:12] in stderr.getvalue()
        assert session_id(other)[:12] in stderr.getvalue()
    assert len(ids()) == 2


@pytest.mark.parametrize("answer", ["", "\n", "n\n", "yeah\n"])
def test_nothing_ends_without_a_yes(store: Any, monkeypatch: Any, answer: str) -> None:
    public_id = new()
    for which in (["--all"], [public_id[:12]]):
        code, text = refused("end", *which, answer=answer, monkeypatch=monkeypatch)
        assert (code, text) == (DECLINED, "nothing was ended.")
    assert ids() == {public_id}


def test_end_tells_how_many_and_asks(store: Any, monkeypatch: Any) -> None:
    for _ in range(3):
        new()
    stdout, stderr = run("end", "--all", answer="y\n", monkeypatch=monkeypatch)
    assert stderr.startswith("End 3 sessions?")
    assert stdout == "3 sessions ended.\n"
    assert ids() == set()


def test_end_by_start_ends_that_session_only(store: Any) -> None:
    first, second, other = new(), new(), new()
    assert refused("end", first[:12], "A" * 12, "--yes")[0] == NONE
    assert ids() == {first, second, other}
    stdout, stderr = run("end", first[:12], second[:12], first, "--yes")
    assert stdout == "2 sessions ended.\n"
    assert first[:12] in stderr
    assert ids() == {other}


def test_end_by_filter_ends_what_fits(store: redis.Redis) -> None:
    idle, fresh = new(), new()
    seen_days_ago(store, idle, 40)
    stdout, _ = run("end", "--idle-since", "30d", "--yes", "--format", "json")
    assert json.loads(stdout) == {"matched": 1, "ended": 1}
    assert ids() == {fresh}
    assert refused("end", "--idle-since", "30d", "--yes") == (NONE, "no session fits.")


@pytest.mark.parametrize("which", [[], ["--all", "--idle-since", "1d"], ["AAAA", "--all"]])
def test_end_needs_to_know_which_sessions(store: Any, which: list[str]) -> None:
    public_id = new()
    assert refused("end", *which, "--yes")[0] == USAGE
    assert ids() == {public_id}


@pytest.mark.parametrize("time", ["yesterday", "2026-13-01", "3w", "d", "999999999d", ""])
def test_time_that_is_none_is_refused(store: Any, time: str) -> None:
    with pytest.raises(CommandError, match="is no time"):
        run("list", "--idle-since", time)


@pytest.mark.parametrize("time", ["2020-01-01", "2020-01-01T12:00", "2020-01-01 12:00+02:00", "9d"])
def test_times_in_their_forms(store: Any, time: str) -> None:
    new()
    assert run("list", "--created-before", time)[1] == "0 sessions found.\n"


def test_address_needs_the_setting_and_a_network(store: Any, settings: Any) -> None:
    assert refused("list", "--address", "10.0.0.1")[0] == USAGE
    settings.CLUSTERED_SESSIONS_TRACK_CLIENTS = True
    assert refused("list", "--address", "home")[0] == USAGE


@pytest.mark.django_db
def test_user_is_named_or_given_by_primary_key(store: Any) -> None:
    ada = User.objects.create_user("ada")
    hers, gone = new(str(ada.pk)), new("4711")
    for named in ("ada", str(ada.pk)):
        assert [line[:12] for line in run("list", "--user", named)[0].splitlines()[1:]] == [
            hers[:12]
        ]
    assert run("end", "--user", "4711", "--yes")[0] == "1 session ended.\n"
    assert gone not in ids()
    assert run("list", "--user", "nobody")[1] == "0 sessions found.\n"
    User.objects.create_user(str(ada.pk))
    code, text = refused("list", "--user", str(ada.pk))
    assert code == USAGE
    assert "'ada'" in text


def test_store_that_is_away_is_an_error(settings: Any) -> None:
    settings.CACHES = {
        "default": {
            "BACKEND": "django_redis.cache.RedisCache",
            "LOCATION": "unix:///nonexistent/store.sock",
        }
    }
    settings.SESSION_CACHE_ALIAS = "default"
    for arguments in (["list"], ["show", "AAAA"], ["end", "--all", "--yes"]):
        assert refused(*arguments)[0] == 1


def test_output_has_no_session_key_and_no_control_characters(store: Any) -> None:
    session = SessionStore()
    session["_auth_user_id"] = "7\x1b[31m\nforged"
    session.save()
    key = str(session.session_key)
    public_id = session_id(key)
    texts = [*run("list"), run("list", "--format", "json")[0], *run("show", public_id)]
    assert not any(key in text for text in texts)
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", "".join(texts))
    assert "7?[31m?forged" in texts[0]


def many(store: redis.Redis, number: int) -> None:
    """Create sessions."""
    record = store.dump(SessionKeys.of_id("session", new()).record)
    pipe = store.pipeline(transaction=False)
    for _ in range(number - 1):
        keys = SessionKeys.of("session", token_hex(16))
        pipe.restore(keys.record, 0, record)
        pipe.zadd(keys.index, {keys.id: -(10**13)})
    pipe.execute()


CHILD = """
import os, sys
os.environ["DJANGO_SETTINGS_MODULE"] = "tests.settings"
from django.conf import settings
settings.CACHES["sessions"]["LOCATION"] = os.environ["STORE_URL"]
from django.core.management import execute_from_command_line
execute_from_command_line(["manage.py", "sessions", *sys.argv[1:]])
"""


def running(*arguments: str, **streams: int) -> AbstractContextManager[subprocess.Popen[str]]:
    location = django_settings.CACHES["sessions"]["LOCATION"]
    return python("-c", CHILD, *arguments, env=os.environ | {"STORE_URL": location}, **streams)


def test_list_broken_off_says_so(store: redis.Redis) -> None:
    many(store, 3000)
    with running("list") as process:
        # It has more to say than the pipe takes.
        assert process.stdout
        assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()
    assert process.returncode == 130
    told = re.fullmatch(r"Broken off after ([0-9,]+) sessions: there may be more\.\n", stderr)
    assert told
    assert int(told[1].replace(",", "")) < 3000


def test_reader_that_goes_away_is_no_error(store: redis.Redis) -> None:
    many(store, 3000)
    with running("list") as process:
        assert process.stdout
        assert process.stdout.readline()
        process.stdout.close()
        process.stdout = None
        _, stderr = process.communicate()
    assert (process.returncode, stderr) == (0, "")


def test_question_broken_off_ends_nothing(store: redis.Redis) -> None:
    public_id = new()
    with running("end", "--all", stdin=subprocess.PIPE) as process:
        assert process.stderr
        assert process.stderr.read(14) == "End 1 session?"
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()
    assert process.returncode == 130
    assert stderr.endswith("Broken off: nothing was ended.\n")
    assert ids() == {public_id}


@pytest.mark.parametrize("arguments", [["lost"], [], ["list", "--idle-since", "lately"], ["show"]])
def test_wrong_usage_is_exit_code_two(store: redis.Redis, arguments: list[str]) -> None:
    with running(*arguments) as process:
        process.communicate()
    assert process.returncode == USAGE


@pytest.mark.parametrize("start", ["-[^-]", "--"])
def test_id_that_begins_with_a_hyphen_is_no_option(store: redis.Redis, start: str) -> None:
    keys = (f"{n:032x}" for n in range(10**6))
    key = next(key for key in keys if re.match(start, session_id(key)))
    public_id = session_id(key)
    SessionStore(key).save(must_create=True)
    assert public_id in run("show", public_id[:12])[0]
    for arguments in (["show", public_id], ["end", "--yes", public_id[:12]]):
        with running(*arguments) as process:
            _, stderr = process.communicate()
        assert process.returncode == 0, stderr
    assert ids() == set()


def test_exit_codes_reach_the_shell(store: redis.Redis) -> None:
    for arguments, code in ((["show", "A" * 12], NONE), (["list"], 0)):
        with running(*arguments) as process:
            process.communicate()
        assert process.returncode == code


def test_progress_is_shown_on_a_terminal_only(store: redis.Redis) -> None:
    many(store, 300)
    ours, theirs = pty.openpty()
    try:
        with running("end", "--all", "--yes", stderr=theirs) as process:
            os.close(theirs)
            stdout, _ = process.communicate()
        shown = b""
        with suppress(OSError):
            while some := os.read(ours, 65536):
                shown += some
    finally:
        os.close(ours)
    assert stdout == "300 sessions ended.\n"
    assert b"ending" in shown
    assert b"300/300" in shown
