"""Model without a table that gives sessions permissions and a place in the admin."""

from __future__ import annotations

from typing import Any

from django.db import models
from django.utils.translation import gettext_lazy as _


class NoRows(models.Manager["Session"]):
    """Manager that finds nothing without a query, so that ``dumpdata`` skips the model."""

    def get_queryset(self) -> models.QuerySet[Session]:
        """Return an empty query set."""
        return super().get_queryset().none()


class Session(models.Model):
    """Model of the permissions ``view_session`` and ``delete_session``, and of the admin's pages.

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
