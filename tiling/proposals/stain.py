"""Score pixels by how much they look like nuclei, and estimate the stain of a slide as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from tiling.tissue.mask import DARK_BACKGROUND


@dataclass(frozen=True)
class ProposalSettings:
    """Lengths in micrometres, areas in square micrometres, optical densities in natural units.

    smooth_um: blur before the thresholds. contrast: the lowest threshold, above the background. levels, level_power:
    number of thresholds, and how much denser they lie at the pale end. nucleus_um2: sizes of a nucleus. dent: an outline
    that fits an ellipse worse is parted at its necks. peak_um: no two parts are closer. neck: two parts whose neck is
    wider than this share of the smaller one are one. overlap: share of an outline that better ones may have taken.
    least_quality: of an outline, from 0 to 1.
    cluster_close_um: half the gap that nuclei of one cluster may leave. cluster_open_um: half the width of
    what is too thin for one. cluster_um: longer side of objects larger than nuclei.
    lumen_um2: sizes of a lumen. wall_um: nuclei this close to a lumen are its wall. gland_share: least share of
    directions in which a gland has nuclei around its lumen. nest_smooth_um: blur that leaves nests of cells only.
    """

    smooth_um: float = 0.25
    contrast: float = 0.14
    levels: int = 7
    level_power: float = 1.4
    nucleus_um2: tuple[float, float] = (6.0, 450.0)
    dent: float = 0.93
    distance_smooth_um: float = 0.4
    peak_um: float = 1.6
    neck: float = 0.9
    overlap: float = 0.25
    least_quality: float = 0.4
    coarsest_nucleus_mpp: float = 1.2
    cluster_close_um: float = 7.0
    cluster_open_um: float = 8.0
    cluster_um: tuple[float, float] = (30.0, 200.0)
    lumen_um2: tuple[float, float] = (80.0, 12000.0)
    wall_um: float = 9.0
    gland_share: float = 0.5
    nest_smooth_um: float = 6.0


Stain = Literal["dark", "eosin", "plain"]


@dataclass(frozen=True)
class SlideLevels:
    """Facts about a slide that no single tile can tell.

    stain: dark (fluorescence), eosin (pink beside the nuclei) or plain (nuclei alone take colour). floor: least score of
    a nucleus, so that a tile without nuclei is not cut in two.
    """

    stain: Stain = "eosin"
    floor: float = float("-inf")


SLIDE_FLOOR_SHARE = 0.5  # of the way from a slide's background to the threshold between its stroma and its nuclei
STAINED_DENSITY = 0.3  # summed optical density of a pixel that took colour
PINK_RATIO, PINK_SHARE = 2.5, 0.1  # pink takes this many times more green than red; so many pixels of it mean eosin
PURPLE_WEIGHT = {"eosin": -0.3, "plain": 1.0}  # of green above blue, beside red: see `nucleus_score`


def slide_levels(tiles: list[np.ndarray], mpp: float, settings: ProposalSettings | None = None) -> SlideLevels:
    """Estimate the levels of a slide from a sample of its tiles, each uint8 (h, w, 3)."""
    from scipy import ndimage
    from skimage.filters import threshold_otsu

    settings = settings or ProposalSettings()
    if not tiles:
        return SlideLevels()
    stain = stain_of(tiles)
    scores = [ndimage.gaussian_filter(nucleus_score(rgb, stain), settings.smooth_um / mpp)[::3, ::3] for rgb in tiles]
    pool = np.concatenate([score.ravel() for score in scores])
    background = float(np.percentile(pool, 2))
    tissue = pool[pool > background + settings.contrast]
    if tissue.size < 100 or float(np.ptp(tissue)) < settings.contrast:
        return SlideLevels(stain)
    between = float(threshold_otsu(tissue))
    return SlideLevels(stain, background + SLIDE_FLOOR_SHARE * (between - background))


def stain_of(tiles: list[np.ndarray]) -> Stain:
    """Tell which kind of picture tiles, each uint8 (h, w, 3), are: see `SlideLevels`."""
    colours = np.concatenate([rgb[::3, ::3].reshape(-1, 3) for rgb in tiles]).astype(np.float32)
    if float(np.median(colours.max(axis=1))) < DARK_BACKGROUND:
        return "dark"
    density = optical_density(colours)
    stained = density[density.sum(axis=1) > STAINED_DENSITY]
    pink = stained[:, 1] > PINK_RATIO * stained[:, 0]
    return "eosin" if len(stained) and pink.mean() > PINK_SHARE else "plain"


def nucleus_score(rgb: np.ndarray, stain: Stain) -> np.ndarray:
    """Score pixels, uint8 (h, w, 3): float32 (h, w), high on nuclei; an optical density, on dark slides a root of intensity.

    Red light is what haematoxylin takes and eosin lets pass. Green above blue tells purple from grey (red blood cells,
    pigment), which pale nuclei need where nothing else is coloured; where there is eosin it counts against a pixel.
    """
    if stain == "dark":
        return np.asarray(np.sqrt(rgb.max(axis=2).astype(np.float32) / 32))  # 0..2.8, the range of the densities below
    density = optical_density(rgb)
    return np.asarray(density[..., 0] + PURPLE_WEIGHT[stain] * (density[..., 1] - density[..., 2]))


_DENSITY = -np.log((np.arange(256, dtype=np.float32) + 1) / 256)


def optical_density(rgb: np.ndarray) -> np.ndarray:
    """Turn values 0..255 of any shape into float32 optical densities, 0 for white."""
    if rgb.dtype == np.uint8:
        return np.asarray(_DENSITY[rgb])
    return np.asarray(-np.log((rgb.astype(np.float32) + 1) / 256))
