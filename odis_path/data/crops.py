"""Object-aware crops: pure geometry on boxes, no pixels.

A view is an integer rectangle of the tile, resized to a square and turned by one of the eight symmetries of the square.
The box of the target object goes through the same steps and comes out as a boolean patch mask.

Source: the ODIS authors' post (crops that contain the object, box to patch mask); the constructive sampler is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor, log, sqrt
from typing import Literal

import numpy as np

Containment = Literal["full", "fraction", "any"]
MaskRule = Literal["any", "fraction", "centre"]

# The share of the smaller of box and crop that must overlap where full containment is impossible.
FALLBACK_FRACTION = 0.5
# An image-sized step (in px) by which "any" must overlap.
ANY_PX = 1.0


@dataclass(frozen=True)
class View:
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
    """How crops of one kind (global, local) are drawn: area share, aspect, output side, symmetries, containment."""

    scale: tuple[float, float]
    size_px: int
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    turns: Literal["none", "flip", "dihedral"] = "dihedral"
    containment: Containment = "full"
    fraction: float = FALLBACK_FRACTION
    sampler: Literal["construct", "reject"] = "construct"
    tries: int = 20


def draw_turn(rng: np.random.Generator, turns: str) -> int:
    """A symmetry of the square: 0 (none), 0 or 4 (flip), 0..7 (dihedral)."""
    if turns == "none":
        return 0
    if turns == "flip":
        return 4 * int(rng.integers(2))
    return int(rng.integers(8))


def draw_size(rng: np.random.Generator, side_px: int, rule: CropRule) -> tuple[int, int]:
    """Width and height in tile px of a random resized crop of a (side_px, side_px) tile."""
    for _ in range(10):
        area = side_px * side_px * rng.uniform(*rule.scale)
        aspect = float(np.exp(rng.uniform(log(rule.ratio[0]), log(rule.ratio[1]))))
        w, h = round(sqrt(area * aspect)), round(sqrt(area / aspect))
        if 0 < w <= side_px and 0 < h <= side_px:
            return w, h
    return side_px, side_px


def _offset_range(lo: float, hi: float, length: int, side_px: int, rule: CropRule) -> tuple[int, int]:
    """First and last integer offset of a crop side `length` that overlaps [lo, hi] as the rule asks, inside the tile."""
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


def fits(box: np.ndarray, w: int, h: int) -> bool:
    """Whether some integer crop of w x h px contains the box whole."""
    x0, y0, x1, y1 = (float(v) for v in box)
    return ceil(x1) - floor(x0) <= w and ceil(y1) - floor(y0) <= h


def sample_view(rng: np.random.Generator, side_px: int, box: np.ndarray | None, rule: CropRule) -> View:
    """A random view of a tile that shows the box.

    box: (4,) x0, y0, x1, y1 in tile px, or None for a free crop. With full containment the view contains the box whenever
    a crop of the rule's largest area can; otherwise it overlaps by `FALLBACK_FRACTION` of the smaller of the two.
    """
    turn = draw_turn(rng, rule.turns)
    if box is None:
        w, h = draw_size(rng, side_px, rule)
        return View(int(rng.integers(side_px - w + 1)), int(rng.integers(side_px - h + 1)), w, h, turn, rule.size_px)
    if rule.sampler == "reject":
        for _ in range(rule.tries):
            w, h = draw_size(rng, side_px, rule)
            x, y = int(rng.integers(side_px - w + 1)), int(rng.integers(side_px - h + 1))
            if _accepts(box, x, y, w, h, side_px, rule):
                return View(x, y, w, h, turn, rule.size_px)
    w, h = _size_for_box(rng, side_px, box, rule)
    x_first, x_last = _offset_range(float(box[0]), float(box[2]), w, side_px, rule)
    y_first, y_last = _offset_range(float(box[1]), float(box[3]), h, side_px, rule)
    x, y = int(rng.integers(x_first, x_last + 1)), int(rng.integers(y_first, y_last + 1))
    return View(x, y, w, h, turn, rule.size_px)


def _accepts(box: np.ndarray, x: int, y: int, w: int, h: int, side_px: int, rule: CropRule) -> bool:
    """Whether a crop drawn freely overlaps the box as the rule asks; an impossible full containment is never accepted."""
    if rule.containment == "full" and not fits(box, w, h):
        return False
    x_first, x_last = _offset_range(float(box[0]), float(box[2]), w, side_px, rule)
    y_first, y_last = _offset_range(float(box[1]), float(box[3]), h, side_px, rule)
    return x_first <= x <= x_last and y_first <= y <= y_last


def _size_for_box(rng: np.random.Generator, side_px: int, box: np.ndarray, rule: CropRule) -> tuple[int, int]:
    """A crop size from the rule, redrawn (and at last stretched) until the box fits where the rule's area allows it."""
    w, h = draw_size(rng, side_px, rule)
    if rule.containment != "full":
        return w, h
    need_w, need_h = ceil(float(box[2])) - floor(float(box[0])), ceil(float(box[3])) - floor(float(box[1]))
    largest = rule.scale[1] * side_px * side_px
    if need_w * need_h > largest:
        return w, h  # no crop of this rule holds the box: overlap is all that can be asked
    for _ in range(rule.tries):
        if need_w <= w and need_h <= h:
            return w, h
        w, h = draw_size(rng, side_px, rule)
    return min(side_px, max(w, need_w)), min(side_px, max(h, need_h))


