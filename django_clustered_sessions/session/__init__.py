"""What one session object is made of: its operations, its lock, its life, its near cache."""

from __future__ import annotations
