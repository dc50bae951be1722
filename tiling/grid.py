"""The grid of tiles on a slide: arithmetic in level-0 pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from annotations.errors import UserError

FINEST_SHARE = 0.9  # tiles may be enlarged by a tenth, not more: 0.25 um is asked of a scan at 0.2501 um


@dataclass(frozen=True)
class GridPlan:
    """Tiles of one slide.

    coords: int64 (N, 2), top-left x, y in level-0 pixels, row-major by (y, x). size_l0: exact side of a tile in level-0
    pixels. patch_px: its side in target pixels of `mpp` micrometres. tissue_fraction: float32 (N,).
    """

    coords: np.ndarray
    size_l0: float
    patch_px: int
    mpp: float
    tissue_fraction: np.ndarray


def plan_grid(
    width_l0: int,
    height_l0: int,
    mpp_l0: float,
    mpp: float,
    size_px: int,
    overlap_px: int = 0,
    mask: np.ndarray | None = None,
    mask_downsample: float = 1.0,
    min_tissue: float = 0.1,
) -> GridPlan:
    """Place tiles that lie wholly inside the slide, and keep those with enough tissue.

    width_l0, height_l0: the slide in level-0 pixels of mpp_l0 micrometres. size_px, overlap_px: in target pixels of
    mpp micrometres. mask: bool (h, w), a pixel of it covers mask_downsample level-0 pixels; None keeps every tile, with
    a tissue fraction of 1. Raises UserError for a tile size, an overlap or an mpp that cannot be.
    """
    if size_px < 1:
        raise UserError(f"--size {size_px}: a tile has at least 1 pixel")
    if not 0 <= overlap_px < size_px:
        raise UserError(f"--overlap {overlap_px}: must be at least 0 and less than --size {size_px}")
    if mpp < FINEST_SHARE * mpp_l0:
        raise UserError(f"--mpp {mpp:g} is finer than the slide's {mpp_l0:g} um per pixel: ask for --mpp {mpp_l0:.4g} or more")
    size_l0, stride_l0 = (side_l0(side_px, mpp, mpp_l0) for side_px in (size_px, size_px - overlap_px))
    xs, ys = (_positions(length, size_l0, stride_l0) for length in (width_l0, height_l0))
    grid_y, grid_x = np.meshgrid(ys, xs, indexing="ij")
    coords = np.stack([grid_x.ravel(), grid_y.ravel()], axis=1).astype(np.int64)
    if mask is None:
        return GridPlan(coords, size_l0, size_px, mpp, np.ones(len(coords), np.float32))
    fraction = tissue_fractions(coords, size_l0, mask, mask_downsample)
    keep = fraction >= min_tissue
    return GridPlan(coords[keep], size_l0, size_px, mpp, fraction[keep])


def side_l0(side_px: int, mpp: float, mpp_l0: float) -> float:
    """Convert target pixels of mpp micrometres to level-0 pixels of mpp_l0; a whole number of them stays whole.

    224 * 0.4942 / 0.2471 would be 447.99999999999994, which no stored tile has and no scaled decoding gives.
    """
    return round(side_px * mpp / mpp_l0, 9)


def tissue_fractions(coords_l0: np.ndarray, size_l0: float, mask: np.ndarray, downsample: float) -> np.ndarray:
    """Compute the share of each tile that the mask covers, exact to fractions of a mask pixel: float32 (N,)."""
    height, width = mask.shape
    integral = np.zeros((height + 1, width + 1))
    np.cumsum(np.cumsum(mask, axis=0, dtype=np.float64), axis=1, out=integral[1:, 1:])
    low = coords_l0 / downsample
    high = (coords_l0 + size_l0) / downsample
    x0, y0 = low[:, 0].clip(0, width), low[:, 1].clip(0, height)
    x1, y1 = high[:, 0].clip(0, width), high[:, 1].clip(0, height)
    covered = _at(integral, x1, y1) - _at(integral, x0, y1) - _at(integral, x1, y0) + _at(integral, x0, y0)
    # The divisor is the part of the tile on the mask: its last row and column may be rounded away.
    area = np.maximum((x1 - x0) * (y1 - y0), 1e-9)
    fractions: np.ndarray = (covered / area).clip(0, 1).astype(np.float32)
    return fractions


def _positions(length_l0: int, size_l0: float, stride_l0: float) -> np.ndarray:
    """Place whole starts k * stride (rounded down, so that the tile stays inside), for tiles that end within the length."""
    count = int(np.floor((length_l0 - size_l0) / stride_l0 + 1e-9)) + 1
    starts: np.ndarray = np.floor(np.arange(max(count, 0)) * stride_l0 + 1e-6).astype(np.int64)
    return starts


def _at(integral: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Read the integral image between its corners (bilinear, which is exact for a mask constant over each pixel)."""
    left = np.minimum(x.astype(np.int64), integral.shape[1] - 2)
    top = np.minimum(y.astype(np.int64), integral.shape[0] - 2)
    fx, fy = x - left, y - top
    upper = integral[top, left] * (1 - fx) + integral[top, left + 1] * fx
    lower = integral[top + 1, left] * (1 - fx) + integral[top + 1, left + 1] * fx
    values: np.ndarray = upper * (1 - fy) + lower * fy
    return values
