"""URLs of "Your devices", for ``include("django_clustered_sessions.devices.urls")``."""

from __future__ import annotations

from django.urls import path, re_path

from . import views

app_name = "clustered_sessions_devices"

urlpatterns = [
    path("", views.DeviceList.as_view(), name="list"),
    path("end-others/", views.EndOtherDevices.as_view(), name="end_others"),
    # A whole id: the start of one would tell whose sessions have ids that begin so.
    re_path("^(?P<id>[A-Za-z0-9_-]{43})/end/$", views.EndDevice.as_view(), name="end"),
]
