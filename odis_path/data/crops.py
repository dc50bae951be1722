"""Object-aware crops: pure geometry on boxes, no pixels.

A crop is an integer rectangle of the tile, resized to a square and turned by one of the eight symmetries of the square.
The box of the target object goes through the same steps and comes out as a boolean patch mask.

Source: the ODIS authors' post (crops that contain the object, box to patch mask); the constructive sampler is ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, floor, log, sqrt
from typing import Literal

import numpy as np

Containment = Literal["full", "fraction", "any"]
MaskRule = Literal["any", "fraction", "centre"]

# The overlap asked for where no crop of the rule holds the box: this share of the largest that is possible.
FALLBACK_FRACTION = 0.5
# An output pixel was moved there by the turn; undone: from output axes to the axes of the unturned crop, for each turn.
_QUARTERS = [np.eye(2), np.array([[0.0, -1.0], [1.0, 0.0]]), -np.eye(2), np.array([[0.0, 1.0], [-1.0, 0.0]])]
_UNTURN = np.stack(_QUARTERS + [np.diag([-1.0, 1.0]) @ quarter for quarter in _QUARTERS])
# An image-sized step (in px) by which "any" must overlap.
ANY_PX = 1.0
_REDRAWS = 20  # of a size that does not fit, before it is drawn from those that do
_CELLS = 64  # aspects among which that draw chooses
_MIDDLES = (np.arange(_CELLS) + 0.5) / _CELLS
_CHUNK = 16  # free crops drawn at once for rejection


@dataclass(frozen=True)
class Crop:
    """One crop of a tile.

    x, y, w, h: integer rectangle in tile px; turn: 0..7, `turn % 4` quarter turns counter-clockwise after a left-right
    flip if `turn >= 4`; size_px: side of the square output.
    """

    x: int
    y: int
    w: int
    h: int
    turn: int
    size_px: int


@dataclass(frozen=True)
class CropRule:
    """Rule by which crops of one kind (global, local) are drawn: area share, aspect, output side, symmetries, containment."""

    scale: tuple[float, float]
    size_px: int
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    turns: Literal["none", "flip", "dihedral"] = "dihedral"
    containment: Containment = "full"
    fraction: float = FALLBACK_FRACTION
    sampler: Literal["construct", "reject"] = "construct"
    tries: int = 20
    fallback: Literal["construct", "zero", "full"] = "construct"  # what follows when every try was rejected


def draw_turns(rng: np.random.Generator, turns: str, count: int) -> np.ndarray:
    """Draw symmetries of the square, int64 (count,): 0 (none), 0 or 4 (flip), 0..7 (dihedral)."""
    if turns == "none":
        return np.zeros(count, dtype=np.int64)
    return rng.integers(8, size=count) if turns == "dihedral" else 4 * rng.integers(2, size=count)


def draw_sizes(
    rng: np.random.Generator, side_px: int, rule: CropRule, count: int, need: tuple[int, int] = (1, 1)
) -> tuple[np.ndarray, np.ndarray]:
    """Draw widths and heights in tile px, int64 (count,), of random resized crops of a (side_px, side_px) tile.

    need: width and height that a crop has at least. Area and aspect are uniform (the latter in its logarithm) over those of
    the rule that leave such a crop inside the tile; sides are rounded to whole px. Where the rule has none (see
    `aspects`), the nearest size is returned.
    """
    tries = min(rule.tries, _REDRAWS)
    area = side_px * side_px * rng.uniform(*rule.scale, size=(count, tries))
    root = np.exp(rng.uniform(0.5 * log(rule.ratio[0]), 0.5 * log(rule.ratio[1]), size=(count, tries)))
    side = np.sqrt(area)
    w, h = np.rint(side * root), np.rint(side / root)
    good = (w >= need[0]) & (w <= side_px) & (h >= need[1]) & (h <= side_px)
    rows, first = np.arange(count), good.argmax(1)  # 0 where none is good
    w, h, good = w[rows, first], h[rows, first], good[rows, first]
    if not good.all():
        span = aspects(side_px, rule, need)
        if span is not None:
            w[~good], h[~good] = _sizes_within(rng, side_px, rule, int((~good).sum()), need, span)
    return w.clip(need[0], side_px).astype(np.int64), h.clip(need[1], side_px).astype(np.int64)


def aspects(side_px: int, rule: CropRule, need: tuple[int, int]) -> tuple[float, float] | None:
    """Lowest and highest aspect w / h at which the rule has a crop of at least need px inside the tile; None: it has none.

    Sides count as rounded to whole px.
    """
    least, most = (share * side_px * side_px for share in rule.scale)
    w, h, end = need[0] - 0.5, need[1] - 0.5, side_px + 0.5
    low = max(rule.ratio[0], w * w / most, w / end, least / end**2)
    high = min(rule.ratio[1], most / (h * h), end / h, end**2 / least)
    return (low, high) if low <= high else None


def _sizes_within(
    rng: np.random.Generator, side_px: int, rule: CropRule, count: int, need: tuple[int, int], span: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Draw sizes as rejection would leave them, directly: an aspect by how much area it leaves, then the area.

    span: what `aspects` says; the aspect is one of `_CELLS` in it.
    """
    ratio = span[0] * (span[1] / span[0]) ** _MIDDLES
    inverse = 1 / ratio
    w, h, end = need[0] - 0.5, need[1] - 0.5, side_px + 0.5
    least = np.maximum(np.maximum(w * w * inverse, h * h * ratio), rule.scale[0] * side_px * side_px)
    most = np.minimum(end * end * np.minimum(ratio, inverse), rule.scale[1] * side_px * side_px)
    slack = np.maximum(most - least, 1e-9)  # never all 0, for a rule of one size
    upto = slack.cumsum()
    where, within = rng.random((2, count))
    cell = np.minimum(upto.searchsorted(where * upto[-1]), _CELLS - 1)
    area = least[cell] + within * slack[cell]
    return np.rint(np.sqrt(area * ratio[cell])), np.rint(np.sqrt(area * inverse[cell]))


