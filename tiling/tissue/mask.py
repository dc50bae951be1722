"""Find tissue on a thumbnail; outlines of a mask, and a mask of outlines."""

from __future__ import annotations

from typing import Any

import numpy as np

from annotations.errors import UserError
from tiling.tissue.quality import pen_mask

DARK_BACKGROUND = 60.0  # brightest channel below this on most of a picture: fluorescence, or a scan with black padding
BLACK = 30.0  # brightest channel below this on a bright slide: padding, not tissue
TOO_DARK = 16.0  # an overview no brighter than this: 16-bit pixels that use few of their bits; 12 of them reach 15
BLACK_OVERVIEW = (
    f"its overview is black, nothing in it brighter than {TOO_DARK:.0f} of 255: if it holds 16-bit pixels of which few bits "
    "are used, export it with 8 bits a channel (contrast stretched)"
)
WHITE = 253.0  # all channels at least this: not scanned, or glass in full light
WHITE_AT_LEAST = 200.0  # the glass of a bright slide without plain glass in sight is not darker than this
GLASS_AT_LEAST, GLASS_SPAN, GLASS_STEP = 120.0, 22.0, 4.0  # glass is bright, grey (channels that close) and even
GLASS_SHARE = 0.01  # of the picture, for its colour to be believed
PALE = 32.0  # grey levels below the glass beyond which tissue is tissue, however much darker it gets
CONTRAST_RANGE = (7.0, 24.0)  # grey levels below the glass between which the threshold is looked for
GREY_SHARE = 0.7  # of a fall that all channels share does not count: dust, shadows and coverslips fall evenly, stains do not
CELL_GAP_UM = 8.0  # between nuclei of a tissue that glow
SMOOTH_SIGMA_PX = 1.5
PEN_EDGE_PX = 3  # ink runs out into pixels that look like pale tissue
FINER = 4  # rasterising: subdivisions of a pixel
MIN_PIECE_SHARE = 1e-4  # of the thumbnail's area: smaller pieces are dust, smaller holes belong to the tissue


def tissue_mask(thumb_rgb: np.ndarray, um_per_px: float | None = None, pen: np.ndarray | None = None) -> np.ndarray:
    """Find the tissue of an overview: uint8 (h, w, 3) -> bool (h, w).

    On bright slides tissue is what absorbs: how far it falls below the colour of the glass, cut by Otsu inside a fixed range
    after all strong absorption is counted alike, so that dark tissue does not hide pale tissue, and neither a blank slide
    nor one full of tissue is split in two. pen: bool (h, w) of ink to leave out, looked for when None. On dark
    (fluorescence) slides tissue is what is brighter than the background. um_per_px: micrometres per pixel of the overview
    where known. Dust is removed and small holes are filled.
    """
    from PIL import Image, ImageFilter
    from scipy.ndimage import binary_dilation, gaussian_filter

    image = _planes(np.asarray(Image.fromarray(thumb_rgb).filter(ImageFilter.GaussianBlur(SMOOTH_SIGMA_PX))))
    brightest = image.max(axis=0)
    if is_dark(thumb_rgb):
        gap_px = 0.0 if um_per_px is None else min(CELL_GAP_UM / um_per_px, 8.0)
        return _cleaned(_bright_parts(gaussian_filter(brightest, gap_px) if gap_px else brightest))
    if pen is None:
        pen = pen_mask(thumb_rgb, um_per_px)
    if pen.any():
        pen = binary_dilation(pen, iterations=PEN_EDGE_PX)
    padding = brightest < BLACK
    glass, spread = _glass(image, brightest)
    below = np.clip(glass[:, None, None] - image, 0, 255)
    fall = below.max(axis=0) - GREY_SHARE * below.min(axis=0)
    usable = ~padding & ~pen
    lowest = min(max(CONTRAST_RANGE[0], 4 * spread), CONTRAST_RANGE[1])
    threshold = float(np.clip(otsu(np.minimum(fall[usable], PALE)), lowest, CONTRAST_RANGE[1]))
    return np.asarray(_cleaned((fall > threshold) & usable) & ~pen)


