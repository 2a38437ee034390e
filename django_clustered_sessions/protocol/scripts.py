"""The Lua scripts of ``lua/``, read once as package resources.

Redis runs one text per script and has no includes, so the files are joined here: the text of a file
stands where a line ``-- Includes: <name>`` names it. Lua makes the functions of a text each time
that it gets there, so a script includes what it rarely needs in the branch that needs it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, cached_property
from hashlib import sha1
from importlib.resources import files

_INCLUDES = re.compile(rb"^ *-- Includes: (\w+)$", re.MULTILINE)


@dataclass(frozen=True)
class Script:
    """A Lua script: its ``name``, its ``source`` as the store gets it, and the source's SHA-1.

    One that only reads is run by the read-only commands: they work while writes are paused.
    """

    name: str
    source: bytes
    sha: bytes
    reads_only: bool

    @cached_property
    def by_sha(self) -> tuple[str, bytes]:
        """Command that runs it where the store knows it, and its first argument."""
        return "EVALSHA_RO" if self.reads_only else "EVALSHA", self.sha

    @cached_property
    def by_source(self) -> tuple[str, bytes]:
        """Command that runs it where the store does not know it, and its first argument."""
        return "EVAL_RO" if self.reads_only else "EVAL", self.source


def read(name: str) -> bytes:
    """Return the text of the resource ``lua/<name>.lua``."""
    return files("django_clustered_sessions.protocol").joinpath("lua", f"{name}.lua").read_bytes()


@cache
def script(name: str) -> Script:
    """Return the script ``name`` with the files that it includes.

    The first line, ``#!lua``, has to stay the first: it makes the store check before the first
    write that it may write at all, so that a full or read-only store changes nothing.
    """
    source = _INCLUDES.sub(lambda include: read(include[1].decode()), read(name))
    sha = sha1(source, usedforsecurity=False).hexdigest().encode()
    return Script(name, source, sha, reads_only=b"no-writes" in source.partition(b"\n")[0])
