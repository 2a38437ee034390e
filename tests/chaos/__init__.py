"""Chaos test: many processes on a few sessions, faults of every kind, and a checked history.

``python -m tests.chaos --seconds 60`` runs it; ``--seed`` repeats the same work and faults, as far
as scheduling allows. The operations of each actor, the points where it is stopped or killed, and
the faults from outside with their times follow from the seed; the interleaving does not.

Workers (`worker`) use sessions through a proxy that cuts replies (`proxy`), while the driver
(`driver`) stops and kills them. Each worker logs its operations (`history`), and the checker
(`checker`) compares them with the final content of the store.
"""

from __future__ import annotations
