"""The recipes of ``docs/recipes.md``, each with the real package."""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml
from celery import Celery
from celery.contrib.testing.worker import start_worker
from celery.signals import setup_logging
from django.contrib.auth import get_user_model, login
from django.contrib.auth.signals import user_logged_in
from django.core.management import call_command
from django.http import HttpRequest, HttpResponse
from django.test import Client
from django.urls import include, path

from django_clustered_sessions import registry
from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.conf import conf
from django_clustered_sessions.exceptions import SessionLockTimeout
from tests.children import ROOT
from tests.pages import page

SESSIONS = "django_clustered_sessions.middleware.ClusteredSessionMiddleware"
PROBE = "not secret"


def section(heading: str, number: int = 0) -> str:
    """Return a code block of a section of the page."""
    text = page("recipes.md").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"^```\w+\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)[number]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import code blocks as a module of their own, in which packages may look names up."""

    def run(*sources: str) -> types.ModuleType:
        file = tmp_path / f"recipe_{len(list(tmp_path.iterdir()))}.py"
        file.write_text("\n".join(sources))
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        vars(module)["HttpResponse"] = HttpResponse
        spec.loader.exec_module(module)
        return module

    return run


@pytest.fixture
def user(db: None) -> Any:
    return get_user_model().objects.create_user("ada", "ada@example.com", PROBE)


def log_in(request: HttpRequest) -> HttpResponse:
    login(request, get_user_model().objects.get(), "django.contrib.auth.backends.ModelBackend")
    return HttpResponse()


def site(settings: Any, *pages: Any) -> Client:
    """Return a browser that is logged in to a site with these pages."""
    settings.ROOT_URLCONF = (path("login/", log_in), *pages)
    client = Client(raise_request_exception=False)
    assert client.get("/login/").status_code == 200
    return client


def test_rest_framework(store: redis.Redis, settings: Any, user: Any, recipe: Any) -> None:
    module = recipe(section("Django REST framework"))
    pages = path("redeem/", module.Redeem.as_view()), path("prices/", module.prices)
    client = site(settings, *pages)
    answers = [client.post("/redeem/") for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 409]
    assert client.get("/prices/").json() == {"currency": "EUR"}
    assert Client().post("/redeem/").status_code == 403
    settings.CACHES = settings.CACHES | {"sessions": nowhere(settings)}
    assert client.post("/redeem/").status_code == 503


def nowhere(settings: Any) -> dict[str, Any]:
    return settings.CACHES["sessions"] | {"LOCATION": "redis://127.0.0.1:1/1"}


def test_ninja(store: redis.Redis, settings: Any, user: Any, recipe: Any) -> None:
    module = recipe(section("Django Ninja"))
    client = site(settings, path("api/", module.api.urls))
    answers = [client.post("/api/redeem?code=x").json()["detail"] for _ in range(2)]
    assert answers == ["ok", "already used"]
    assert Client().post("/api/redeem?code=x").status_code == 401
    settings.CACHES = settings.CACHES | {"sessions": nowhere(settings)}
    assert client.post("/api/redeem?code=y").status_code == 503


@pytest.fixture
def allauth(store: redis.Redis, settings: Any, transactional_db: None) -> Iterator[None]:
    """Use the settings of the recipe, and create the tables of allauth."""
    found: dict[str, Any] = {}
    exec(section("allauth"), found)
    settings.MIDDLEWARE = found["MIDDLEWARE"]
    settings.AUTHENTICATION_BACKENDS = found["AUTHENTICATION_BACKENDS"]
    settings.ACCOUNT_EMAIL_VERIFICATION = "none"
    added = [name for name in found["INSTALLED_APPS"] if name not in settings.INSTALLED_APPS]
    settings.INSTALLED_APPS = [*settings.INSTALLED_APPS, *added]
    settings.ROOT_URLCONF = (path("accounts/", include("allauth.urls")),)
    call_command("migrate", "account", verbosity=0)
    yield
    call_command("migrate", "account", "zero", verbosity=0)


@pytest.mark.full
def test_allauth(allauth: None, settings: Any, user: Any) -> None:
    client = Client()
    form = {"login": "ada", "password": PROBE}
    assert client.post("/accounts/login/", form).status_code == 302
    assert registry.count_of(user) == 1
    assert client.post("/accounts/logout/").status_code == 302
    assert registry.count_of(user) == 0


