"""Addresses of the shop."""

from __future__ import annotations

from django.urls import include, path
from django.views.generic import RedirectView

urlpatterns = [
    path("", RedirectView.as_view(pattern_name="shop")),
    path("Cart/", include("cart.urls")),
]
