"""The overview of a slide: thumbnail, tissue (detected or drawn, less what is excluded), and warnings about both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from annotations.errors import UserError
from tiling.grid import GridPlan, tissue_fractions
from tiling.tissue.drawn_regions import MASK_SUFFIXES, read_mask, read_outlines
from tiling.tissue.mask import BLACK_OVERVIEW, check_brightness, is_black, is_dark, tissue_mask
from tiling.tissue.quality import pen_mask
from tiling.wsi.slide import Slide

NOTED_SHARE = 0.5  # from this share on, what is lost is worth a note
MAX_FILLED_SHARE = 0.25  # of the picture, for one unreadable part: the surroundings of a larger one say little of it
MIN_FILLED_PX = 4  # pixels of the overview in an unreadable part


@dataclass(frozen=True)
class Overview:
    """A slide at low resolution. thumb: uint8 (h, w, 3); downsample: level-0 pixels per pixel of it.

    tissue, pen, excluded, unreadable: bool (h, w); tissue is None where every tile is wanted, excluded where nothing is;
    unreadable: black since it cannot be decoded.
    """

    thumb: np.ndarray
    downsample: float
    tissue: np.ndarray | None
    pen: np.ndarray
    excluded: np.ndarray | None
    unreadable: np.ndarray

    @property
    def tissue_mask(self) -> np.ndarray | None:
        """bool (h, w): where tiles are wanted, the tissue less what is excluded; None where everywhere."""
        if self.excluded is None:
            return self.tissue
        return ~self.excluded if self.tissue is None else self.tissue & ~self.excluded


def read_overview(
    slide: Slide, mpp_l0: float, outlines: Path | None, exclude: Path | None, *, find: bool, keep_pen: bool, side_px: int = 1024
) -> Overview:
    """Read a slide's overview, its longer side `side_px`, in bands whatever the slide's size, and find its tissue.

    mpp_l0: micrometres per level-0 pixel. outlines: GeoJSON of the tissue, in place of the search; exclude: GeoJSON or mask
    of what is not wanted. find: search for tissue where there are no outlines. keep_pen: ink counts as tissue. Raises UserError
    for files that do not fit, and where tissue is to be found in a picture that is black throughout.
    """
    info = slide.info
    thumb, unreadable = slide.read_thumbnail(side_px)
    shape = (thumb.shape[0], thumb.shape[1])
    downsample = info.width_l0 / shape[1]
    um_per_px = mpp_l0 * downsample
    is_searched = find and outlines is None
    picture = _fill_unreadable(thumb, unreadable) if is_searched else thumb
    pen = np.zeros(shape, bool) if is_dark(picture) else pen_mask(picture, um_per_px)
    tissue = None
    if outlines is not None:
        tissue = read_outlines(outlines, info, shape, downsample)
    elif is_searched:
        try:
            check_brightness(thumb)
        except UserError as error:
            raise UserError(f"{info.path}: {error}") from None
        tissue = tissue_mask(picture, um_per_px, np.zeros(shape, bool) if keep_pen else pen)
    excluded = None
    if exclude is not None and exclude.suffix.lower() in MASK_SUFFIXES:
        excluded = read_mask(exclude, info, shape)
    elif exclude is not None:
        excluded = read_outlines(exclude, info, shape, downsample, may_be_empty=True)
    return Overview(thumb, downsample, tissue, pen, excluded, unreadable)


def pen_shares(overview: Overview, plan: GridPlan) -> np.ndarray:
    """Measure the share of each tile under ink: float32 (N,)."""
    return tissue_fractions(plan.coords, plan.size_l0, overview.pen, overview.downsample)


def overview_warnings(overview: Overview, plan: GridPlan, *, ink_dropped: bool) -> Iterator[str]:
    """Warn where the picture is black, where most tissue came into no tile, where ink makes up most of what is not glass.

    ink_dropped: tissue was looked for, and what has the colours of ink was not taken for it.
    """
    if is_black(overview.thumb):
        yield f"warning: {BLACK_OVERVIEW}"
    wanted = overview.tissue_mask
    if wanted is None:
        return
    tissue = overview.tissue if overview.tissue is not None else np.ones_like(wanted)
    total = int(tissue.sum())
    kept = int((wanted & _covered(plan, wanted.shape, overview.downsample)).sum()) / max(1, total)
    if total and kept < NOTED_SHARE:
        excluded = int((tissue & ~wanted).sum()) / total
        small = max(0.0, 1 - kept - excluded)
        whole = "tissue" if overview.tissue is not None else "slide"
        yield (
            f"warning: {kept:.0%} of the {whole} is in tiles: {excluded:.0%} is under --exclude, {small:.0%} in tiles below "
            "--min-tissue or at the border"
        )
    if not ink_dropped:
        return
    excluded_too = overview.excluded if overview.excluded is not None else np.zeros_like(wanted)
    ink = int((overview.pen & ~tissue & ~excluded_too).sum())
    not_glass = int(wanted.sum()) + ink
    if ink > NOTED_SHARE * not_glass:
        yield (
            f"warning: {ink / not_glass:.0%} of what is not glass has the colours of pen ink and was left out: "
            "--pen keep takes it in"
        )


def _covered(plan: GridPlan, shape: tuple[int, ...], downsample: float) -> np.ndarray:
    """Mark the pixels of the overview, bool `shape`, that a tile covers."""
    height, width = shape
    edges = np.concatenate([plan.coords, plan.coords + plan.size_l0], axis=1) / downsample
    x0, y0, x1, y1 = np.rint(edges).astype(np.int64).clip(0, [width, height, width, height]).T
    change = np.zeros((height + 1, width + 1), np.int32)
    for row, column, step in ((y0, x0, 1), (y0, x1, -1), (y1, x0, -1), (y1, x1, 1)):
        np.add.at(change, (row, column), step)
    return change.cumsum(axis=0).cumsum(axis=1)[:height, :width] > 0


def _fill_unreadable(thumb: np.ndarray, unreadable: np.ndarray) -> np.ndarray:
    """Make unreadable parts, bool (h, w), look like the nearest pixels that could be decoded: uint8 (h, w, 3).

    Tiles there are then tiled, marked and counted as unreadable; black, they would pass for padding. Parts larger than
    MAX_FILLED_SHARE of the picture stay black.
    """
    from scipy.ndimage import distance_transform_edt, label

    parts, count = label(unreadable, np.ones((3, 3)))
    sizes = np.bincount(parts.ravel(), minlength=count + 1)
    fillable = (sizes >= MIN_FILLED_PX) & (sizes <= MAX_FILLED_SHARE * unreadable.size)
    fillable[0] = False
    filled = fillable[parts]
    if not filled.any():
        return thumb
    rows, columns = distance_transform_edt(filled, return_distances=False, return_indices=True)
    return np.asarray(thumb[rows, columns])
