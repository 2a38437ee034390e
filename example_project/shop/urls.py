"""Addresses of the shop."""

from __future__ import annotations

from django.contrib import admin
from django.contrib.staticfiles.views import serve
from django.urls import include, path
from django.views.generic import RedirectView

from shop.health import health

urlpatterns = [
    path("", RedirectView.as_view(pattern_name="shop")),
    path("Cart/devices/", include("django_clustered_sessions.devices.urls")),
    path("Cart/", include("cart.urls")),
    path("admin/", admin.site.urls),
    path("health/", health),
    path("sessions/", include("django_clustered_sessions.urls")),
    # A real site leaves these files to its web server.
    path("static/<path:path>", serve, {"insecure": True}),
]
