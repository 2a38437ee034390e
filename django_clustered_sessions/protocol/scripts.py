"""The Lua scripts of ``lua/``, read once as package resources.

A script's source is its own file behind ``prelude.lua``, which packs a record's meta field, and
behind the files that its header includes: ``write.lua``, ``lock.lua``. Redis runs one text per
script and has no includes, so the files are joined here. A function that is not called costs the
store time too, so a script includes no more than it uses.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, cached_property
from hashlib import sha1
from importlib.resources import files

_INCLUDES = re.compile(rb"^-- Includes: (\w+)$", re.MULTILINE)


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
    """Return the script ``name``, its own text behind the files that it includes.

    The first line, ``#!lua``, has to stay the first: it makes the store check before the first
    write that it may write at all, so that a full or read-only store changes nothing.
    """
    shebang, _, body = read(name).partition(b"\n")
    included = [read(name.decode()) for name in _INCLUDES.findall(body)]
    source = b"\n".join((shebang, read("prelude"), *included, body))
    sha = sha1(source, usedforsecurity=False).hexdigest().encode()
    return Script(name, source, sha, reads_only=b"no-writes" in shebang)