def _offset_range(lo: float, hi: float, length: int, side_px: int, rule: CropRule) -> tuple[int, int]:
    """Find the first and last offset in the tile of a crop side `length` that overlaps [lo, hi] as the rule asks."""
    span = hi - lo
    if rule.containment == "any":
        need = min(ANY_PX, span, length)
    elif rule.containment == "full" and span <= length:
        need = span
    else:
        share = rule.fraction if rule.containment == "fraction" else FALLBACK_FRACTION
        need = sqrt(share) * min(span, length)
    first = max(0, ceil(lo - length + need - 1e-9)) if need < span else max(0, ceil(hi) - length)
    last = min(side_px - length, floor(hi - need + 1e-9)) if need < span else min(side_px - length, floor(lo))
    if first > last:  # the box touches the border by less than a pixel's rounding: the nearest legal offset
        first = last = min(max(0, min(first, last)), side_px - length)
    return first, last


def sample_crop(rng: np.random.Generator, side_px: int, box: np.ndarray | None, rule: CropRule) -> Crop:
    """Draw one random crop; see `sample_crops`."""
    return sample_crops(rng, side_px, box, rule, 1)[0]


def sample_crops(rng: np.random.Generator, side_px: int, box: np.ndarray | None, rule: CropRule, count: int) -> list[Crop]:
    """Draw random crops of a tile that show the box.

    box: (4,) x0, y0, x1, y1 in tile px, or None for free crops. Every crop has scale and aspect of the rule. With full
    containment it contains the box if a crop of the rule can; else it does so along the axes on which it is long enough, and
    along the others it overlaps by the root of `FALLBACK_FRACTION` of its own side: half of the largest overlap that is
    possible. Where rejection fails and the rule's fallback is not to construct, the last free crop is returned: see `shows`.
    """
    if not count:
        return []
    if box is not None and rule.sampler == "reject":
        return _by_rejection(rng, side_px, box, rule, count)
    turns = draw_turns(rng, rule.turns, count).tolist()
    need = (1, 1) if box is None or rule.containment != "full" else _whole_px(box)
    if need != (1, 1) and aspects(side_px, rule, need) is None:
        need = (1, 1)  # no crop of the rule holds the box: overlap is all to be asked
    sizes = draw_sizes(rng, side_px, rule, count, need)
    places = rng.random((count, 2)).tolist()
    x0, y0, x1, y1 = (0.0, 0.0, 0.0, 0.0) if box is None else (float(v) for v in box)
    crops = []
    for w, h, (right, down), turn in zip(*(size.tolist() for size in sizes), places, turns, strict=True):
        first_x, last_x = (0, side_px - w) if box is None else _offset_range(x0, x1, w, side_px, rule)
        first_y, last_y = (0, side_px - h) if box is None else _offset_range(y0, y1, h, side_px, rule)
        x, y = first_x + int(right * (last_x - first_x + 1)), first_y + int(down * (last_y - first_y + 1))
        crops.append(Crop(x, y, w, h, turn, rule.size_px))
    return crops


