"""libfaketime, which gives a process a wrong clock."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import require


def libfaketime() -> Path:
    """Return the path of the library; its folder depends on the distribution."""
    folders = ("/usr/lib", "/usr/lib64", "/usr/local/lib", "/opt/homebrew/lib")
    patterns = ("faketime/libfaketime.so.1", "*/faketime/libfaketime.so.1")
    found = [path for folder in folders for each in patterns for path in Path(folder).glob(each)]
    return require(found[0] if found else None, "libfaketime")
