"""Single tiles: their boxes, the pair of object-aware crops, and where [OBJ] looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from annotations.objects import Kind
from odis_path.figures import style
from odis_path.reporting.cohort_table import UNCLASSIFIED

if TYPE_CHECKING:
    from matplotlib.figure import Figure


MAX_ATTENTION = 3.0  # times the attention of a patch when it is spread evenly


@dataclass(frozen=True)
class CropPair:
    """A tile, its boxes and the two global crops of one sample, as teacher and student see them before colour changes.

    tile uint8 (S, S, 3); boxes float32 (k, 4); target (4,) in tile px; rects int (2, 4) x, y, w, h of the crops in the tile;
    crops: two uint8 (s, s, 3); masks: two bool (g, g), the patches [OBJ] may attend to.
    """

    tile: np.ndarray
    boxes: np.ndarray
    target: np.ndarray
    rects: np.ndarray
    crops: list[np.ndarray]
    masks: list[np.ndarray]


@dataclass(frozen=True)
class Sample:
    """A tile picked for the report: its slide file, row, and the class and kind (0 tissue, 1 cell, 2 proposal) of each box."""

    path: Path
    slide_id: str
    row: int
    names: list[str]
    kinds: list[int]


def pick_tiles(paths: Sequence[Path], count: int, seed: int = 0) -> list[Sample]:
    """Pick up to `count` tiles with as many tissue classes as possible, of different slides where there are enough."""
    from tiling.slide_file.read import SlideFile

    rng = np.random.default_rng(seed)
    ranked: list[tuple[float, Sample]] = []
    slides = [paths[i] for i in sorted(rng.permutation(len(paths))[: 3 * count])]
    per_slide = max(1, int(np.ceil(count / max(1, len(slides)))))
    for path in slides:
        with SlideFile(path) as file:
            boxes, objects = file.boxes_table(), file.objects_table(ids=False)
            names = file.object_classes(UNCLASSIFIED)[boxes["object"]]
            label, kind = objects["label"][boxes["object"]], objects["kind"][boxes["object"]]
            size = (boxes["xyxy"][:, 2:] - boxes["xyxy"][:, :2]).min(1, initial=file.patch_size)
            large = (size > file.patch_size / 5) & (kind != Kind.CELL)
            pairs = np.unique(np.stack([file.box_tiles[large], label[large]], 1), axis=0)
            score = np.bincount(pairs[:, 0], minlength=len(file)) + rng.uniform(0, 0.5, len(file))
            for row in np.argsort(-score)[:per_slide].tolist() if len(label) else []:
                rows = file.box_rows(row)
                sample = Sample(path, file.slide_id, row, names[rows].tolist(), kind[rows].tolist())
                ranked.append((float(score[row]), sample))
    ranked.sort(key=lambda pair: -pair[0])
    return [sample for _, sample in ranked[:count]]


def draw_pairs(
    samples: Sequence[Sample], pairs: Sequence[CropPair], colors: dict[str, str], kinds: Sequence[int] = tuple(Kind)
) -> Figure:
    """Draw a row per tile: the tile with boxes, target and both crops' frames; then each crop, veiled where [OBJ] is blind.

    kinds: of the objects whose boxes are drawn.
    """
    figure = style.new_figure(style.WIDTH_IN, 2.95 * len(samples) + 0.75)
    with style.styled():
        grid = figure.subplots(len(samples), 3, squeeze=False)
        shown: dict[str, str] = {}
        for axes, sample, pair in zip(grid, samples, pairs, strict=True):
            shown.update(_draw_tile(axes[0], sample, pair, colors, kinds))
            for axis, crop, mask, color in zip(axes[1:], pair.crops, pair.masks, style.PAIR, strict=True):
                _draw_veiled(axis, crop, mask, color)
        for axes, title in zip(grid[0], ("tile, boxes and target", "crop 1", "crop 2"), strict=True):
            axes.set_title(title)
        figure.legend(handles=_legend(shown), loc="outside lower center", ncols=4, fontsize=9)
    return figure


def _legend(shown: dict[str, str]) -> list[Any]:
    from matplotlib.lines import Line2D

    entries = [("target", style.TARGET, "-", 4), ("frame of crop 1", style.PAIR[0], "--", 2.2)]
    entries += [("frame of crop 2", style.PAIR[1], "--", 2.2)]
    entries += [(name, color, "-", 1.6) for name, color in shown.items()]
    return [Line2D([], [], color=color, ls=ls, lw=lw, label=name) for name, color, ls, lw in entries]


def _draw_tile(axes: Any, sample: Sample, pair: CropPair, colors: dict[str, str], kinds: Sequence[int]) -> dict[str, str]:
    from matplotlib.patches import Rectangle

    axes.imshow(pair.tile)
    side = pair.tile.shape[0]
    shown = {}
    for box, name, kind in zip(pair.boxes, sample.names, sample.kinds, strict=True):
        if kind in kinds:
            color = shown[name] = colors.get(name, style.GREY)
            axes.add_patch(_rectangle(box + np.array([1, 1, -1, -1]), color, 2.0 if kind == Kind.TISSUE else 1.3))
    axes.add_patch(_rectangle(pair.target, "black", 4.6))
    axes.add_patch(_rectangle(pair.target, style.TARGET, 2.8))
    for (x, y, w, h), color in zip(pair.rects, style.PAIR, strict=True):
        axes.add_patch(Rectangle((x, y), w, h, fill=False, ec=color, lw=2.2, ls="--"))
    pad = 0.02 * side
    axes.set(xlim=(-pad, side + pad), ylim=(side + pad, -pad))
    style.picture_axes(axes)
    axes.set_xlabel(f"{sample.slide_id}, tile {sample.row}", fontsize=8.5, color=style.MUTED)
    return shown


def _rectangle(box: np.ndarray, color: str, width: float) -> Any:
    from matplotlib.patches import Rectangle

    x0, y0, x1, y1 = (float(v) for v in box)
    return Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, ec=color, lw=width)


def _draw_veiled(axes: Any, crop: np.ndarray, mask: np.ndarray, frame: str) -> None:
    """Draw a crop with the patches washed out that [OBJ] may not attend to."""
    side, grid = crop.shape[0], mask.shape[0]
    index = np.minimum(np.arange(side) * grid // side, grid - 1)
    open_ = mask[np.ix_(index, index)][..., None]
    axes.imshow(np.where(open_, crop, (0.35 * crop + 0.65 * 255).astype(np.uint8)))
    padded = np.pad(open_[..., 0].astype(float), 1)
    axes.contour(np.arange(-1, side + 1), np.arange(-1, side + 1), padded, [0.5], colors=style.INK, linewidths=1.2)
    axes.set(xlim=(-0.5, side - 0.5), ylim=(side - 0.5, -0.5))
    style.picture_axes(axes)
    for spine in axes.spines.values():
        spine.set(visible=True, color=frame, linewidth=2.6, linestyle="--")


def draw_attention(
    samples: Sequence[Sample], tiles: np.ndarray, boxes: np.ndarray, inside: np.ndarray, whole: np.ndarray
) -> Figure:
    """Draw a column per tile: the tile with its box; attention of [OBJ] kept to the box; attention over the whole tile.

    tiles uint8 (n, S, S, 3), boxes (n, 4), inside and whole float32 (n, g, g).
    """
    figure = style.new_figure(style.WIDTH_IN, 3 * style.WIDTH_IN / max(4, len(tiles)) + 0.9)
    with style.styled():
        grid = figure.subplots(3, max(4, len(tiles)), squeeze=False)
        rows = ("tile and box", "attention in the box", "attention, whole tile")
        colors: Any = None
        for column, axes in enumerate(grid.T):
            if column >= len(tiles):
                for empty in axes:
                    empty.set_visible(False)
                continue
            axes[0].imshow(tiles[column])
            style.picture_axes(axes[0], samples[column].slide_id)
            _draw_heat(axes[1], tiles[column], inside[column])
            colors = _draw_heat(axes[2], tiles[column], whole[column])
            for axis in axes:
                axis.add_patch(_rectangle(boxes[column], "black", 3.4))
                axis.add_patch(_rectangle(boxes[column], style.TARGET, 1.8))
        for axes, title in zip(grid[:, 0], rows, strict=True):
            axes.set_ylabel(title, fontsize=9.5)
        bar = figure.colorbar(colors, ax=grid[1:, :].ravel().tolist(), orientation="horizontal", aspect=50, pad=0.03)
        bar.set_ticks([0, 1, 2, 3], labels=["none", "as if spread evenly", "twice that", "three times or more"])
    return figure


def _draw_heat(axes: Any, tile: np.ndarray, heat: np.ndarray) -> Any:
    """Draw attention as colour over a faded grey tile; 1 is what a patch would get if all open patches got the same.

    Returns what a colour bar is drawn from.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    side = tile.shape[0]
    axes.imshow(0.5 * tile.mean(-1) + 0.5 * 255, cmap="gray", vmin=0, vmax=255)
    even = float(heat.sum()) / max(int((heat > 0).sum()), 1)
    strength = heat / max(even, 1e-12)
    scale = Normalize(0, MAX_ATTENTION)
    extent = (-0.5, side - 0.5, side - 0.5, -0.5)
    alpha = np.where(heat > 0, 0.25 + 0.5 * scale(strength).clip(0, 1), 0)
    axes.imshow(strength, cmap="plasma", norm=scale, alpha=alpha, extent=extent, interpolation="nearest")
    style.picture_axes(axes)
    return ScalarMappable(norm=scale, cmap="plasma")
