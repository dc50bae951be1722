"""How much an outline is like a nucleus: a quadratic form of its features, fitted once and written down here.

The numbers come from `python experiments/eval_proposals.py DATA --fit FILE` on one half of the stained-tissue images of
the 2018 Data Science Bowl (CC0), 0.35 um per pixel; they estimate how well the outline's box agrees with a nucleus.
"""

from __future__ import annotations

import numpy as np

MEAN = np.array(
    [
        0.9109, 0.2307, 0.4167, 0.3433, 0.5537, 0.2629, 0.4508, 2.7793, 0.5367, 0.3612, 0.3008,
    ]
)  # fmt: skip
SCALE = np.array(
    [
        0.0861, 0.9959, 0.1706, 0.1389, 0.2077, 0.176, 0.2304, 0.3513, 0.2255, 0.1789, 0.0669,
    ]
)  # fmt: skip
# Of 1, each scaled feature, and each product of two: see `products`.
WEIGHTS = np.array(
    [
        0.4896, 0.1268, 0.0707, -0.0542, -0.0273, 0.4224, -0.1837, -0.0178, 0.0556, 0.1602, -0.0289, 0.0446, 0.023, 0.0405,
        0.0283, -0.0194, -0.0264, -0.0076, 0.0168, -0.0008, -0.03, 0.0202, 0.0092, -0.0237, 0.0615, 0.0478, -0.0639, 0.0441,
        -0.024, 0.0126, 0.0802, -0.0217, -0.0051, 0.0214, 0.0093, -0.0244, 0.0657, 0.0121, 0.0047, 0.077, 0.0128, -0.0152,
        -0.0001, -0.06, 0.0091, -0.0025, -0.0013, -0.014, -0.0086, 0.0081, 0.1992, -0.093, -0.055, 0.0279, 0.2096, -0.2067,
        0.1034, 0.0137, 0.0528, 0.0013, -0.0216, 0.0711, -0.0435, 0.0081, 0.0118, -0, 0.0088, -0.0089, 0.0056, 0.0393,
        0.0007, -0.0033, 0.0582, -0.142, 0.0689, 0.0177, -0.0092, -0.0031,
    ]
)  # fmt: skip


def quality(features: np.ndarray) -> np.ndarray:
    """Features (k, 11) as `tiling.outlines.FEATURES` names them -> float64 (k,), about 0 for a scrap, 1 for a nucleus."""
    return products((features - MEAN) / SCALE) @ WEIGHTS


def products(scaled: np.ndarray) -> np.ndarray:
    """(k, n) -> (k, (n + 1) (n + 2) / 2): 1, each column, and each product of two, row by row of the upper triangle."""
    wide = np.concatenate([np.ones((len(scaled), 1)), scaled], axis=1)
    first, second = np.triu_indices(wide.shape[1])
    return wide[:, first] * wide[:, second]
