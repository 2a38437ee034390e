"""The catalogues of translations: complete, and with the placeholders of the source."""

from __future__ import annotations

import re
from collections import Counter

import polib
import pytest

from tests.catalogues import LOCALE, LOCALES, catalogue

PLACEHOLDER = re.compile(r"%\(\w+\)[sd]|\{\w+\}")

#: What a translator may not translate.
KEPT = re.compile(r"CLUSTERED_SESSIONS_\w+ = True")


def translations(entry: polib.POEntry) -> list[str]:
    return [entry.msgstr] if not entry.msgid_plural else list(entry.msgstr_plural.values())


def test_there_is_a_catalogue_of_each_language() -> None:
    assert sorted(path.name for path in LOCALE.iterdir()) == list(LOCALES)


@pytest.mark.parametrize("locale", LOCALES)
def test_no_string_is_missing_fuzzy_or_left_over(locale: str) -> None:
    found = catalogue(locale)
    for entry in found:
        assert entry.translated() and all(translations(entry)), entry.msgid
        assert not entry.fuzzy and not entry.obsolete, entry.msgid
    assert {entry.msgid for entry in found} == {entry.msgid for entry in catalogue("de")}


@pytest.mark.parametrize("locale", LOCALES)
def test_each_number_has_its_form(locale: str) -> None:
    found = catalogue(locale)
    (forms,) = re.findall(r"^nplurals=(\d);", found.metadata["Plural-Forms"])
    for entry in found:
        if entry.msgid_plural:
            assert sorted(entry.msgstr_plural) == list(range(int(forms))), entry.msgid


@pytest.mark.parametrize("locale", LOCALES)
def test_placeholders_are_those_of_the_source(locale: str) -> None:
    for entry in catalogue(locale):
        for pattern in (PLACEHOLDER, KEPT):
            expected = Counter(pattern.findall(entry.msgid))
            for text in translations(entry):
                assert Counter(pattern.findall(text)) == expected, text


def test_texts_are_marked_by_names_that_makemessages_knows() -> None:
    """It knows ``_`` and gettext's own names; an import by another name is never found."""
    for path in LOCALE.parent.rglob("*.py"):
        aliases = re.findall(r"\bn?p?n?gettext\w* as (\w+)", path.read_text(encoding="utf-8"))
        assert set(aliases) <= {"_"}, path
