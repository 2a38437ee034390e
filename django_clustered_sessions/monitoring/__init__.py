"""Monitoring: count on each node, report to the store, collect and show the statistics."""

from __future__ import annotations
