"""Make the demo user who may open the admin, in the demo only."""

from __future__ import annotations

from django.conf import settings
from django.contrib.auth.hashers import make_password
from django.db import migrations


def make_demo_staff(apps, schema_editor):
    if not settings.IS_DEMO:
        return
    apps.get_model("auth", "User").objects.create(
        username=settings.DEMO_STAFF,
        password=make_password(settings.DEMO_PASSWORD),
        is_staff=True,
        is_superuser=True,
    )


class Migration(migrations.Migration):
    """Makes no table of its own."""

    dependencies = [("cart", "0001_demo_user")]
    operations = [migrations.RunPython(make_demo_staff, migrations.RunPython.noop)]
