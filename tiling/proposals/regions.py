"""Objects larger than nuclei on one tile: glands, vessels, clusters and nests of cells, by classical image analysis.

A nucleus of 10 um spans one patch of a vision transformer; these span many. The names say what a region was found by;
nobody looked at it, and training takes its box only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tiling.proposals.outlines import fill_holes
from tiling.proposals.stain import STAINED_DENSITY, ProposalSettings, SlideLevels, nucleus_score, optical_density

REGION_LABELS = ("cluster", "gland", "vessel", "nest")
# Summed density of what is empty, and of what is pale (mucin, secretion), at most this and this share of the tissue's.
EMPTY, PALE = (0.35, 0.35), (0.9, 0.55)
# Red blood cells: the least green density, the least blue to it (eosin takes less), and the most red.
BLOOD_DENSITY, BLOOD_BLUE, BLOOD_RED = 0.8, 0.7, 0.5
NECK_UM = 2.0  # half the width of a gap that parts a lumen from the next
LEAST_EXTENT = 0.45  # share of its box that a lumen fills: clefts do not
CUT = 1.0  # see `_lumina`: the background at a tissue's edge lies on the tile's border with far more
DIRECTIONS = 24  # in which a lumen is looked around for nuclei
SAME_IOU = 0.75  # boxes this much alike are one: the first label in the order gland, vessel, cluster, nest stays
FULL_SHARE = 0.85  # a region that fills the tile is no object in it
GRID_UM = 1.0  # pixel of the small picture that regions are found on


@dataclass(frozen=True)
class Regions:
    """xyxy float32 (k, 4) in pixels of the tile, area_px float32 (k,), label int16 (k,), which indexes REGION_LABELS."""

    xyxy: np.ndarray
    area_px: np.ndarray
    label: np.ndarray


def find_regions(rgb: np.ndarray, nuclei: np.ndarray, mpp: float, settings: ProposalSettings, levels: SlideLevels) -> Regions:
    """Find all regions of a tile uint8 (h, w, 3) whose nuclei (instance labels or a mask) are int32 (h, w).

    Found on a picture of about 1 um per pixel: finer says nothing about objects of this size, and costs time.
    """
    step = max(1, int(GRID_UM / mpp + 0.5))
    small, small_mpp = _shrunk(rgb, step), mpp * step
    coarse = _shrunk((nuclei > 0).astype(np.uint8) * 255, step) >= 128
    masks = {"cluster": segment_clusters(coarse, small_mpp, settings)}
    if levels.stain != "dark":
        masks["gland"], masks["vessel"] = segment_lumina(small, coarse, small_mpp, settings, levels)
    masks["nest"] = segment_nests(small, coarse, small_mpp, settings, levels)
    boxes, areas, labels = [np.zeros((0, 4), np.float32)], [np.zeros(0, np.float32)], [np.zeros(0, np.int16)]
    for name in ("gland", "vessel", "cluster", "nest"):
        if name in masks:
            box, area = boxes_of(masks[name])
            new = _best_iou(box, np.concatenate(boxes)) < SAME_IOU
            boxes.append(box[new])
            areas.append(area[new])
            labels.append(np.full(int(new.sum()), REGION_LABELS.index(name), np.int16))
    height, width = nuclei.shape
    xyxy = np.minimum(np.concatenate(boxes) * step, np.array([width, height] * 2, np.float32))
    return Regions(xyxy, np.concatenate(areas) * step**2, np.concatenate(labels))


def segment_clusters(nuclei: np.ndarray, mpp: float, settings: ProposalSettings | None = None) -> np.ndarray:
    """Label nuclei that lie close together, with what they enclose: instance labels int32 (h, w).

    nuclei: instance labels or mask (h, w). Kept are those whose longer side is in `cluster_um` and that leave some of
    the tile free.
    """
    from scipy import ndimage

    settings = settings or ProposalSettings()
    reach, core = (max(1, round(length / mpp)) for length in (settings.cluster_close_um, settings.cluster_open_um))
    if not nuclei.any():
        return np.zeros(nuclei.shape, np.int32)
    closed = ndimage.distance_transform_edt(np.pad(nuclei == 0, reach, constant_values=True)) <= reach
    closed = ndimage.distance_transform_edt(closed)[reach:-reach, reach:-reach] > reach
    solid = ndimage.binary_fill_holes(closed | (nuclei > 0))
    # Opened by distances too: discs of tens of pixels are slow as structuring elements.
    eroded = ndimage.distance_transform_edt(np.pad(solid, core, mode="edge")) > core
    if not eroded.any():
        return np.zeros(nuclei.shape, np.int32)
    rounded = ndimage.distance_transform_edt(~eroded)[core:-core, core:-core] <= core
    return _of_size(ndimage.label(rounded)[0], mpp, settings)


def segment_lumina(
    rgb: np.ndarray, nuclei: np.ndarray, mpp: float, settings: ProposalSettings, levels: SlideLevels
) -> tuple[np.ndarray, np.ndarray]:
    """Label glands and vessels: instance labels int32 (h, w) of each, on an uint8 (h, w, 3) picture with nuclei bool (h, w).

    A gland is a lumen, empty or pale, with nuclei or other dense stain around it in `gland_share` of all directions, and that
    wall. An empty lumen with less, shut in by tissue, is a vessel (or a gap); so is, where there is eosin, a pool of red cells.
    """
    from scipy import ndimage
    from skimage.filters import threshold_otsu

    density = ndimage.gaussian_filter(optical_density(rgb), (1.0 / mpp, 1.0 / mpp, 0))
    total = density.sum(axis=2)
    tissue = total[total > STAINED_DENSITY]
    usual = float(np.percentile(tissue, 75)) if tissue.size else 0.0
    empty, pale = (total < min(limit, share * usual) for limit, share in (EMPTY, PALE))
    score = ndimage.gaussian_filter(nucleus_score(rgb, levels.stain), 1.0 / mpp)
    wall = nuclei | (score > threshold_otsu(score)) if float(np.ptp(score)) > settings.contrast else nuclei
    lumen, lumina = _lumina(pale, mpp, settings, CUT)
    is_gland = _wall_around(lumen, lumina, wall, mpp, settings.wall_um) >= settings.gland_share
    glands = _with_wall(np.where(is_gland[lumen], lumen, 0), wall, mpp, settings.wall_um)

    hollow = (_lumina(empty, mpp, settings)[0] > 0) & (glands == 0)
    if levels.stain == "eosin":
        red, green, blue = np.moveaxis(density, 2, 0)
        blood = (green > BLOOD_DENSITY) & (blue > BLOOD_BLUE * green) & (red < BLOOD_RED * green)
        hollow |= _lumina(blood, mpp, settings, CUT)[0] > 0
    reach = max(1, round(3.0 / mpp))  # the wall
    near = ndimage.distance_transform_edt(~hollow) <= reach if hollow.any() else hollow
    return _of_size(glands, mpp, settings), _of_size(ndimage.label(near)[0], mpp, settings)


def segment_nests(
    rgb: np.ndarray, nuclei: np.ndarray, mpp: float, settings: ProposalSettings, levels: SlideLevels
) -> np.ndarray:
    """Instance labels int32 (h, w) of connected regions that take more of the nuclear stain than the rest of the tile."""
    from scipy import ndimage
    from skimage.filters import threshold_otsu

    blur = settings.nest_smooth_um / mpp
    score = ndimage.gaussian_filter(nucleus_score(rgb, levels.stain), blur)
    density = ndimage.gaussian_filter(nuclei.astype(np.float32), blur)
    if float(np.ptp(score)) < settings.contrast or float(density.max()) < 0.15:
        return np.zeros(nuclei.shape, np.int32)
    region = (score > threshold_otsu(score)) & (density > 0.1)
    return _of_size(ndimage.label(fill_holes(region))[0], mpp, settings)


def boxes_of(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Box instance labels (h, w): boxes float32 (k, 4) x0, y0, x1, y1 (far edges exclusive) and areas float32 (k,)."""
    from scipy import ndimage

    slices = [part for part in ndimage.find_objects(labels) if part is not None]
    boxes = [(column.start, row.start, column.stop, row.stop) for row, column in slices]
    area = np.bincount(labels.ravel())[1:]
    return np.array(boxes, np.float32).reshape(-1, 4), area[area > 0].astype(np.float32)


