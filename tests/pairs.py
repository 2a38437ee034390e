"""Pairwise testing: fewer cases than all combinations, with each pair of values in one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
from allpairspy import AllPairs


def pairwise(
    *,
    indirect: Sequence[str] = (),
    ids: Callable[[Any], str | None] | None = None,
    **parameters: Iterable[Any],
) -> pytest.MarkDecorator:
    """Return a mark that parametrizes a test so that each pair of values occurs in a case.

    ``indirect`` names the parameters that are fixtures, and ``ids`` names a value, as for
    ``pytest.mark.parametrize``. Most faults that depend on a combination depend on two values:
    Kuhn, Wallace and Gallo, "Software Fault Interactions and Implications for Software Testing",
    2004.
    """
    columns = [list(values) for values in parameters.values()]
    # Pairs positions instead of values, which may be unhashable or equal.
    rows = AllPairs([range(len(column)) for column in columns])
    cases = [[column[place] for column, place in zip(columns, row, strict=True)] for row in rows]
    return pytest.mark.parametrize(list(parameters), cases, indirect=list(indirect), ids=ids)
