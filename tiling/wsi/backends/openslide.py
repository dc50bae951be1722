"""The OpenSlide backend."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tiling.wsi.backends.base import background_of, probed
from tiling.wsi.backends.tiff_pages import SparseTiles, not_shown, pages_of, size_of, sparse_tiles_of
from tiling.wsi.backends.tiff_rules import openslide_refusal

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
        if refusal := openslide_refusal(pages_of(path), self.level_dimensions, is_plain=self.tags_only):
            self._slide.close()
            raise ValueError(refusal)
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
