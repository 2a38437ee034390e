"""Addresses to include: ``path("sessions/", include("django_clustered_sessions.urls"))``."""

from __future__ import annotations

from django.urls import path

from . import expiry

app_name = "clustered_sessions"

urlpatterns = [
    path("expiry/", expiry.expiry, name="expiry"),
    path("stay/", expiry.stay, name="stay"),
]
