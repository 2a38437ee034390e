"""URLs of "Your devices", for ``include("django_clustered_sessions.devices.urls")``."""

from __future__ import annotations

from django.urls import path

from . import views

app_name = "clustered_sessions_devices"

urlpatterns = [
    path("", views.DeviceList.as_view(), name="list"),
    path("end-others/", views.EndOtherDevices.as_view(), name="end_others"),
    path("<str:id>/end/", views.EndDevice.as_view(), name="end"),
]
