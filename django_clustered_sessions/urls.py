"""URLs to include: ``path("sessions/", include("django_clustered_sessions.urls"))``."""

from __future__ import annotations

from django.urls import path

from . import views

app_name = "clustered_sessions"

urlpatterns = [
    path("expiry/", views.expiry, name="expiry"),
    path("stay/", views.stay, name="stay"),
]
