"""The picture of the ratios, each with its spread and its target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .engines import BASE
from .measuring import Ratio
from .targets import Target

_REACHED, _MISSED, _TARGET = "#2a7f62", "#b5452c", "#444444"


def draw(targets: Sequence[Target], path: Path) -> None:
    """Draw the ratios among the targets to a file whose suffix says how, such as ``.svg``."""
    import matplotlib

    matplotlib.use("Agg")
    # The same figures make the same file.
    matplotlib.rcParams["svg.hashsalt"] = "benchmark"
    from matplotlib import pyplot

    shown = [target for target in targets if isinstance(target.measured, Ratio)][::-1]
    figure, axes = pyplot.subplots(figsize=(8, 0.36 * len(shown) + 1.2), layout="constrained")
    for row, target in enumerate(shown):
        assert isinstance(target.measured, Ratio)
        median, low, high = target.measured
        color = _REACHED if target.is_reached else _MISSED
        axes.barh(row, median, height=0.55, color=color, alpha=0.75)
        axes.plot((low, high), (row, row), color="black", linewidth=1.2)
        axes.plot((target.limit,) * 2, (row - 0.4, row + 0.4), color=_TARGET, linewidth=2.5)
        axes.annotate(f" {median:.2f}", (max(high, target.limit), row), va="center", fontsize=8)
    axes.set_yticks(range(len(shown)), [target.name for target in shown], fontsize=8)
    axes.axvline(1.0, color="#999999", linewidth=0.8, linestyle=":")
    axes.set_xlim(left=0)
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.set_xlabel(
        f"ratio to {BASE} on django-redis, or to what the row says\n"
        "upright bar: target; thin line: the middle half of the rounds",
        fontsize=8,
    )
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, metadata=metadata)
    pyplot.close(figure)
