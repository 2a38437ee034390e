"""First words of docstrings: an imperative verb, or the noun that the thing is."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.children import ROOT

#: Words that begin a riddle: the reader learns last what the thing is.
FORBIDDEN: Final = frozenset(
    {"if", "so", "what", "whatever", "when", "where", "whether", "which"}
    | {"who", "whoever", "whom", "whose", "why", "how", "while"}
)

PACKAGE: Final = ROOT / "django_clustered_sessions"
TESTS: Final = ROOT / "tests"
MODULES: Final = sorted([*PACKAGE.rglob("*.py"), *TESTS.rglob("*.py")])


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of the docstrings of a module, its classes and its functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None:
                yield node.body[0].lineno, text


def riddles(source: str) -> list[str]:
    """Return the docstrings that begin with a forbidden word, each with its line."""
    return [
        f"{line}: {text.splitlines()[0]}"
        for line, text in docstrings(source)
        if (word := re.search(r"\w+", text)) and word[0].lower() in FORBIDDEN
    ]


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_begin_with_a_verb_or_a_noun(module: Path) -> None:
    assert riddles(module.read_text("utf-8")) == []


def test_a_forbidden_first_word_is_found_with_its_line() -> None:
    source = '"""Things."""\n\nclass A:\n    async def b(self):\n        """Whose it is."""\n'
    assert riddles(source) == ["5: Whose it is."]
