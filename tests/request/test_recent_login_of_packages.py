"""``recent_login`` and the mail about a sign-in, where logins are django-otp's or allauth's."""

from __future__ import annotations

import os
from typing import Any

import pytest
import redis
from django.conf import settings as django_settings

from tests.children import python

SITE = """
import os
import django
from django.conf import settings
locmem = "django.core.mail.backends.locmem.EmailBackend"
mailer = {"MAILERS": {"default": {"BACKEND": locmem}}}
settings.configure(
    **(mailer if django.VERSION >= (6, 1) else {"EMAIL_BACKEND": locmem}),
    CLUSTERED_SESSIONS_SIGN_IN_MAIL="all",
    ALLOWED_HOSTS=["testserver"],
    CACHES={
        "default": {
            "BACKEND": "django_redis.cache.RedisCache", "LOCATION": os.environ["STORE_URL"]
        }
    },
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    INSTALLED_APPS=[
        "django.contrib.auth", "django.contrib.contenttypes", "django.contrib.messages",
        "django_clustered_sessions", *APPS,
    ],
    LOGIN_REDIRECT_URL="/",
    MIDDLEWARE=[
        "django_clustered_sessions.middleware.ClusteredSessionMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
        "django.contrib.messages.middleware.MessageMiddleware",
        *MIDDLEWARE,
    ],
    PASSWORD_HASHERS=["django.contrib.auth.hashers.MD5PasswordHasher"],
    ROOT_URLCONF="__main__",
    SECRET_KEY="x",
    SESSION_ENGINE="django_clustered_sessions.backend",
    TEMPLATES=[
        {
            "BACKEND": "django.template.backends.django.DjangoTemplates",
            "APP_DIRS": True,
            "OPTIONS": {"context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]},
        }
    ],
)
django.setup()
from datetime import UTC, datetime
from django.contrib.auth.models import User
from django.core import mail
from django.core.management import call_command
from django.http import HttpResponse
from django.test import Client
from django.urls import include, path
from django_clustered_sessions.decorators import recent_login
from django_clustered_sessions.protocol.record import SessionKeys
import redis

def long_ago():
    record = SessionKeys.of("session", client.cookies["sessionid"].value).record
    with redis.Redis.from_url(os.environ["STORE_URL"]) as store:
        packed = store.hget(record, "m:")
        old = int((datetime.now(UTC).timestamp() - 3600) * 1000).to_bytes(6)
        store.hset(record, "m:", packed[:10] + old + packed[16:])

def start():
    global client, ada
    call_command("migrate", verbosity=0)
    ada = User.objects.create_user("ada", "ada@example.org", "fired-clay")
    client = Client()
"""

ALLAUTH = (
    """
APPS = ["allauth", "allauth.account"]
MIDDLEWARE = ["allauth.account.middleware.AccountMiddleware"]
"""
    + SITE
    + """
from allauth.account.signals import authentication_step_completed
from django.dispatch import receiver

@receiver(authentication_step_completed)
def confirm(request, reauthenticated=False, **kwargs):
    if reauthenticated:
        request.session.confirm_login()

@recent_login(confirm_url="account_reauthenticate")
def page(request):
    return HttpResponse("let in")

urlpatterns = [
    path("accounts/", include("allauth.urls")),
    path("page/", page),
    path("sessions/", include("django_clustered_sessions.urls")),
]
start()
Client().post("/accounts/login/", {"login": "ada", "password": "fired-clay"})
# allauth's own asks to confirm the address.
(told,) = (one for one in mail.outbox if "new sign-in" in one.subject)
assert told.to == ["ada@example.org"], told.to
link = told.body.partition("http://testserver")[2].split()[0]
ended = Client().post(link)
assert ended.status_code == 200 and b'href="/accounts/password/reset/"' in ended.content
client.post("/accounts/login/", {"login": "ada", "password": "fired-clay"})
assert client.get("/page/").content == b"let in"
long_ago()
asked = client.get("/page/")
assert asked.url == "/accounts/reauthenticate/?next=%2Fpage%2F", asked.url
assert client.post(asked.url, {"password": "wrong"}).status_code == 200
assert client.get("/page/").status_code == 302
back = client.post(asked.url, {"password": "fired-clay", "next": "/page/"})
assert back.url == "/page/", back
assert client.get("/page/").content == b"let in"
print("done")
"""
)

OTP = (
    """
APPS = ["django_otp", "django_otp.plugins.otp_static"]
MIDDLEWARE = ["django_otp.middleware.OTPMiddleware"]
"""
    + SITE
    + """
import django_otp
from django_otp.plugins.otp_static.models import StaticDevice

@recent_login(confirm_url="/code/")
def page(request):
    return HttpResponse("let in")

def code(request):
    device = django_otp.match_token(request.user, request.POST["token"])
    if device is None:
        return HttpResponse(status=400)
    django_otp.login(request, device)
    request.session.confirm_login()
    return HttpResponse(str(request.user.is_verified()))

urlpatterns = [path("page/", page), path("code/", code)]
start()
device = StaticDevice.objects.create(user=ada, name="paper")
device.token_set.create(token="123456")
client.force_login(ada)
assert client.get("/page/").content == b"let in"
long_ago()
assert client.get("/page/").url == "/code/?next=%2Fpage%2F"
assert client.post("/code/", {"token": "654321"}).status_code == 400
assert client.get("/page/").status_code == 302
device.throttle_reset()
assert client.post("/code/", {"token": "123456"}).content == b"True"
assert client.get("/page/").content == b"let in"
print("done")
"""
)


@pytest.mark.parametrize(
    ("package", "script"),
    [
        pytest.param("allauth.account", ALLAUTH, id="allauth"),
        pytest.param("django_otp", OTP, id="django-otp"),
    ],
)
def test_package_confirms_the_login(store: redis.Redis, package: str, script: str) -> None:
    pytest.importorskip(package.partition(".")[0])
    location: Any = django_settings.CACHES["sessions"]["LOCATION"]
    with python("-c", script, env=os.environ | {"STORE_URL": location}) as process:
        stdout, stderr = process.communicate()
    assert (process.returncode, stdout) == (0, "done\n"), stderr
