"""The Django application."""

from __future__ import annotations

from django.apps import AppConfig
from django.core.checks import Tags, register
from django.utils.translation import gettext_lazy as _


class ClusteredSessionsConfig(AppConfig):
    """Application that registers the system checks."""

    name = "django_clustered_sessions"
    label = "clustered_sessions"
    verbose_name = _("Sessions")

    def ready(self) -> None:
        """Register the system checks."""
        from .checks.settings import check_settings
        from .checks.store import check_store

        register(check_settings, Tags.security)
        register(check_store, Tags.security, deploy=True)
