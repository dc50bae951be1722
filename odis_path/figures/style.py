"""Style of figures: colours that colour-blind readers tell apart, sizes, saving."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    """A colour for each class name, in the order given; after twelve the colours start again."""
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}


def class_markers(names: Sequence[str]) -> dict[str, str]:
    """A marker for each class name, so that colour is never the only sign."""
    return {name: MARKERS[i % len(MARKERS)] for i, name in enumerate(names)}


def new_figure(width_in: float, height_in: float) -> Figure:
    """An empty figure in the report's style; no global state, no window."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(RC):
        return Figure(figsize=(width_in, height_in), layout="constrained")


def styled() -> Any:
    """Context in which axes are made and drawn: `with styled(): ...`."""
    import matplotlib

    return matplotlib.rc_context(RC)


def picture_axes(axes: Any, title: str = "") -> None:
    """Axes that hold a picture: no ticks, no frame, a title."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    if title:
        axes.set_title(title, fontsize=9.5, fontweight="normal", loc="left")


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whatever the name ends in. The same figure gives the same bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with styled():
        FigureCanvasAgg(figure)
        figure.savefig(path, format="png", dpi=DPI, metadata={"Software": "odis-path"})
