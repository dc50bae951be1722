"""What the embedding knows: variance explained by class, patient, slide and tile, before and after training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from odis_path.figures import style
from odis_path.reporting.inventory import RunFolder
from odis_path.training.log.rows import GROUPINGS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class VarianceShares:
    """Shares of the embedding variance of a run, by grouping: of its first and of its last score.

    before_step, after_step: the steps of these; before is empty where the run has but one score.
    """

    name: str
    before: dict[str, float]
    after: dict[str, float]
    before_step: int
    after_step: int


def read_shares(run: RunFolder) -> VarianceShares | None:
    """Read the shares of a run; None where it has none."""
    scored = []
    for row in run.rows:
        shares = {name: row.get(f"variance_{name}") for name in GROUPINGS}
        numbers = {name: float(share) for name, share in shares.items() if isinstance(share, int | float)}
        if numbers and isinstance(row.get("step"), int | float):
            scored.append((int(row["step"]), numbers))
    if not scored:
        return None
    (first_step, first), (last_step, last) = scored[0], scored[-1]
    return VarianceShares(run.name, first if len(scored) > 1 else {}, last, first_step, last_step)


def draw_shares(runs: Sequence[VarianceShares]) -> Figure:
    """Draw a panel a run: a pair of bars for each grouping, pale before training and dark after."""
    figure = style.new_figure(style.WIDTH_IN * min(1.0, 0.34 * len(runs) + 0.2), 2.4)
    with style.styled():
        panels = figure.subplots(1, len(runs), sharex=True, squeeze=False)[0]
        for axes, run in zip(panels, runs, strict=True):
            names = [name for name in GROUPINGS if name in run.before or name in run.after]
            for shares, offset, color, label in (
                (run.before, -0.19, style.GREY, f"step {run.before_step}"),
                (run.after, 0.19, style.ACCENT, f"step {run.after_step}"),
            ):
                bars = [(y + offset, shares[name]) for y, name in enumerate(names) if name in shares]
                if bars:
                    axes.barh(*zip(*bars, strict=True), height=0.36, color=color, label=label)
                for y, share in bars:
                    axes.text(share + 0.015, y, f"{share:.2f}", va="center", fontsize=8.5)
            axes.set(yticks=range(len(names)), yticklabels=names, xlim=(0, 1.12), ylim=(len(names) - 0.4, -0.6))
            axes.set_title(run.name)
            axes.set_xlabel("share of variance")
            axes.legend(fontsize=8.5, loc="lower right")
    return figure
