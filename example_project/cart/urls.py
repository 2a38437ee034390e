"""Addresses below ``/Cart/``."""

from __future__ import annotations

from django.urls import path

from cart import views

urlpatterns = [
    path("", views.shop, name="shop"),
    path("state.json", views.state, name="state"),
    path("login/", views.Login.as_view(), name="login"),
    path("email/", views.Email.as_view(), name="email"),
    path("logout/", views.Logout.as_view(), name="logout"),
    path("<slug:sku>/", views.product, name="product"),
    path("<slug:sku>/change/", views.change, name="change"),
]
