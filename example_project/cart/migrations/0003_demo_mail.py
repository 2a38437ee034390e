"""Give the demo users mail addresses, to which a new sign-in is told."""

from __future__ import annotations

from django.conf import settings
from django.db import migrations


def give_addresses(apps, schema_editor):
    for name in (settings.DEMO_USER, settings.DEMO_STAFF):
        users = apps.get_model("auth", "User").objects.filter(username=name, email="")
        users.update(email=f"{name}@localhost")


class Migration(migrations.Migration):
    """Makes no table of its own."""

    dependencies = [("cart", "0002_demo_staff")]
    operations = [migrations.RunPython(give_addresses, migrations.RunPython.noop)]
