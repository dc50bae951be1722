"""Block-wise masks for masked image modelling (BEiT, arXiv 2106.08254, algorithm 1; ratios as in iBOT, arXiv 2111.07832)."""

from __future__ import annotations

from math import exp, log, sqrt

import numpy as np


def draw_ratio(rng: np.random.Generator, probability: float, ratio: tuple[float, float]) -> float:
    """0 with probability 1 - `probability`, else uniform in `ratio` (iBOT's pred_ratio {0, 0.3}, variance {0, 0.2})."""
    return float(rng.uniform(*ratio)) if rng.random() < probability else 0.0


def block_mask(
    rng: np.random.Generator,
    grid: int,
    ratio: float,
    *,
    min_patches: int = 4,
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> np.ndarray:
    """Rectangular blocks that together hide floor(ratio * grid^2) patches: bool (grid, grid)."""
    mask = np.zeros((grid, grid), dtype=bool)
    total = int(ratio * grid * grid)
    count = 0
    while count < total:
        added = _add_block(rng, mask, total - count, min_patches, aspect)
        if added == 0:
            break
        count += added
    if count < total:  # what blocks could not reach is filled patch by patch
        free = np.flatnonzero(~mask)
        mask.flat[rng.choice(free, total - count, replace=False)] = True
    return mask


def _add_block(rng: np.random.Generator, mask: np.ndarray, most: int, min_patches: int, aspect: tuple[float, float]) -> int:
    """Hide one block of at most `most` new patches, in place; the number of patches it added (0: none found in 10 tries)."""
    grid = len(mask)
    for _ in range(10):
        area = rng.uniform(min(min_patches, most), most)
        ratio = exp(rng.uniform(log(aspect[0]), log(aspect[1])))
        h, w = round(sqrt(area * ratio)), round(sqrt(area / ratio))
        if not (0 < h <= grid and 0 < w <= grid):
            continue
        top, left = int(rng.integers(grid - h + 1)), int(rng.integers(grid - w + 1))
        block = mask[top : top + h, left : left + w]
        new = int(block.size - block.sum())
        if 0 < new <= most:
            block[:] = True
            return new
    return 0
