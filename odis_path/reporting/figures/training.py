"""Curves of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from odis_path.figures import style
from odis_path.reporting.inventory import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_training(runs: Sequence[RunFolder]) -> Figure:
    """Draw loss, k-NN on held-out patients and learning rate against epochs; one run shows its loss in parts."""
    figure = style.new_figure(style.WIDTH_IN, 3.6)
    parts = [("loss", "total"), ("loss_obj", "[OBJ] token"), ("loss_patch", "hidden patches")]
    with style.styled():
        loss, knn, rate = figure.subplots(1, 3)
        for i, run in enumerate(runs):
            color, marker = style.PALETTE[i % len(style.PALETTE)], style.MARKERS[i % len(style.MARKERS)]
            keys = parts if len(runs) == 1 else [("loss", run.name)]
            for j, (key, label) in enumerate(keys):
                x, y = run.series(key)
                if x and (len(runs) > 1 or any(y)):
                    loss.plot(x, y, color=style.PALETTE[i + j], lw=1.8, label=label, ls=("-", "--", ":")[j])
            x, y = run.series("knn_balanced_accuracy")
            knn.plot(x, y, color=color, marker=marker, ms=4.5, label=run.name)
            knn.set_ylim(0, 1)
            rate.plot(*run.series("lr"), color=color, label=run.name)
        if not knn.lines or not any(len(line.get_xdata()) for line in knn.lines):
            knn.text(0.5, 0.5, "not measured", transform=knn.transAxes, ha="center", color=style.MUTED)
        for axes, title in ((loss, "loss"), (knn, "k-NN balanced accuracy"), (rate, "learning rate")):
            axes.set_title(title)
            axes.set_xlabel("epoch")
            axes.grid(axis="y", lw=0.7)
        rate.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        handles, labels = loss.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
    return figure