def _lumina(mask: np.ndarray, mpp: float, settings: ProposalSettings, cut: float = 0.0) -> tuple[np.ndarray, int]:
    """Label the connected parts of a mask that are solid and of the size of lumina: int32 (h, w), and their number.

    cut: the most that may lie on the tile's border, to the root of the area: 0 for a part that is whole.
    """
    from scipy import ndimage

    reach = max(1, round(NECK_UM / mpp))
    core = ndimage.distance_transform_edt(np.pad(fill_holes(mask), 1, mode="edge"))[1:-1, 1:-1] > reach
    if not core.any():
        return np.zeros(mask.shape, np.int32), 0
    labels, _ = ndimage.label(ndimage.distance_transform_edt(~core) <= reach)
    area = np.bincount(labels.ravel()).astype(float)
    box, _ = boxes_of(labels)
    extent = np.concatenate([[0], area[1:] / np.prod(box[:, 2:] - box[:, :2], axis=1)])
    low, high = settings.lumen_um2
    good = (area * mpp**2 >= low) & (area * mpp**2 <= high) & (extent > LEAST_EXTENT)
    sides = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    good &= np.bincount(sides, minlength=len(area)) <= cut * np.sqrt(area)
    good[0] = False
    number = np.cumsum(good) * good
    return number.astype(np.int32)[labels], int(good.sum())


