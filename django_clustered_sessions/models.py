"""What Django's admin and permissions know of sessions: a model without a table."""

from __future__ import annotations

from typing import Any

from django.db import models
from django.utils.translation import gettext_lazy as _


class NoRows(models.Manager["Session"]):
    """Finds nothing without asking, so that ``dumpdata`` passes by a model without a table."""

    def get_queryset(self) -> models.QuerySet[Session]:
        """Return nothing."""
        return super().get_queryset().none()


class Session(models.Model):
    """Carries the permissions ``view_session`` and ``delete_session``, and a place in the admin.

    There is no table: sessions are in the store, see ``registry``.
    """

    id = models.CharField(primary_key=True, max_length=43, editable=False)

    objects = NoRows()

    class Meta:
        managed = False
        base_manager_name = "objects"
        default_permissions = ("view", "delete")
        verbose_name = _("session")
        verbose_name_plural = _("sessions")

    def save(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: there is no table."""
        raise TypeError("this model has no table; a session is saved by its SessionStore")
