"""Addresses of the shop."""

from __future__ import annotations

from django.urls import include, path
from django.views.generic import RedirectView

from shop.health import health

urlpatterns = [
    path("", RedirectView.as_view(pattern_name="shop")),
    path("Cart/", include("cart.urls")),
    path("health/", health),
]
