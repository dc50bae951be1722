"""Candidate outlines of nuclei at many thresholds, each with what tells a nucleus from a scrap or a clump.

One threshold never fits all nuclei of a tile: the dark ones touch where the pale ones just appear. So outlines are taken
at several, clumps are parted at their necks, and the best of those that overlap is kept (`tiling.proposals.nuclei`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tiling.proposals.stain import ProposalSettings

RING_UM = 0.7  # width of the surroundings that an outline is compared with
TOP_PERCENT = 95  # of the stained pixels lie below the last threshold
DETAIL = 0.05  # density that keeps the ratios below finite
FEATURES = (
    *("fit", "log_area", "edge", "edge_spread", "contrast", "texture", "elongation", "free_rim", "level", "depth", "compact"),
)


@dataclass(frozen=True)
class Outlines:
    """k outlines. maps: label images int32 (h, w); outline i is maps[at[i]] == number[i], inside box[i].

    box: int64 (k, 4) x0, y0, x1, y1, far edges exclusive. features: float64 (k, 11), columns as in FEATURES.
    """

    maps: list[np.ndarray]
    at: np.ndarray
    number: np.ndarray
    box: np.ndarray
    features: np.ndarray

    def __len__(self) -> int:
        return len(self.at)


@dataclass(frozen=True)
class _Layer:
    """The outlines in one label image: columns as of `Outlines`."""

    labels: np.ndarray
    number: np.ndarray
    box: np.ndarray
    features: np.ndarray


@dataclass(frozen=True)
class _Picture:
    """A score map float32 (h, w), its slope per um, its background and its range, and the coordinates of its pixels."""

    score: np.ndarray
    slope: np.ndarray
    background: float
    range: float
    x: np.ndarray
    y: np.ndarray
    mpp: float


def candidate_outlines(score: np.ndarray, mpp: float, settings: ProposalSettings, floor: float) -> Outlines:
    """Collect all outlines of nuclear size on a smoothed score map float32 (h, w), at thresholds above `floor`."""
    background = float(np.percentile(score[::2, ::2], 5))
    lowest = background + settings.contrast
    stained = score[score > lowest]  # of these and not of the tile, or a single nucleus would stand above all thresholds
    top = float(np.percentile(stained, TOP_PERCENT)) if stained.size else lowest
    layers: list[_Layer] = []
    if top > lowest:
        picture = _picture(score, background, top, mpp)
        steps = (np.arange(settings.levels) / settings.levels) ** settings.level_power
        for level in lowest + (top - lowest) * steps:
            if level > floor:
                layers += _layers_at(picture, float(level), settings)
    return Outlines(
        maps=[layer.labels for layer in layers],
        at=np.repeat(np.arange(len(layers)), [len(layer.number) for layer in layers]),
        number=np.concatenate([np.zeros(0, np.int64), *(layer.number for layer in layers)]),
        box=np.concatenate([np.zeros((0, 4), np.int64), *(layer.box for layer in layers)]),
        features=np.concatenate([np.zeros((0, len(FEATURES))), *(layer.features for layer in layers)]),
    )


def _picture(score: np.ndarray, background: float, top: float, mpp: float) -> _Picture:
    down, right = np.zeros_like(score), np.zeros_like(score)
    down[1:-1] = score[2:] - score[:-2]
    right[:, 1:-1] = score[:, 2:] - score[:, :-2]
    y, x = (grid.ravel().astype(np.float64) for grid in np.indices(score.shape))
    return _Picture(score, np.hypot(down, right) / (2 * mpp), background, top - background, x, y, mpp)


def _layers_at(picture: _Picture, level: float, settings: ProposalSettings) -> list[_Layer]:
    """Take the connected pieces above one threshold, and what the dented ones among them fall into."""
    from scipy import ndimage

    labels, count = ndimage.label(fill_holes(open_mask(picture.score > level)))
    if not count:
        return []
    area, features = _features(labels, count, picture, level)
    low, high = (limit / picture.mpp**2 for limit in settings.nucleus_um2)
    layers = [_layer(labels, (area >= low) & (area <= high), features)]
    dented = (features[:, 0] < settings.dent) & (area >= 2 * low)
    dented[0] = False
    if not dented.any():
        return layers
    pieces, whole = split_at_necks(np.where(dented[labels], labels, 0), picture.mpp, settings)
    if len(whole) == 1:
        return layers
    area, features = _features(pieces, len(whole) - 1, picture, level)
    several = np.bincount(whole, minlength=count + 1)[whole] > 1
    return [*layers, _layer(pieces, (area >= low) & (area <= high) & several, features)]


def _layer(labels: np.ndarray, keep: np.ndarray, features: np.ndarray) -> _Layer:
    """Select the outlines `keep`, bool (count + 1,) with the background first, of a label image."""
    from scipy import ndimage

    number = np.flatnonzero(keep[1:]) + 1
    slices = ndimage.find_objects(labels)
    box = [(slices[i - 1][1].start, slices[i - 1][0].start, slices[i - 1][1].stop, slices[i - 1][0].stop) for i in number]
    return _Layer(labels, number, np.array(box, np.int64).reshape(-1, 4), features[number])


def _features(labels: np.ndarray, count: int, picture: _Picture, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Measure each label: its area in pixels float64 (count + 1,), its features (count + 1, 11), columns as in FEATURES.

    All but the area are ratios, so that they mean the same on pale and on dark slides.
    """
    from scipy import ndimage

    flat, size = labels.ravel(), count + 1
    inside = np.flatnonzero(flat)
    owner, x, y, score = flat[inside], picture.x[inside], picture.y[inside], picture.score.ravel()[inside]
    area = np.bincount(owner, minlength=size).astype(float)
    pixels = np.maximum(area, 1)
    mean_x, mean_y, mean = (np.bincount(owner, values, size) / pixels for values in (x, y, score))
    var_x = np.bincount(owner, x * x, size) / pixels - mean_x**2 + 1 / 12  # a pixel has a variance of 1/12 of its own
    var_y = np.bincount(owner, y * y, size) / pixels - mean_y**2 + 1 / 12
    covariance = np.bincount(owner, x * y, size) / pixels - mean_x * mean_y
    product = np.maximum(var_x * var_y - covariance**2, 1e-6)
    spread = np.sqrt(np.maximum(np.bincount(owner, score * score, size) / pixels - mean**2, 0))

    edge = np.flatnonzero(_edges(labels))
    slope = picture.slope.ravel()[edge]
    rim = np.maximum(np.bincount(flat[edge], minlength=size), 1)
    steep = np.bincount(flat[edge], slope, size) / rim
    uneven = np.sqrt(np.maximum(np.bincount(flat[edge], slope * slope, size) / rim - steep**2, 0))

    reach = 2 * max(1, round(RING_UM / picture.mpp)) + 1
    grown = ndimage.maximum_filter(labels, reach).ravel()
    around = np.flatnonzero((grown > 0) & (flat == 0))
    free = np.bincount(grown[around], minlength=size)
    outside = np.bincount(grown[around], picture.score.ravel()[around], size) / np.maximum(free, 1)
    contrast = np.where(free > 0, mean - outside, 0)

    height = mean - picture.background + DETAIL
    columns = [
        area / (4 * np.pi * np.sqrt(product)),  # 1 for an ellipse, less where dented
        np.log(np.maximum(area, 1) * picture.mpp**2 / 30),
        steep / height,
        uneven / (steep + 0.01),
        contrast / height,
        spread / height,
        np.sqrt(np.maximum((var_x + var_y) ** 2 - 4 * product, 0)) / (var_x + var_y),
        np.minimum(free / rim, 3),
        (level - picture.background) / height,
        contrast / picture.range,
        np.sqrt(area) / rim,
    ]
    return area, np.stack(columns, axis=1)


