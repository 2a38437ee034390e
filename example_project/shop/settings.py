"""Settings of the shop: the same for every node, but for the few that the environment names."""

from __future__ import annotations

import os
from pathlib import Path

import django

BASE_DIR = Path(__file__).resolve().parent.parent

# Sessions in the cluster -------------------------------------------------------------------------

SESSION_ENGINE = "django_clustered_sessions.backend"
SESSION_CACHE_ALIAS = "sessions"

# With Sentinel: SHOP_SENTINELS=10.0.0.11:26379,10.0.0.12:26379,10.0.0.13:26379, and in SHOP_STORE
# the name that they know the primary by takes the place of its address: redis://:PASSWORD@main/1
SENTINELS = [
    (host, int(port))
    for host, _, port in (
        address.rpartition(":") for address in os.environ.get("SHOP_SENTINELS", "").split(",")
    )
    if host
]

CACHES = {
    "default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"},
    "sessions": {
        "BACKEND": "django_redis.cache.RedisCache",
        "LOCATION": os.environ.get("SHOP_STORE", "redis://127.0.0.1:6379/1"),
    },
}
if SENTINELS:
    CACHES["sessions"]["OPTIONS"] = {
        "CONNECTION_FACTORY": "django_redis.pool.SentinelConnectionFactory",
        "SENTINELS": SENTINELS,
    }

INSTALLED_APPS = [
    # Before the package: it has the page around "Your devices".
    "cart",
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "django_clustered_sessions",
]

MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django_clustered_sessions.middleware.ClusteredSessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]

MESSAGE_STORAGE = "django.contrib.messages.storage.session.SessionStorage"

# Whoever is away for so long is logged out, after a warning.
CLUSTERED_SESSIONS_IDLE_TIMEOUT = float(os.environ.get("SHOP_IDLE_TIMEOUT", "1800"))

# Changing the mail address asks for the password again, where it was given longer ago than that.
CONFIRM_MINUTES = float(os.environ.get("SHOP_CONFIRM_MINUTES", "1"))

# "Your devices" says which browser it was, and from where; SHOP_PROXIES: how many are in front.
CLUSTERED_SESSIONS_TRACK_CLIENTS = True
CLUSTERED_SESSIONS_TRUSTED_PROXIES = int(os.environ.get("SHOP_PROXIES", "0"))
# A sign-in with a browser that the user is not logged in with is told by mail.
CLUSTERED_SESSIONS_SIGN_IN_MAIL = "new"
# The first one writes, all of them read. Without any, carts are stored as they are.
CLUSTERED_SESSIONS_ENCRYPTION_KEYS = os.environ.get("SHOP_ENCRYPTION_KEYS", "").split()

# This node and the other one ---------------------------------------------------------------------

NODE = {
    "name": os.environ.get("SHOP_NODE", "terracotta"),
    "colour": os.environ.get("SHOP_COLOUR", "#a8452a"),
    "port": int(os.environ.get("SHOP_PORT", "9081")),
}
PEER = {
    "name": os.environ.get("SHOP_PEER", "cobalt"),
    "colour": os.environ.get("SHOP_PEER_COLOUR", "#2a4fa8"),
    "port": int(os.environ.get("SHOP_PEER_PORT", "9082")),
}

CLUSTERED_SESSIONS_NODE_NAME = NODE["name"]

# Django ------------------------------------------------------------------------------------------

# Every node needs the same key. This one is public: choose your own for anything but this demo.
# A shop with a secret of its own is no demo, and gets no staff whose password everybody knows.
IS_DEMO = "SHOP_SECRET_KEY" not in os.environ
SECRET_KEY = os.environ.get("SHOP_SECRET_KEY", "public-and-therefore-for-the-demo-only-0f5c81d2e7")
ALLOWED_HOSTS = ["localhost", "127.0.0.1", *os.environ.get("SHOP_HOSTS", "").split()]
ROOT_URLCONF = "shop.urls"
WSGI_APPLICATION = "shop.wsgi.application"
ASGI_APPLICATION = "shop.asgi.application"

DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.environ.get("SHOP_DATABASE", BASE_DIR / "shop.sqlite3"),
    }
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
                "cart.context.shop",
            ]
        },
    }
]

STATIC_URL = "/static/"

# To stderr, where systemd, compose and the demo read it; without DEBUG Django's own goes nowhere.
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
    "root": {"handlers": ["stderr"], "level": "INFO"},
}

# Mails are printed; a site names its mail server here.
MAILER = "shop.mail.EmailBackend"
if django.VERSION >= (6, 1):
    MAILERS = {"default": {"BACKEND": MAILER}}
else:
    EMAIL_BACKEND = MAILER

LOGIN_URL = "login"
LOGIN_REDIRECT_URL = "shop"
LOGOUT_REDIRECT_URL = "shop"
TIME_ZONE = "UTC"
USE_TZ = True

# The login page shows all three; the second may open the admin.
DEMO_USER = "ada"
DEMO_STAFF = "grace"
DEMO_PASSWORD = "fired-clay"
