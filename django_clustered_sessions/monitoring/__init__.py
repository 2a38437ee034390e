"""What the nodes count: how it gets into the store, and what sessionstats makes of it."""

from __future__ import annotations
