"""What decodes slides, behind one small surface: stored tiles directly, OpenSlide, tiffslide, and plain images in memory.

Which of them reads a file is tried out in that order (`open_reader`), or forced by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    main_page,
    not_shown,
    orientation_of,
    pages_of,
    size_of,
)
from tiling.upright import TURNS, UprightReader, exif_orientation
from tiling.urls import shown, url_of

CACHE_BYTES = 192 << 20  # decoded tiles OpenSlide keeps: some tile rows of a wide slide, so that none is decoded twice
PROBES = (0.5, 0.0, 0.3, 0.8)  # of a slide's width and height
MAX_IMAGE_PIXELS = 1_000_000_000
DEPTHS_READ = "8 and 16 bits unsigned are read, so convert it to 8 bits"
GREY = ("MINISBLACK", "MINISWHITE")
PHOTOMETRIC, MINISWHITE = 262, 0  # a TIFF tag and a value of it
BITS, COMPRESSION, PLANES = 258, 259, 284


class Reader(Protocol):
    """What tiling.slide needs from a library.

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

    def empty(self, level: int) -> Empty | None: ...  # what of a level was not scanned, where that is known

    def close(self) -> None: ...


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


class ImageReader:
    """A PNG, JPEG or TIFF held in memory as one level, upright; of a TIFF its largest page."""

    name = "image"
    scales: tuple[int, ...] = (1,)
    threadsafe = True
    orientation = 1

    def __init__(self, path: Path) -> None:
        from PIL import Image

        Image.MAX_IMAGE_PIXELS = MAX_IMAGE_PIXELS
        self.properties: Mapping[str, Any] = {}
        with Image.open(path) as image:
            _seek_main(image, path)
            self.vendor = str(image.format or "image").lower()
            resolution = image.info.get("dpi")
            if resolution:
                x, y = resolution
                self.properties = {"tiff.ResolutionUnit": "inch", "tiff.XResolution": x, "tiff.YResolution": y}
            tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
            if tags.get(PLANES, 1) == 2 and tags.get(COMPRESSION) == 1 and max(tags.get(BITS, (8,))) > 8:
                raise ValueError(f"Pillow mixes up channels of 16 bits stored apart and not compressed: {DEPTHS_READ}")
            photometric = tags.get(PHOTOMETRIC)
            turn = TURNS[exif_orientation(image)]
            pixels = turn.array(np.asarray(_flattened(image)))
            self._rgb = as_rgb(65535 - pixels if photometric == MINISWHITE and pixels.dtype.itemsize == 2 else pixels)
        self.tags_only = True  # of the dpi an image editor may have written
        self.level_dimensions: tuple[tuple[int, int], ...] = ((self._rgb.shape[1], self._rgb.shape[0]),)
        self.note = not_shown(path, self.level_dimensions)
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


def _seek_main(image: Any, path: Path) -> None:
    """Go to the largest page of an image of Pillow's that is a TIFF. Raises ValueError where that lies beneath another."""
    if image.format != "TIFF":
        return
    page = main_page(pages_of(path))
    if page is not None and len(page.treeindex) > 1:
        raise ValueError("its largest page lies beneath another, and Pillow does not read those")
    if page is not None and page.index:
        image.info.pop("dpi", None)  # of the page before
        image.seek(page.index)
    image.info.pop("xmp", None)  # an orientation in it would turn the picture for this reader alone


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


def _mistake(pages: Sequence[Any], sizes: Sequence[tuple[int, int]], *, is_plain: bool) -> str:
    """What OpenSlide (libtiff in it) would show wrongly of a TIFF's pages; empty where nothing.

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
        return UprightReader(reader) if reader.orientation != 1 else reader, "; ".join(said) or chosen
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
    if name == "tiffslide":
        from tiling.tiffslides import TiffSlideReader

        return TiffSlideReader
    return OpenSlideReader if name == "openslide" else ImageReader
