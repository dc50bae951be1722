"""Stains of slides, and views in the stain of another slide: one 3 x 3 matrix in optical density.

Stain vectors of a slide by Macenko et al. 2009: the extreme directions, in the plane of the two principal axes of the optical
densities of its stained pixels, each as long as the 99th percentile of its amount. What two stains do not explain stays.
"""

from __future__ import annotations

import numpy as np

from odis_path.data.tile_index import OpenSlides, TileIndex

TILES_A_SLIDE = 4
STAINED_DENSITY = 0.45  # summed over R, G, B: what is paler is background
LEAST_PIXELS = 500
PERCENT = 1.0  # of the angles, left out at both ends as noise
_STEP = 3  # every third pixel of every third line


class SlideStains:
    """The stain of each slide of an index, float64 (slides, 3, 3); rows are haematoxylin, eosin, rest. NaN: not to be told."""

    def __init__(self, stains: np.ndarray) -> None:
        self.stains = stains
        self.known = np.flatnonzero(np.isfinite(stains).all(axis=(1, 2)))

    @classmethod
    def measure(cls, index: TileIndex, files: OpenSlides, seed: int) -> SlideStains:
        """Stains from a few tiles of each slide that has some in the index."""
        stains = np.full((len(index.paths), 3, 3), np.nan)
        for slide in np.unique(index.slide):
            rows = index.row[index.slide == slide]
            chosen = np.random.default_rng([seed, int(slide), 31]).permutation(rows)[:TILES_A_SLIDE]
            stains[slide] = stain_matrix([files[int(slide)].tile(int(row)) for row in np.sort(chosen)])
        return cls(stains)

    def swaps(self, rng: np.random.Generator, slide: int, share: float, views: int) -> np.ndarray:
        """Matrices on optical densities as columns, float64 (views, 3, 3): to another slide's stain, or the identity.

        share: of the views that change. How much is drawn depends on `views` only.
        """
        changes, which = rng.random((2, views))
        matrices = np.tile(np.eye(3), (views, 1, 1))
        others = self.known[self.known != slide]
        if len(others) and np.isfinite(self.stains[slide]).all():
            back = np.linalg.inv(self.stains[slide])
            for view in np.flatnonzero(changes < share):
                matrices[view] = (back @ self.stains[others[int(which[view] * len(others))]]).T
        return matrices


def stain_matrix(tiles: list[np.ndarray]) -> np.ndarray:
    """Stain vectors of tiles uint8 (h, w, 3) of a slide: float64 (3, 3), NaN where too little is stained to tell two."""
    nothing = np.full((3, 3), np.nan)
    pixels = np.concatenate([tile[::_STEP, ::_STEP].reshape(-1, 3) for tile in tiles]) if tiles else np.zeros((0, 3))
    density = -np.log((pixels.astype(np.float64) + 1) / 256)
    density = density[density.sum(axis=1) > STAINED_DENSITY]
    if len(density) < LEAST_PIXELS:
        return nothing
    _, axes = np.linalg.eigh(np.cov(density.T))
    plane = axes[:, [2, 1]] * np.where(axes[:, [2, 1]].sum(axis=0) < 0, -1.0, 1.0)
    first, second = (density @ plane).T
    angles = np.percentile(np.arctan2(second, first), [PERCENT, 100 - PERCENT])
    pair = np.stack([np.cos(angles), np.sin(angles)], axis=1) @ plane.T
    pair = pair[np.argsort(-pair[:, 0])]  # haematoxylin takes more of the red
    rest = np.cross(pair[0], pair[1])
    if np.linalg.norm(rest) < 0.05:  # one direction only: a single stain
        return nothing
    vectors = np.concatenate([pair, rest[None] / np.linalg.norm(rest)])
    amounts = np.percentile(density @ np.linalg.inv(vectors), 99, axis=0)[:2]
    stains: np.ndarray = vectors * np.array([*np.maximum(amounts, 0.05), 1.0])[:, None]
    return stains
