"""The Lua files: their headers tell the truth, and each is loaded as the store needs it."""

from __future__ import annotations

import re
from importlib.resources import files
from itertools import product

import pytest

from django_clustered_sessions.protocol import scripts
from django_clustered_sessions.protocol.changes import Change, Changes, Operation
from django_clustered_sessions.protocol.commands import (
    event_stream,
    lock_queue,
    records,
    replication,
    script_calls,
    statistics,
    users,
)
from django_clustered_sessions.protocol.effects import Call
from django_clustered_sessions.protocol.options import Expiry, Fence, LockOptions, WriteOptions
from django_clustered_sessions.protocol.record import NOBODY, Ages, EndReason, Mode, SessionKeys

#: Files that are no scripts: others are built on them.
INCLUDES = ["lock", "notes", "prelude", "queue", "removal", "write"]
FILES = sorted(
    path.name.removesuffix(".lua")
    for path in files("django_clustered_sessions.protocol").joinpath("lua").iterdir()
)
NAMES = [name for name in FILES if name not in INCLUDES]
PLACE = SessionKeys.of("p", "some key")
TERMS = WriteOptions(Ages(1000), 100, 4000, "merge")
LOCKING = LockOptions(10_000, 8000, 120_000, 16, b"node GET /")
HOLDER, WAITER = "1" * 16, "2" * 16
EXPIRY = Expiry(Mode.DEFAULT, 0)
CHANGE = Change(Operation.SET, b"d:a", b"12345678", b"s1")

#: One call of each script, with one repetition where its arguments repeat.
CALLS: dict[str, Call] = {
    "create": records.create(PLACE, b"12345678", EXPIRY, [(b"d:a", b"s1")], TERMS),
    "commit": records.commit(
        PLACE, b"12345678", EXPIRY, Changes((CHANGE,), False), TERMS, Fence(HOLDER)
    ),
    "touch": records.touch(PLACE, TERMS),
    "end": records.end(PLACE, EndReason.FLUSHED, 0),
    "rotate": records.rotate(PLACE, SessionKeys.of("p", "new key"), b"12345678", TERMS),
    "rekey": records.rekey(PLACE, {b"d:a": (b"12345678s1", b"12345678e1")}),
    "leave": records.leave(PLACE, b"12345678", b"87654321", SessionKeys.of("p", "new key"), TERMS),
    "stats": statistics.stats("p:{000}", "node", 0, [1]),
    "acquire": lock_queue.acquire(PLACE, WAITER, LOCKING, 10_000, HOLDER),
    "release": lock_queue.release(PLACE, WAITER),
    "fetch": records.fetch(PLACE, b"12345678")[0],
    "owned": users.owned("p", 0, b"usertag8"),
    "claim": users.claim("p", b"usertag8", PLACE.id, 3, 60_000, [PLACE.id], [b"other"]),
    "unlist": users.unlist(PLACE, b"usertag8", 0),
    "adopt": records.adopt(PLACE, b"12345678", EXPIRY, [(b"d:a", b"s1")], TERMS, NOBODY, 1, 2),
    "sweep": event_stream.sweep("p", 0, 10),
    "take": event_stream.take("p", 0, 10, 60_000),
    "renew": lock_queue.renew(PLACE, WAITER, 8000, 120_000),
}


def header(name: str) -> str:
    source = scripts.read(name).decode()
    lines = source.splitlines()[1:]
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("--"))])


def body(name: str) -> str:
    return scripts.read(name).decode().split(header(name), 1)[1]


def documented(name: str, array: str) -> set[int]:
    return {int(number) for number in re.findall(rf"-- {array}\[(\d+)(?:\.\.)?\]", header(name))}


