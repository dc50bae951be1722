"""Boxes over the pixels they were cut from, at three scales: a shift of a few pixels is seen at the finest."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from odis_path.figures import style
from odis_path.reporting.cohort_table import UNCLASSIFIED
from odis_path.reporting.figures.slides import mosaic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tiling.slide_file.read import SlideFile

NEIGHBOURS = 2  # tiles shown on each side of the one that is shown whole
TILE_SIDE_PX = 256  # a tile is reduced to about this for the widest panel
CLOSE = 4  # the closest panel is this part of a tile's side
MAX_BOXES = 4000


@dataclass(frozen=True)
class Panel:
    """One picture; lengths are pixels of a tile, from the picture's upper left corner.

    image uint8 (h, w, 3); side: of the picture; boxes float (M, 4) x0, y0, x1, y1 and the class of each; rings: outlines
    (k, 2); frame: x0, y0, x1, y1 of the next panel.
    """

    image: np.ndarray
    side: float
    boxes: np.ndarray
    names: np.ndarray
    rings: list[np.ndarray] = field(default_factory=list)
    frame: np.ndarray | None = None


@dataclass(frozen=True)
class BoxPicture:
    """Three panels of one place, the widest first. row: the tile; um_per_px: of a pixel of a tile."""

    row: int
    um_per_px: float
    panels: tuple[Panel, Panel, Panel]


def read_boxes(path: Path) -> BoxPicture | None:
    """Read the tile of a slide file with most whole objects; None where the file has no boxes.

    Raises UserError where the file has no pixels and its slide is gone.
    """
    from tiling.slide_file.read import SlideFile

    with SlideFile(path) as file:
        table = file.boxes_table()
        if not len(table["object"]):
            return None
        row = int(np.bincount(file.box_tiles, weights=0.5 + 0.5 * (table["visible"] > 0.999)).argmax())
        all_names, rows = file.object_classes(UNCLASSIFIED)[table["object"]], file.box_rows(row)
        boxes, names, side = table["xyxy"][rows].astype(float), all_names[rows], float(file.patch_size)
        rings = [ring for i in range(rows.start, rows.stop) if file.has_polygons for ring in file.polygon(i)]
        image = file.tile(row)
        corner = close_up(boxes, side)
        frame = np.concatenate([corner, corner + side / CLOSE])
        x0, y0, x1, y1 = np.round(frame).astype(int).tolist()
        inside = ((boxes[:, :2] < frame[2:]) & (boxes[:, 2:] > frame[:2])).all(axis=1)
        close_boxes, close_rings = boxes[inside] - [x0, y0, x0, y0], [ring - [x0, y0] for ring in rings]
        close = Panel(image[y0:y1, x0:x1], float(x1 - x0), close_boxes, names[inside], close_rings)
        middle = Panel(image, side, boxes, names, rings, np.array([x0, y0, x1, y1], dtype=float))
        return BoxPicture(row, file.mpp, (_neighbourhood(file, row, all_names), middle, close))


def close_up(boxes: np.ndarray, side: float) -> np.ndarray:
    """Return the corner (x, y), whole pixels, of the square of side / CLOSE pixels to look at closely.

    It lies around the most central box that fits in, else around the corner of one, where an edge is seen at least.
    boxes: float (M, 4) in pixels of a tile of `side`.
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
    corner: np.ndarray = np.floor(np.clip(centre - span / 2, 0, side - span))
    return corner


def _neighbourhood(file: SlideFile, row: int, names: np.ndarray) -> Panel:
    """Piece the tile and its neighbours together from their pixels."""
    side, px_l0 = float(file.patch_size), file.size_l0 / file.patch_size
    corners = (file.coords - file.coords[row]) / px_l0  # in pixels of a tile
    shown = np.flatnonzero((np.abs(corners) < (NEIGHBOURS + 0.5) * side).all(axis=1))
    corners -= corners[shown].min(axis=0)
    span = float(corners[shown].max() + side)
    step = max(1, round(side / TILE_SIDE_PX))
    size = round(span / step)
    image = mosaic(file, shown, corners[shown] / step, max(1, round(side / step)), (size, size))
    rows = np.flatnonzero(np.isin(file.box_tiles, shown))
    rows = rows[:: max(1, len(rows) // MAX_BOXES)]
    boxes = file.boxes_table()["xyxy"][rows] + np.tile(corners[file.box_tiles[rows]], 2)
    return Panel(image, span, boxes, names[rows], [], np.concatenate([corners[row], corners[row] + side]))


def draw_boxes(picture: BoxPicture, colors: dict[str, str]) -> Figure:
    """Draw the three panels side by side, each with a frame around what the next one shows."""
    from matplotlib.lines import Line2D

    figure = style.new_figure(style.WIDTH_IN, style.WIDTH_IN / 3 + 0.85)
    wide, middle, close = (panel.side * picture.um_per_px for panel in picture.panels)
    titles = (
        f"{wide:.0f} µm, tile {picture.row} and its neighbours",
        f"{middle:.0f} µm, the tile",
        f"{close:.0f} µm, pixels of {picture.um_per_px:.2g} µm",
    )
    with style.styled():
        for axes, panel, title, width in zip(figure.subplots(1, 3), picture.panels, titles, (0.6, 1.1, 1.8), strict=True):
            _draw_panel(axes, panel, colors, width)
            style.picture_axes(axes, title)
        shown = dict.fromkeys(str(name) for panel in picture.panels for name in panel.names)
        handles = [Line2D([], [], color=colors.get(name, style.GREY), lw=2, label=name) for name in shown]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(shown)), fontsize=9)
    return figure


def _draw_panel(axes: Any, panel: Panel, colors: dict[str, str], width: float) -> None:
    from matplotlib.collections import LineCollection

    # The extent is of pixels' edges, as boxes count: half a pixel would be a shift.
    axes.imshow(panel.image, extent=(0, panel.side, panel.side, 0), interpolation="antialiased")
    boxes = panel.boxes.reshape(-1, 4)
    style.draw_rectangles(axes, boxes, "white", width + 0.8, alpha=0.6)
    style.draw_rectangles(axes, boxes, [colors.get(str(name), style.GREY) for name in panel.names], width)
    rings = [np.concatenate([ring, ring[:1]]) for ring in panel.rings]
    axes.add_collection(LineCollection(rings, colors="black", linewidths=width * 0.6))
    if panel.frame is not None:
        outline = style.rectangle_corners(panel.frame[None])[0].T
        axes.plot(*outline, color=style.TARGET, lw=2.2)
        axes.plot(*outline, color=style.INK, lw=0.8)
    axes.set(xlim=(0, panel.side), ylim=(panel.side, 0))
