"""How often colour alone finds the other view of a tile: what a network can do without looking at tissue."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BEST_SHARE = 0.05  # of the views compared with


@dataclass(frozen=True)
class ViewRank:
    """Where the other view of a tile stands among those of `count` tiles, by distance.

    median: 1 is the nearest, (count + 1) / 2 is chance. best: share of the views that stand in the best BEST_SHARE, which is
    also what chance gives.
    """

    median: float
    best: float
    count: int

    @property
    def chance(self) -> float:
        """The median rank that chance gives."""
        return (self.count + 1) / 2

    def __str__(self) -> str:
        return (
            f"at median rank {self.median:.0f} of {self.count} (chance {self.chance:.0f}), "
            f"in the best {BEST_SHARE:.0%} for {self.best:.0%} of the tiles"
        )


def colour_statistics(images: np.ndarray) -> np.ndarray:
    """Mean and standard deviation of each channel: float (n, 3, h, w) -> float64 (n, 6), the means first."""
    pixels = np.asarray(images, np.float64).reshape(len(images), 3, -1)
    return np.concatenate([pixels.mean(2), pixels.std(2)], axis=1)


def rank_views(first: np.ndarray, second: np.ndarray) -> ViewRank:
    """Rank the second view of each of n tiles among all second views by distance to its first, and the other way round.

    first, second: float (n, D), columns of one unit. Equal distances share their mean rank, so that views without any
    difference are at chance. Raises ValueError for no tiles.
    """
    if not len(first):
        raise ValueError("no tiles to rank")
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    distance = np.sqrt(((a[:, None] - b[None]) ** 2).sum(2))
    ranks = np.concatenate([_own_rank(distance), _own_rank(distance.T)])
    within = ranks <= max(1.0, BEST_SHARE * len(a))
    return ViewRank(float(np.median(ranks)), float(within.mean()), len(a))


def equal_columns(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Divide each column by its spread over both views (n, D), so that small and large ones count alike in a distance."""
    spread = np.concatenate([first, second]).std(0)
    spread = np.where(spread > 0, spread, 1.0)
    return first / spread, second / spread


def _own_rank(distance: np.ndarray) -> np.ndarray:
    """Rank the diagonal in each line of (n, n), from 1: float64 (n,)."""
    own = np.diag(distance)[:, None]
    nearer, as_near = (distance < own).sum(1), (distance == own).sum(1) - 1
    return np.asarray(1.0 + nearer + as_near / 2)
