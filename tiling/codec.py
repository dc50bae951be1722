"""Encoded tiles: JPEG through libjpeg-turbo, PNG through pillow."""

from __future__ import annotations

import io
from typing import Literal

import numpy as np

PNG_MAGIC = b"\x89PNG"
JPEG_MAGIC = b"\xff\xd8"


def encode_jpeg(rgb: np.ndarray, quality: int = 90) -> bytes:
    """uint8 (h, w, 3) -> JPEG bytes, colour at full resolution (4:4:4), so that stains keep their edges."""
    import simplejpeg

    return simplejpeg.encode_jpeg(np.ascontiguousarray(rgb), quality=quality, colorspace="RGB", colorsubsampling="444")


def encode_png(rgb: np.ndarray) -> bytes:
    """uint8 (h, w, 3) -> PNG bytes."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, format="PNG", compress_level=3)
    return buffer.getvalue()


def encoding_of(data: bytes) -> Literal["jpeg", "png", "other"]:
    """What the first bytes say."""
    if data[:4] == PNG_MAGIC:
        return "png"
    return "jpeg" if data[:2] == JPEG_MAGIC else "other"


def decode(data: bytes) -> np.ndarray:
    """JPEG or PNG (or whatever else pillow reads) -> uint8 (h, w, 3). Raises ValueError where it is none of them."""
    if encoding_of(data) == "jpeg":
        import simplejpeg

        try:
            return simplejpeg.decode_jpeg(data, colorspace="RGB")
        except ValueError:
            pass  # CMYK and other rare JPEGs: pillow reads them
    from PIL import Image, UnidentifiedImageError

    try:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"not a readable image: {error}") from None