def functions(name: str) -> dict[str, str]:
    """Return a file's functions: name -> text."""
    parts = re.split(r"^local function (\w+)", scripts.read(name).decode(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_each_script_has_a_builder():
    assert set(NAMES) == set(CALLS)


def test_scripts_and_no_includes_begin_with_a_shebang():
    """With it the store checks before the script runs whether writes are possible."""
    for name in FILES:
        assert scripts.read(name).startswith(b"#!lua") == (name not in INCLUDES), name
    for name in NAMES:
        assert scripts.script(name).source.startswith(b"#!lua"), name


def declared(name: str) -> set[str]:
    """Return the names of functions and values that a file declares for those that include it."""
    code = scripts.read(name).decode()
    lists = re.findall(r"^local (?!function)([\w, ]+) =", code, re.MULTILINE)
    return {*functions(name), *(each for names in lists for each in names.split(", "))}


def test_scripts_include_what_they_use_and_nothing_else():
    for name, include in product(NAMES, INCLUDES):
        code = re.sub(r"--.*", "", scripts.read(name).decode())
        code = re.sub(r"^local function.*", "", re.sub(r'"[^"]*"', "", code), flags=re.MULTILINE)
        used = declared(include) & set(re.findall(r"(?<![.\w])\w+", code)) - declared(name)
        included = re.search(rf"^ *-- Includes: {include}$", scripts.read(name).decode(), re.M)
        assert bool(included) == bool(used), (name, include, used)
        assert f"-- Includes: {include}\n".encode() not in scripts.script(name).source


def test_headers_say_purpose_keys_arguments_and_returns():
    for name in NAMES:
        text = header(name)
        assert re.match(r"-- [A-Z][^\n]+\.\n", text), name
        assert documented(name, "KEYS") and documented(name, "ARGV"), name
        assert "-- Returns  {" in text, name


@pytest.mark.parametrize("name", FILES)
def test_header_documents_the_keys_and_arguments_used(name):
    code = body(name) if name in NAMES else scripts.read(name).decode()
    for array in ("KEYS", "ARGV"):
        used = {int(number) for number in re.findall(rf"{array}\[(\d+)\]", code)}
        if f"#{array}" in code:
            used.add(max(documented(name, array)))
        assert used == (documented(name, array) if name in NAMES else set())


@pytest.mark.parametrize("name", NAMES)
def test_builder_sends_what_the_header_documents(name):
    call = CALLS[name]
    assert len(call.keys) == max(documented(name, "KEYS"))
    last = max(documented(name, "ARGV"))
    if f"ARGV[{last}..]" in header(name):
        assert len(call.arguments) >= last
    else:
        assert len(call.arguments) == last


#: What functions that several scripts share may return in a script's place.
SHARED_REPLIES = {"read_meta": {"GONE", "NEWER"}, "refuse": {"HELD", "LOST"}}


def statuses(code: str) -> set[str]:
    return set(re.findall(r"\{([A-Z_]+)\b", code)) & script_calls.Status.__members__.keys()


def test_shared_functions_return_the_statuses_assumed():
    for include in INCLUDES:
        for name, code in functions(include).items():
            assert statuses(code) == SHARED_REPLIES.get(name, set())


@pytest.mark.parametrize("name", NAMES)
def test_header_documents_the_statuses_returned(name):
    code = body(name)
    returned = statuses(code)
    # ``return why_not``, ``return refusal``: the second value of the one, the value of the other.
    for function, replies in SHARED_REPLIES.items():
        for reply in re.findall(rf"local (?:meta, )?(\w+) = {function}\(", code):
            if re.search(rf"return {reply}$", code, re.MULTILINE):
                returned |= replies
    told = {int(number) for number in re.findall(r"(?:Returns|--)  +\{(-?\d+),", header(name))}
    assert {script_calls.Status[word] for word in returned} == told


def keys_used(code: str) -> set[str]:
    # Some commands have words, or the group of a stream, before their key.
    before = r'(?:XREADGROUP"[^)]*"STREAMS|X(?:GROUP|INFO)", "[A-Z]+|[A-Z]+)'
    return set(re.findall(rf'redis\.call\("{before}",\s+([^,)]+)', code))


def test_no_script_scans_or_catches_errors():
    for name in FILES:
        code = scripts.read(name).decode()
        assert not re.search(r'redis\.p?call\("(KEYS|SCAN|EVAL)', code), name
        assert 'redis.pcall("' not in code, name


@pytest.mark.parametrize("name", NAMES)
def test_scripts_use_only_keys_passed_in(name):
    code = body(name)
    passed = {
        key
        for keys, values in re.findall(r"^local ([\w, ]+) = ((?:KEYS\[\d+\],? ?)+)$", code, re.M)
        for key, value in zip(keys.split(", "), values.split(", "), strict=True)
    }
    assert len(passed) == len(documented(name, "KEYS"))
    either = re.findall(r"^ *local (\w+) = .* and (\w+) or (\w+)$", code, re.MULTILINE)
    assert keys_used(code) <= passed | {key for key, *keys in either if passed.issuperset(keys)}
    assert not re.findall(rf"^ *(?:local )?(?:{'|'.join(passed)}) = (?!KEYS)", code, re.MULTILINE)


@pytest.mark.parametrize("name", INCLUDES)
def test_includes_use_only_keys_passed_on(name):
    for function, code in functions(name).items():
        parameters = set(re.match(r"\((.*)\)", code)[1].split(", "))
        assert keys_used(code) <= parameters, function
        for key in keys_used(code):
            assert not re.search(rf"^ *(?:local )?{key} =", code, re.MULTILINE)


def test_python_and_lua_agree_on_the_statuses():
    prelude = scripts.read("prelude").decode()
    lua = {}
    for names, values in re.findall(r"^local ([A-Z_, ]+) = ([-\d, ]+)$", prelude, re.MULTILINE):
        lua |= dict(zip(names.split(", "), map(int, values.split(", ")), strict=True))
    del lua["FORMAT"], lua["ID_BYTES"]
    assert lua == {status.name: status.value for status in script_calls.Status}
    (told,) = re.findall(r"starts with a status: (.*?); then", prelude, re.DOTALL)
    assert sorted(map(int, re.findall(r"-?\d+", told))) == sorted(script_calls.Status)


def test_touch_is_relied_on_where_it_always_writes():
    terms = TERMS._replace(events_kept=1)
    assert replication.relied_on((records.touch(PLACE, terms, always=True),)) == 0
    assert replication.relied_on((records.touch(PLACE, terms),)) is None
