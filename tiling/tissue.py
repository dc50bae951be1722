"""Find tissue on a thumbnail; outlines of a mask, and a mask of outlines."""

from __future__ import annotations

from typing import Any

import numpy as np

DARK_BACKGROUND = 60.0  # brightest channel below this on most of a thumbnail: fluorescence
BLACK = 30.0  # brightest channel below this on a bright slide: padding, not tissue
WHITE_AT_LEAST = 200.0  # the glass of a bright slide is not darker than this
CONTRAST_RANGE = (12.0, 40.0)  # grey levels below the glass between which the threshold is looked for
SMOOTH_SIGMA_PX = 1.5
FINER = 4  # rasterising: subdivisions of a pixel
MIN_PIECE_SHARE = 1e-4  # of the thumbnail's area: smaller pieces are dust, smaller holes belong to the tissue


def tissue_mask(thumb_rgb: np.ndarray) -> np.ndarray:
    """uint8 (h, w, 3) overview -> bool (h, w), True on tissue.

    On bright slides tissue is what absorbs: the channel that falls furthest below the glass, cut by Otsu inside a
    fixed range, so that neither a blank slide nor one full of tissue is split in two. On dark (fluorescence) slides it
    is what is brighter than the background. Dust is removed and small holes are filled.
    """
    from scipy.ndimage import gaussian_filter

    image = gaussian_filter(thumb_rgb.astype(np.float32), (SMOOTH_SIGMA_PX, SMOOTH_SIGMA_PX, 0))
    brightest = image.max(axis=2)
    if np.median(brightest) < DARK_BACKGROUND:
        return _cleaned(_bright_parts(brightest))
    glass = np.clip(np.percentile(image.reshape(-1, 3), 95, axis=0), WHITE_AT_LEAST, 255)
    fall = np.clip((glass - image).max(axis=2), 0, 255)
    padding = brightest < BLACK
    threshold = float(np.clip(_otsu(fall[~padding]), *CONTRAST_RANGE))
    return _cleaned((fall > threshold) & ~padding)


def tissue_outlines(mask: np.ndarray, downsample: float) -> list[Any]:
    """bool (h, w) -> shapely polygons in level-0 pixels that cover exactly the mask's pixels, largest first."""
    import shapely

    padded = np.zeros((mask.shape[0], mask.shape[1] + 2), np.int8)
    padded[:, 1:-1] = mask
    step = np.diff(padded, axis=1)
    row, start = np.nonzero(step == 1)
    _, stop = np.nonzero(step == -1)
    if not len(row):
        return []
    runs = shapely.box(start * downsample, row * downsample, stop * downsample, (row + 1) * downsample)
    parts = shapely.get_parts(shapely.simplify(shapely.union_all(runs), 0))
    return sorted(parts, key=lambda part: -part.area)


def rasterise(geometry: np.ndarray, shape: tuple[int, int], downsample: float) -> np.ndarray:
    """Polygons in level-0 pixels -> bool (h, w) of a grid with `downsample` level-0 pixels per pixel; holes stay holes.

    A pixel is set where about half of it or more is covered.
    """
    import shapely
    from PIL import Image, ImageDraw

    mask = np.zeros(shape, bool)
    for polygon in shapely.get_parts(np.asarray(geometry, dtype=object)):
        x0, y0, x1, y1 = np.array(polygon.bounds) / downsample
        left, top = max(0, int(x0)), max(0, int(y0))
        width, height = min(shape[1], int(x1) + 1) - left, min(shape[0], int(y1) + 1) - top
        if width <= 0 or height <= 0:
            continue
        image = Image.new("L", (width * FINER, height * FINER))
        draw = ImageDraw.Draw(image)
        for ring, inside in ((polygon.exterior, 255), *((hole, 0) for hole in polygon.interiors)):
            # Pillow's corners lie on pixel centres.
            corners = (shapely.get_coordinates(ring) / downsample - (left, top)) * FINER - 0.5
            draw.polygon([(float(x), float(y)) for x, y in corners], fill=inside)
        mask[top : top + height, left : left + width] |= np.asarray(image.reduce(FINER)) >= 128
    return mask


def _bright_parts(brightest: np.ndarray) -> np.ndarray:
    """What stands out of a dark background; nothing where the picture is flat."""
    low, high = np.percentile(brightest, [5, 99.5])
    if high - low < 8:
        return np.zeros(brightest.shape, bool)
    log = np.log1p(brightest)
    return log > max(_otsu(log), float(np.log1p(low + 3)))


def _otsu(values: np.ndarray) -> float:
    """Otsu's threshold; 0 for a flat or empty input."""
    from skimage.filters import threshold_otsu

    if values.size == 0 or float(np.ptp(values)) < 1e-6:
        return 0.0
    return float(threshold_otsu(values))


def _cleaned(mask: np.ndarray) -> np.ndarray:
    """Close gaps of a pixel or two, drop dust, fill small holes."""
    from scipy.ndimage import binary_closing, label

    smallest = max(4, round(MIN_PIECE_SHARE * mask.size))
    # Padding before the closing keeps tissue at the picture's edge.
    closed = binary_closing(np.pad(mask, 3), iterations=2)[3:-3, 3:-3] | mask
    for wanted in (True, False):
        pieces, count = label(closed == wanted)
        if count:
            sizes = np.bincount(pieces.ravel())
            small = sizes < smallest
            small[0] = False
            closed[small[pieces]] = not wanted
    return closed
