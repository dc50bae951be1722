"""Thumbnails with tissue outline, tile grid and boxes coloured by class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from annotations.objects import Kind
from odis_path.figures import style
from odis_path.reporting.cohort_table import UNCLASSIFIED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_SIDE_PX = 1000
MAX_DOTS = 6000


@dataclass(frozen=True)
class SlidePicture:
    """The contents of a slide figure; geometry in thumbnail pixels.

    image uint8 (h, w, 3); outlines: list of (k, 2); tiles float (N, 4) x0, y0, x1, y1; boxes float (M, 4);
    kind uint8 (M,), name: class of each box.
    """

    slide_id: str
    image: np.ndarray
    outlines: list[np.ndarray]
    tiles: np.ndarray
    boxes: np.ndarray
    kind: np.ndarray
    name: np.ndarray
    um_per_px: float


def read_picture(path: Path) -> SlidePicture:
    """Collect what a slide figure shows from a slide file."""
    from tiling.slide_file.read import SlideFile

    with SlideFile(path) as file:
        image, downsample = _overview(file)
        tiles = np.concatenate([file.coords, file.coords + file.size_l0], 1) / downsample
        kinds, row = file.objects_table(ids=False)["kind"], file.boxes_table()["object"]
        mask = file.tissue_mask()
        return SlidePicture(
            slide_id=file.slide_id,
            image=image,
            outlines=_outlines(mask, image.shape[1]) if mask is not None else [],
            tiles=tiles,
            boxes=file.box_bounds_l0 / downsample,
            kind=kinds[row],
            name=file.object_classes(UNCLASSIFIED)[row],
            um_per_px=downsample * file.mpp_level0,
        )


def _overview(file: Any) -> tuple[np.ndarray, float]:
    """The stored thumbnail; else one read from the slide; else one pieced together from the tiles."""
    from annotations.errors import UserError
    from tiling.wsi.slide import Slide

    width, height = file.dimensions_l0
    stored = file.thumbnail()
    if stored is not None and max(stored[0].shape) >= 0.6 * min(MAX_SIDE_PX, max(width, height)):
        return stored
    try:
        with Slide.open(file.source, assume_mpp=file.mpp_level0) as slide:
            image = slide.thumbnail(MAX_SIDE_PX)
        return image, width / image.shape[1]
    except UserError:
        return stored if stored is not None else _from_tiles(file)


def _from_tiles(file: Any) -> tuple[np.ndarray, float]:
    from PIL import Image

    width, height = file.dimensions_l0
    downsample = max(width, height, 1) / MAX_SIDE_PX
    canvas = Image.new("RGB", (max(1, round(width / downsample)), max(1, round(height / downsample))), (244, 244, 244))
    side = max(1, round(file.size_l0 / downsample))
    if file.has_pixels:
        for i, (x, y) in enumerate(file.coords / downsample):
            tile = Image.fromarray(file.tile(i)).resize((side, side), Image.Resampling.BOX)
            canvas.paste(tile, (round(x), round(y)))
    return np.asarray(canvas), downsample


def _outlines(mask: np.ndarray, width_px: int) -> list[np.ndarray]:
    """Rings around the tissue, in thumbnail pixels; holes and crumbs under a thousandth of the picture are left out."""
    from skimage.measure import find_contours

    rings = find_contours(np.pad(mask, 1).astype(float), 0.5)
    big = [ring for ring in rings if abs(_area(ring)) > mask.size / 1000]
    return [(ring[:, ::-1] - 0.5) * (width_px / mask.shape[1]) for ring in big or rings]


def _area(ring: np.ndarray) -> float:
    y, x = ring.T
    return float(0.5 * (x[:-1] * y[1:] - x[1:] * y[:-1]).sum())


def draw_slide(picture: SlidePicture, colors: dict[str, str]) -> Figure:
    """Two views of one slide: tissue outline with the grid of tiles, and the boxes coloured by class."""
    height, width = picture.image.shape[:2]
    panel = style.WIDTH_IN / 2
    figure = style.new_figure(style.WIDTH_IN, min(panel * height / width, 6.5) + 0.85)
    with style.styled():
        left, right = figure.subplots(1, 2)
        for axes in (left, right):
            axes.imshow(picture.image)
            axes.set(xlim=(0, width), ylim=(height, 0))
        style.picture_axes(left, f"tissue outline and the {len(picture.tiles):,} tiles")
        boxed = f"{len(picture.boxes):,} boxes, coloured by class"
        style.picture_axes(right, boxed if len(picture.boxes) else "the slide (no boxes)")
        _draw_rectangles(left, picture.tiles, "white", 1.8, alpha=0.5)
        _draw_rectangles(left, picture.tiles, style.INK, 0.7, alpha=0.7)
        for ring in picture.outlines:
            left.plot(*ring.T, color=style.PALETTE[1], lw=1.6)
        shown = _draw_boxes(right, picture, colors)
        _scale_bar(left, picture)
        if shown:
            figure.legend(handles=shown, loc="outside lower center", ncols=min(5, len(shown)), fontsize=9)
    return figure


def _draw_rectangles(axes: Any, boxes: np.ndarray, color: Any, width: float, alpha: float = 1.0) -> None:
    from matplotlib.collections import LineCollection

    x0, y0, x1, y1 = boxes.T
    corners = np.stack([np.stack([x0, x1, x1, x0, x0], 1), np.stack([y0, y0, y1, y1, y0], 1)], -1)
    axes.add_collection(LineCollection(list(corners), colors=color, linewidths=width, alpha=alpha))


def _draw_boxes(axes: Any, picture: SlidePicture, colors: dict[str, str]) -> list[Any]:
    """Tissue boxes as tinted frames, everything smaller (cells, proposals) as dots. Returns the legend's handles."""
    from matplotlib.collections import PolyCollection
    from matplotlib.lines import Line2D

    handles = []
    for kind in Kind:
        here = picture.kind == kind
        for name in sorted(set(picture.name[here]), key=str):
            color = colors.get(name, style.GREY)
            boxes = picture.boxes[here & (picture.name == name)]
            if kind == Kind.TISSUE:
                boxes = _inset(boxes)
                x0, y0, x1, y1 = boxes.T
                corners = np.stack([np.stack([x0, x1, x1, x0], 1), np.stack([y0, y0, y1, y1], 1)], -1)
                axes.add_collection(PolyCollection(list(corners), facecolors=color, alpha=0.13, lw=0))
                _draw_rectangles(axes, boxes, color, 1.5)
            else:
                step = max(1, int(np.ceil(here.sum() / MAX_DOTS)))
                axes.scatter(*(boxes[::step, :2] + boxes[::step, 2:]).T / 2, s=2.2, color=color, lw=0, zorder=3)
            look = {"marker": "s", "mfc": "none", "mew": 2} if kind == Kind.TISSUE else {"marker": "o"}
            label = name if name != UNCLASSIFIED else f"{kind.word}, {UNCLASSIFIED}"
            size = 8 if kind == Kind.TISSUE else 5
            handles.append(Line2D([], [], color=color, ls="", ms=size, label=label, **look))
    return handles


def _inset(boxes: np.ndarray) -> np.ndarray:
    """Boxes shrunk a little, so that neighbours in two tiles do not hide each other."""
    return boxes + np.array([1.2, 1.2, -1.2, -1.2])


def _scale_bar(axes: Any, picture: SlidePicture) -> None:
    """A bar of a round length, about a fifth of the picture, at the lower left."""
    from matplotlib.patches import Rectangle

    height, width = picture.image.shape[:2]
    wanted = picture.um_per_px * width / 5
    power = 10 ** np.floor(np.log10(wanted))
    length = max(step * power for step in (1, 2, 5) if step * power <= wanted)
    label = f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} µm"
    x, y, long = 0.03 * width, 0.965 * height, length / picture.um_per_px
    backing = Rectangle((x - 0.012 * width, y - 0.055 * height), long + 0.024 * width, 0.07 * height, fc="white", alpha=0.8)
    axes.add_patch(backing).set_zorder(5)
    axes.plot([x, x + long], [y, y], color=style.INK, lw=3, solid_capstyle="butt", zorder=6)
    axes.text(x + long / 2, y - 0.012 * height, label, fontsize=9, va="bottom", ha="center", zorder=6)
