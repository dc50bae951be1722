"""Area-averaged resampling of a crop with fractional borders."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


def area_resize(rgb: np.ndarray, box: tuple[float, float, float, float], out_w: int, out_h: int) -> np.ndarray:
    """Average the pixels under each output pixel.

    rgb: uint8 (h, w, 3). box: x0, y0, x1, y1 in pixels of rgb, fractions allowed, inside it. Returns uint8
    (out_h, out_w, 3). Where the output is finer than the input, it is interpolated bilinearly instead.
    """
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


def _weighted(rgb: np.ndarray, box: tuple[float, float, float, float], out_w: int, out_h: int) -> np.ndarray:
    x0, y0, x1, y1 = box
    left, top = int(x0), int(y0)
    crop = rgb[top : int(np.ceil(y1)), left : int(np.ceil(x1))]
    height, width = crop.shape[:2]
    rows = _weights(height, round(y0 - top, 6), round(y1 - y0, 6), out_h)
    columns = _weights(width, round(x0 - left, 6), round(x1 - x0, 6), out_w)
    mixed = rows @ crop.reshape(height, width * 3).astype(np.float32)
    mixed = mixed.reshape(out_h, width, 3).transpose(1, 0, 2).reshape(width, out_h * 3)
    mixed = (columns @ np.ascontiguousarray(mixed)).reshape(out_w, out_h, 3).transpose(1, 0, 2)
    return np.ascontiguousarray((mixed + 0.5).clip(0, 255).astype(np.uint8))


@lru_cache(maxsize=64)
def _weights(length: int, start: float, extent: float, count: int):  # type: ignore[no-untyped-def]
    """Sparse float32 (count, length): row i averages [start + i * step, start + (i + 1) * step] of a line of pixels."""
    from scipy.sparse import csr_array

    edges = start + extent / count * np.arange(count + 1)
    low, high = edges[:-1], edges[1:]
    first = np.floor(low).astype(int)
    reach = int(np.max(np.ceil(high).astype(int) - first))
    pixel = first[:, None] + np.arange(reach)
    cover = np.minimum(high[:, None], pixel + 1) - np.maximum(low[:, None], pixel)
    cover = np.clip(cover, 0, None) * (pixel < length)
    cover /= cover.sum(axis=1, keepdims=True)
    row = np.repeat(np.arange(count), reach)
    used = cover.ravel() > 1e-9
    triples = (cover.ravel()[used].astype(np.float32), (row[used], pixel.ravel()[used]))
    return csr_array(triples, shape=(count, length))
