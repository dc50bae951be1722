"""The protocol of a slide backend, and what all backends share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from tiling.wsi.backends.tiff_pages import SparseTiles

PROBES = (0.5, 0.0, 0.3, 0.8)  # of a slide's width and height
MAX_IMAGE_PIXELS = 1_000_000_000
DEPTHS_READ = "8 and 16 bits unsigned are read, so convert it to 8 bits"


class Reader(Protocol):
    """The protocol of a backend, as tiling.wsi.slide uses it.

    Regions are in pixels of their level, divided by scale, and lie inside it. scales: what a level may be divided by while
    it is decoded. threadsafe: whether `read` may run in several threads. orientation: 1 where what it reads stands upright.
    """

    name: str
    vendor: str
    level_dimensions: tuple[tuple[int, int], ...]
    level_downsamples: tuple[float, ...]
    properties: Mapping[str, Any]
    tags_only: bool  # its mpp, if any, comes from bare resolution tags
    scales: tuple[int, ...]
    threadsafe: bool
    orientation: int
    note: str  # what of the file is not shown

    def read(self, level: int, x: int, y: int, w: int, h: int, scale: int = 1) -> np.ndarray: ...

    def expect_strips(self) -> None: ...  # the whole slide will be read row by row

    def sparse_tiles(self, level: int) -> SparseTiles | None: ...  # what of a level was not scanned, where that is known

    def close(self) -> None: ...


def background_of(properties: Mapping[str, Any]) -> tuple[int, int, int]:
    """The colour of what was not scanned: white where a file does not say."""
    colour = str(properties.get("openslide.background-color") or "FFFFFF")
    return int(colour[0:2], 16), int(colour[2:4], 16), int(colour[4:6], 16)


def as_rgb(array: np.ndarray) -> np.ndarray:
    """(h, w) or (h, w, channels), 8 or 16 bits -> uint8 (h, w, 3). Grey is repeated, as is the first of 2 or more than 3.

    Raises ValueError for other pixels.
    """
    if array.ndim == 2:
        array = array[..., None]
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:  # of either byte order
        array = (array >> 8).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(f"its pixels are of type {array.dtype}: {DEPTHS_READ}")
    if array.shape[2] != 3:
        array = np.repeat(array[..., :1], 3, axis=2)
    return np.ascontiguousarray(array)


def probed(opened: Callable[[], Any], read: Callable[[Any, tuple[int, int]], Any]) -> Any:
    """A slide that gives pixels: some open well and cannot be decoded, some are torn in one place only.

    opened: opens it, once more after each failure, since OpenSlide refuses all work after an error. read: one pixel of it, at
    x, y of level 0. Raises what the library says where none of several places can be read.
    """
    for number, part in enumerate(PROBES, 1):
        slide = opened()
        width, height = slide.dimensions
        try:
            read(slide, (int(width * part), int(height * part)))
            return slide
        except Exception:
            slide.close()
            if number == len(PROBES):
                raise
    raise AssertionError
