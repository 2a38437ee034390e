"""URLs to include: ``path("sessions/", include("django_clustered_sessions.urls"))``."""

from __future__ import annotations

from django.urls import path

from . import views
from .sign_ins.views import EndSignIn

app_name = "clustered_sessions"

urlpatterns = [
    path("confirm/", views.ConfirmLogin.as_view(), name="confirm"),
    path("expiry/", views.expiry, name="expiry"),
    path("stay/", views.stay, name="stay"),
    path("sign-in/<str:link>/", EndSignIn.as_view(), name="end_sign_in"),
]