def _by_rejection(rng: np.random.Generator, side_px: int, box: np.ndarray, rule: CropRule, count: int) -> list[Crop]:
    """Draw free crops until one shows the box, `count` times; what follows the last try is the rule's fallback."""
    free = _free_crops(rng, side_px, rule)
    whole = rule.containment == "full" and _can_fit(box, side_px, rule)
    crops = []
    for _ in range(count):
        for _ in range(rule.tries):
            crop = next(free)
            if contains(crop, box) if whole else _overlaps(crop, box, side_px, rule):
                break
        else:
            if rule.fallback == "construct":
                crop = sample_crop(rng, side_px, box, replace(rule, sampler="construct"))
        crops.append(crop)
    return crops


def _free_crops(rng: np.random.Generator, side_px: int, rule: CropRule) -> Iterator[Crop]:
    """Draw free crops without end, a few at a time."""
    while True:
        yield from sample_crops(rng, side_px, None, rule, _CHUNK)


def shows(crop: Crop, box: np.ndarray, side_px: int, rule: CropRule) -> bool:
    """Tell if a crop overlaps the box as the rule asks; a box that some crop of the rule could contain must be contained."""
    if rule.containment == "full" and _can_fit(box, side_px, rule):
        return contains(crop, box)
    return _overlaps(crop, box, side_px, rule)


def _overlaps(crop: Crop, box: np.ndarray, side_px: int, rule: CropRule) -> bool:
    """Tell whether a crop of its size lies where it overlaps the box enough."""
    x_first, x_last = _offset_range(float(box[0]), float(box[2]), crop.w, side_px, rule)
    y_first, y_last = _offset_range(float(box[1]), float(box[3]), crop.h, side_px, rule)
    return x_first <= crop.x <= x_last and y_first <= crop.y <= y_last


