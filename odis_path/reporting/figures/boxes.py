"""Boxes over the pixels they were cut from, at three scales: a shift of a few pixels is seen at the finest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from odis_path.figures import style
from odis_path.reporting.cohort_table import UNCLASSIFIED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tiling.slide_file.read import SlideFile

AROUND = 2  # tiles on each side of the one that is shown whole
TILE_SIDE_PX = 256  # a tile is reduced to about this for the widest panel
CLOSE = 4  # the closest panel is this part of a tile's side
MOST_BOXES = 4000


@dataclass(frozen=True)
class Panel:
    """One picture. image uint8 (h, w, 3); side: what it spans, pixels of a tile; boxes float (M, 4) and name of each, rings
    [(name, (k, 2))]: in the same pixels, from the picture's upper left corner; frame: x0, y0, x1, y1 of the next panel.
    """

    image: np.ndarray
    side: float
    boxes: np.ndarray
    names: np.ndarray
    rings: list[tuple[str, np.ndarray]] = field(default_factory=list)
    frame: np.ndarray | None = None


@dataclass(frozen=True)
class BoxPicture:
    """Three panels of one place, the widest first. um_per_px: of a pixel of a tile."""

    slide_id: str
    row: int
    um_per_px: float
    panels: tuple[Panel, Panel, Panel]


def read_boxes(path: Path) -> BoxPicture | None:
    """The place of a slide file with most whole objects in a tile; None where it has no boxes.

    Raises UserError where the file has no pixels and its slide is gone.
    """
    from tiling.slide_file.read import SlideFile

    with SlideFile(path) as file:
        table = file.boxes_table()
        if not len(table["object"]):
            return None
        row = int(np.bincount(file.box_tiles, weights=0.5 + 0.5 * (table["visible"] > 0.999)).argmax())
        names = file.object_classes(UNCLASSIFIED)[table["object"]]
        here = file.box_rows(row)
        boxes, side = table["xyxy"][here].astype(float), float(file.patch_size)
        rings = [(str(names[i]), ring) for i in range(here.start, here.stop) if file.has_polygons for ring in file.polygon(i)]
        image = file.tile(row)
        corner = close_up(boxes, side)
        frame = np.concatenate([corner, corner + side / CLOSE])
        x, y, x1, y1 = np.round(frame).astype(int).tolist()
        inside = ((boxes[:, :2] < frame[2:]) & (boxes[:, 2:] > frame[:2])).all(axis=1)
        close = Panel(
            image[y:y1, x:x1],
            float(x1 - x),
            boxes[inside] - [x, y, x, y],
            names[here][inside],
            [(name, ring - [x, y]) for name, ring in rings],
        )
        middle = Panel(image, side, boxes, names[here], rings, np.array([x, y, x1, y1], dtype=float))
        return BoxPicture(file.slide_id, row, file.mpp, (_around(file, row, names), middle, close))


def close_up(boxes: np.ndarray, side: float) -> np.ndarray:
    """Corner (x, y), whole pixels, of the square of side / CLOSE pixels to look at closely: around the most central box that
    fits in, else around the corner of one, where an edge is seen at least.
    """
    span = side / CLOSE
    size = (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
    fits = np.flatnonzero((size <= span) & (size >= span / 8))
    if len(fits):
        middle = (boxes[:, :2] + boxes[:, 2:]) / 2
        centre = middle[fits[np.abs(middle[fits] - side / 2).max(axis=1).argmin()]]
    else:
        edges = boxes[size.argmin()].reshape(2, 2)
        centre = np.where((edges[0] > 0), edges[0], edges[1])  # an edge on the tile's own border says nothing
    return np.floor(np.clip(centre - span / 2, 0, side - span))


def _around(file: SlideFile, row: int, names: np.ndarray) -> Panel:
    """The tile among its neighbours, pieced together from their pixels."""
    from PIL import Image

    side, per_px = float(file.patch_size), file.size_l0 / file.patch_size
    at = (file.coords - file.coords[row]) / per_px  # corners in pixels of a tile
    shown = np.flatnonzero((np.abs(at) < (AROUND + 0.5) * side).all(axis=1))
    at -= at[shown].min(axis=0)
    span = float(at[shown].max() + side)
    step = max(1, round(side / TILE_SIDE_PX))
    small = max(1, round(side / step))
    canvas = Image.new("RGB", (round(span / step),) * 2, (244, 244, 244))
    for i in shown.tolist():
        picture = Image.fromarray(file.tile(i)).resize((small, small), Image.Resampling.BOX)
        canvas.paste(picture, tuple(np.round(at[i] / step).astype(int).tolist()))
    rows = np.flatnonzero(np.isin(file.box_tiles, shown))
    rows = rows[:: max(1, len(rows) // MOST_BOXES)]
    boxes = file.boxes_table()["xyxy"][rows] + np.tile(at[file.box_tiles[rows]], 2)
    return Panel(np.asarray(canvas), span, boxes, names[rows], [], np.concatenate([at[row], at[row] + side]))


def draw_boxes(picture: BoxPicture, colors: dict[str, str]) -> Figure:
    """The three panels side by side, each with a frame around what the next one shows."""
    figure = style.new_figure(style.WIDTH_IN, style.WIDTH_IN / 3 + 0.85)
    wide, _, close = (panel.side * picture.um_per_px for panel in picture.panels)
    titles = (
        f"{wide:.0f} µm, tile {picture.row} and its neighbours",
        f"{picture.panels[1].side * picture.um_per_px:.0f} µm, the tile",
        f"{close:.0f} µm, pixels of {picture.um_per_px:.2g} µm",
    )
    with style.styled():
        for axes, panel, title, width in zip(figure.subplots(1, 3), picture.panels, titles, (0.6, 1.1, 1.8), strict=True):
            _draw_panel(axes, panel, colors, width)
            style.picture_axes(axes, title)
        shown = dict.fromkeys(str(name) for panel in picture.panels for name in panel.names)
        figure.legend(handles=_legend(list(shown), colors), loc="outside lower center", ncols=min(5, len(shown)), fontsize=9)
    return figure


def _draw_panel(axes: Any, panel: Panel, colors: dict[str, str], width: float) -> None:
    from matplotlib.collections import LineCollection

    # The extent is of pixels' edges, as boxes count: half a pixel would be a shift.
    axes.imshow(panel.image, extent=(0, panel.side, panel.side, 0), interpolation="antialiased")
    x0, y0, x1, y1 = panel.boxes.reshape(-1, 4).T
    corners = np.stack([np.stack([x0, x1, x1, x0, x0], 1), np.stack([y0, y0, y1, y1, y0], 1)], -1)
    tint = [colors.get(str(name), style.GREY) for name in panel.names]
    axes.add_collection(LineCollection(list(corners), colors="white", linewidths=width + 0.8, alpha=0.6))
    axes.add_collection(LineCollection(list(corners), colors=tint, linewidths=width))
    rings = [np.concatenate([ring, ring[:1]]) for _, ring in panel.rings]
    axes.add_collection(LineCollection(rings, colors="black", linewidths=width * 0.6))
    if panel.frame is not None:
        a, b, c, d = panel.frame
        axes.plot([a, c, c, a, a], [b, b, d, d, b], color=style.TARGET, lw=2.2)
        axes.plot([a, c, c, a, a], [b, b, d, d, b], color=style.INK, lw=0.8)
    axes.set(xlim=(0, panel.side), ylim=(panel.side, 0))


def _legend(names: Sequence[str], colors: dict[str, str]) -> list[Any]:
    from matplotlib.lines import Line2D

    return [Line2D([], [], color=colors.get(name, style.GREY), lw=2, label=name) for name in names]
