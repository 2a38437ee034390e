"""CHANGELOG.md and the version agree."""

from __future__ import annotations

import re

from packaging.version import Version

from django_clustered_sessions import __version__
from tests.release.changelog import headings, newest


def test_entries_have_a_version_and_a_date() -> None:
    first, *others = headings()
    dated = others if first == "Unreleased" else [first, *others]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+\S* - \d{4}-\d\d-\d\d", entry) for entry in dated)


def test_versions_descend() -> None:
    versions = [entry.partition(" - ")[0] for entry in headings() if entry != "Unreleased"]
    assert versions == sorted(versions, key=Version, reverse=True)
    assert len(versions) == len(set(versions))


def test_version_is_of_the_newest_entry_or_above() -> None:
    released = [entry.partition(" - ")[0] for entry in headings() if entry != "Unreleased"]
    if newest() != "Unreleased":
        assert __version__ == newest()
    elif released:
        assert Version(__version__) > Version(released[0])