def is_dark(thumb_rgb: np.ndarray) -> bool:
    """Tell whether uint8 (h, w, 3) shows light on a dark ground (fluorescence) and not glass, also in black padding."""
    image = _planes(thumb_rgb)
    brightest = image.max(axis=0)
    if np.median(brightest) >= DARK_BACKGROUND:
        return False
    darkest = image.min(axis=0)
    glass = (darkest >= WHITE_AT_LEAST) & (brightest - darkest <= GLASS_SPAN)
    # Glass fills a good part of what is not padding; light seldom saturates in all channels.
    return int(glass.sum()) < 0.2 * max(1, int((brightest >= DARK_BACKGROUND).sum()))


def is_black(thumb_rgb: np.ndarray) -> bool:
    """Tell whether an overview is black throughout."""
    return bool((thumb_rgb > TOO_DARK).any(axis=2).mean() < 1e-3)


def check_brightness(thumb_rgb: np.ndarray) -> None:
    """Raise UserError (without a file name) where an overview is black."""
    if is_black(thumb_rgb):
        raise UserError(f"{BLACK_OVERVIEW}; --tissue none tiles it as it is")


def _glass(image: np.ndarray, brightest: np.ndarray) -> tuple[np.ndarray, float]:
    """Estimate the colour of the glass, float32 (3,), and its sigma in grey levels, from smoothed planes (3, h, w).

    Glass is even, nearly grey, and the brightest such thing in the picture; pure white may be glass or not scanned, and
    counts only where nothing else does.
    """
    from scipy.ndimage import maximum_filter, minimum_filter

    even = maximum_filter(brightest, 3) - minimum_filter(brightest, 3) <= GLASS_STEP
    darkest = image.min(axis=0)
    plain = even & (brightest >= GLASS_AT_LEAST) & (brightest - darkest <= GLASS_SPAN)
    white = darkest >= WHITE
    glassy = plain & ~white
    if glassy.sum() >= GLASS_SHARE * glassy.size:
        counts, edges = np.histogram(brightest[glassy], bins=np.arange(GLASS_AT_LEAST, 260, 3))
        counts = np.convolve(counts, (1, 1, 1), mode="same")
        peak = edges[np.flatnonzero(counts >= 0.3 * counts.max())[-1]]
        peaks = glassy & (np.abs(brightest - peak - 1.5) <= 6)
        colours = image[:, peaks]
        glass = np.median(colours, axis=1)
        brighter = (brightest > glass.max() + 12) & ~white
        if peaks.sum() >= GLASS_SHARE * glassy.size and brighter.mean() <= 0.02:
            return glass, 1.48 * float(np.median(np.abs(colours - glass[:, None])))
    if (plain & white).sum() >= GLASS_SHARE * glassy.size:
        return np.full(3, 255, np.float32), 0.0
    return np.clip(np.percentile(image.reshape(3, -1), 95, axis=1), WHITE_AT_LEAST, 255), 0.0


def _planes(rgb: np.ndarray) -> np.ndarray:
    """Turn uint8 (h, w, 3) into float32 (3, h, w), which numpy reduces many times faster."""
    return np.ascontiguousarray(rgb.transpose(2, 0, 1), dtype=np.float32)


def tissue_outlines(mask: np.ndarray, downsample: float) -> list[Any]:
    """Outline a mask, bool (h, w): shapely polygons in level-0 pixels that cover exactly its pixels, largest first."""
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
    """Draw polygons in level-0 pixels on a mask, bool (h, w), with `downsample` level-0 pixels per pixel; holes stay holes.

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
    """Mask the parts that stand out of a dark background; none where the picture is flat."""
    low, high = np.percentile(brightest, [5, 99.5])
    if high - low < 8:
        return np.zeros(brightest.shape, bool)
    log = np.log1p(brightest)
    return np.asarray(log > max(otsu(log), float(np.log1p(low + 3))))


def otsu(values: np.ndarray) -> float:
    """Compute Otsu's threshold; 0 for a flat or empty input."""
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
    return np.asarray(closed)
