"""What is said to the store and what its answers mean: record, scripts and flows. Pure."""

from __future__ import annotations
