"""Pages and answers in the language of the visitor."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import polib
import pytest
import redis
from django.contrib.auth.models import User
from django.core.management import call_command
from django.template.loader import render_to_string
from django.test import Client, RequestFactory
from django.urls import include, path
from django.utils import translation

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.exceptions import (
    ClusteredSessionError,
    SessionConflict,
    SessionLimitReached,
    SessionLockLost,
    SessionLockRefused,
    SessionLockTimeout,
    SessionNotReplicated,
    SessionStoreUnavailable,
)
from django_clustered_sessions.monitoring.charts import Series, svg
from django_clustered_sessions.session.error_responses import answer_to
from tests.catalogues import LOCALE, LOCALES, catalogue, compile_into
from tests.conftest import require

#: The first word of the list of devices, and how its number of devices is said.
DEVICES = {
    "de": ("Ihre Geräte", "Sie sind auf 1 Gerät angemeldet."),
    "es": ("Sus dispositivos", "Tiene la sesión iniciada en 1 dispositivo."),
    "fr": ("Vos appareils", "Vous êtes connecté sur 1 appareil."),
    "it": ("I tuoi dispositivi", "Sei connesso su 1 dispositivo."),
    "ja": ("ログイン中の端末", "1 台の端末でログインしています。"),
    "pl": ("Twoje urządzenia", "Jesteś zalogowany na 1 urządzeniu."),
    "pt-br": ("Os seus dispositivos", "Tem sessão iniciada em 1 dispositivo."),
    "zh-hans": ("您的设备", "您已在 1 台设备上登录。"),
}


@pytest.fixture(autouse=True)
def site(settings: Any, tmp_path: Path) -> None:
    compile_into(tmp_path / "locale", settings)
    settings.ROOT_URLCONF = (
        path("devices/", include("django_clustered_sessions.devices.urls")),
        path("sessions/", include("django_clustered_sessions.urls")),
    )
    settings.STATIC_URL = "/static/"


@pytest.mark.parametrize("language", DEVICES)
@pytest.mark.django_db
def test_devices_are_in_the_language_of_the_browser(
    language: str, store: redis.Redis, settings: Any
) -> None:
    settings.MIDDLEWARE = [*settings.MIDDLEWARE, "django.middleware.locale.LocaleMiddleware"]
    client = Client(headers={"accept-language": language})
    client.force_login(User.objects.create_user("ada"))
    text = client.get("/devices/").content.decode()
    title, number = DEVICES[language]
    assert f'<html lang="{language}"' in text
    assert f"<title>{title}</title>" in text and number in text


@pytest.mark.parametrize("language", ["de", "ja"])
def test_warning_has_its_words_from_the_page(language: str) -> None:
    request = RequestFactory().get("/")
    request.session = SessionStore()
    with translation.override(language):
        text = render_to_string("clustered_sessions/expiry.html", {}, request)
    expected = {
        "de": ('data-left="Noch {time}"', 'data-away="Die Website antwortet nicht.', "Nicht jetzt"),
        "ja": ('data-left="残り {time}"', 'data-away="サイトが応答しません。', "後で"),
    }
    assert [words for words in expected[language] if words not in text] == []


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (SessionStoreUnavailable("no answer"), "Die Sitzungen sind im Moment nicht erreichbar."),
        (SessionLockRefused("a" * 43, "", 1, "full", ""), "Eine andere Anfrage von Ihnen läuft"),
        (SessionLockTimeout("a" * 43, "", 1, "late", ""), "Eine andere Anfrage von Ihnen läuft"),
        (SessionLockLost("a" * 43, ""), "hat dieselben Sitzungsdaten geändert."),
        (SessionConflict("a" * 43, ["n"]), "hat dieselben Sitzungsdaten geändert."),
        (SessionNotReplicated("a" * 43, 0, 1, "late"), "konnte aber nicht gesichert werden."),
        (SessionLimitReached(2), "Sie sind zu oft angemeldet."),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_answers_without_a_template_are_translated(
    error: ClusteredSessionError, words: str
) -> None:
    with translation.override("de"):
        response = answer_to(error)
    assert response is not None and words in response.content.decode()


def test_charts_are_translated() -> None:
    with translation.override("de"):
        text = svg(Series("a", []), title="t", times=[])
    assert "noch nichts" in text and "Noch keine Daten." in text


def test_catalogues_have_each_string_of_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After ``django-admin makemessages --all`` they have the same strings, translated."""
    require(shutil.which("xgettext"), "gettext")
    package = tmp_path / "package"
    shutil.copytree(LOCALE.parent, package, ignore=shutil.ignore_patterns("__pycache__", "*.mo"))
    monkeypatch.chdir(package)
    call_command("makemessages", all=True, no_obsolete=True, verbosity=0)
    for locale in LOCALES:
        found = polib.pofile(str(package / "locale" / locale / "LC_MESSAGES" / "django.po"))
        wanting = [entry.msgid for entry in found if entry.fuzzy or not entry.translated()]
        assert wanting == []
        assert {entry.msgid for entry in found} == {entry.msgid for entry in catalogue(locale)}