def contains(view: View, box: np.ndarray) -> bool:
    """Whether the view shows the whole box."""
    x0, y0, x1, y1 = (float(v) for v in box)
    return view.x <= x0 and view.y <= y0 and x1 <= view.x + view.w and y1 <= view.y + view.h


def turn_grid(grid: np.ndarray, turn: int) -> np.ndarray:
    """Apply a symmetry of the square to the first two axes of a (g, g, ...) array, as the pixels of a view are turned."""
    if turn >= 4:
        grid = grid[:, ::-1]
    return np.rot90(grid, turn % 4)


def patch_mask(
    view: View, box: np.ndarray, grid: int, *, rule: MaskRule = "any", fraction: float = 0.5, margin: int = 0
) -> np.ndarray:
    """Patches of the view that belong to the box: bool (grid, grid), rows are y.

    any: the patch overlaps the box; fraction: by at least that share of the patch's area; centre: the patch's centre lies
    in the box. margin: patches added on each side. All False where the box lies outside the view.
    """
    span_x = (np.array([box[0], box[2]], dtype=np.float64) - view.x) * grid / view.w
    span_y = (np.array([box[1], box[3]], dtype=np.float64) - view.y) * grid / view.h
    share_x, share_y = _axis_share(span_x, grid), _axis_share(span_y, grid)
    if rule == "centre":
        centres = np.arange(grid) + 0.5
        inside_x = (centres >= span_x[0]) & (centres < span_x[1])
        inside_y = (centres >= span_y[0]) & (centres < span_y[1])
        mask = inside_y[:, None] & inside_x[None, :]
    elif rule == "fraction":
        mask = share_y[:, None] * share_x[None, :] >= fraction
    else:
        mask = (share_y[:, None] > 0) & (share_x[None, :] > 0)
    if margin and mask.any():
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        mask[max(0, rows[0] - margin) : rows[-1] + margin + 1, max(0, columns[0] - margin) : columns[-1] + margin + 1] = True
    return np.ascontiguousarray(turn_grid(mask, view.turn))


def _axis_share(span: np.ndarray, grid: int) -> np.ndarray:
    """Length of [span[0], span[1]] inside each of the unit cells 0..grid-1: float64 (grid,)."""
    cells = np.arange(grid, dtype=np.float64)
    return np.clip(np.minimum(span[1], cells + 1) - np.maximum(span[0], cells), 0.0, None)


def view_matrix(view: View, side_px: int) -> np.ndarray:
    """The view as an affine map for `torch.nn.functional.grid_sample` (align_corners=False): float32 (2, 3).

    Maps output coordinates in [-1, 1] to tile coordinates in [-1, 1], turn included.
    """
    # Output pixel (u, v) was moved there by the turn; undo it: M maps output axes to the axes of the unturned crop.
    quarter = [np.eye(2), np.array([[0, -1], [1, 0]]), -np.eye(2), np.array([[0, 1], [-1, 0]])][view.turn % 4]
    matrix = quarter.astype(np.float64)
    if view.turn >= 4:
        matrix = np.diag([-1.0, 1.0]) @ matrix
    scale = np.array([view.w / side_px, view.h / side_px])
    centre = np.array([(2 * view.x + view.w) / side_px - 1, (2 * view.y + view.h) / side_px - 1])
    return np.concatenate([scale[:, None] * matrix, centre[:, None]], axis=1).astype(np.float32)
