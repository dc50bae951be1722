"""Class-agnostic nuclei and gland-sized clusters on one tile, by classical image analysis: arrays in, boxes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from tiling.tissue import DARK_BACKGROUND


@dataclass(frozen=True)
class ProposalSettings:
    """Lengths in micrometres, areas in square micrometres, optical densities in natural units.

    smooth_um: blur before the threshold. otsu_share: where between background and Otsu's threshold to cut. contrast: the
    least optical density above the background. window_um, local_contrast: a pixel this much above its surroundings
    counts too. peak_um: no two nuclei are closer. recut: second threshold inside a piece, as a multiple of its mean.
    """

    smooth_um: float = 0.2
    otsu_share: float = 0.9
    contrast: float = 0.1
    window_um: float = 14.0
    local_contrast: float = 0.1
    peak_um: float = 2.0
    distance_smooth_um: float = 0.45
    recut: float = 1.1
    nucleus_um2: tuple[float, float] = (8.0, 400.0)
    cluster_close_um: float = 7.0
    cluster_open_um: float = 8.0
    cluster_um: tuple[float, float] = (30.0, 200.0)
    coarsest_nucleus_mpp: float = 1.2


@dataclass(frozen=True)
class Proposals:
    """xyxy: float32 (k, 4), x0, y0, x1, y1 in pixels of the tile, x1 > x0. area_px: float32 (k,). label: int16 (k,)."""

    xyxy: np.ndarray
    area_px: np.ndarray
    label: np.ndarray


Stain = Literal["dark", "eosin", "plain"]


@dataclass(frozen=True)
class SlideLevels:
    """What one tile cannot know of its slide.

    stain: dark (fluorescence), eosin (pink beside the nuclei) or plain (nuclei alone take colour). floor: least score of
    a nucleus, so that a tile without nuclei is not cut in two.
    """

    stain: Stain = "eosin"
    floor: float = float("-inf")


LABELS = ("nucleus", "cluster")
SLIDE_FLOOR_SHARE = 0.5  # of the way from a slide's background to the threshold between its stroma and its nuclei
STAINED_DENSITY = 0.3  # summed optical density of a pixel that took colour
PINK_RATIO, PINK_SHARE = 2.5, 0.1  # pink takes this many times more green than red; so many pixels of it mean eosin
PURPLE_WEIGHT = {"eosin": -0.3, "plain": 1.0}  # of green above blue, beside red: see `nucleus_score`


def slide_levels(tiles: list[np.ndarray], mpp: float, settings: ProposalSettings | None = None) -> SlideLevels:
    """Levels of a slide from a sample of its tiles, each uint8 (h, w, 3)."""
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
    """Which kind of picture these tiles (each uint8 (h, w, 3)) are: see `SlideLevels`."""
    colours = np.concatenate([rgb[::3, ::3].reshape(-1, 3) for rgb in tiles]).astype(np.float32)
    if float(np.median(colours.max(axis=1))) < DARK_BACKGROUND:
        return "dark"
    density = _density(colours)
    stained = density[density.sum(axis=1) > STAINED_DENSITY]
    pink = stained[:, 1] > PINK_RATIO * stained[:, 0]
    return "eosin" if len(stained) and pink.mean() > PINK_SHARE else "plain"


def nucleus_score(rgb: np.ndarray, stain: Stain) -> np.ndarray:
    """uint8 (h, w, 3) -> float32 (h, w), high on nuclei: an optical density, or the root of the intensity on dark slides.

    Red light is what haematoxylin takes and eosin lets pass. Green above blue tells purple from grey (red blood cells,
    pigment), which pale nuclei need where nothing else is coloured; where there is eosin it counts against a pixel.
    """
    if stain == "dark":
        return np.sqrt(rgb.max(axis=2).astype(np.float32) / 32)  # 0..2.8, the range of the densities below
    density = _density(rgb)
    return density[..., 0] + PURPLE_WEIGHT[stain] * (density[..., 1] - density[..., 2])


def _density(rgb: np.ndarray) -> np.ndarray:
    return -np.log((rgb.astype(np.float32) + 1) / 256)


def score_threshold(score: np.ndarray, settings: ProposalSettings) -> tuple[float, float]:
    """Background level and threshold of a score map; the threshold is at least `contrast` above the background."""
    from skimage.filters import threshold_otsu

    background = float(np.percentile(score, 5))
    if float(np.ptp(score)) < settings.contrast:
        return background, float("inf")
    otsu = float(threshold_otsu(score))
    return background, background + max(settings.otsu_share * (otsu - background), settings.contrast)


def segment_nuclei(
    rgb: np.ndarray, mpp: float, settings: ProposalSettings | None = None, levels: SlideLevels | None = None
) -> np.ndarray:
    """Instance labels int32 (h, w), 0 for background, of nuclei on an uint8 (h, w, 3) tile of `mpp` um per pixel.

    levels: of the whole slide; without them the tile speaks for itself. Threshold (Otsu, and local contrast), pieces
    parted at the necks of their distance map, then pieces that are dented or too large cut again at a threshold of
    their own; sizes outside `nucleus_um2` are dropped.
    """
    from scipy import ndimage
    from skimage.segmentation import watershed

    settings, levels = settings or ProposalSettings(), levels or SlideLevels(stain_of([rgb]))
    score = ndimage.gaussian_filter(nucleus_score(rgb, levels.stain), settings.smooth_um / mpp)
    mask = _mask(score, mpp, settings, levels.floor)
    labels = _parted(mask, mpp, settings)
    for _ in range(2):
        labels = watershed(-score, _recut_markers(labels, score, mpp, settings), mask=mask)
    area_um2 = np.bincount(labels.ravel()) * mpp**2
    low, high = settings.nucleus_um2
    wrong = (area_um2 < low) | (area_um2 > high)
    wrong[0] = True
    return np.where(wrong[labels], 0, labels).astype(np.int32)


def segment_clusters(nuclei: np.ndarray, mpp: float, settings: ProposalSettings | None = None) -> np.ndarray:
    """Instance labels int32 (h, w) of glands and nests: nuclei that lie close together, with the lumen they enclose.

    nuclei: instance labels or mask (h, w). Kept are those whose longer side is in `cluster_um` and that leave some of
    the tile free.
    """
    from scipy import ndimage

    settings = settings or ProposalSettings()
    reach, core = (max(1, round(length / mpp)) for length in (settings.cluster_close_um, settings.cluster_open_um))
    closed = ndimage.distance_transform_edt(np.pad(nuclei == 0, reach, constant_values=True)) <= reach
    closed = ndimage.distance_transform_edt(closed)[reach:-reach, reach:-reach] > reach
    filled = ndimage.binary_fill_holes(closed | (nuclei > 0))
    # Opened by distances too: discs of tens of pixels are slow as structuring elements.
    eroded = ndimage.distance_transform_edt(np.pad(filled, core, mode="edge")) > core
    opened = ndimage.distance_transform_edt(~eroded)[core:-core, core:-core] <= core
    labels, count = ndimage.label(opened)
    if not count:
        return np.zeros(nuclei.shape, np.int32)
    boxes, area = boxes_of(labels)
    side_um = np.maximum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]) * mpp
    low, high = settings.cluster_um
    keep = np.concatenate([[False], (side_um >= low) & (side_um <= high) & (area < 0.85 * labels.size)])
    return np.where(keep[labels], labels, 0).astype(np.int32)


def propose_tile(
    rgb: np.ndarray, mpp: float, settings: ProposalSettings | None = None, levels: SlideLevels | None = None
) -> Proposals:
    """Nuclei and clusters of one tile, nuclei first. See `segment_nuclei` for the arguments."""
    from scipy import ndimage

    settings, levels = settings or ProposalSettings(), levels or SlideLevels(stain_of([rgb]))
    if mpp <= settings.coarsest_nucleus_mpp:
        dense = nuclei = segment_nuclei(rgb, mpp, settings, levels)
    else:  # nuclei are a few pixels here: only what they form is proposed
        nuclei = np.zeros(rgb.shape[:2], np.int32)
        score = ndimage.gaussian_filter(nucleus_score(rgb, levels.stain), 1.0)
        dense = _mask(score, mpp, settings, levels.floor).astype(np.int32)
    found = [boxes_of(nuclei), boxes_of(segment_clusters(dense, mpp, settings))]
    label = np.repeat(np.arange(len(LABELS), dtype=np.int16), [len(area) for _, area in found])
    return Proposals(np.concatenate([box for box, _ in found]), np.concatenate([area for _, area in found]), label)


def boxes_of(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Instance labels (h, w) -> boxes float32 (k, 4) x0, y0, x1, y1 (far edges exclusive) and areas float32 (k,)."""
    from scipy import ndimage

    slices = [found for found in ndimage.find_objects(labels) if found is not None]
    boxes = [(column.start, row.start, column.stop, row.stop) for row, column in slices]
    area = np.bincount(labels.ravel())[1:]
    return np.array(boxes, np.float32).reshape(-1, 4), area[area > 0].astype(np.float32)


