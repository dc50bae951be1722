"""An overview with parts that cannot be decoded: whether there is tissue is told by what lies around them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from annotations.errors import UserError
from tiling.overview import Overview
from tiling.quality import pen_mask
from tiling.slide import SMALLEST_PART_L0, Slide
from tiling.tissue import is_dark, tissue_mask

MOST_MENDED = 0.25  # of the picture, for one part: the surroundings of a larger one say little of it
LEAST_PX = 4  # pixels of the overview in a part


def mended(slide: Slide, overview: Overview, mpp_l0: float, keep_pen: bool) -> Overview:
    """The overview with its tissue found anew, as if lost parts looked like the nearest pixels that could be decoded.

    So tiles there are tiled, found torn, marked and counted; black, they would pass for padding. mpp_l0: micrometres per
    level-0 pixel. keep_pen: ink counts as tissue.
    """
    lost = lost_parts(slide, overview.thumb, overview.downsample)
    if not lost.any():
        return overview
    thumb, um_per_px = filled(overview.thumb, lost), mpp_l0 * overview.downsample
    pen = np.zeros(lost.shape, bool) if is_dark(thumb) else pen_mask(thumb, um_per_px)
    tissue = tissue_mask(thumb, um_per_px, np.zeros(lost.shape, bool) if keep_pen else pen)
    return replace(overview, pen=pen, tissue=tissue)


def lost_parts(slide: Slide, thumb: np.ndarray, downsample: float) -> np.ndarray:
    """bool (h, w): parts of an overview that are black because they cannot be decoded, not too large to be filled."""
    from scipy.ndimage import distance_transform_edt, label, maximum_position

    black = (thumb == 0).all(axis=2)
    pieces, count = label(black, np.ones((3, 3)))
    sizes = np.bincount(pieces.ravel(), minlength=count + 1)
    fitting = [i for i in range(1, count + 1) if LEAST_PX <= sizes[i] <= MOST_MENDED * black.size]
    middles = maximum_position(distance_transform_edt(black), pieces, fitting) if fitting else []
    lost = [i for i, (y, x) in zip(fitting, middles, strict=True) if not _decodes(slide, int(x), int(y), downsample)]
    return np.isin(pieces, lost)


def filled(thumb: np.ndarray, lost: np.ndarray) -> np.ndarray:
    """uint8 (h, w, 3) with the pixels of `lost`, bool (h, w), like the nearest others."""
    from scipy.ndimage import distance_transform_edt

    rows, columns = distance_transform_edt(lost, return_distances=False, return_indices=True)
    return thumb[rows, columns]


def _decodes(slide: Slide, x: int, y: int, downsample: float) -> bool:
    """Whether the surroundings of a pixel of the overview can be read, as far as one lost part reaches at the most."""
    view = slide.whole(slide.best_level(downsample))
    reach = max(4, SMALLEST_PART_L0 / downsample)
    step = downsample / view.downsample
    left, top = (int(max(0, at - reach) * step) for at in (x, y))
    right, bottom = (min(int((at + reach + 1) * step), most) for at, most in ((x, view.width), (y, view.height)))
    try:
        slide.read(view, left, top, max(1, right - left), max(1, bottom - top))
    except UserError:
        slide.reopen()
        return False
    return True
