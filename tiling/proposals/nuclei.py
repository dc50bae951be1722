"""Class-agnostic nuclei on one tile, by classical image analysis: arrays in, boxes out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tiling.proposals.outlines import Outlines, candidate_outlines, fill_holes, open_mask, quality
from tiling.proposals.regions import REGION_LABELS, boxes_of, find_regions, segment_clusters
from tiling.proposals.stain import ProposalSettings, SlideLevels, nucleus_score, slide_levels, stain_of

__all__ = [
    "LABELS",
    "ProposalSettings",
    "Proposals",
    "SlideLevels",
    "boxes_of",
    "nucleus_outlines",
    "propose_tile",
    "segment_clusters",
    "segment_nuclei",
    "slide_levels",
    "stain_of",
]

LABELS = ("nucleus", *REGION_LABELS)


@dataclass(frozen=True)
class Proposals:
    """xyxy: float32 (k, 4), x0, y0, x1, y1 in pixels of the tile, x1 > x0. area_px: float32 (k,). label: int16 (k,)."""

    xyxy: np.ndarray
    area_px: np.ndarray
    label: np.ndarray


def segment_nuclei(
    rgb: np.ndarray, mpp: float, settings: ProposalSettings | None = None, levels: SlideLevels | None = None
) -> np.ndarray:
    """Label the nuclei of a tile, uint8 (h, w, 3) of `mpp` um per pixel: int32 (h, w), 0 for background.

    levels: of the whole slide; without them the tile speaks for itself. Outlines at several thresholds, clumps parted at
    their necks (`tiling.proposals.outlines`); of those that overlap the one most like a nucleus is kept.
    """
    settings = settings or ProposalSettings()
    outlines = nucleus_outlines(rgb, mpp, settings, levels)
    return _best(outlines, quality(outlines.features), rgb.shape[:2], settings)


def nucleus_outlines(rgb: np.ndarray, mpp: float, settings: ProposalSettings, levels: SlideLevels | None = None) -> Outlines:
    """Collect the outlines among which `segment_nuclei` chooses, with the same arguments."""
    from scipy import ndimage

    levels = levels or SlideLevels(stain_of([rgb]))
    score = ndimage.gaussian_filter(nucleus_score(rgb, levels.stain), settings.smooth_um / mpp)
    return candidate_outlines(score, mpp, settings, levels.floor)


def _best(outlines: Outlines, value: np.ndarray, shape: tuple[int, ...], settings: ProposalSettings) -> np.ndarray:
    """Draw outlines in the order of their quality, each where better ones have left nearly all of it free."""
    taken = np.zeros(shape, np.int32)
    count = 0
    for i in np.argsort(-value, kind="stable"):
        if value[i] < settings.least_quality:
            break
        x0, y0, x1, y1 = outlines.box[i]
        window = taken[y0:y1, x0:x1]
        own = outlines.maps[outlines.at[i]][y0:y1, x0:x1] == outlines.number[i]
        free = own & (window == 0)
        if np.count_nonzero(free) >= (1 - settings.overlap) * np.count_nonzero(own):
            count += 1
            window[free] = count
    return taken


def propose_tile(
    rgb: np.ndarray, mpp: float, settings: ProposalSettings | None = None, levels: SlideLevels | None = None
) -> Proposals:
    """Propose nuclei and what they form (labels as in LABELS) on one tile, nuclei first. Arguments: see `segment_nuclei`."""
    from scipy import ndimage

    settings, levels = settings or ProposalSettings(), levels or SlideLevels(stain_of([rgb]))
    if mpp <= settings.coarsest_nucleus_mpp:
        dense = nuclei = segment_nuclei(rgb, mpp, settings, levels)
    else:  # nuclei are a few pixels here: only what they form is proposed
        nuclei = np.zeros(rgb.shape[:2], np.int32)
        dense = _stained(ndimage.gaussian_filter(nucleus_score(rgb, levels.stain), 1.0), settings, levels.floor)
    boxes, area = boxes_of(nuclei)
    regions = find_regions(rgb, dense, mpp, settings, levels)
    label = np.concatenate([np.zeros(len(area), np.int16), regions.label + np.int16(1)])
    return Proposals(np.concatenate([boxes, regions.xyxy]), np.concatenate([area, regions.area_px]), label)


def _stained(score: np.ndarray, settings: ProposalSettings, floor: float) -> np.ndarray:
    """Mark the pixels above Otsu's threshold of the tile: int32 (h, w), 0 or 1."""
    from skimage.filters import threshold_otsu

    background = float(np.percentile(score, 5))
    if float(np.ptp(score)) < settings.contrast:
        return np.zeros(score.shape, np.int32)
    threshold = max(0.9 * (float(threshold_otsu(score)) - background), settings.contrast) + background
    return fill_holes(open_mask(score > max(threshold, floor))).astype(np.int32)
