"""Style of figures: colours that colour-blind readers tell apart, sizes, saving."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, continued with Paul Tol's "muted" one.
PALETTE = (
    *("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442"),
    *("#332288", "#882255", "#44AA99", "#999933", "#000000"),
)
MARKERS = "osD^vPX*ph<>"
INK, MUTED, FAINT = "#1d2733", "#7a8794", "#d5dbe1"
ACCENT, GREY = PALETTE[0], "#9aa5b1"
PAIR = (PALETTE[0], PALETTE[3])  # first and second crop
TARGET = "#F0E442"
DPI = 130
WIDTH_IN = 9.4

RC: Any = {
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "font.size": 10.5,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "text.color": INK,
    "text.parse_math": False,  # a $ in a name of a class or a slide is a $
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": FAINT,
    "legend.frameon": False,
    "lines.linewidth": 2.0,
}


def class_colors(names: Sequence[str]) -> dict[str, str]:
    """Give every class name a colour, in the order given; after twelve the colours start again."""
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}


def class_markers(names: Sequence[str]) -> dict[str, str]:
    """Give every class name a marker, so that colour is never the only sign."""
    return {name: MARKERS[i % len(MARKERS)] for i, name in enumerate(names)}


def new_figure(width_in: float, height_in: float) -> Figure:
    """Return an empty figure in the report's style, without global state or a window."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(RC):
        return Figure(figsize=(width_in, height_in), layout="constrained")


def styled() -> AbstractContextManager[None]:
    """Return the context in which axes are made and drawn: `with styled(): ...`."""
    import matplotlib

    return matplotlib.rc_context(RC)


def picture_axes(axes: Any, title: str = "") -> None:
    """Turn axes into a picture's: no ticks, no frame, a small title."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    if title:
        axes.set_title(title, fontsize=9.5, fontweight="normal", loc="left")


def draw_rectangles(axes: Axes, boxes: np.ndarray, colors: Any, width: float, alpha: float = 1.0) -> None:
    """Draw boxes (n, 4), x0, y0, x1, y1 in data units, as frames of one colour, or of a colour each."""
    from matplotlib.collections import LineCollection

    axes.add_collection(LineCollection(list(rectangle_corners(boxes)), colors=colors, linewidths=width, alpha=alpha))


def rectangle_corners(boxes: np.ndarray) -> np.ndarray:
    """Return the closed outlines (n, 5, 2) of boxes (n, 4)."""
    x0, y0, x1, y1 = boxes.T
    return np.stack([np.stack([x0, x1, x1, x0, x0], 1), np.stack([y0, y0, y1, y1, y0], 1)], -1)


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whatever the name ends in. The same figure gives the same bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with styled():
        FigureCanvasAgg(figure)
        figure.savefig(path, format="png", dpi=DPI, metadata={"Software": "odis-path"})
