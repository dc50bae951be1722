"""Thumbnails with tissue outline, tile grid and boxes coloured by class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from annotations.errors import UserError
from annotations.objects import Kind
from odis_path.figures import style
from odis_path.reporting.cohort_table import UNCLASSIFIED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    from tiling.slide_file.read import SlideFile

MAX_SIDE_PX = 1000
MAX_DOTS = 6000


@dataclass(frozen=True)
class SlidePicture:
    """The contents of a slide figure; geometry in thumbnail pixels.

    image uint8 (h, w, 3); outlines: of the tissue, (k, 2) each; tiles float (N, 4) x0, y0, x1, y1; boxes float (M, 4);
    kinds uint8 (M,) and names of the boxes' objects.
    """

    image: np.ndarray
    outlines: list[np.ndarray]
    tiles: np.ndarray
    boxes: np.ndarray
    kinds: np.ndarray
    names: np.ndarray
    um_per_px: float


def read_picture(path: Path) -> SlidePicture:
    """Read the contents of a slide figure from a slide file."""
    from tiling.slide_file.read import SlideFile

    with SlideFile(path) as file:
        image, downsample = _overview(file)
        mask, rows = file.tissue_mask(), file.boxes_table()["object"]
        return SlidePicture(
            image=image,
            outlines=[] if mask is None else _outlines(mask, image.shape[1]),
            tiles=np.concatenate([file.coords, file.coords + file.size_l0], 1) / downsample,
            boxes=file.box_bounds_l0 / downsample,
            kinds=file.objects_table(ids=False)["kind"][rows],
            names=file.object_classes(UNCLASSIFIED)[rows],
            um_per_px=downsample * file.mpp_level0,
        )


def _overview(file: SlideFile) -> tuple[np.ndarray, float]:
    """Return the stored thumbnail, else one read from the slide, else one pieced together from the tiles; its downsample."""
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
        if stored is not None:
            return stored
    downsample = max(width, height, 1) / MAX_SIDE_PX
    size = (max(1, round(width / downsample)), max(1, round(height / downsample)))
    tiles = np.arange(len(file) if file.has_pixels else 0)
    tile_px = max(1, round(file.size_l0 / downsample))
    return mosaic(file, tiles, file.coords / downsample, tile_px, size), downsample


def mosaic(file: SlideFile, tiles: np.ndarray, corners: np.ndarray, tile_px: int, size: tuple[int, int]) -> np.ndarray:
    """Piece tiles together: uint8 (h, w, 3) with tile `tiles[i]`, reduced to tile_px, at corners[i] (x, y). size: (w, h)."""
    from PIL import Image

    canvas = Image.new("RGB", size, (244, 244, 244))
    for i, (x, y) in zip(tiles.tolist(), corners.tolist(), strict=False):
        tile = Image.fromarray(file.tile(i)).resize((tile_px, tile_px), Image.Resampling.BOX)
        canvas.paste(tile, (round(x), round(y)))
    return np.asarray(canvas)


def _outlines(mask: np.ndarray, width_px: int) -> list[np.ndarray]:
    """Trace the tissue as rings in thumbnail pixels; those under a thousandth of the picture are left out."""
    from skimage.measure import find_contours

    trace: Callable[[np.ndarray, float], list[np.ndarray]] = find_contours
    rings = trace(np.pad(mask, 1).astype(float), 0.5)
    big = [ring for ring in rings if abs(_area(ring)) > mask.size / 1000]
    return [(ring[:, ::-1] - 0.5) * (width_px / mask.shape[1]) for ring in big or rings]


def _area(ring: np.ndarray) -> float:
    y, x = ring.T
    return float(0.5 * (x[:-1] * y[1:] - x[1:] * y[:-1]).sum())


def draw_slide(picture: SlidePicture, colors: dict[str, str]) -> Figure:
    """Draw a slide twice: the tissue outline with the grid of tiles, and the boxes coloured by class."""
    height, width = picture.image.shape[:2]
    panel = style.WIDTH_IN / 2
    figure = style.new_figure(style.WIDTH_IN, min(panel * height / width, 6.5) + 0.85)
    with style.styled():
        left, right = figure.subplots(1, 2)
        for axes in (left, right):
            axes.imshow(picture.image)
            axes.set(xlim=(0, width), ylim=(height, 0))
        style.picture_axes(left, f"tissue outline and the {len(picture.tiles):,} tiles")
        count = len(picture.boxes)
        style.picture_axes(right, f"{count:,} boxes, coloured by class" if count else "the slide (no boxes)")
        style.draw_rectangles(left, picture.tiles, "white", 1.8, alpha=0.5)
        style.draw_rectangles(left, picture.tiles, style.INK, 0.7, alpha=0.7)
        for ring in picture.outlines:
            left.plot(*ring.T, color=style.PALETTE[1], lw=1.6)
        handles = _draw_boxes(right, picture, colors)
        _scale_bar(left, picture)
        if handles:
            figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles)), fontsize=9)
    return figure


def _draw_boxes(axes: Axes, picture: SlidePicture, colors: dict[str, str]) -> list[Line2D]:
    """Draw tissue boxes as tinted frames, all smaller ones (cells, proposals) as dots; return the legend's handles."""
    from matplotlib.collections import PolyCollection
    from matplotlib.lines import Line2D

    handles = []
    for kind in Kind:
        of_kind = picture.kinds == kind
        for name in sorted(set(picture.names[of_kind]), key=str):
            color = colors.get(name, style.GREY)
            boxes = picture.boxes[of_kind & (picture.names == name)]
            if kind == Kind.TISSUE:
                boxes = boxes + np.array([1.2, 1.2, -1.2, -1.2])  # so that neighbours in two tiles do not hide each other
                corners = style.rectangle_corners(boxes)[:, :4]
                axes.add_collection(PolyCollection(list(corners), facecolors=color, alpha=0.13, lw=0))
                style.draw_rectangles(axes, boxes, color, 1.5)
                handle = Line2D([], [], color=color, ls="", marker="s", mfc="none", mew=2, ms=8)
            else:
                step = max(1, int(np.ceil(of_kind.sum() / MAX_DOTS)))
                x, y = ((boxes[::step, :2] + boxes[::step, 2:]) / 2).T
                axes.scatter(x, y, s=2.2, color=color, lw=0, zorder=3)
                handle = Line2D([], [], color=color, ls="", marker="o", ms=5)
            handle.set_label(name if name != UNCLASSIFIED else f"{kind.word}, {UNCLASSIFIED}")
            handles.append(handle)
    return handles


def _scale_bar(axes: Axes, picture: SlidePicture) -> None:
    """Draw a bar of a round length, about a fifth of the picture, at the lower left."""
    from matplotlib.patches import Rectangle

    height, width = picture.image.shape[:2]
    fifth_um = picture.um_per_px * width / 5
    power = 10 ** np.floor(np.log10(fifth_um))
    length_um = max(step * power for step in (1, 2, 5) if step * power <= fifth_um)
    label = f"{length_um / 1000:g} mm" if length_um >= 1000 else f"{length_um:g} µm"
    x, y, length = 0.03 * width, 0.965 * height, length_um / picture.um_per_px
    backing = Rectangle((x - 0.012 * width, y - 0.055 * height), length + 0.024 * width, 0.07 * height, fc="white", alpha=0.8)
    axes.add_patch(backing).set_zorder(5)
    axes.plot([x, x + length], [y, y], color=style.INK, lw=3, solid_capstyle="butt", zorder=6)
    axes.text(x + length / 2, y - 0.012 * height, label, fontsize=9, va="bottom", ha="center", zorder=6)
