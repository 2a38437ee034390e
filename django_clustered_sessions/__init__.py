"""Django sessions for sites on more than one machine, kept in Redis or Valkey."""

from __future__ import annotations

__version__ = "0.1.0"
