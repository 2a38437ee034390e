"""The Django application."""

from __future__ import annotations

from django.apps import AppConfig


class ClusteredSessionsConfig(AppConfig):
    """Registers the system checks."""

    name = "django_clustered_sessions"
    verbose_name = "Clustered sessions"