def _mask(score: np.ndarray, mpp: float, settings: ProposalSettings, floor: float) -> np.ndarray:
    """Pixels of nuclei: above the tile's threshold, or standing out of their surroundings."""
    from scipy import ndimage

    background, threshold = score_threshold(score, settings)
    window = settings.window_um / mpp / 2
    mean = ndimage.uniform_filter(score, max(3, round(window * 3.4)))
    square = ndimage.uniform_filter(score * score, max(3, round(window * 3.4)))
    spread = np.sqrt(np.maximum(square - mean * mean, 0))
    local = (score > mean + 0.3 * spread + settings.local_contrast) & (score > background + settings.contrast)
    mask = ((score > threshold) | local) & (score > floor)
    mask = ndimage.binary_opening(np.pad(mask, 1, mode="edge"))[1:-1, 1:-1]
    return ndimage.binary_fill_holes(mask)


def _parted(mask: np.ndarray, mpp: float, settings: ProposalSettings) -> np.ndarray:
    """Part touching nuclei: watershed on the distance to the edge, from its peaks."""
    from scipy import ndimage
    from skimage.segmentation import watershed

    # The tile's border is no edge of a nucleus: the mask goes on beyond it.
    distance = ndimage.distance_transform_edt(np.pad(mask, 1, mode="edge"))[1:-1, 1:-1] * mpp
    distance = ndimage.gaussian_filter(distance, settings.distance_smooth_um / mpp)
    size = 2 * max(1, round(settings.peak_um / mpp)) + 1
    peaks = (distance == ndimage.maximum_filter(distance, size)) & mask
    markers, _ = ndimage.label(peaks, np.ones((3, 3)))
    return watershed(-distance, markers, mask=mask)


