"""What decodes slides, behind one small surface: stored tiles directly, OpenSlide, tiffslide, and plain images in memory.

Which of them reads a file is tried out in that order (`open_reader`), or forced by name.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from annotations.errors import UserError
from tiling.tiffpage import (
    UNSPECIFIED,
    Empty,
    LoopedTiffError,
    colours_of,
    empty_tiles,
    extras_of,
    first_stored,
    pages_of,
    says_rgb,
    size_of,
)  # fmt: skip
from tiling.urls import shown, url_of

CACHE_BYTES = 192 << 20  # decoded tiles OpenSlide keeps: some tile rows of a wide slide, so that none is decoded twice
PROBES = (0.5, 0.0, 0.3, 0.8)  # of a slide's width and height
MAX_IMAGE_PIXELS = 1_000_000_000
DEPTHS_READ = "8 and 16 bits unsigned are read, so convert it to 8 bits"
JPEG, J2K_YCBCR = 7, 33003  # TIFF compressions whose colours tifffile turns into RGB, and does not
GREY = ("MINISBLACK", "MINISWHITE")
PHOTOMETRIC, ORIENTATION, MINISWHITE = 262, 274, 0  # TIFF tags, and a value of the first
BITS, COMPRESSION, PLANES = 258, 259, 284
TURNED_BACK = {  # Pillow's names of what undoes its turning of a TIFF with such an orientation
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90", 7: "TRANSVERSE",
    8: "ROTATE_270",
}  # fmt: skip


class Reader(Protocol):
    """What tiling.slide needs from a library.

    Regions are in pixels of their level, divided by scale, and lie inside it. scales: what a level may be divided by while
    it is decoded. threadsafe: whether `read` may run in several threads.
    """

    name: str
    vendor: str
    level_dimensions: tuple[tuple[int, int], ...]
    level_downsamples: tuple[float, ...]
    properties: Mapping[str, Any]
    tags_only: bool  # its mpp, if any, comes from bare resolution tags
    scales: tuple[int, ...]
    threadsafe: bool
    note: str  # what of the file is not shown

    def read(self, level: int, x: int, y: int, w: int, h: int, scale: int = 1) -> np.ndarray: ...

    def expect_strips(self) -> None: ...  # the whole slide will be read row by row

    def empty(self, level: int) -> Empty | None: ...  # what of a level was not scanned, where that is known

    def close(self) -> None: ...


class OpenSlideReader:
    """All formats of OpenSlide, DICOM included."""

    name = "openslide"
    scales: tuple[int, ...] = (1,)
    threadsafe = True

    def __init__(self, path: Path) -> None:
        import openslide

        self._path = path
        self._slide = _probed(lambda: openslide.OpenSlide(str(path)), lambda slide, at: slide.read_region(at, 0, (1, 1)))
        self.properties: Mapping[str, Any] = dict(self._slide.properties)
        self.vendor = self.properties.get("openslide.vendor", "")
        self.tags_only = self.vendor == "generic-tiff"
        self.note = hidden_channels(path) if self.tags_only else ""
        self.level_dimensions: tuple[tuple[int, int], ...] = tuple(self._slide.level_dimensions)
        self.level_downsamples: tuple[float, ...] = tuple(float(value) for value in self._slide.level_downsamples)
        if mistake := _mistake(path, self.level_dimensions):
            self._slide.close()
            raise ValueError(mistake)
        colour = self.properties.get("openslide.background-color", "FFFFFF")
        self.background = np.array([int(colour[i : i + 2], 16) for i in (0, 2, 4)], dtype=np.uint8)

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

    def empty(self, level: int) -> Empty | None:
        """As the pages of a plain TIFF tell; scanners' own formats have rules of their own."""
        fitting = [page for page in pages_of(self._path) if size_of(page) == self.level_dimensions[level]]
        return empty_tiles(fitting[0]) if fitting and self.tags_only else None

    def close(self) -> None:
        self._slide.close()


