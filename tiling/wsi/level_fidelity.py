"""Check that a coarser level of a slide, or fewer coefficients of its JPEGs, may stand for the average of all pixels.

Scanners make their coarser levels as they like: some average, some sharpen or take every other pixel, all compress them once
more. On H&E such a level can lie 5 grey levels from the average of level 0, and slides of two scanners would differ by it.

A JPEG decoder that leaves out coefficients averages well what is stored at full resolution. Colours mostly are not: of those
stored at half the width (4:2:2) it takes a half once more, where the average of all pixels keeps them whole. On sharp H&E that
is 3 grey levels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from annotations.errors import UserError

if TYPE_CHECKING:
    from tiling.wsi.backends.tiff_direct import DirectReader
    from tiling.wsi.level_view import Levels

MAX_DEVIATION = 1.5  # grey levels, mean over a place; other places may lie a little further, and 2 are promised
GRID, PLACES = 4, 4  # places looked at along each side; of those the ones with the most fine structure
SIDE_L0, SIDES = 640, (8, 128)  # of a place: level-0 pixels, and bounds in pixels of the output
STORED_TILES, STORED_PIXELS = 8, 16_000_000  # stored tiles looked at, and their pixels together, at most
MOST_BYTES = 0.1  # share of the stored tiles, those of the most bytes, among which they are

Box = tuple[float, float, float, float]


def matches_area_average(slide: Levels, level: int, downsample: float) -> bool:
    """Tell whether output of `downsample` level-0 pixels per pixel looks the same from a level as averaged from level 0.

    Looks at a few places with structure; those that cannot be decoded do not count.
    """
    width, height = slide.info.width_l0, slide.info.height_l0
    side = int(np.clip(SIDE_L0 / downsample, *SIDES))
    side = max(1, min(side, int(min(width, height) / downsample)))
    size_l0 = side * downsample
    seen: list[tuple[float, Box, np.ndarray]] = []
    for y in np.linspace(0, max(0.0, height - size_l0), GRID).round():
        for x in np.linspace(0, max(0.0, width - size_l0), GRID).round():
            box = (float(x), float(y), float(x) + size_l0, float(y) + size_l0)
            if (pixels := _read(slide, level, box, side)) is not None:
                # By differences of neighbours: the edge of the tissue varies more than all else, and averages well.
                seen.append((float(np.abs(np.diff(pixels.astype(np.int16), axis=1)).mean()), box, pixels))
    for _, box, pixels in sorted(seen, key=lambda place: -place[0])[:PLACES]:
        average = _read(slide, 0, box, side)
        if average is not None and np.abs(pixels.astype(np.int16) - average).mean() > MAX_DEVIATION:
            return False
    return True


def scale_matches_average(reader: DirectReader, level: int, scale: int) -> bool:
    """Tell whether stored tiles decoded at 1 / scale look the same as averages of all their pixels.

    Looks at a few of those with the most bytes, which have the most structure; those that cannot be decoded do not count.
    """
    page = reader.pages[level]
    count = int(np.clip(STORED_PIXELS // (page.tile_w * page.tile_h), 1, STORED_TILES))
    by_bytes = np.argsort(-page.counts, axis=None, kind="stable")
    ranks = np.linspace(0, max(0, int((page.counts > 0).sum() * MOST_BYTES) - 1), count).astype(int)
    for at in np.unique(by_bytes[ranks]).tolist():
        try:
            row, column = divmod(at, page.counts.shape[1])
            full, scaled = (reader.decode_tile(level, factor, row, column) for factor in (1, scale))
        except (ValueError, OSError):
            continue
        if full is None or scaled is None:
            continue
        height, width = full.shape[0] // scale, full.shape[1] // scale
        sums = full[: height * scale, : width * scale].reshape(height, scale, width, scale, 3).sum((1, 3), dtype=np.float32)
        if np.abs(scaled[:height, :width] - sums / scale**2).mean() > MAX_DEVIATION:
            return False
    return True


def _read(slide: Levels, level: int, box_l0: Box, side: int) -> np.ndarray | None:
    """uint8 (side, side, 3): a level-0 box from the whole pixels of a level; None where they cannot be decoded."""
    from tiling.wsi.level_view import pixel_bounds

    view = slide.full_view(level)
    (edges,) = pixel_bounds(view, np.array([box_l0])).tolist()
    try:
        return slide.resample_block(view, edges, slide.read_block(view, edges), box_l0, side, side)
    except UserError:
        slide.reopen()
        return None
