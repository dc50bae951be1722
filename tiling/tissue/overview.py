"""The overview of a slide: thumbnail, tissue (detected or drawn, less what is excluded), and remarks about both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from annotations.errors import UserError
from tiling.grid import GridPlan, tissue_fractions
from tiling.tissue.drawn_regions import MASK_SUFFIXES, read_mask, read_outlines
from tiling.tissue.mask import BLACK_OVERVIEW, check_brightness, is_black, is_dark, tissue_mask
from tiling.tissue.quality import pen_mask
from tiling.wsi.slide import SMALLEST_PART_L0, Slide

MOST = 0.5  # from this share on, what is lost is worth a word


@dataclass(frozen=True)
class Overview:
    """A slide at low resolution. thumb: uint8 (h, w, 3); downsample: level-0 pixels per pixel of it.

    tissue, pen, excluded: bool (h, w); tissue is None where every tile is wanted, excluded where nothing is.
    """

    thumb: np.ndarray
    downsample: float
    tissue: np.ndarray | None
    pen: np.ndarray
    excluded: np.ndarray | None

    @property
    def tissue_mask(self) -> np.ndarray | None:
        """bool (h, w): where tiles are wanted; None where everywhere."""
        if self.excluded is None:
            return self.tissue
        return ~self.excluded if self.tissue is None else self.tissue & ~self.excluded


def read_overview(
    slide: Slide, mpp_l0: float, outlines: Path | None, exclude: Path | None, *, find: bool, keep_pen: bool, side_px: int = 1024
) -> Overview:
    """Read a slide's overview, its longer side `side_px`, in bands whatever the slide's size, and find its tissue.

    mpp_l0: micrometres per level-0 pixel. outlines: GeoJSON of the tissue, in place of the search; exclude: GeoJSON or mask
    of what is not wanted. find: search for tissue where there are no outlines. keep_pen: ink counts as tissue.
    Raises UserError for files that do not fit and for pictures in which nothing can be told from black.
    """
    from tiling.tissue.quality import pen_mask

    info = slide.info
    thumb = slide.thumbnail(side_px)
    shape = (thumb.shape[0], thumb.shape[1])
    downsample = info.width_l0 / shape[1]
    um_per_px = mpp_l0 * downsample
    pen = np.zeros(shape, bool) if is_dark(thumb) else pen_mask(thumb, um_per_px)
    tissue = None
    if outlines is not None:
        tissue = read_outlines(outlines, info, shape, downsample)
    elif find:
        try:
            check_brightness(thumb)
        except UserError as error:
            raise UserError(f"{info.path}: {error}") from None
        tissue = tissue_mask(thumb, um_per_px, np.zeros(shape, bool) if keep_pen else pen)
    excluded = None
    if exclude is not None and exclude.suffix.lower() in MASK_SUFFIXES:
        excluded = read_mask(exclude, info, shape)
    elif exclude is not None:
        excluded = read_outlines(exclude, info, shape, downsample, may_be_empty=True)
    return Overview(thumb, downsample, tissue, pen, excluded)


def pen_shares(overview: Overview, plan: GridPlan) -> np.ndarray:
    """Share of each tile under ink: float32 (N,)."""
    return tissue_fractions(plan.coords, plan.size_l0, overview.pen, overview.downsample)


def remarks(overview: Overview, plan: GridPlan, *, ink_dropped: bool) -> Iterator[str]:
    """A line where the picture is black, where most tissue came into no tile, where ink makes up most of what is not glass.

    ink_dropped: tissue was looked for, and what has the colours of ink was not taken for it.
    """
    if is_black(overview.thumb):
        yield f"warning: {BLACK_OVERVIEW}"
    wanted = overview.tissue_mask
    if wanted is None:
        return
    found = overview.tissue if overview.tissue is not None else np.ones_like(wanted)
    total = int(found.sum())
    kept = int((wanted & _covered(plan, wanted.shape, overview.downsample)).sum()) / max(1, total)
    if total and kept < MOST:
        excluded = int((found & ~wanted).sum()) / total
        small = max(0.0, 1 - kept - excluded)
        whole = "tissue" if overview.tissue is not None else "slide"
        yield (
            f"warning: {kept:.0%} of the {whole} is in tiles: {excluded:.0%} is under --exclude, {small:.0%} in tiles below "
            "--min-tissue or at the border"
        )
    if not ink_dropped:
        return
    excluded_too = overview.excluded if overview.excluded is not None else np.zeros_like(wanted)
    marked, other = int((overview.pen & ~found & ~excluded_too).sum()), int(wanted.sum())
    if marked > MOST * (other + marked):
        share = marked / (other + marked)
        yield f"warning: {share:.0%} of what is not glass has the colours of pen ink and was left out: --pen keep takes it in"


def _covered(plan: GridPlan, shape: tuple[int, ...], downsample: float) -> np.ndarray:
    """bool `shape`: pixels of the overview that some tile covers."""
    height, width = shape
    edges = np.concatenate([plan.coords, plan.coords + plan.size_l0], axis=1) / downsample
    x0, y0, x1, y1 = np.rint(edges).astype(np.int64).clip(0, [width, height, width, height]).T
    change = np.zeros((height + 1, width + 1), np.int32)
    for row, column, step in ((y0, x0, 1), (y0, x1, -1), (y1, x0, -1), (y1, x1, 1)):
        np.add.at(change, (row, column), step)
    return change.cumsum(axis=0).cumsum(axis=1)[:height, :width] > 0


MOST_FILLED = 0.25  # of the picture, for one part: the surroundings of a larger one say little of it


LEAST_PX = 4  # pixels of the overview in a part


def fill_unreadable(slide: Slide, overview: Overview, mpp_l0: float, keep_pen: bool) -> Overview:
    """The overview with its tissue found anew, as if lost parts looked like the nearest pixels that could be decoded.

    So tiles there are tiled, found torn, marked and counted; black, they would pass for padding. mpp_l0: micrometres per
    level-0 pixel. keep_pen: ink counts as tissue.
    """
    lost = unreadable_parts(slide, overview.thumb, overview.downsample)
    if not lost.any():
        return overview
    thumb, um_per_px = nearest_readable(overview.thumb, lost), mpp_l0 * overview.downsample
    pen = np.zeros(lost.shape, bool) if is_dark(thumb) else pen_mask(thumb, um_per_px)
    tissue = tissue_mask(thumb, um_per_px, np.zeros(lost.shape, bool) if keep_pen else pen)
    return replace(overview, pen=pen, tissue=tissue)


def unreadable_parts(slide: Slide, thumb: np.ndarray, downsample: float) -> np.ndarray:
    """bool (h, w): parts of an overview that are black because they cannot be decoded, not too large to be filled."""
    from scipy.ndimage import distance_transform_edt, label, maximum_position

    black = (thumb == 0).all(axis=2)
    pieces, count = label(black, np.ones((3, 3)))
    sizes = np.bincount(pieces.ravel(), minlength=count + 1)
    fitting = [i for i in range(1, count + 1) if LEAST_PX <= sizes[i] <= MOST_FILLED * black.size]
    middles = maximum_position(distance_transform_edt(black), pieces, fitting) if fitting else []
    lost = [i for i, (y, x) in zip(fitting, middles, strict=True) if not _decodes(slide, int(x), int(y), downsample)]
    return np.isin(pieces, lost)


def nearest_readable(thumb: np.ndarray, lost: np.ndarray) -> np.ndarray:
    """uint8 (h, w, 3) with the pixels of `lost`, bool (h, w), like the nearest others."""
    from scipy.ndimage import distance_transform_edt

    rows, columns = distance_transform_edt(lost, return_distances=False, return_indices=True)
    return thumb[rows, columns]


def _decodes(slide: Slide, x: int, y: int, downsample: float) -> bool:
    """Tell whether the surroundings of a pixel of the overview can be read, as far as one lost part reaches at the most."""
    view = slide.full_view(slide.best_level(downsample))
    reach = max(4, SMALLEST_PART_L0 / downsample)
    step = downsample / view.downsample
    left, top = (int(max(0, at - reach) * step) for at in (x, y))
    right, bottom = (min(int((at + reach + 1) * step), most) for at, most in ((x, view.width), (y, view.height)))
    try:
        slide.read_view(view, left, top, max(1, right - left), max(1, bottom - top))
    except UserError:
        slide.reopen()
        return False
    return True
