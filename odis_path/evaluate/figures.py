"""Figures of an evaluation, in the style of the report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from odis_path.report import style
from odis_path.report.result_figures import draw_confusion

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_all(results: dict[str, Any], y: np.ndarray, scores: np.ndarray) -> dict[str, Figure]:
    """File name -> figure. y int (n,), scores (n, C) of the model."""
    labels = results["labels"]
    found = {"confusion": draw_confusion(np.array(results["confusion"]), labels)}
    roc = draw_roc(y, scores, labels)
    if roc is not None:
        found["roc"] = roc
    if results["per_k"]:
        validation = "validation folds" if results["probe"] == "knn" else "majority vote of the answers"
        points = {float(k): v for k, v in results["per_k"].items() if v is not None}
        found["k_curve"] = draw_curve(points, results["k"], "neighbours asked (k)", f"balanced accuracy, {validation}")
    if results.get("per_c"):
        points = {float(c): v for c, v in results["per_c"].items()}
        found["c_curve"] = draw_curve(points, results["chosen_C"], "C (weaker regularisation to the right)",
                                      "balanced accuracy, validation folds")  # fmt: skip
    if results.get("per_shots"):
        found["shots"] = draw_shots(results["per_shots"])
    return found


def draw_roc(y: np.ndarray, scores: np.ndarray, labels: list[str]) -> Figure | None:
    """One class against the rest, a curve per class; None where no class has rows on both sides."""
    figure = style.new_figure(5.6, 4.6)
    drawn = False
    with style.styled():
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=style.FAINT, lw=1.2)
        for c, label in enumerate(labels):
            curve = roc_curve(y == c, scores[:, c])
            if curve is None:
                continue
            drawn = True
            area = float(np.trapezoid(curve[1], curve[0]))
            dash = ("-", "--", ":", "-.")[c // len(style.PALETTE) % 4]
            axes.plot(*curve, color=style.PALETTE[c % len(style.PALETTE)], ls=dash, label=f"{label} ({area:.3f})")
        axes.set(xlabel="share of other classes taken for it", ylabel="share of the class found", xlim=(0, 1), ylim=(0, 1.01))
        axes.set_title("one class against the rest (area)")
        axes.set_aspect("equal")
        if drawn:
            axes.legend(fontsize=9, loc="lower right")
    return figure if drawn else None


def roc_curve(is_class: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """False and true positive rates at every distinct score, from (0, 0) to (1, 1)."""
    if is_class.all() or not is_class.any():
        return None
    order = np.argsort(-score, kind="stable")
    last = np.r_[score[order][1:] != score[order][:-1], True]
    right = np.cumsum(is_class[order])[last]
    wrong = np.cumsum(~is_class[order])[last]
    return np.r_[0, wrong / wrong[-1]], np.r_[0, right / right[-1]]


def draw_curve(points: dict[float, float], chosen: float | None, xlabel: str, ylabel: str) -> Figure:
    """A setting against its score; a ring marks the one that was used."""
    figure = style.new_figure(5.6, 3.4)
    x = sorted(points)
    with style.styled():
        axes = figure.subplots()
        axes.plot(x, [points[value] for value in x], color=style.ACCENT, marker="o")
        if chosen in points:
            axes.scatter([chosen], [points[float(chosen)]], s=170, fc="none", ec=style.ACCENT, lw=1.8)
        axes.set_xscale("log")
        axes.set_xticks(x, [f"{value:g}" for value in x])
        axes.minorticks_off()
        axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, 1))
        axes.grid(axis="y", lw=0.7)
    return figure


def draw_shots(per_shots: dict[str, dict[str, float]]) -> Figure:
    """Shots per class against balanced accuracy: mean over episodes, and the band of nine in ten of them."""
    figure = style.new_figure(5.6, 3.4)
    x = [int(s) for s in per_shots]
    mean, low, high = ([row[key] for row in per_shots.values()] for key in ("mean", "p5", "p95"))
    with style.styled():
        axes = figure.subplots()
        axes.fill_between(x, low, high, color=style.ACCENT, alpha=0.2, lw=0, label="9 in 10 episodes")
        axes.plot(x, mean, color=style.ACCENT, marker="o", label="mean")
        axes.set_xscale("log")
        axes.set_xticks(x, [str(value) for value in x])
        axes.minorticks_off()
        axes.set(xlabel="examples per class", ylabel="balanced accuracy", ylim=(0, 1))
        axes.grid(axis="y", lw=0.7)
        axes.legend(loc="lower right")
    return figure
