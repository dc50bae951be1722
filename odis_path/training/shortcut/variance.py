"""The share of the variance of embeddings that a grouping explains: by tile, slide, patient, class.

One-way analysis of variance for each grouping by itself, not a nested decomposition: tiles lie in slides and slides in
patients, but classes run across them, and the question is the same for all four: how much of an embedding is known once this
one name is known? So the shares do not add up: a tile's holds its slide's, and a slide's its patient's.

eta squared, the sum of squares between groups over the total, favours fine groupings: m groups of n rows explain (m - 1) /
(n - 1) by chance, a quarter for four rows a tile. Epsilon squared sets the mean squares in place of the sums, which takes
that off: it is 0 in expectation where the grouping says nothing, and 1 where it says everything.
"""

from __future__ import annotations

import numpy as np


def variance_share(x: np.ndarray, groups: np.ndarray) -> float | None:
    """Compute epsilon squared of a grouping over all columns together, from 0 to 1 (below 0, less than chance, is 0).

    x: float (n, D); groups: int (n,). None where nothing can be said: fewer than two groups, no group of two rows, or rows
    that are all equal.
    """
    x = np.asarray(x, np.float64)
    _, group, counts = np.unique(groups, return_inverse=True, return_counts=True)
    n, m = len(x), len(counts)
    if m < 2 or m == n:
        return None
    x = x - x.mean(0)
    total = float((x**2).sum())
    if total <= 1e-12 * n:
        return None
    sums = np.zeros((m, x.shape[1]))
    np.add.at(sums, group, x)
    within = total - float((sums**2 / counts[:, None]).sum())
    return min(1.0, max(0.0, 1.0 - (within / (n - m)) / (total / (n - 1))))
