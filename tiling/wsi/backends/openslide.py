"""The OpenSlide backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tiling.wsi.backends.base import GREY, background_of, probed
from tiling.wsi.backends.tiff_pages import (
    UNSPECIFIED,
    SparseTiles,
    colours_of,
    extras_of,
    main_page,
    not_shown,
    orientation_of,
    pages_of,
    size_of,
    sparse_tiles_of,
)

CACHE_BYTES = 192 << 20  # decoded tiles OpenSlide keeps: some tile rows of a wide slide, so that none is decoded twice


class OpenSlideReader:
    """All formats of OpenSlide, DICOM included."""

    name = "openslide"
    scales: tuple[int, ...] = (1,)
    threadsafe = True
    orientation = 1

    def __init__(self, path: Path) -> None:
        import openslide

        self._path = path
        self._slide = probed(lambda: openslide.OpenSlide(str(path)), lambda slide, at: slide.read_region(at, 0, (1, 1)))
        self.properties: Mapping[str, Any] = dict(self._slide.properties)
        self.vendor = self.properties.get("openslide.vendor", "")
        self.tags_only = self.vendor == "generic-tiff"
        self.level_dimensions: tuple[tuple[int, int], ...] = tuple(self._slide.level_dimensions)
        self.level_downsamples: tuple[float, ...] = tuple(float(value) for value in self._slide.level_downsamples)
        self.note = not_shown(path, self.level_dimensions) if self.tags_only else ""
        if mistake := _mistake(pages_of(path), self.level_dimensions, is_plain=self.tags_only):
            self._slide.close()
            raise ValueError(mistake)
        self.background = np.array(background_of(self.properties), np.uint8)

    def expect_strips(self) -> None:
        import openslide

        self._slide.set_cache(openslide.OpenSlideCache(CACHE_BYTES))

    def share_cache(self) -> None:
        """Many slides stay open and are read here and there: one cache for all of them in this process."""
        self._slide.set_cache(_common_cache())

    def read(self, level: int, x: int, y: int, w: int, h: int, scale: int = 1) -> np.ndarray:
        """uint8 (h, w, 3); what was not scanned has the slide's background colour."""
        downsample = self.level_downsamples[level]
        image = self._slide.read_region((round(x * downsample), round(y * downsample)), level, (w, h))
        rgb = np.asarray(image.convert("RGB"))
        alpha = image.getchannel("A")
        if alpha.getextrema()[0] == 255:
            return rgb
        share = np.asarray(alpha)[..., None].astype(np.float32) / 255
        return (rgb * share + self.background * (1 - share) + 0.5).astype(np.uint8)

    def sparse_tiles(self, level: int) -> SparseTiles | None:
        """As the pages of a plain TIFF tell; scanners' own formats have rules of their own."""
        fitting = [page for page in pages_of(self._path) if size_of(page) == self.level_dimensions[level]]
        return sparse_tiles_of(fitting[0]) if fitting and self.tags_only else None

    def close(self) -> None:
        self._slide.close()


@lru_cache(maxsize=1)
def _common_cache() -> Any:
    import openslide

    return openslide.OpenSlideCache(CACHE_BYTES // 4)


def _mistake(pages: Sequence[Any], sizes: Sequence[tuple[int, int]], *, is_plain: bool) -> str:
    """Describe what OpenSlide (libtiff in it) would show wrongly of a TIFF's pages; empty where nothing.

    sizes: of its levels. is_plain: the TIFF is of no scanner's own format.
    """
    if is_plain and pages and pages[0] is not main_page(pages):
        return "it would show another page than the largest, or take the resolution of another"
    levels = [page for page in pages if size_of(page) in sizes]
    if turned := [orientation for page in levels if (orientation := orientation_of(page)) != 1]:
        return f"it would leave pages of orientation {turned[0]} as they are stored, or turn each of their tiles in itself"
    for page in (page for page in levels if page.is_tiled):
        colours, samples, extras = colours_of(page), page.samplesperpixel, extras_of(page)
        is_apart = samples > 1 and int(page.planarconfig) != 1
        bits = page.bitspersample * samples
        if colours in GREY and bits > 8 and not is_apart and page.imagewidth % page.tilewidth:
            return f"it would mix up the last column of tiles, as of all grey in pixels of {bits} bits"
        if samples > 3 and extras[:1] == (UNSPECIFIED,) and (colours == "RGB" or (colours in GREY and is_apart)):
            return f"it would take one of {samples} channels for transparency, though the file says nothing of it"
    return ""
