"""Decode the pixels of a label image: whole numbers, from grey, 1-bit, palette and grey-in-colour PNG and TIFF."""

from __future__ import annotations

import io
import logging
import struct
from typing import Any

import numpy as np

from annotations.errors import UserError, one_line
from annotations.readers.detect import PNG

MAX_PIXELS = 1 << 29  # a slide of 100,000 x 80,000 at a quarter of its resolution; tracing takes some 15 bytes a pixel
ALWAYS_FINE = 1 << 26  # pixels below which nothing is suspicious
MAX_RATIO = 20_000  # pixels a byte of the file: nothing packs an image that far, damage and bombs claim to
REMEDY = "save one channel of whole numbers, 0 for background"
ORIENTATION = 274  # TIFF tag
_GREY, _PALETTE = 0, 3  # colour types of PNG


def decode_label_image(data: bytes, source: str) -> np.ndarray:
    """Decode an image of whole numbers, (height, width). Raises UserError for any other.

    1-bit images are 0 and 1; a palette image is its indices, colours of equal channels are their grey.
    """
    try:
        image = _png(data, source) if data.startswith(PNG) else _tiff(data, source)
    except UserError:
        raise
    except Exception as error:  # the decoders raise whatever comes to them
        raise UserError(f"{source}: not a readable image: {one_line(error)[:200]}: save the mask again") from None
    image = _one_channel(np.squeeze(image), source)
    if image.ndim != 2 or image.dtype.kind not in "iub":
        what = f"{' x '.join(map(str, image.shape))} of {image.dtype}"
        raise UserError(f"{source}: {what} is no label image: {REMEDY}")
    return image.astype(np.uint8) if image.dtype.kind == "b" else image


def _png(data: bytes, source: str) -> np.ndarray:
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    _refuse_size(width * height, len(data), source)
    if colour == _PALETTE:
        return _png_indices(data)
    import imagecodecs

    image = imagecodecs.png_decode(data)
    if colour == _GREY and depth < 8:  # decoders stretch 0..1, 0..3 and 0..15 to 0..255
        image = image // (255 // ((1 << depth) - 1))
    return image


def _png_indices(data: bytes) -> np.ndarray:
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    with Image.open(io.BytesIO(data)) as picture:
        palette = np.array(picture.getpalette("RGB"), dtype=np.uint8).reshape(-1, 3)
        return _upright_palette(np.asarray(picture), palette)


def _tiff(data: bytes, source: str) -> np.ndarray:
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it says of a damaged file, we say in a line
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        series: Any = file.series[0]
        _refuse_size(int(np.prod(series.shape[-3:], dtype=float)), len(data), source)
        page = series.keyframe
        if page.tags.valueof(ORIENTATION, 1) in range(2, 9):
            raise UserError(f"{source}: is stored turned (its tag Orientation is not 1): save the mask upright")
        image = series.asarray()
        # Whether white is 0 (photometric) does not matter: tifffile and ImageJ store masks so, and mean the numbers.
        if page.photometric == tifffile.PHOTOMETRIC.PALETTE and page.colormap is not None:
            image = _upright_palette(image, (page.colormap.T >> 8).astype(np.uint8))
        return np.moveaxis(image, series.axes.index("S"), -1) if "S" in series.axes else image


def _upright_palette(image: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Return indices (h, w); the greys behind them where all are grey and black is not 0, as after an image was repacked."""
    used = np.unique(image)
    colours = palette[used]
    black = used[~colours.any(axis=1)]
    if (colours == colours[:, :1]).all() and len(black) and 0 not in black:
        return np.asarray(palette[image, 0])
    return image


def _one_channel(image: np.ndarray, source: str) -> np.ndarray:
    """Reduce (h, w, channels) whose colour channels are equal and which is opaque to (h, w); any other stays."""
    if image.ndim != 3 or image.shape[2] not in (2, 3, 4):
        return image
    colours = image[..., : image.shape[2] - (image.shape[2] in (2, 4))]
    if not (colours == colours[..., :1]).all():
        return image
    if colours.shape[2] < image.shape[2] and not (image[..., -1] == image[0, 0, -1]).all():
        raise UserError(f"{source}: is transparent in parts, which may be its mask or its background: {REMEDY}")
    return np.ascontiguousarray(colours[..., 0])


def _refuse_size(pixels: int, size: int, source: str) -> None:
    if not pixels > 0 or pixels > max(ALWAYS_FINE, MAX_RATIO * size):
        raise UserError(f"{source}: says it has {pixels} pixels in {size} bytes: damaged: save the mask again")
    if pixels > MAX_PIXELS:
        raise UserError(f"{source}: {pixels / 1e6:.0f} megapixels, {MAX_PIXELS / 1e6:.0f} at most: save it reduced")
