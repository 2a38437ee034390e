"""Sphinx's settings for this site: ``make docs``."""

from __future__ import annotations

import sys
from pathlib import Path

import django
from django.conf import settings

ROOT = Path(__file__).resolve().parent.parent
# The sources beside this page, not a release that is installed somewhere.
sys.path.insert(0, str(ROOT))

from django_clustered_sessions import __version__  # noqa: E402

# Autodoc imports the package, which needs an app registry; it asks no store.
settings.configure(
    INSTALLED_APPS=[
        "django.contrib.auth",
        "django.contrib.contenttypes",
        "django_clustered_sessions",
    ],
    SESSION_ENGINE="django_clustered_sessions.backend",
)
django.setup()

project = "django-clustered-sessions"
version = release = __version__
html_title = f"{project} {release}"
copyright = "the authors of django-clustered-sessions"

extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_copy_source = False
html_show_sphinx = False

# As GitHub makes them, so that a link works in both places.
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
# As in the source, not as the address of an object.
autodoc_preserve_defaults = True
