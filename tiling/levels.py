"""Whether a coarser level of a slide may stand for level 0.

Scanners make their coarser levels as they like: some average, some sharpen or take every other pixel, all compress them once
more. On H&E such a level can lie 5 grey levels from the average of level 0, and slides of two scanners would differ by it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from annotations.errors import UserError

if TYPE_CHECKING:
    from tiling.slide import Slide

MOST_AWAY = 1.5  # grey levels, mean over a place; other places may lie a little further, and 2 are promised
GRID, PLACES = 4, 4  # places looked at along each side; of those the ones with the most fine structure
SIDE_L0, SIDES = 640, (8, 128)  # of a place: level-0 pixels, and bounds in pixels of the output

Box = tuple[float, float, float, float]


def is_average(slide: Slide, level: int, downsample: float) -> bool:
    """Whether output of `downsample` level-0 pixels per pixel looks the same from a level as averaged from level 0.

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
    for _, box, pixels in sorted(seen, key=lambda each: -each[0])[:PLACES]:
        average = _read(slide, 0, box, side)
        if average is not None and np.abs(pixels.astype(np.int16) - average).mean() > MOST_AWAY:
            return False
    return True


def _read(slide: Slide, level: int, box_l0: Box, side: int) -> np.ndarray | None:
    """uint8 (side, side, 3): a level-0 box from the whole pixels of a level; None where they cannot be decoded."""
    from tiling.slide import View, cover

    view = View(level, 1, slide.info.level_downsamples[level], *slide.info.level_dimensions[level])
    (edges,) = cover(view, np.array([box_l0])).tolist()
    try:
        return slide.cut(view, edges, slide.block(view, edges), box_l0, side, side)
    except UserError:
        slide.reopen()
        return None
