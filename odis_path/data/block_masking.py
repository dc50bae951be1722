"""Block-wise masks for masked image modelling (BEiT, arXiv 2106.08254, algorithm 1; ratios as in iBOT, arXiv 2111.07832)."""

from __future__ import annotations

from math import exp, log, sqrt
from typing import Literal

import numpy as np

Blocks = Literal["ibot", "filled"]

LEAST_FILLED = 4  # patches of a block of the filled kind
ASPECT = (0.3, 1 / 0.3)
TRIES = 10  # for one block


def draw_ratio(rng: np.random.Generator, probability: float, ratio: tuple[float, float]) -> float:
    """Draw 0 with probability 1 - `probability`, else uniformly in `ratio` (iBOT's pred_ratio {0, 0.3}, variance {0, 0.2})."""
    return float(rng.uniform(*ratio)) if rng.random() < probability else 0.0


def block_mask(rng: np.random.Generator, grid: int, ratio: float, blocks: Blocks = "filled") -> np.ndarray:
    """Draw rectangular blocks that hide patches of a view: bool (grid, grid).

    ibot: an area between the square of a third of the side (16 of 14 x 14 patches) and what is left of ratio * grid^2, until
    none fits in 10 tries: at most that many patches, mostly a few less, in one or two pieces. filled: blocks from 4 patches
    on, and the rest patch by patch: exactly floor(ratio * grid^2).
    """
    mask = np.zeros((grid, grid), dtype=bool)
    if blocks == "ibot":
        remaining, least, longest = ratio * grid * grid, (grid // 3) ** 2, grid - 1
    else:
        remaining, least, longest = int(ratio * grid * grid), LEAST_FILLED, grid
    while remaining > 0:
        added = _add_block(rng, mask, remaining, least if blocks == "ibot" else min(least, remaining), longest)
        if added == 0:
            break
        remaining -= added
    if blocks == "filled" and remaining:
        free = np.flatnonzero(~mask)
        mask.flat[rng.choice(free, int(remaining), replace=False)] = True
    return mask


def _add_block(rng: np.random.Generator, mask: np.ndarray, most: float, least: float, longest: int) -> int:
    """Hide one block of at most `most` new patches and sides of at most `longest`, in place; how many it added (0: none found).

    Its area is drawn between `least` and `most`, whichever is larger: near the end a block of `least` may overlap others.
    """
    grid = len(mask)
    low, high = log(ASPECT[0]), log(ASPECT[1])
    for size, shape, down, right in rng.random((TRIES, 4)).tolist():
        area, ratio = least + (most - least) * size, exp(low + (high - low) * shape)
        h, w = round(sqrt(area * ratio)), round(sqrt(area / ratio))
        if not (0 < h <= longest and 0 < w <= longest):
            continue
        top, left = int(down * (grid - h + 1)), int(right * (grid - w + 1))
        block = mask[top : top + h, left : left + w]
        new = int(block.size - block.sum())
        if 0 < new <= most:
            block[:] = True
            return new
    return 0