def _recut_markers(labels: np.ndarray, score: np.ndarray, mpp: float, settings: ProposalSettings) -> np.ndarray:
    """Markers for the final watershed: each piece itself, or its dark parts where it falls into several round ones."""
    from scipy import ndimage

    count = int(labels.max())
    area, fit = _ellipse_fit(labels)
    mean = np.bincount(labels.ravel(), score.ravel(), count + 1) / np.maximum(area, 1)
    dark = ndimage.binary_opening((labels > 0) & (score > mean[labels] * settings.recut))
    parts = _parted(ndimage.binary_fill_holes(dark), mpp, settings)
    part_area, part_fit = _ellipse_fit(parts)
    parent = np.zeros(len(part_area), np.int64)
    parent[parts.ravel()] = labels.ravel()
    good = (part_area * mpp**2 >= 10) & (part_fit > 0.88)
    good[0] = False
    pieces = np.bincount(parent, good, count + 1)
    share = np.bincount(parent, part_area * good, count + 1) / np.maximum(area, 1)
    recut = ((pieces >= 2) & (fit < 0.9) & (share > 0.35)) | ((pieces >= 1) & (area * mpp**2 > settings.nucleus_um2[1]))
    recut[0] = False
    inside = np.where(good[parts] & (parent[parts] == labels), parts + count, 0)
    return np.where(recut[labels], inside, labels)


def _ellipse_fit(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Area in pixels, and area over that of the ellipse with the same second moments (1 for an ellipse, less if dented).

    Both float (k + 1,), index 0 being the background.
    """
    flat, count = labels.ravel(), int(labels.max()) + 1
    y, x = (grid.ravel().astype(float) for grid in np.indices(labels.shape))
    area = np.bincount(flat, minlength=count).astype(float)
    size = np.maximum(area, 1)
    mean_x, mean_y = np.bincount(flat, x, count) / size, np.bincount(flat, y, count) / size
    # A pixel has a variance of 1/12 of its own.
    var_x = np.bincount(flat, x * x, count) / size - mean_x**2 + 1 / 12
    var_y = np.bincount(flat, y * y, count) / size - mean_y**2 + 1 / 12
    covariance = np.bincount(flat, x * y, count) / size - mean_x * mean_y
    ellipse = 4 * np.pi * np.sqrt(np.maximum(var_x * var_y - covariance**2, 1e-6))
    return area, area / ellipse
