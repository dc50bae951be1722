"""The reader of what OpenSlide leaves: tiffslide, made to show the right pages of a TIFF."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tiling.storage.paths import url_of
from tiling.wsi.backends.base import as_rgb, probed
from tiling.wsi.backends.tiff_pages import (
    MASK,
    SparseTiles,
    all_pages,
    colours_of,
    is_reduction,
    joined,
    main_page,
    orientation_of,
    planes,
    size_of,
    skipped_pages,
    sparse_tiles_of,
)
from tiling.wsi.backends.tiff_rules import tiffslide_refusal
from tiling.wsi.mpp import pixels_of

TIFFS_OF_SCANNERS = ("svs", "scn", "bif", "ndpi", "philips")  # as tifffile names those whose pages tiffslide knows


class TiffSlideReader:
    """TIFFs that OpenSlide leaves: not tiled, OME with sub-resolutions, odd compressions; and what fsspec opens by URL."""

    name = "tiffslide"
    scales: tuple[int, ...] = (1,)
    threadsafe = False

    def __init__(self, path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Pages that open and cannot be decoded are found out here.
            self._slide = probed(
                lambda: _open_tiff(url_of(path) or str(path)),
                lambda slide, at: as_rgb(np.asarray(slide.read_region(at, 0, (1, 1), as_array=True))),
            )
            self.properties: Mapping[str, Any] = {str(key): value for key, value in self._slide.properties.items()}
            series = _series_of(self._slide)
            self.level_dimensions: tuple[tuple[int, int], ...] = tuple(
                (int(w), int(h)) for w, h in self._slide.level_dimensions
            )
            pages = [level[0] for level in series.levels]
            self.orientation = _orientation(series)
            skipped = skipped_pages(all_pages(self._slide.ts_tifffile), series, self.level_dimensions)
            self._empty = {
                size: sparse_tiles_of(page)
                for page in pages
                if page is not None and (size := size_of(page)) in self.level_dimensions
            }
        channels = {axis: size for axis, size in zip(series.axes, series.shape, strict=True) if axis in "CS"}
        is_three_channels = series.axes in ("CYX", "YXS") and 3 in channels.values()  # shown as red, green and blue
        is_plain = not _scanner_of(self._slide.ts_tifffile)
        self.note = joined("" if is_three_channels else planes(series), skipped if is_plain else "")
        self._channels = slice(3 if colours_of(series.keyframe) == "RGB" else None)
        self.vendor = str(self.properties.get("tiffslide.vendor") or "")
        self.tags_only = self.vendor in ("", "generic-tiff")
        self.level_downsamples: tuple[float, ...] = tuple(float(value) for value in self._slide.level_downsamples)

    def expect_strips(self) -> None:
        """Nothing to prepare."""

    def read(self, level: int, x: int, y: int, w: int, h: int, scale: int = 1) -> np.ndarray:
        """uint8 (h, w, 3); what was not scanned is white, as is what lies beyond the slide."""
        downsample = self.level_downsamples[level]
        at = (math.ceil(x * downsample), math.ceil(y * downsample))  # tiffslide rounds down to pixels of the level
        pixels = as_rgb(np.asarray(self._slide.read_region(at, level, (w, h), as_array=True))[..., self._channels])
        if empty := self.sparse_tiles(level):
            empty.paint(pixels, x, y)
        return pixels

    def sparse_tiles(self, level: int) -> SparseTiles | None:
        """The parts of a level that were not scanned; None where nothing is known to be missing."""
        return self._empty.get(self.level_dimensions[level])

    def close(self) -> None:
        self._slide.close()


def _series_of(slide: Any) -> Any:
    """The series of tifffile's that a TiffSlide shows."""
    return slide.ts_tifffile.series[slide.properties.get("tiffslide.series-index") or 0]


def _scanner_of(file: Any) -> str:
    """Whose own format a TiffFile is, as tiffslide knows it; empty of plain TIFFs."""
    return next((kind for kind in TIFFS_OF_SCANNERS if getattr(file, f"is_{kind}")), "")


def _open_tiff(path: str) -> Any:
    """A TiffSlide. Raises ValueError where what is stored are no colours: it would be shown as if it were."""
    import tiffslide

    slide = tiffslide.TiffSlide(path)
    try:
        if not _scanner_of(slide.ts_tifffile):
            _show_main(slide)
        if refusal := tiffslide_refusal(_series_of(slide).levels[0].keyframe):
            raise ValueError(refusal)
    except Exception:
        slide.close()
        raise
    return slide


def _show_main(slide: Any) -> None:
    """Make a TiffSlide show the largest page and those that may be its levels, where it would show another."""
    import tifffile

    file = slide.ts_tifffile
    pages = all_pages(file)
    main, levels = main_page(pages), file.series[0].levels
    turned = {orientation_of(level.keyframe) for level in levels}
    first = levels[0].keyframe
    if main is None or (size_of(first) == size_of(main) and not first.subfiletype & MASK and len(turned) == 1):
        return
    kind = (main.dtype, main.axes, main.samplesperpixel)
    coarser = [
        page
        for page in pages
        if is_reduction(page, main) and (page.dtype, page.axes, page.samplesperpixel) == kind and not tiffslide_refusal(page)
    ]
    by_size = {size_of(page): page for page in reversed(coarser)}  # of equal ones the first
    shown = [main, *(by_size[size] for size in sorted(by_size, reverse=True))]
    series = [tifffile.TiffPageSeries([page], page.shape, page.dtype, page.axes, kind="generic") for page in shown]
    series[0].levels += series[1:]
    file.series = [series[0]]
    slide.properties["tiff.ImageDescription"] = pixels_of(file.pages[0].description, size_of(main)) or main.description


def _orientation(series: Any) -> int:
    """The orientation of the levels of a series of tifffile's. Raises ValueError where that differs or cannot be done."""
    turned = sorted({orientation_of(level.keyframe) for level in series.levels})
    if len(turned) > 1:
        raise ValueError(f"its levels have orientations {' and '.join(map(str, turned))}: which is right?")
    if turned != [1] and (scanner := _scanner_of(series.keyframe.parent)) not in ("", "svs"):
        raise ValueError(f"its pages have orientation {turned[0]}, which means nothing in a file of kind {scanner}")
    return turned[0]
