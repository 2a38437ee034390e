"""Make the demo user."""

from __future__ import annotations

from django.conf import settings
from django.contrib.auth.hashers import make_password
from django.db import migrations


def make_demo_user(apps, schema_editor):
    apps.get_model("auth", "User").objects.create(
        username=settings.DEMO_USER, password=make_password(settings.DEMO_PASSWORD)
    )


class Migration(migrations.Migration):
    """Needs Django's users, makes no table of its own."""

    dependencies = [("auth", "0012_alter_user_first_name_max_length")]
    operations = [migrations.RunPython(make_demo_user, migrations.RunPython.noop)]