def visible_share(crop: Crop, boxes: np.ndarray) -> np.ndarray:
    """Compute the share of each box's area that lies in the crop: (k, 4) -> float64 (k,)."""
    corner = np.array([crop.x, crop.y], dtype=np.float64)
    low, high = np.maximum(boxes[:, :2], corner), np.minimum(boxes[:, 2:], corner + np.array([crop.w, crop.h]))
    share: np.ndarray = (high - low).clip(0).prod(1) / (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return share


def _can_fit(box: np.ndarray, side_px: int, rule: CropRule) -> bool:
    """Tell whether a crop of the rule, in scale and aspect, can hold the box."""
    return aspects(side_px, rule, _whole_px(box)) is not None


def _whole_px(box: np.ndarray) -> tuple[int, int]:
    """Width and height of the smallest integer rectangle around a box."""
    return ceil(float(box[2])) - floor(float(box[0])), ceil(float(box[3])) - floor(float(box[1]))


def contains(crop: Crop, box: np.ndarray) -> bool:
    """Tell whether the crop shows the whole box."""
    x0, y0, x1, y1 = (float(v) for v in box)
    return crop.x <= x0 and crop.y <= y0 and x1 <= crop.x + crop.w and y1 <= crop.y + crop.h


def turn_grid(grid: np.ndarray, turn: int) -> np.ndarray:
    """Apply a symmetry of the square to the first two axes of a (g, g, ...) array, as the pixels of a crop are turned."""
    if turn >= 4:
        grid = grid[:, ::-1]
    return np.rot90(grid, turn % 4)


def patch_mask(
    crop: Crop, box: np.ndarray, grid: int, *, rule: MaskRule = "any", fraction: float = 0.5, margin: int = 0
) -> np.ndarray:
    """Find the patches of the crop that belong to the box: bool (grid, grid), rows are y.

    any: the patch overlaps the box; fraction: by at least that share of the patch's area; centre: the patch's centre lies
    in the box. margin: patches added on each side. All False where the box lies outside the crop.
    """
    mask: np.ndarray = patch_masks([crop], box, grid, rule=rule, fraction=fraction, margin=margin)[0]
    return mask


def patch_masks(
    crops: Sequence[Crop], box: np.ndarray, grid: int, *, rule: MaskRule = "any", fraction: float = 0.5, margin: int = 0
) -> np.ndarray:
    """Compute `patch_mask` of several crops of one tile: bool (crops, grid, grid)."""
    frame = np.array([(c.x, c.y, c.w, c.h) for c in crops], dtype=np.float64)
    # (crops, x or y, low or high), in patches of the unturned crop
    span = (box.reshape(1, 2, 2) - frame[:, None, :2]).transpose(0, 2, 1) * grid / frame[:, 2:, None]
    cells = np.arange(grid, dtype=np.float64)
    if rule == "centre":
        inside = (cells + 0.5 >= span[:, :, :1]) & (cells + 0.5 < span[:, :, 1:])
        masks = inside[:, 1, :, None] & inside[:, 0, None, :]
    else:
        share = np.minimum(span[:, :, 1:], cells + 1) - np.maximum(span[:, :, :1], cells)  # of each cell, below 0 outside
        if rule == "fraction":
            share = share.clip(0)
            masks = share[:, 1, :, None] * share[:, 0, None, :] >= fraction
        else:
            masks = (share[:, 1, :, None] > 0) & (share[:, 0, None, :] > 0)
    for mask, crop in zip(masks, crops, strict=True):
        if margin and mask.any():
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            mask[max(0, rows[0] - margin) : rows[-1] + margin + 1, max(0, columns[0] - margin) : columns[-1] + margin + 1] = (
                True
            )
        if crop.turn:
            mask[...] = turn_grid(mask, crop.turn).copy()
    return masks


def crop_matrices(crops: Sequence[Crop], side_px: int) -> np.ndarray:
    """Turn crops into affine maps for `torch.nn.functional.grid_sample` (align_corners=False): float32 (crops, 2, 3).

    Each maps output coordinates in [-1, 1] to tile coordinates in [-1, 1], turn included.
    """
    frame = np.array([(c.x, c.y, c.w, c.h) for c in crops], dtype=np.float64).reshape(-1, 2, 2)  # (crops, corner or size, axis)
    theta = np.empty((len(crops), 2, 3), dtype=np.float32)
    theta[:, :, :2] = _UNTURN[[c.turn for c in crops]] * (frame[:, 1] / side_px)[:, :, None]
    theta[:, :, 2] = (2 * frame[:, 0] + frame[:, 1]) / side_px - 1
    return theta