def _wall_around(lumen: np.ndarray, count: int, wall: np.ndarray, mpp: float, reach_um: float) -> np.ndarray:
    """Measure the share of directions from each lumen's centre in which wall, bool (h, w), is near its edge: (count + 1,)."""
    from scipy import ndimage

    share = np.zeros(count + 1)
    if not count or not wall.any():
        return share
    distance, (row, column) = ndimage.distance_transform_edt(lumen == 0, return_indices=True)
    y, x = np.nonzero(wall & (distance > 0) & (distance * mpp <= reach_um))
    owner = lumen[row[y, x], column[y, x]]
    centre = np.array([(0.0, 0.0), *ndimage.center_of_mass(lumen > 0, lumen, np.arange(1, count + 1))])
    turn = np.arctan2(y - centre[owner, 0], x - centre[owner, 1]) / (2 * np.pi) + 0.5
    seen = np.zeros((count + 1, DIRECTIONS), bool)
    seen[owner, np.minimum((turn * DIRECTIONS).astype(int), DIRECTIONS - 1)] = True
    share[1:] = seen[1:].mean(axis=1)
    return share


def _with_wall(lumen: np.ndarray, wall: np.ndarray, mpp: float, reach_um: float) -> np.ndarray:
    """Add to each lumen the wall, bool (h, w), near it: int32 (h, w); lumina that share a wall stay apart."""
    from scipy import ndimage

    if not lumen.any():
        return lumen.astype(np.int32)
    distance, (row, column) = ndimage.distance_transform_edt(lumen == 0, return_indices=True)
    within = distance * mpp <= reach_um
    return np.where(within & (wall | (distance * mpp <= reach_um / 3)), lumen[row, column], 0).astype(np.int32)


def _of_size(labels: np.ndarray, mpp: float, settings: ProposalSettings) -> np.ndarray:
    """Keep the labels int32 (h, w) whose longer side is in `cluster_um` and that leave some of the tile free."""
    if not labels.any():
        return np.zeros(labels.shape, np.int32)
    from scipy import ndimage

    low, high = settings.cluster_um
    keep = np.zeros(int(labels.max()) + 1, bool)
    area = np.bincount(labels.ravel())
    for number, place in enumerate(ndimage.find_objects(labels), 1):
        if place is not None:
            side_um = mpp * max(side.stop - side.start for side in place)
            keep[number] = low <= side_um <= high and area[number] < FULL_SHARE * labels.size
    return np.where(keep[labels], labels, 0).astype(np.int32)


def _shrunk(picture: np.ndarray, step: int) -> np.ndarray:
    """Average blocks of step x step pixels, uint8; the last row and column are repeated where the sides do not divide."""
    if step == 1:
        return picture
    height, width = picture.shape[:2]
    edge = [(0, -height % step), (0, -width % step), *[(0, 0)] * (picture.ndim - 2)]
    padded = np.pad(picture, edge, mode="edge")
    blocks = padded.reshape(padded.shape[0] // step, step, padded.shape[1] // step, step, *picture.shape[2:])
    return np.asarray(blocks.mean(axis=(1, 3), dtype=np.float32).astype(np.uint8))


def _best_iou(boxes: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Compute the largest IoU of each box (k, 4) with the kept ones (m, 4): float (k,)."""
    if not len(kept) or not len(boxes):
        return np.zeros(len(boxes))
    low, high = np.maximum(boxes[:, None, :2], kept[None, :, :2]), np.minimum(boxes[:, None, 2:], kept[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=2)
    area, kept_area = ((xyxy[:, 2:] - xyxy[:, :2]).prod(axis=1) for xyxy in (boxes, kept))
    return np.asarray((shared / (area[:, None] + kept_area[None] - shared)).max(axis=1))