def split_at_necks(labels: np.ndarray, mpp: float, settings: ProposalSettings) -> tuple[np.ndarray, np.ndarray]:
    """Split each label at its necks: watershed on the distance to the edge, parts joined again where the neck is wide.

    labels: int32 (h, w). Returns the parts int32 (h, w), numbered from 1, and the label that each part lies in,
    int64 (parts + 1,), 0 for the background.
    """
    from scipy import ndimage
    from skimage.segmentation import watershed

    mask = labels > 0
    # The tile's border is no edge of a nucleus: the mask goes on beyond it.
    wide = np.pad(mask, 1, mode="edge")
    octagonal = [ndimage.distance_transform_cdt(wide, metric)[1:-1, 1:-1] for metric in ("chessboard", "taxicab")]
    distance = (octagonal[0] + octagonal[1]).astype(np.float32) * np.float32(mpp / 2)  # near Euclid's, and far quicker
    distance = ndimage.gaussian_filter(distance, settings.distance_smooth_um / mpp)
    size = 2 * max(1, round(settings.peak_um / mpp)) + 1
    peaks = (distance == ndimage.maximum_filter(distance, size)) & mask
    markers, count = ndimage.label(peaks, np.ones((3, 3)))
    pieces = watershed(-distance, markers, mask=mask)
    height = np.zeros(count + 1)
    height[markers[peaks]] = distance[peaks]
    root = _merge_over_wide_necks(pieces, distance, height, settings.neck)
    names, number = np.unique(root, return_inverse=True)  # the background is its own root, so it stays 0
    pieces = number.astype(np.int32)[pieces]
    whole = np.zeros(len(names), np.int64)
    whole[pieces.ravel()] = labels.ravel()
    return pieces, whole


