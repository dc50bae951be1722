"""Figures of an evaluation, in the style of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from odis_path.figures import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Score:
    """A number with its 95% interval (None where there is none)."""

    point: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        return self._text(".3f")

    def signed(self) -> str:
        """Return the text of a difference, with its sign."""
        return self._text("+.3f").replace("-", "−")

    def _text(self, form: str) -> str:
        text = format(self.point, form)
        if self.low is None or self.high is None:
            return text
        return f"{text} ({format(self.low, form)} to {format(self.high, form)})"


@dataclass(frozen=True)
class Bar:
    """A bar of the score plot: what was scored, and whether it is the model or a baseline."""

    label: str
    score: Score
    is_model: bool


@dataclass(frozen=True)
class KCurve:
    """Balanced accuracy by number of neighbours of one evaluation, and the number that was used."""

    name: str
    per_k: Mapping[int, float]
    used_k: int | None


def draw_scores(blocks: Sequence[tuple[str, Sequence[Bar]]], chance: Sequence[float | None], xlabel: str) -> Figure:
    """Draw bars with intervals, a block per evaluation; the model filled and dark, baselines pale and grey.

    blocks: the title and the bars of each evaluation. chance: the score of guessing, drawn as a dotted line.
    """
    lines = sum(len(bars) + 1 for _, bars in blocks)
    figure = style.new_figure(style.WIDTH_IN, 0.34 * lines + 0.95)
    with style.styled():
        axes = figure.subplots()
        y, ticks, labels = 0.0, [], []
        for (title, bars), guess in zip(blocks, chance, strict=True):
            axes.text(0.0, y, title, fontweight="bold", va="center", fontsize=10)
            top = y + 0.5
            for bar in bars:
                y += 1
                ticks.append(y)
                labels.append(bar.label)
                _draw_bar(axes, y, bar)
            if guess is not None:
                axes.plot([guess, guess], [top, y + 0.5], color=style.MUTED, lw=1.2, ls=":")
                axes.text(guess, y + 0.72, "guessing", fontsize=8, color=style.MUTED, ha="center", va="center")
            y += 1.35
        axes.set(yticks=ticks, yticklabels=labels, xlim=(0, 1.09), ylim=(y - 0.1, -0.7), xlabel=xlabel)
        axes.set_xticks(np.arange(0, 1.01, 0.2))
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", lw=0.7)
        axes.set_axisbelow(True)
    return figure


def _draw_bar(axes: Any, y: float, bar: Bar) -> None:
    color = style.ACCENT if bar.is_model else style.GREY
    low, high = bar.score.low, bar.score.high
    axes.barh(y, bar.score.point, height=0.62, color=color, alpha=0.9 if bar.is_model else 0.55, lw=0)
    if low is not None and high is not None:
        axes.plot([low, high], [y, y], color=style.INK, lw=1.6)
        for end in (low, high):
            axes.plot([end, end], [y - 0.16, y + 0.16], color=style.INK, lw=1.6)
    right = max(bar.score.point, high if high is not None else 0) + 0.012
    weight = "bold" if bar.is_model else "normal"
    axes.text(right, y, f"{bar.score.point:.2f}", va="center", fontsize=9.5, fontweight=weight)


def draw_confusion(counts: np.ndarray, labels: Sequence[str]) -> Figure:
    """Draw (C, C) counts, rows the truth: colour is the share of the row, the number in a cell is the count."""
    classes = len(labels)
    size = min(0.8 * classes + 2.4, style.WIDTH_IN)
    figure = style.new_figure(size, 0.9 * size)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    with style.styled():
        axes = figure.subplots()
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        if classes <= 15:
            for i, j in np.ndindex(classes, classes):
                color = "white" if share[i, j] > 0.55 else style.INK
                count = f"{counts[i, j]:,.0f}" if float(counts[i, j]).is_integer() else f"{counts[i, j]:,.1f}"
                text = f"{count}\n{share[i, j]:.0%}" if counts[i, j] else "0"
                axes.text(j, i, text, ha="center", va="center", fontsize=11, color=color)
        axes.set_xticks(range(classes), labels, rotation=35, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(classes), labels)
        axes.set_xlabel("what the model said", fontsize=12)
        axes.set_ylabel("what it is", fontsize=12)
        axes.tick_params(length=0, labelsize=12)
        for spine in axes.spines.values():
            spine.set_visible(False)
    return figure


def draw_per_k(curves: Sequence[KCurve]) -> Figure:
    """Draw number of neighbours against balanced accuracy, a line per evaluation; a ring marks the k that was used."""
    figure = style.new_figure(style.WIDTH_IN, 3.2)
    with style.styled():
        axes = figure.subplots()
        for i, curve in enumerate(curves):
            color, marker = style.PALETTE[i % len(style.PALETTE)], style.MARKERS[i % len(style.MARKERS)]
            axes.plot(list(curve.per_k), list(curve.per_k.values()), color=color, marker=marker, label=curve.name)
            _ring(axes, curve.per_k, curve.used_k, color)
        _setting_axis(axes, sorted({k for curve in curves for k in curve.per_k}), "neighbours asked (k)")
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    return figure


def _ring(axes: Any, points: Mapping[Any, float], used: float | None, color: str) -> None:
    """Mark the setting that was used with a ring, where it is one of the points."""
    if used in points:
        axes.scatter([used], [points[used]], s=170, fc="none", ec=color, lw=1.8)


def _setting_axis(axes: Any, values: Sequence[float], xlabel: str) -> None:
    """Lay out a plot of a setting against balanced accuracy, with ticks at its values."""
    axes.set_xscale("log")
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.minorticks_off()
    axes.set(xlabel=xlabel, ylabel="balanced accuracy", ylim=(0, 1))
    axes.grid(axis="y", lw=0.7)


def draw_roc(y: np.ndarray, scores: np.ndarray, labels: list[str]) -> Figure | None:
    """Draw one class against the rest, a curve per class; None where no class has rows on both sides.

    y: int (t,) truth. scores: float (t, C).
    """
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
    """Return false and true positive rates at every distinct score, from (0, 0) to (1, 1)."""
    if is_class.all() or not is_class.any():
        return None
    order = np.argsort(-score, kind="stable")
    last = np.r_[score[order][1:] != score[order][:-1], True]
    right = np.cumsum(is_class[order])[last]
    wrong = np.cumsum(~is_class[order])[last]
    return np.r_[0, wrong / wrong[-1]], np.r_[0, right / right[-1]]


def draw_curve(points: dict[float, float], chosen: float | None, xlabel: str, ylabel: str) -> Figure:
    """Draw a setting against its score; a ring marks the one that was used."""
    figure = style.new_figure(5.6, 3.4)
    values = sorted(points)
    with style.styled():
        axes = figure.subplots()
        axes.plot(values, [points[value] for value in values], color=style.ACCENT, marker="o")
        _ring(axes, points, chosen, style.ACCENT)
        _setting_axis(axes, values, xlabel)
        axes.set_ylabel(ylabel)
    return figure


def draw_shots(per_shots: dict[str, dict[str, float]]) -> Figure:
    """Draw shots per class against balanced accuracy: mean over episodes, and the band of nine in ten of them."""
    figure = style.new_figure(5.6, 3.4)
    shots = [int(count) for count in per_shots]
    mean, low, high = ([row[key] for row in per_shots.values()] for key in ("mean", "p5", "p95"))
    with style.styled():
        axes = figure.subplots()
        axes.fill_between(shots, low, high, color=style.ACCENT, alpha=0.2, lw=0, label="9 in 10 episodes")
        axes.plot(shots, mean, color=style.ACCENT, marker="o", label="mean")
        _setting_axis(axes, shots, "examples per class")
        axes.legend(loc="lower right")
    return figure
