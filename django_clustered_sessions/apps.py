"""The Django application."""

from __future__ import annotations

from django.apps import AppConfig
from django.core.checks import Tags, register
from django.utils.translation import gettext_lazy as _


class ClusteredSessionsConfig(AppConfig):
    """Application that registers the system checks, and tells of sign-ins where that is set."""

    name = "django_clustered_sessions"
    label = "clustered_sessions"
    verbose_name = _("Sessions")

    def ready(self) -> None:
        """Register the system checks, and a receiver of logins if a setting wants one."""
        from . import sign_ins
        from .checks.settings import check_settings
        from .checks.store import check_store

        register(check_settings, Tags.security)
        register(check_store, Tags.security, deploy=True)
        sign_ins.switch()
