"""Questions to the store and the meaning of its replies: record, scripts and flows. Pure."""

from __future__ import annotations
