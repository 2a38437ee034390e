"""System checks, of the settings and, with ``--deploy``, of the store: see ``docs/checks.md``."""

from __future__ import annotations