@lru_cache(maxsize=1)
def _common_cache() -> Any:
    import openslide

    return openslide.OpenSlideCache(CACHE_BYTES // 4)


class TiffSlideReader:
    """TIFFs that OpenSlide leaves: not tiled, OME with sub-resolutions, odd compressions; and what fsspec opens by URL."""

    name = "tiffslide"
    scales: tuple[int, ...] = (1,)
    threadsafe = False

    def __init__(self, path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Pages that open and cannot be decoded are found out here.
            self._slide = _probed(
                lambda: _opened_tiff(url_of(path) or str(path)),
                lambda slide, at: as_rgb(np.asarray(slide.read_region(at, 0, (1, 1), as_array=True))),
            )
            self.properties: Mapping[str, Any] = {str(key): value for key, value in self._slide.properties.items()}
            series = _series_of(self._slide)
            self.level_dimensions: tuple[tuple[int, int], ...] = tuple(
                (int(w), int(h)) for w, h in self._slide.level_dimensions
            )
            pages = [level[0] for level in series.levels]
            self._empty = {
                size: empty_tiles(page)
                for page in pages
                if page is not None and (size := size_of(page)) in self.level_dimensions
            }
        channels = {axis: size for axis, size in zip(series.axes, series.shape, strict=True) if axis in "CS"}
        is_three_channels = series.axes in ("CYX", "YXS") and 3 in channels.values()  # shown as red, green and blue
        self.note = "" if is_three_channels else _not_shown(series)
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
        if empty := self.empty(level):
            empty.paint(pixels, x, y)
        return pixels

    def empty(self, level: int) -> Empty | None:
        """What of a level was not scanned; None where nothing is known to be missing."""
        return self._empty.get(self.level_dimensions[level])

    def close(self) -> None:
        self._slide.close()


class ImageReader:
    """A PNG, JPEG or TIFF held in memory as one level, as it is stored: an orientation it may state is left to viewers."""

    name = "image"
    scales: tuple[int, ...] = (1,)
    threadsafe = True

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
            tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
            if tags.get(PLANES, 1) == 2 and tags.get(COMPRESSION) == 1 and max(tags.get(BITS, (8,))) > 8:
                raise ValueError(f"Pillow mixes up channels of 16 bits stored apart and not compressed: {DEPTHS_READ}")
            turn_back, photometric = TURNED_BACK.get(tags.get(ORIENTATION, 1)), tags.get(PHOTOMETRIC)
            flat = _flattened(image)
            if turn_back:
                image.load()  # turns it and forgets the tag
                flat = flat.transpose(Image.Transpose[turn_back])
            pixels = np.asarray(flat)
            self._rgb = as_rgb(65535 - pixels if photometric == MINISWHITE and pixels.dtype.itemsize == 2 else pixels)
        self.tags_only = True  # of the dpi an image editor may have written
        self.note = hidden_channels(path)
        self.level_dimensions: tuple[tuple[int, int], ...] = ((self._rgb.shape[1], self._rgb.shape[0]),)
        self.level_downsamples: tuple[float, ...] = (1.0,)

    def expect_strips(self) -> None:
        """Nothing to prepare."""

    def read(self, level: int, x: int, y: int, w: int, h: int, scale: int = 1) -> np.ndarray:
        """uint8 (h, w, 3)"""
        return self._rgb[y : y + h, x : x + w]

    def empty(self, level: int) -> Empty | None:
        """It is there whole."""
        return None

    def close(self) -> None:
        self._rgb = np.zeros((0, 0, 3), np.uint8)


def _flattened(image: Any) -> Any:
    """An image without transparency (composited on white) and without a palette. Raises ValueError for more than 16 bits."""
    from PIL import Image

    if image.mode in ("I", "F"):  # Pillow would cut them off at 255
        held = "signed or 32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise ValueError(f"its pixels are {held}: {DEPTHS_READ}")
    if image.mode in ("I;16", "I;16B", "I;16L", "L", "RGB"):
        return image
    if image.mode == "La":
        image = image.convert("LA")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


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


def hidden_channels(path: Path) -> str:
    """Of a TIFF with more channels or planes than one picture shows: how many there are; else an empty string."""
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            return _not_shown(file.series[0])
    except Exception:  # tifffile has many errors of its own
        return ""


def _not_shown(series: Any) -> str:
    """As `hidden_channels`, of a series of tifffile's."""
    sizes = dict(zip(series.axes, series.shape, strict=True))
    samples = sizes.pop("S", 1)
    planes = int(np.prod([size for axis, size in sizes.items() if axis not in "YX"]))
    shown = samples - extras_of(series.keyframe).count(UNSPECIFIED)
    if planes == 1 and 1 < shown < samples:
        return f"shows the first {shown} of its {samples} channels only"
    count = planes * (1 if shown == samples else samples)
    return f"shows the first of its {count} channels or planes only" if count > 1 else ""


def _mistake(path: Path, sizes: tuple[tuple[int, int], ...]) -> str:
    """What OpenSlide (libtiff in it) would show wrongly of a TIFF's tiled pages of these sizes; empty where nothing."""
    for page in (page for page in pages_of(path) if page.is_tiled and size_of(page) in sizes):
        colours, samples, extras = colours_of(page), page.samplesperpixel, extras_of(page)
        is_apart = samples > 1 and int(page.planarconfig) != 1
        bits = page.bitspersample * samples
        if colours in GREY and bits > 8 and not is_apart and page.imagewidth % page.tilewidth:
            return f"it would mix up the last column of tiles, as of all grey in pixels of {bits} bits"
        if samples > 3 and extras[:1] == (UNSPECIFIED,) and (colours == "RGB" or (colours in GREY and is_apart)):
            return f"it would take one of {samples} channels for transparency, though the file says nothing of it"
    return ""


def _series_of(slide: Any) -> Any:
    """The series of tifffile's that a TiffSlide shows."""
    return slide.ts_tifffile.series[slide.properties.get("tiffslide.series-index") or 0]


def _opened_tiff(where: str) -> Any:
    """A TiffSlide. Raises ValueError where what is stored are no colours: it would be shown as if it were."""
    import tiffslide

    slide = tiffslide.TiffSlide(where)
    page = _series_of(slide).levels[0].keyframe
    try:
        _check_colours(page)
    except ValueError:
        slide.close()
        raise
    return slide


def _check_colours(page: Any) -> None:
    """Raises ValueError for a page whose samples tifffile does not turn into grey or RGB."""
    colours, samples, is_jpeg = colours_of(page), page.samplesperpixel, page.compression == JPEG
    compression = getattr(page.compression, "name", page.compression)
    no_colours = set(extras_of(page)) == {UNSPECIFIED} and not is_jpeg
    is_plain = colours in ("MINISBLACK", "RGB") and (samples in (1, 3) or no_colours) and page.compression != J2K_YCBCR
    if not is_plain and (colours, is_jpeg) != ("YCBCR", True):
        raise ValueError(f"its colours are {colours} in {samples} samples ({compression}), which it does not convert")
    if page.bitspersample in range(2, 8):
        raise ValueError(f"its pixels are of {page.bitspersample} bits: {DEPTHS_READ}")
    if is_jpeg and ((colours == "RGB" and page.is_jfif) or (colours == "YCBCR" and says_rgb(first_stored(page)))):
        raise ValueError(f"its colours are {colours}, which markers in its JPEG tiles contradict, and it would believe those")


def _probed(opened: Callable[[], Any], read: Callable[[Any, tuple[int, int]], Any]) -> Any:
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


ORDER = ("direct", "openslide", "tiffslide", "image")


def open_reader(path: Path, wanted: str = "auto") -> tuple[Reader, str]:
    """The first of `ORDER` that reads a file, or the wanted one, and why it is this one.

    Raises UserError for a reader of no such name and where none reads the file; the line tells what each said.
    """
    if wanted not in ("auto", *ORDER):
        raise UserError(f"--reader {wanted}: choose among auto, {', '.join(ORDER)}")
    names = ("tiffslide",) if url_of(path) and wanted == "auto" else ORDER if wanted == "auto" else (wanted,)
    said: list[str] = []
    try:
        pages_of(path)
    except LoopedTiffError as error:
        raise UserError(f"{shown(path)}: not a readable slide: {error}: copy it again or convert it to a tiled TIFF") from None
    for name in names:
        try:
            reader = _class_of(name)(path)
        except Exception as error:  # each library has errors of its own; all are told below
            text = " ".join(str(error).split()).replace(f" {str(path)!r}", "") or type(error).__name__
            said.append(f"{name}: {text[:120]}")
            continue
        stores = getattr(reader, "stores", "JPEG")
        chosen = (
            "asked for" if wanted != "auto" else "a URL" if url_of(path) else f"its stored {stores} tiles are read directly"
        )
        return reader, "; ".join(said) or chosen
    hint = "copy it again or convert it to a tiled TIFF" if wanted == "auto" else "leave out --reader to try the others"
    if url_of(path):
        hint = "is it there, and does its server give parts of files (ranges)? Else download it"
    raise UserError(f"{shown(path)}: not a readable slide ({'; '.join(said)}): {hint}")


def reader_of(path: Path | str, wanted: str = "auto") -> tuple[str, str]:
    """Name of the reader a slide gets, and why: what the ones before it said. Raises UserError where none reads it."""
    reader, why = open_reader(Path(path), wanted)
    reader.close()
    return reader.name, why


def _class_of(name: str) -> Callable[[Path], Reader]:
    if name == "direct":
        from tiling.direct import DirectReader

        return DirectReader
    if name == "openslide":
        return OpenSlideReader
    return TiffSlideReader if name == "tiffslide" else ImageReader
