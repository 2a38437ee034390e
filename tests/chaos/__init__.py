"""Many processes at once on a few sessions, faults of every kind, and a history that is checked.

``python -m tests.chaos --seconds 60`` runs it, ``--seed`` runs the same work and the same faults
again, as far as scheduling allows: what each actor does and where it is stopped or killed follows
from the seed, and so do the faults from outside and their times; how the processes interleave is
the machine's.

Workers (`worker`) do their work through a proxy that cuts replies (`proxy`), while the driver
(`driver`) stops and kills them. Each writes down what it did (`history`), and afterwards that is
held against what the store has (`checker`).
"""

from __future__ import annotations
