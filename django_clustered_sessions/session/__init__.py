"""One session object: its state, a module for each flow, and the parts that these share."""

from __future__ import annotations
