"""The catalogues of translations, for tests that read or use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import polib

import django_clustered_sessions

LOCALE: Final = Path(django_clustered_sessions.__file__).parent / "locale"

#: Names of the catalogues, as Django spells locales.
LOCALES: Final = ("de", "es", "fr", "it", "ja", "pl", "pt", "zh_Hans")


def catalogue(locale: str) -> polib.POFile:
    """Return the source of a catalogue."""
    return polib.pofile(str(LOCALE / locale / "LC_MESSAGES" / "django.po"))


def compile_into(folder: Path, settings: Any) -> None:
    """Have Django use the catalogues as they are now, not as they were when last installed."""
    for locale in LOCALES:
        target = folder / locale / "LC_MESSAGES" / "django.mo"
        target.parent.mkdir(parents=True)
        catalogue(locale).save_as_mofile(str(target))
    settings.LOCALE_PATHS = [folder]
