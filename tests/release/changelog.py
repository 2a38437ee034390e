"""Read the versions of CHANGELOG.md."""

from __future__ import annotations

import re

from tests.children import ROOT


def headings() -> list[str]:
    """Return the entries, the newest first: ``Unreleased``, ``1.2.3 - 2026-12-31``."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    return re.findall(r"^## (.+)$", text, re.MULTILINE)


def newest() -> str:
    """Return the version of the newest entry, or ``Unreleased``."""
    return headings()[0].partition(" - ")[0]
