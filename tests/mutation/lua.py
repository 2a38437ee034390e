"""Mutants of the Lua scripts, made line by line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from .mutants import Mutant, changed

#: A string, which may look like code inside; or a comment up to the line's end.
_TOKEN: Final = re.compile(r'"(?:\\.|[^"\\])*"|--.*|\d+|[<>=~]=|[<>]|[\w.]+|[^\w\s]')

_SWAPS: Final = {
    "==": ("equality", "~="),
    "~=": ("equality", "=="),
    "<": ("comparison", "<="),
    "<=": ("comparison", "<"),
    ">": ("comparison", ">="),
    ">=": ("comparison", ">"),
    "and": ("junction", "or"),
    "or": ("junction", "and"),
    "not": ("negation", ""),
    "true": ("boolean", "false"),
    "false": ("boolean", "true"),
    "+": ("arithmetic", "-"),
    "-": ("arithmetic", "+"),
    "break": ("break", ""),
}

_CONDITION: Final = re.compile(r"\s*(?:else)?if (.+) then$")

#: A call, or an assignment to what is declared already.
_STATEMENT: Final = re.compile(
    r"(?!(?:local|return|for|while|function|and|or)\b)[\w.\[\]#+ ,]+( = [^{].*|\(.*\))$"
)

#: The end of a line that goes on.
_OPEN: Final = re.compile(r"(?:[,=({+*/-]|\.\.|\band|\bor)$")


def mutants(file: str, source: str) -> Iterator[Mutant]:
    """Yield every mutant of a script."""
    offset = 0
    is_whole = True
    for line in source.splitlines(keepends=True):
        code = line.rstrip()
        if not code.lstrip().startswith(("--", "#!")):
            was_whole, is_whole = is_whole, not _OPEN.search(code)
            if was_whole and is_whole and code.count("(") == code.count(")"):
                yield from _whole(file, source, offset, code)
            for token in _TOKEN.finditer(code):
                yield from _one(file, source, offset, token)
        offset += len(line)


def _whole(file: str, source: str, offset: int, code: str) -> Iterator[Mutant]:
    """Yield the mutants of a whole line: a condition turned round, a statement removed."""
    if condition := _CONDITION.match(code):
        start, end = (offset + at for at in condition.span(1))
        yield changed(file, source, start, end, f"not ({condition[1]})", kind="condition")
    elif _STATEMENT.match(code.lstrip()):
        start = offset + len(code) - len(code.lstrip())
        yield changed(file, source, start, offset + len(code), "", kind="statement")


def _one(file: str, source: str, offset: int, token: re.Match[str]) -> Iterator[Mutant]:
    """Yield the mutants of one token."""
    text = token[0]
    start, end = (offset + at for at in token.span())
    # With nothing before it, a minus is a sign.
    is_sign = text == "-" and not re.search(r"[\w)\]] $", token.string[: token.start()])
    if text.isdigit():
        yield changed(file, source, start, end, str(int(text) + 1), kind="number")
    elif text in _SWAPS and not is_sign:
        kind, other = _SWAPS[text]
        yield changed(file, source, start, end, other, kind=kind)
    elif text.startswith('"'):
        yield changed(file, source, start, end, '"X"' if text == '""' else '""', kind="string")
