"""Pages of the documentation, for tests that read them."""

from __future__ import annotations

import re
from typing import Any, Final

from tests.children import ROOT

DOCS: Final = ROOT / "docs"


def page(name: str) -> str:
    """Return the text of a page of ``docs/``."""
    return (DOCS / name).read_text(encoding="utf-8")


def block(name: str, word: str) -> str:
    """Return the only code block of a page that contains a word."""
    (found,) = (
        text
        for text in re.findall(r"^```\w*\n(.*?)^```$", page(name), re.DOTALL | re.MULTILINE)
        if word in text
    )
    return str(found)


def shape(value: Any) -> Any:
    """Reduce JSON to its names and kinds; all items of a list have one shape."""
    if isinstance(value, dict):
        return [(name, shape(item)) for name, item in value.items()]
    if isinstance(value, list):
        return [shape(item) for item in value[:1]]
    return type(value)
