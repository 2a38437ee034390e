"""A mutant: one small change to one file of the package."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha1


@dataclass(frozen=True)
class Mutant:
    """Lines ``original`` of a file, from line ``line`` on, and the ``mutated`` ones in their place.

    ``first`` and ``last`` are the lines of the statement around the change. ``binds`` is the name
    that the statement binds where it runs at import, under no test.
    """

    file: str
    line: int
    kind: str
    original: str
    mutated: str
    first: int = 0
    last: int = 0
    binds: str = ""

    def rank(self, seed: int) -> bytes:
        """Return the mutant's place in the order of a seed, which other mutants do not change."""
        text = f"{seed} {self.file} {self.line} {self.kind} {self.original} {self.mutated}"
        return sha1(text.encode(), usedforsecurity=False).digest()

    def apply(self, source: str) -> str:
        """Return a file's text with the change; raise ValueError where the text is another."""
        lines = source.split("\n")
        at = slice(self.line - 1, self.line + self.original.count("\n"))
        if "\n".join(lines[at]) != self.original:
            raise ValueError(f"{self.file}:{self.line} has changed since the mutant was made")
        lines[at] = self.mutated.split("\n")
        return "\n".join(lines)


def changed(file: str, source: str, start: int, end: int, text: str, **fields: object) -> Mutant:
    """Return the mutant that has ``text`` for what is between two offsets of ``source``."""
    head = source.rfind("\n", 0, start) + 1
    tail = source.find("\n", end)
    tail = len(source) if tail < 0 else tail
    return Mutant(
        file,
        source.count("\n", 0, head) + 1,
        original=source[head:tail],
        mutated=source[head:start] + text + source[end:tail],
        **fields,  # type: ignore[arg-type]
    )
