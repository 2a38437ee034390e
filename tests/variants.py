"""A defect that a test has to find: the package's own text with a change."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import NamedTuple


class Variant(NamedTuple):
    """In a module of the package, ``new`` replaces ``old``."""

    module: str
    old: str
    new: str

    def apply(self) -> None:
        """Run the module's text with the change, for the rest of this process."""
        module = importlib.import_module(f"django_clustered_sessions.{self.module}")
        text = Path(module.__file__ or "").read_text("utf-8")
        assert text.count(self.old) == 1, f"the variant does not fit the module: {self.old}"
        exec(compile(text.replace(self.old, self.new), self.module, "exec"), vars(module))
