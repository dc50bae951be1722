"""The libraries that decode slides, behind one small surface: OpenSlide, tiffslide, and plain images in memory."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

CACHE_BYTES = 256 << 20  # decoded tiles OpenSlide keeps: some tile rows of a wide slide, so that none is decoded twice
MAX_IMAGE_PIXELS = 1_000_000_000


class Reader(Protocol):
    """What tiling.slide needs from a library. Regions are in pixels of their level and lie inside it."""

    name: str
    vendor: str
    level_dimensions: tuple[tuple[int, int], ...]
    level_downsamples: tuple[float, ...]
    properties: Mapping[str, Any]
    tags_only: bool  # its mpp, if any, comes from bare resolution tags

    def read(self, level: int, x: int, y: int, w: int, h: int) -> np.ndarray: ...

    def expect_strips(self) -> None: ...  # the whole slide will be read row by row

    def close(self) -> None: ...


class OpenSlideReader:
    """All formats of OpenSlide, DICOM included."""

    name = "openslide"

    def __init__(self, path: Path) -> None:
        import openslide

        self._slide = openslide.OpenSlide(str(path))
        self.properties: Mapping[str, Any] = dict(self._slide.properties)
        self.vendor = self.properties.get("openslide.vendor", "")
        self.tags_only = self.vendor == "generic-tiff"
        self.level_dimensions: tuple[tuple[int, int], ...] = tuple(self._slide.level_dimensions)
        self.level_downsamples: tuple[float, ...] = tuple(float(value) for value in self._slide.level_downsamples)
        colour = self.properties.get("openslide.background-color", "FFFFFF")
        self.background = np.array([int(colour[i : i + 2], 16) for i in (0, 2, 4)], dtype=np.uint8)

    def expect_strips(self) -> None:
        import openslide

        self._slide.set_cache(openslide.OpenSlideCache(CACHE_BYTES))

    def read(self, level: int, x: int, y: int, w: int, h: int) -> np.ndarray:
        """uint8 (h, w, 3); what was not scanned has the slide's background colour."""
        downsample = self.level_downsamples[level]
        image = self._slide.read_region((round(x * downsample), round(y * downsample)), level, (w, h))
        rgb = np.asarray(image.convert("RGB"))
        alpha = image.getchannel("A")
        if alpha.getextrema()[0] == 255:
            return rgb
        share = np.asarray(alpha)[..., None].astype(np.float32) / 255
        return (rgb * share + self.background * (1 - share) + 0.5).astype(np.uint8)

    def close(self) -> None:
        self._slide.close()


class TiffSlideReader:
    """TIFFs that OpenSlide leaves: not tiled, OME with sub-resolutions, odd compressions."""

    name = "tiffslide"

    def __init__(self, path: Path) -> None:
        import tiffslide

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._slide = tiffslide.TiffSlide(str(path))
            self.properties: Mapping[str, Any] = {str(key): value for key, value in self._slide.properties.items()}
        self.vendor = str(self.properties.get("tiffslide.vendor") or "")
        self.tags_only = self.vendor in ("", "generic-tiff")
        self.level_dimensions: tuple[tuple[int, int], ...] = tuple((int(w), int(h)) for w, h in self._slide.level_dimensions)
        self.level_downsamples: tuple[float, ...] = tuple(float(value) for value in self._slide.level_downsamples)
        self.read(0, 0, 0, 1, 1)  # pages that open and cannot be decoded are found out here

    def expect_strips(self) -> None:
        """Nothing to prepare."""

    def read(self, level: int, x: int, y: int, w: int, h: int) -> np.ndarray:
        """uint8 (h, w, 3)"""
        downsample = self.level_downsamples[level]
        at = (round(x * downsample), round(y * downsample))
        return as_rgb(np.asarray(self._slide.read_region(at, level, (w, h), as_array=True)))

    def close(self) -> None:
        self._slide.close()


class ImageReader:
    """A PNG, JPEG or TIFF held in memory as one level."""

    name = "image"

    def __init__(self, path: Path) -> None:
        from PIL import Image

        Image.MAX_IMAGE_PIXELS = MAX_IMAGE_PIXELS
        self.properties: Mapping[str, Any] = {}
        with Image.open(path) as image:
            self.vendor = str(image.format or "image").lower()
            resolution = image.info.get("dpi")
            if resolution:
                x, y = resolution
                self.properties = {"tiff.ResolutionUnit": "inch", "tiff.XResolution": x, "tiff.YResolution": y}
            self._rgb = as_rgb(np.asarray(_flattened(image)))
        self.tags_only = True  # of the dpi an image editor may have written
        self.level_dimensions: tuple[tuple[int, int], ...] = ((self._rgb.shape[1], self._rgb.shape[0]),)
        self.level_downsamples: tuple[float, ...] = (1.0,)

    def expect_strips(self) -> None:
        """Nothing to prepare."""

    def read(self, level: int, x: int, y: int, w: int, h: int) -> np.ndarray:
        """uint8 (h, w, 3)"""
        return self._rgb[y : y + h, x : x + w]

    def close(self) -> None:
        self._rgb = np.zeros((0, 0, 3), np.uint8)


def _flattened(image: Any) -> Any:
    """An image without transparency (composited on white) and without a palette."""
    from PIL import Image

    if image.mode in ("I;16", "I;16B", "I;16L", "L", "RGB"):
        return image
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def as_rgb(array: np.ndarray) -> np.ndarray:
    """(h, w), (h, w, 1), (h, w, 3) or more channels, 8 or 16 bits -> uint8 (h, w, 3). Grey is repeated."""
    if array.ndim == 2:
        array = array[..., None]
    if array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(f"pixels of type {array.dtype}: only 8 and 16 bits unsigned are read")
    if array.shape[2] < 3:
        array = np.repeat(array[..., :1], 3, axis=2)
    return np.ascontiguousarray(array[..., :3])


READERS: tuple[type[OpenSlideReader] | type[TiffSlideReader] | type[ImageReader], ...] = (
    OpenSlideReader,
    TiffSlideReader,
    ImageReader,
)
