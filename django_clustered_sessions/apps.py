"""The Django application."""

from __future__ import annotations

from django.apps import AppConfig
from django.core.checks import Tags, register


class ClusteredSessionsConfig(AppConfig):
    """Registers the system checks."""

    name = "django_clustered_sessions"
    verbose_name = "Clustered sessions"

    def ready(self) -> None:
        """Register the system checks."""
        from . import checks

        register(checks.check_settings, Tags.security)
        register(checks.check_store, Tags.security, deploy=True)
