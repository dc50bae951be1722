"""Choose the target object of a tile: pure functions on boxes."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

BoxChoice = Literal["uniform", "area", "label"]


class Target(NamedTuple):
    """A target object: box float64 (4,) in tile px, and which of the tile's boxes it is made of, int64 (r,).

    whole: it is the whole tile, of which [OBJ] sees every patch.
    """

    box: np.ndarray
    rows: np.ndarray
    whole: bool = False


def whole_tile(side_px: int, rows: np.ndarray | None = None) -> Target:
    """Make the tile itself a target; rows: the boxes that nearly fill it, if it stands for those."""
    return Target(np.array([0.0, 0.0, side_px, side_px]), np.zeros(0, dtype=np.int64) if rows is None else rows, True)


def tile_share(box: np.ndarray, side_px: int) -> float:
    """Compute the share of a tile's area that a box (4,) covers."""
    return float((box[2] - box[0]) * (box[3] - box[1])) / side_px**2


def choose_box(
    rng: np.random.Generator,
    boxes: np.ndarray,
    *,
    choice: BoxChoice = "uniform",
    groups: np.ndarray | None = None,
    min_side_px: float = 0.0,
    side_px: int,
) -> Target | None:
    """Draw the target object of a tile; None where there is no box.

    boxes: (k, 4); groups: (k,) label of each box, used by choice="label" (a label first, uniformly, then one of its boxes).
    uniform draws among the boxes whose area is at least min_side_px squared, if there are any; a smaller box is
    merged with its nearest neighbours until it is that large, and widened at last.
    """
    if len(boxes) == 0:
        return None
    boxes = np.asarray(boxes, dtype=np.float64)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    large = np.flatnonzero(area >= min_side_px**2)
    pool = large if len(large) else np.arange(len(boxes))
    if choice == "area":
        pick = int(rng.choice(pool, p=area[pool] / area[pool].sum()))
    elif choice == "label" and groups is not None:
        names = np.unique(groups[pool])
        pool = pool[groups[pool] == names[int(rng.integers(len(names)))]]
        pick = int(pool[rng.integers(len(pool))])
    else:
        pick = int(pool[rng.integers(len(pool))])
    if area[pick] >= min_side_px**2:
        return Target(boxes[pick], np.array([pick]))
    return grow_box(boxes, pick, min_side_px, side_px)


def further_targets(
    rng: np.random.Generator, boxes: np.ndarray, allowed: np.ndarray, count: int, first: Target
) -> list[Target | None]:
    """Draw `count` targets among the allowed boxes, bool (k,), that the first is not made of; None fills up."""
    pool = np.setdiff1d(np.flatnonzero(allowed), first.rows)
    picked = rng.permutation(pool)[:count]
    targets: list[Target | None] = [Target(boxes[i].astype(np.float64), np.array([i])) for i in picked]
    return targets + [None] * (count - len(targets))


def noisy_boxes(
    rng: np.random.Generator, boxes: np.ndarray, *, jitter: float, drop: float, false: float, side_px: int
) -> tuple[np.ndarray, np.ndarray]:
    """Make boxes as a poor detector would give them, for studies of robustness: (m, 4), and the row each was, -1 if false.

    boxes: (k, 4) in tile px. jitter: every edge moves by up to this share of the side, uniformly, and stays in the tile; no
    side gets shorter than a pixel. drop: probability that a box is missing. false: probability that a box brings along a false
    one of its size at a uniformly random place. How much is drawn depends on k only.
    """
    boxes = np.asarray(boxes, dtype=np.float64)
    size = boxes[:, 2:] - boxes[:, :2]
    stays, brings = rng.random((2, len(boxes)))
    moved = boxes + rng.uniform(-jitter, jitter, (len(boxes), 4)) * np.tile(size, 2)
    moved = np.clip(moved, 0, side_px)
    thin = (moved[:, 2:] - moved[:, :2] < np.minimum(size, 1.0)).any(axis=1)
    moved[thin] = boxes[thin]
    corner = rng.random((len(boxes), 2)) * np.maximum(side_px - size, 0)
    kept, made = np.flatnonzero(stays >= drop), np.flatnonzero(brings < false)
    noisy = np.concatenate([moved[kept], np.concatenate([corner[made], corner[made] + size[made]], axis=1)])
    return noisy, np.concatenate([kept, np.full(len(made), -1)]).astype(np.int64)


def grow_box(boxes: np.ndarray, pick: int, min_side_px: float, side_px: int) -> Target:
    """Unite a small box with its nearest neighbours until it covers min_side_px squared, else widen it."""
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    box, rows = boxes[pick].copy(), [pick]
    order = np.argsort(((centre - centre[pick]) ** 2).sum(1), kind="stable")
    reach = 2.0 * min_side_px
    for row in order:
        if row == pick:
            continue
        if (box[2] - box[0]) * (box[3] - box[1]) >= min_side_px**2:
            return Target(box, np.array(rows))
        if np.abs(centre[row] - centre[pick]).max() > reach:
            break
        box[:2] = np.minimum(box[:2], boxes[row, :2])
        box[2:] = np.maximum(box[2:], boxes[row, 2:])
        rows.append(int(row))
    if (box[2] - box[0]) * (box[3] - box[1]) >= min_side_px**2:
        return Target(box, np.array(rows))
    middle = (box[:2] + box[2:]) / 2
    half = np.maximum(box[2:] - box[:2], min_side_px) / 2
    middle = np.clip(middle, np.minimum(half, side_px / 2), np.maximum(side_px - half, side_px / 2))
    return Target(np.clip(np.concatenate([middle - half, middle + half]), 0, side_px), np.array(rows))
