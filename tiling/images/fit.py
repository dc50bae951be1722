"""A whole image as one square tile: centre-cropped or squashed, and the same map for what is drawn on it."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from annotations.errors import UserError
from tiling.images.listing import TIFF_EXTENSIONS
from tiling.jobs.outcome import describe_error
from tiling.wsi import codec
from tiling.wsi.backends.base import MAX_IMAGE_PIXELS, as_rgb
from tiling.wsi.backends.image import _flattened
from tiling.wsi.backends.upright import TURNS, exif_orientation
from tiling.wsi.mpp import Mpp, mpp_of
from tiling.wsi.slide import Slide

Fit = Literal["tiles", "crop", "squash"]
FITS = ("tiles", "crop", "squash")
QUALITY = 95
SPARE = 2  # a JPEG is decoded at no less than this many times the wanted size, so that the rest is a true resampling


@dataclass(frozen=True)
class FitMap:
    """The part of an upright image that becomes the tile: corner x0, y0, width and height in its pixels, not rounded."""

    x0: float
    y0: float
    width: float
    height: float
    size_px: int

    def to_tile(self, xy: np.ndarray) -> np.ndarray:
        """Map positions, float (V, 2), from pixels of the image to pixels of the tile."""
        return (xy - [self.x0, self.y0]) * [self.size_px / self.width, self.size_px / self.height]


@dataclass(frozen=True)
class FittedImage:
    """jpeg: the tile. size: width and height of the upright image. note: what of the file is not shown."""

    jpeg: bytes
    size: tuple[int, int]
    note: str = ""


def unreadable_image(path: Path, error: Exception) -> UserError:
    """Make the error for an image that cannot be read, without Pillow's own name for it."""
    reason = re.sub(rf" (<_io\.BytesIO[^>]*>|{re.escape(repr(str(path)))})", "", describe_error(error))
    return UserError(f"{path}: not a readable image ({reason}): copy it again or leave it out")


def fit_map(size: tuple[int, int], fit: str, size_px: int) -> FitMap:
    """Choose the part of an image of this width and height. crop: the largest centred square; squash: all of it."""
    width, height = size
    if fit == "squash":
        return FitMap(0.0, 0.0, width, height, size_px)
    side = min(width, height)
    return FitMap((width - side) / 2, (height - side) / 2, side, side, size_px)


def read_as_tile(path: Path, fit: str, size_px: int) -> FittedImage:
    """Decode an image, turn it upright, and make it one tile. Raises UserError where it cannot be read.

    A plain, flawless JPEG that has the wanted size keeps its own bytes; others are resampled bicubically with antialiasing and
    encoded at quality 95. Transparency lies on white, grey is repeated, CMYK is converted, 16 bits become 8.
    """
    if path.suffix.lower() in TIFF_EXTENSIONS:
        with Slide.open(path) as slide:
            size = (slide.info.width_l0, slide.info.height_l0)
            part = fit_map(size, fit, size_px)
            rgb = slide.read_region(part.x0, part.y0, part.width, part.height, size_px, size_px)
        return FittedImage(codec.encode_jpeg(rgb, QUALITY), size, slide.info.note)
    try:
        return _fitted(path.read_bytes(), fit, size_px)
    except Exception as error:  # pillow has many
        raise unreadable_image(path, error) from None


def _fitted(data: bytes, fit: str, size_px: int) -> FittedImage:
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = MAX_IMAGE_PIXELS
    with Image.open(io.BytesIO(data)) as image:
        stored = image.size
        orientation = exif_orientation(image)
        plain = image.format == "JPEG" and image.mode in ("RGB", "L")
        part = fit_map(stored, fit, size_px)  # centred, so that turning the tile is turning the image
        rgb, shrunk = _decoded_jpeg(data, part, stored) if plain else (None, 1)
        plain = rgb is not None
        if rgb is None:
            rgb = as_rgb(np.asarray(_flattened(image)))
    if plain and orientation == 1 and stored == (size_px, size_px):
        return FittedImage(data, stored)
    box = (part.x0 / shrunk, part.y0 / shrunk, (part.x0 + part.width) / shrunk, (part.y0 + part.height) / shrunk)
    tile = Image.fromarray(rgb).resize((size_px, size_px), Image.Resampling.BICUBIC, box=box)
    turned = np.ascontiguousarray(TURNS[orientation].array(np.asarray(tile)))
    return FittedImage(codec.encode_jpeg(turned, QUALITY), TURNS[orientation].size(*stored))


def _decoded_jpeg(data: bytes, part: FitMap, stored: tuple[int, int]) -> tuple[np.ndarray | None, int]:
    """Decode a JPEG at 1/1, 1/2, 1/4 or 1/8 of its size, whichever leaves SPARE times the tile.

    None where it is not flawless: pillow then decides whether it can be read at all.
    """
    import simplejpeg

    limit = min(part.width, part.height) / (SPARE * part.size_px)
    shrunk = max(step for step in (1, 2, 4, 8) if step == 1 or step <= limit)
    width, height = (-(-side // shrunk) for side in stored)
    try:
        rgb = simplejpeg.decode_jpeg(data, colorspace="RGB", min_width=width, min_height=height, min_factor=shrunk)
    except ValueError:
        return None, 1
    return (rgb, shrunk) if rgb.shape[:2] == (height, width) else (None, 1)


def plain_jpeg(path: Path) -> bytes | None:
    """Read the bytes of a JPEG in colour or grey that stands upright; None for other formats and colour spaces."""
    from PIL import Image

    if path.suffix.lower() in TIFF_EXTENSIONS:  # which Pillow does not always read
        return None
    with Image.open(path) as image:
        plain = image.format == "JPEG" and image.mode in ("RGB", "L") and exif_orientation(image) == 1
    return path.read_bytes() if plain else None


def probe_image(path: Path) -> tuple[tuple[int, int], Mpp]:
    """Read width, height and mpp of an image from its header, upright. Raises UserError where it cannot be read."""
    from PIL import Image

    if path.suffix.lower() in TIFF_EXTENSIONS:
        with Slide.open(path) as slide:
            return (slide.info.width_l0, slide.info.height_l0), slide.info.stated_mpp
    Image.MAX_IMAGE_PIXELS = MAX_IMAGE_PIXELS
    try:
        with Image.open(path) as image:
            size, dpi = TURNS[exif_orientation(image)].size(*image.size), image.info.get("dpi")
    except Exception as error:  # pillow has many
        raise unreadable_image(path, error) from None
    tags = {"tiff.ResolutionUnit": "inch", "tiff.XResolution": dpi[0], "tiff.YResolution": dpi[1]} if dpi else {}
    return size, mpp_of(tags, tags_only=True)
