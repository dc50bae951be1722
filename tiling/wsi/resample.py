"""Area-averaged resampling of a crop with fractional borders."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from scipy.sparse import csr_array


def area_resize(rgb: np.ndarray, box: tuple[float, float, float, float], out_w: int, out_h: int) -> np.ndarray:
    """Average the pixels under each output pixel.

    rgb: uint8 (h, w, 3). box: x0, y0, x1, y1 in pixels of rgb, fractions allowed, inside it. Returns uint8
    (out_h, out_w, 3). Where the output is finer than the input, it is interpolated bilinearly instead.
    """
    rgb, box = _cropped(rgb, box)
    x0, y0, x1, y1 = box
    scale_x, scale_y = (x1 - x0) / out_w, (y1 - y0) / out_h
    whole = all(float(value).is_integer() for value in (*box, scale_x, scale_y))
    if whole and scale_x == scale_y == 1:
        return np.ascontiguousarray(rgb[int(y0) : int(y1), int(x0) : int(x1)])
    if whole or scale_x < 1 or scale_y < 1:
        from PIL import Image

        image = Image.fromarray(rgb)
        if whole:
            corners = (int(x0), int(y0), int(x1), int(y1))
            return np.asarray(image.reduce((int(scale_x), int(scale_y)), box=corners))
        return np.asarray(image.resize((out_w, out_h), Image.Resampling.BILINEAR, box=box))
    return _weighted(rgb, box, out_w, out_h)


def _cropped(rgb: np.ndarray, box: tuple[float, float, float, float]) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """Return the part of a picture that a box needs, and the box in it."""
    left, top = int(box[0]), int(box[1])
    right, bottom = int(np.ceil(box[2])), int(np.ceil(box[3]))
    return rgb[top:bottom, left:right], (box[0] - left, box[1] - top, box[2] - left, box[3] - top)


def _weighted(rgb: np.ndarray, box: tuple[float, float, float, float], out_w: int, out_h: int) -> np.ndarray:
    x0, y0, x1, y1 = box
    height, width = rgb.shape[:2]
    rows = _weights(height, round(y0, 6), round(y1 - y0, 6), out_h, 1)
    columns = _weights(width, round(x0, 6), round(x1 - x0, 6), out_w, 3)
    mixed = rows @ rgb.reshape(height, width * 3).astype(np.float32)
    mixed = columns @ np.ascontiguousarray(mixed.T)  # (out_w * 3, out_h)
    return np.ascontiguousarray((mixed + np.float32(0.5)).clip(0, 255).astype(np.uint8).T).reshape(out_h, out_w, 3)


@lru_cache(maxsize=64)
def _weights(length: int, start: float, extent: float, count: int, channels: int) -> csr_array:
    """Compute sparse float32 (count * channels, length * channels) for a line of pixels with their channels side by side.

    Output i averages [start + i * step, start + (i + 1) * step] of the line, each channel by itself.
    """
    from scipy.sparse import csr_array

    edges = start + extent / count * np.arange(count + 1)
    low, high = edges[:-1], edges[1:]
    first = np.floor(low).astype(int)
    reach = int(np.max(np.ceil(high).astype(int) - first))
    pixel = first[:, None] + np.arange(reach)
    coverage = np.minimum(high[:, None], pixel + 1) - np.maximum(low[:, None], pixel)
    coverage = np.clip(coverage, 0, None) * (pixel < length)
    coverage /= coverage.sum(axis=1, keepdims=True)
    row = np.repeat(np.arange(count), reach)
    used = coverage.ravel() > 1e-9
    channel = np.arange(channels)
    at = [(index[:, None] * channels + channel).ravel() for index in (row[used], pixel.ravel()[used])]
    share = np.repeat(coverage.ravel()[used].astype(np.float32), channels)
    return csr_array((share, (at[0], at[1])), shape=(count * channels, length * channels))
