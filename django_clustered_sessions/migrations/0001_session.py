"""Tell Django of the model that carries the permissions; no database gets a table by it."""

from __future__ import annotations

from django.db import migrations, models


class Migration(migrations.Migration):
    """Changes nothing in the database; the permissions are made by ``migrate`` itself."""

    initial = True
    operations = [
        migrations.CreateModel(
            name="Session",
            fields=[
                (
                    "id",
                    models.CharField(
                        editable=False, max_length=43, primary_key=True, serialize=False
                    ),
                )
            ],
            options={
                "verbose_name": "session",
                "verbose_name_plural": "sessions",
                "base_manager_name": "objects",
                "managed": False,
                "default_permissions": ("view", "delete"),
            },
        )
    ]