@pytest.fixture
def no_logging_of_celery() -> Iterator[None]:
    """Keep a worker from setting up the root logger of this process, which later tests read."""

    def leave_it(**kwargs: Any) -> None:
        """Set nothing up: with a receiver, Celery leaves that to it."""

    setup_logging.connect(leave_it)
    yield
    setup_logging.disconnect(leave_it)


@pytest.mark.full
@pytest.mark.usefixtures("no_logging_of_celery")
def test_celery(store: redis.Redis, settings: Any, recipe: Any) -> None:
    app = Celery("recipes", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.set_default()
    module = recipe(section("Celery"), section("Celery", 1))
    settings.ROOT_URLCONF = (path("", module.order_report),)
    client = Client()
    with start_worker(app, perform_ping_check=False, shutdown_timeout=30):
        assert client.get("/").status_code == 202
        key = client.cookies[settings.SESSION_COOKIE_NAME].value
        for _ in range(2):
            module.finish_report.delay(key, "july.pdf").get(timeout=30)
        assert SessionStore(key)["reports"] == ["june.pdf", "july.pdf", "july.pdf"]
        SessionStore(key).delete()
        assert module.finish_report.delay(key, "august.pdf").get(timeout=30) is None
    assert not SessionStore().exists(key)


def test_django_tasks(store: redis.Redis, settings: Any, recipe: Any) -> None:
    pytest.importorskip("django.tasks", reason="Django 6.0 brings tasks")
    module = recipe(section("Django's tasks"))
    session = SessionStore()
    session.create()
    key = session.session_key
    assert module.finish_report.enqueue(key, "june.pdf").status == "SUCCESSFUL"
    assert SessionStore(key)["reports"] == ["june.pdf"]
    with session.lock():
        (error,) = module.finish_report.enqueue(key, "june.pdf").errors
    assert error.exception_class is SessionLockTimeout
    session.delete(key)
    assert module.finish_report.enqueue(key, "june.pdf").status == "SUCCESSFUL"


def test_htmx(store: redis.Redis, settings: Any, user: Any, recipe: Any) -> None:
    module = recipe(section("HTMX"))
    settings.MIDDLEWARE = [*settings.MIDDLEWARE, "django_htmx.middleware.HtmxMiddleware"]
    settings.SESSION_SAVE_EVERY_REQUEST = True
    client = site(settings, path("unread/", module.unread))
    answer = client.get("/unread/", headers={"HX-Request": "true"})
    assert answer.content == b"0 unread"
    assert settings.SESSION_COOKIE_NAME not in answer.cookies
    registry.end_sessions_of(user)
    answer = client.get("/unread/", headers={"HX-Request": "true"})
    assert answer.headers["HX-Redirect"] == settings.LOGIN_URL


def test_tenants(store: redis.Redis, settings: Any, user: Any, recipe: Any) -> None:
    module = recipe(section("Several tenants"))
    try:
        settings.MIDDLEWARE = [*settings.MIDDLEWARE, f"{module.__name__}.one_tenant"]
        client = site(settings)
        assert client.get("/login/", headers={"host": "testserver"}).status_code == 200
        assert client.get("/login/", headers={"host": "other.example"}).status_code == 403
        assert Client().get("/login/", headers={"host": "other.example"}).status_code == 200
    finally:
        user_logged_in.disconnect(module.bind_to_host)


def test_kubernetes() -> None:
    pod = yaml.safe_load(section("Kubernetes"))["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (graceful_s,) = (
        int(found[1])
        for word in container["command"]
        if (found := re.fullmatch(r"--graceful-timeout=(\d+)", word))
    )
    sleep, drain_s = container["lifecycle"]["preStop"]["exec"]["command"]
    assert sleep == "sleep"
    assert pod["terminationGracePeriodSeconds"] > int(drain_s) + graceful_s
    assert conf.lock_wait < graceful_s
    urls = (ROOT / "example_project" / "shop" / "urls.py").read_text("utf-8")
    for probe in ("readinessProbe", "livenessProbe"):
        assert f'"{container[probe]["httpGet"]["path"].strip("/")}/"' in urls