def _merge_over_wide_necks(pieces: np.ndarray, distance: np.ndarray, height: np.ndarray, neck: float) -> np.ndarray:
    """Number the piece that each piece joins where necks are wide: int64 (pieces + 1,). height: the peak of each piece."""
    count = len(height)
    keys, saddles = [], []
    for a, b in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        meet = (pieces[a] != pieces[b]) & (pieces[a] > 0) & (pieces[b] > 0)
        first, second = pieces[a][meet].astype(np.int64), pieces[b][meet].astype(np.int64)
        keys.append(np.minimum(first, second) * count + np.maximum(first, second))
        saddles.append(np.minimum(distance[a][meet], distance[b][meet]))
    pairs, place = np.unique(np.concatenate(keys), return_inverse=True)
    saddle = np.zeros(len(pairs))
    np.maximum.at(saddle, place, np.concatenate(saddles))
    root = np.arange(count)

    def top(i: int) -> int:
        while root[i] != i:
            i = int(root[i])
        return i

    for row in np.argsort(-saddle):
        low, high = sorted((top(int(pairs[row]) // count), top(int(pairs[row]) % count)), key=lambda i: height[i])
        if low != high and saddle[row] > neck * height[low]:
            root[low] = high
    return np.array([top(i) for i in range(count)])


def open_mask(mask: np.ndarray) -> np.ndarray:
    """Open a mask, bool (h, w), by a cross of five pixels, as if it went on beyond the border."""
    wide = np.pad(mask, 2, mode="edge")
    core = wide[1:-1, 1:-1] & wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]
    return np.asarray(core[1:-1, 1:-1] | core[:-2, 1:-1] | core[2:, 1:-1] | core[1:-1, :-2] | core[1:-1, 2:])


def fill_holes(mask: np.ndarray) -> np.ndarray:
    """Fill the holes of a mask, bool (h, w); what touches the border of the picture is no hole."""
    from scipy import ndimage

    holes, count = ndimage.label(~mask)
    open_ = np.zeros(count + 1, bool)
    for side in (holes[0], holes[-1], holes[:, 0], holes[:, -1]):
        open_[side] = True
    open_[0] = False
    return np.asarray(~open_[holes])


def _edges(labels: np.ndarray) -> np.ndarray:
    """Mark the pixels, bool (h, w), of a label that meet another label or the background."""
    edge = np.zeros(labels.shape, bool)
    down, right = labels[1:] != labels[:-1], labels[:, 1:] != labels[:, :-1]
    edge[1:] |= down
    edge[:-1] |= down
    edge[:, 1:] |= right
    edge[:, :-1] |= right
    return edge & (labels > 0)


MEAN = np.array([0.9109, 0.2307, 0.4167, 0.3433, 0.5537, 0.2629, 0.4508, 2.7793, 0.5367, 0.3612, 0.3008])
SCALE = np.array([0.0861, 0.9959, 0.1706, 0.1389, 0.2077, 0.176, 0.2304, 0.3513, 0.2255, 0.1789, 0.0669])
WEIGHT_ROWS = (
    # Of 1, each scaled feature, and each product of two: see `products`.
    [0.4896, 0.1268, 0.0707, -0.0542, -0.0273, 0.4224, -0.1837, -0.0178, 0.0556, 0.1602, -0.0289, 0.0446],
    [0.023, 0.0405, 0.0283, -0.0194, -0.0264, -0.0076, 0.0168, -0.0008, -0.03, 0.0202, 0.0092],
    [-0.0237, 0.0615, 0.0478, -0.0639, 0.0441, -0.024, 0.0126, 0.0802, -0.0217, -0.0051],
    [0.0214, 0.0093, -0.0244, 0.0657, 0.0121, 0.0047, 0.077, 0.0128, -0.0152],
    [-0.0001, -0.06, 0.0091, -0.0025, -0.0013, -0.014, -0.0086, 0.0081],
    [0.1992, -0.093, -0.055, 0.0279, 0.2096, -0.2067, 0.1034],
    [0.0137, 0.0528, 0.0013, -0.0216, 0.0711, -0.0435],
    [0.0081, 0.0118, -0, 0.0088, -0.0089],
    [0.0056, 0.0393, 0.0007, -0.0033],
    [0.0582, -0.142, 0.0689],
    [0.0177, -0.0092],
    [-0.0031],
)
WEIGHTS = np.concatenate(WEIGHT_ROWS)


def quality(features: np.ndarray) -> np.ndarray:
    """Score features (k, 11) as FEATURES names them: float64 (k,), about 0 for a scrap, 1 for a nucleus."""
    return np.asarray(products((features - MEAN) / SCALE) @ WEIGHTS)


def products(scaled: np.ndarray) -> np.ndarray:
    """Expand (k, n) to (k, (n + 1) (n + 2) / 2): 1, each column, each product of two, row by row of the upper triangle."""
    wide = np.concatenate([np.ones((len(scaled), 1)), scaled], axis=1)
    first, second = np.triu_indices(wide.shape[1])
    return np.asarray(wide[:, first] * wide[:, second])
