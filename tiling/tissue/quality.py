"""Quality of pictures: pen ink on a thumbnail, blur of a tile."""

from __future__ import annotations

import numpy as np

# Ink, in shares of a pixel's brightest channel. Stains keep below: haematoxylin takes as much red as green, eosin is red.
GREENISH = (0.30, 0.16)  # green above red (and blue not below it by much): sure, and next to what is sure
BLUISH = (0.50, 0.40)  # blue above green, and green not below red
LEAST_SPAN = 30.0  # grey levels between the brightest and the darkest channel of coloured ink
BLACK_BELOW = (75.0, 95.0)  # brightest channel of black ink, sure and next to it
BLACK_SPAN = 26.0  # and its channels lie no further apart
NO_SCAN = 10.0  # brightest channel of what was not scanned
COLOURED_WIDTH_UM, BLACK_WIDTH_UM = 40.0, 90.0  # strokes are wider than that; nuclei, folds and pigment are not
LEAST_WIDTH_PX = 3.0

MEAN_PX = 9  # pixels of the running mean that blurs once more
LINE_STEP = 32  # pixels between the rows of a tile that are looked at for blur
STRIPS, STRIP_PX = 4, 2  # and the columns: so many strips, so wide
LEAST_CHANGE = 2.0  # grey levels over 9 pixels on average: below, a tile has no structure to judge


def pen_mask(thumb_rgb: np.ndarray, um_per_px: float | None = None) -> np.ndarray:
    """Find green, blue and black ink: uint8 (h, w, 3) overview of a bright slide -> bool (h, w).

    um_per_px: micrometres per pixel of the overview, for the least width of a stroke; a width of 3 pixels where it is not
    known. Red ink has the colours of blood and eosin and is not looked for.
    """
    from PIL import Image, ImageFilter

    image = np.asarray(Image.fromarray(thumb_rgb).filter(ImageFilter.BoxBlur(1)), dtype=np.float32)
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    brightest = np.maximum(np.maximum(red, green), blue)
    span = brightest - np.minimum(np.minimum(red, green), blue)
    scale = np.maximum(brightest, 1.0)
    greenish = np.minimum(green - red, 2 * (green - 0.75 * blue)) / scale
    bluish = np.where(green >= red, blue - green, 0) / scale  # dense haematoxylin takes more green than red
    ink = np.zeros(brightest.shape, bool)
    coloured = span >= LEAST_SPAN
    for value, (sure, near) in ((greenish, GREENISH), (bluish, BLUISH)):
        ink |= _strokes(coloured & (value >= sure), coloured & (value >= near), COLOURED_WIDTH_UM, um_per_px)
    grey = (span <= BLACK_SPAN) & (brightest > NO_SCAN)
    black, blackish = (grey & (brightest < limit) for limit in BLACK_BELOW)
    return np.asarray(ink | _strokes(black, blackish, BLACK_WIDTH_UM, um_per_px))


def blur_score(tile_rgb: np.ndarray) -> float:
    """Score the blur of a tile, uint8 (h, w, 3): 0 (sharp) to 1 (blurred), NaN where it is too plain to tell.

    How little a tile changes when it is blurred once more: the share of the differences between neighbours that outlives a
    running mean of 9 pixels, in its blurrier direction (Crete et al., The blur effect, 2007). Only some rows and columns are
    looked at.
    """
    height, width = tile_rgb.shape[:2]
    if min(height, width) < 2 * MEAN_PX:
        return float("nan")
    flat = tile_rgb.reshape(height, 3 * width)  # the next pixel's value of a channel lies three further on
    rows = flat[LINE_STEP // 2 :: LINE_STEP].astype(np.int16)
    columns = flat[:, : width // STRIPS * STRIPS * 3].reshape(height, STRIPS, -1)[:, :, : 3 * STRIP_PX].astype(np.int16)
    columns = columns.reshape(height, -1)
    across, down = rows.shape[0] * (rows.shape[1] - 3 * MEAN_PX), (height - MEAN_PX) * columns.shape[1]
    n = across + down
    # Changes, ends and the smaller of both, across and down, in one array: calls cost more than sums of this size.
    table = np.empty(3 * n, np.int16)
    for lines, axis, at, count in ((rows, 1, 0, across), (columns, 0, across, down)):
        step = 3 if axis else 1
        margin, length = MEAN_PX // 2 * step, lines.shape[axis] - MEAN_PX * step
        shape = (-1, length) if axis else (length, -1)
        change, ends = (table[start : start + count].reshape(shape) for start in (at, n + at))
        first, second, near, far = (
            lines[:, start : start + length] if axis else lines[start : start + length]
            for start in (margin, margin + step, 0, MEAN_PX * step)
        )
        np.subtract(second, first, out=change)
        np.subtract(far, near, out=ends)  # the running mean's own change, times its width
    np.abs(table[: 2 * n], out=table[: 2 * n])
    table[:n] *= MEAN_PX
    np.minimum(table[:n], table[n : 2 * n], out=table[2 * n :])
    sums = np.add.reduceat(table, [0, across, n, n + across, 2 * n, 2 * n + across], dtype=np.int32).reshape(3, 2).tolist()
    scores = [
        outlived / max(1, changes)
        for changes, ends, outlived, count in zip(*sums, (across, down), strict=True)
        if ends >= LEAST_CHANGE * count
    ]
    # A flat direction says nothing of focus; two of them leave nothing to judge.
    return max(scores, default=float("nan"))


def _strokes(sure: np.ndarray, near: np.ndarray, width_um: float, um_per_px: float | None) -> np.ndarray:
    """Keep the pieces of `near` that hold a pixel of `sure` and are somewhere as wide as a stroke."""
    if not sure.any():
        return sure
    from scipy.ndimage import distance_transform_edt, label

    pieces, count = label(near | sure)
    width_px = LEAST_WIDTH_PX if um_per_px is None else max(LEAST_WIDTH_PX, width_um / um_per_px)
    # Only pieces with a sure pixel are worth measuring.
    kept = np.zeros(count + 1, bool)
    kept[np.unique(pieces[sure])] = True
    kept[0] = False
    held = kept[pieces]
    wide = distance_transform_edt(held) >= width_px / 2
    kept[:] = False
    kept[np.unique(pieces[wide & held])] = True
    return np.asarray(kept[pieces])
