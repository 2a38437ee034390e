"""The Lua files: their headers tell the truth, and each is loaded as the store needs it."""

from __future__ import annotations

import re
from hashlib import sha1
from importlib.resources import files

import pytest

from django_clustered_sessions import commands, scripts
from django_clustered_sessions.commands import Call, Expiry, Terms
from django_clustered_sessions.fields import Change, Delta, Operation
from django_clustered_sessions.record import EndReason, Mode, Place

NAMES = sorted(
    path.name.removesuffix(".lua")
    for path in files("django_clustered_sessions").joinpath("lua").iterdir()
    if path.name != "prelude.lua"
)
PLACE = Place.of("p", "some key")
TERMS = Terms(1000, 0, 100, 4000, "merge")
EXPIRY = Expiry(Mode.DEFAULT, 0)
CHANGE = Change(Operation.SET, b"d:a", b"12345678", b"s1")

#: One call of each script, with one repetition where its arguments repeat.
CALLS: dict[str, Call] = {
    "create": commands.create(PLACE, b"12345678", EXPIRY, [(b"d:a", b"s1")], TERMS),
    "commit": commands.commit(PLACE, b"12345678", EXPIRY, Delta((CHANGE,), False), TERMS),
    "touch": commands.touch(PLACE, TERMS),
    "end": commands.end(PLACE, EndReason.FLUSHED),
    "rotate": commands.rotate(PLACE, Place.of("p", "new key"), b"12345678", TERMS),
    "stats": commands.stats("p:{000}:figures", "node", 0, [1]),
}


def header(name: str) -> str:
    source = scripts.read(name).decode()
    lines = source.splitlines()[1:]
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("--"))])


def body(name: str) -> str:
    return scripts.read(name).decode().split(header(name), 1)[1]


def documented(name: str, array: str) -> set[int]:
    return {int(number) for number in re.findall(rf"-- {array}\[(\d+)(?:\.\.)?\]", header(name))}


def test_every_script_has_a_builder():
    assert set(NAMES) == set(CALLS)


@pytest.mark.parametrize("name", NAMES)
def test_starts_with_the_line_that_makes_the_store_check_before_it_writes(name):
    assert scripts.script(name).source.startswith(b"#!lua")


@pytest.mark.parametrize("name", NAMES)
def test_header_says_purpose_keys_arguments_and_returns(name):
    text = header(name)
    assert re.match(r"-- [A-Z][^\n]+\.\n", text)
    assert documented(name, "KEYS") and documented(name, "ARGV")
    assert "-- Returns  {" in text


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_arguments_used_are_those_documented(name):
    code = body(name)
    for array in ("KEYS", "ARGV"):
        used = {int(number) for number in re.findall(rf"{array}\[(\d+)\]", code)}
        if f"#{array}" in code:
            used.add(max(documented(name, array)))
        assert used == documented(name, array)


@pytest.mark.parametrize("name", NAMES)
def test_the_builder_sends_what_the_header_documents(name):
    call = CALLS[name]
    assert len(call.keys) == max(documented(name, "KEYS"))
    last = max(documented(name, "ARGV"))
    if f"ARGV[{last}..]" in header(name):
        assert len(call.arguments) >= last
    else:
        assert len(call.arguments) == last


@pytest.mark.parametrize("name", NAMES)
def test_status_codes_returned_are_those_documented(name):
    statuses = {"DONE": 1, "GONE": 0, "EXISTS": -1, "CONFLICT": -2, "TOO_LARGE": -3, "NEWER": -4}
    code = body(name)
    returned = {
        statuses[word]
        for word in re.findall(r"\{(DONE|GONE|EXISTS|CONFLICT|TOO_LARGE|NEWER)\b", code)
    }
    if "why_not" in code:
        returned |= {statuses["GONE"], statuses["NEWER"]}
    told = {int(number) for number in re.findall(r"(?:Returns|--)  +\{(-?\d+),", header(name))}
    assert returned == told


@pytest.mark.parametrize("name", NAMES)
def test_every_key_is_passed_in_and_nothing_scans(name):
    code = scripts.script(name).source.decode()
    assert not re.search(r'redis\.call\("(KEYS|SCAN|EVAL)"', code)
    for argument in re.findall(r'redis\.call\("[A-Z]+", ([a-z_]+)', code):
        assert argument in {"record", "index", "old", "new", "old_index", "new_index", "figures"}


def test_python_and_lua_agree_on_the_statuses():
    prelude = scripts.read("prelude").decode()
    names, values = re.search(
        r"local (DONE, GONE, EXISTS, CONFLICT, TOO_LARGE, NEWER) = ([-\d, ]+)", prelude
    ).groups()
    lua = dict(zip(names.split(", "), map(int, values.split(", ")), strict=True))
    assert lua == {status.name: status.value for status in commands.Status}


def test_the_digest_is_the_one_the_store_computes(store):
    for name in NAMES:
        script = scripts.script(name)
        assert script.sha == sha1(script.source).hexdigest().encode()
        loaded = store.script_load(script.source)
        assert (loaded if isinstance(loaded, bytes) else loaded.encode()) == script.sha
