"""Tiled JPEG and JPEG 2000 TIFFs without a slide library in between: stored tiles are decoded straight.

Of JPEG, a half, a quarter or an eighth of the resolution costs less than all of it, since libjpeg-turbo then transforms
4 x 4, 2 x 2 or 1 x 1 coefficients of each block instead of 8 x 8. JPEG 2000 could leave out wavelet levels in the same way, but
what is left is sharper than an average (by 4 grey levels on H&E), so it is decoded whole. Levels, mpp and what else headers say
come from OpenSlide (or tiffslide), so that coordinates mean the same whoever reads the pixels; what is decoded here is compared
with its pixels when the file is opened, and a file that differs is left to it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from annotations.errors import one_line
from tiling.wsi.backends.base import Reader, as_rgb, background_of
from tiling.wsi.backends.jpeg_stack import JpegHeader, parse_jpeg_header
from tiling.wsi.backends.openslide import OpenSlideReader
from tiling.wsi.backends.tiff_pages import SparseTiles, colours_of, tiff_pages
from tiling.wsi.backends.tiff_rules import JPEG_2000, direct_refusal
from tiling.wsi.backends.tiffslide import TiffSlideReader
from tiling.wsi.codec import decode_jpeg
from tiling.wsi.jpeg_markers import ADOBE_RGB, ADOBE_YCBCR, EOI, SOI, without_colour_markers

SCALES = (1, 2, 4, 8)
VENDORS = ("aperio", "generic-tiff", "")  # stored tiles lie edge to edge; others overlap, turn or hide some
PARTS_CHECKED = (0.5, 0.3, 0.7, 0.15, 0.85)  # where in a level stored tiles are looked at
MOST_CHECKED_PX = 1024  # of a side of such a tile
MAX_DIFFERENCE = 1.5  # grey levels, mean over a stored tile, between this decoder and the slide library's


class NotDirectError(Exception):
    """This file is read by others; the text says why."""


@dataclass(frozen=True)
class Page:
    """One level as it is stored: width, height, tile_w, tile_h in its pixels; offsets, counts int64 (rows, columns).

    head: the bytes that go in front of each stored stream to make it a JPEG file of its own. codec: "jpeg", "jpeg2000", or
    "jpeg2000 ycc" whose colours are left to whoever decodes it.
    """

    width: int
    height: int
    tile_w: int
    tile_h: int
    offsets: np.ndarray
    counts: np.ndarray
    head: bytes
    codec: str = "jpeg"

    def scaled(self, scale: int) -> tuple[int, int]:
        """Width and height when decoded at 1 / scale, the last part pixel included."""
        return -(-self.width // scale), -(-self.height // scale)


GetTile = Callable[[int, int], np.ndarray | None]  # (row, column) -> a decoded stored tile, None where nothing is stored


class DirectReader:
    """Reads what `VENDORS` and tifffile write as JPEG or JPEG 2000 tiles. Safe to use from several threads."""

    name = "direct"
    threadsafe = True
    _fd = -1

    def __init__(self, path: Path) -> None:
        stat = path.stat()
        pages = stored_pages(path, stat.st_size, stat.st_mtime_ns)
        header: Reader
        try:
            header = OpenSlideReader(path)
        except Exception:  # what OpenSlide says of it is told when its own turn comes
            header = TiffSlideReader(path)
        try:
            self.vendor = header.vendor
            self.properties: Mapping[str, Any] = header.properties
            self.tags_only = header.tags_only
            self.orientation, self.note = header.orientation, header.note
            self.level_dimensions: tuple[tuple[int, int], ...] = header.level_dimensions
            self.level_downsamples: tuple[float, ...] = header.level_downsamples
            if header.name == "openslide" and self.vendor not in VENDORS:
                raise NotDirectError(f"tiles of {self.vendor} are left to OpenSlide")
            self.pages = tuple(_page_of(pages, *size) for size in self.level_dimensions)
            is_jpeg = all(page.codec == "jpeg" for page in self.pages)
            self.scales: tuple[int, ...] = SCALES if is_jpeg else (1,)
            self.stores = "JPEG" if is_jpeg else "JPEG 2000"
            self.background = np.array(background_of(self.properties), np.uint8)
            self._fd = os.open(path, os.O_RDONLY)
            self._headers: dict[int, JpegHeader | None] = {}
            for level in {0, len(self.pages) - 1}:
                self._check(level, header)
        except BaseException:
            self.close()
            raise
        finally:
            header.close()

    def expect_strips(self) -> None:
        """Nothing to prepare."""

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; twice does no harm."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
        self._fd = -1

    def read(self, level: int, x: int, y: int, w: int, h: int, scale: int = 1) -> np.ndarray:
        """Read uint8 (h, w, 3) of a level decoded at 1 / scale, in pixels of that. Raises ValueError for a bad stored tile."""
        pixels, problem = self.read_region(
            level, scale, (x, y, x + w, y + h), lambda row, column: self.decode_tile(level, scale, row, column)
        )
        if problem:
            raise ValueError(problem)
        return pixels

    def read_region(self, level: int, scale: int, box: tuple[int, int, int, int], get_tile: GetTile) -> tuple[np.ndarray, str]:
        """Put stored tiles together: uint8 (h, w, 3), and what is wrong with it ("" where nothing is).

        box: x0, y0, x1, y1 inside the scaled level. Where nothing is stored the background shows; where a stored tile
        cannot be decoded the pixels are black, and the problem names it.
        """
        page = self.pages[level]
        x0, y0, x1, y1 = box
        tile_w, tile_h = page.tile_w // scale, page.tile_h // scale
        out = np.empty((y1 - y0, x1 - x0, 3), np.uint8)
        problem = ""
        for row in range(y0 // tile_h, (y1 - 1) // tile_h + 1):
            top = row * tile_h
            a, b = max(top, y0), min(top + tile_h, y1)
            for column in range(x0 // tile_w, (x1 - 1) // tile_w + 1):
                left = column * tile_w
                c, d = max(left, x0), min(left + tile_w, x1)
                target = out[a - y0 : b - y0, c - x0 : d - x0]
                try:
                    tile = get_tile(row, column)
                except (ValueError, OSError) as error:
                    target[...] = 0
                    problem = f"stored tile {column}, {row} of level {level}: {error}"
                    continue
                target[...] = self.background if tile is None else tile[a - top : b - top, c - left : d - left]
        return out, problem

    def sparse_tiles(self, level: int) -> SparseTiles | None:
        """Return the parts of a level that were not scanned; None where everything is stored."""
        page = self.pages[level]
        missing = page.counts == 0
        return SparseTiles(page.tile_w, page.tile_h, missing) if missing.any() else None

    def decode_stack(self, level: int, scale: int, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray | None:
        """Decode the stored JPEG tiles of rows and columns (first, end) in one call at 1 / scale: uint8 (h, w, 3).

        None where that cannot be done: of a single tile, where one is missing or corrupt, and at the level's right and lower
        edge.
        """
        page, header = self.pages[level], self._header(level)
        row_count, column_count = rows[1] - rows[0], columns[1] - columns[0]
        if header is None or row_count * column_count == 1:
            return None
        if rows[1] * page.tile_h > page.height or columns[1] * page.tile_w > page.width:
            return None
        offsets, counts = (values[slice(*rows), slice(*columns)].ravel().tolist() for values in (page.offsets, page.counts))
        if not all(offsets) or not all(counts):
            return None
        try:
            streams = [os.pread(self._fd, count, offset) for count, offset in zip(counts, offsets, strict=True)]
        except OSError:
            return None
        tiles = header.decode(streams, scale)
        if tiles is None:
            return None
        height, width = page.tile_h // scale, page.tile_w // scale
        out = np.empty((row_count * height, column_count * width, 3), np.uint8)
        by_tile = tiles.reshape(row_count, column_count, height, width * 3)
        out.reshape(row_count, height, column_count, width * 3)[...] = by_tile.swapaxes(1, 2)
        return out

    def _header(self, level: int) -> JpegHeader | None:
        """Return the common header of the stored tiles of a level; None where they cannot be decoded in one call."""
        if level not in self._headers:
            page, header = self.pages[level], None
            row, column = (int(size) // 2 for size in page.counts.shape)
            with contextlib.suppress(ValueError, OSError):
                data = os.pread(self._fd, int(page.counts[row, column]), int(page.offsets[row, column]))
                if page.codec == "jpeg" and page.counts[row, column]:
                    header = parse_jpeg_header(data, page.head[2:], len(data) - len(without_colour_markers(data)))
            size = (page.tile_h, page.tile_w)
            self._headers[level] = header if header is not None and (header.height, header.width) == size else None
        return self._headers[level]

    def decode_tile(self, level: int, scale: int, row: int, column: int) -> np.ndarray | None:
        """Decode one stored tile at 1 / scale: uint8 (tile_h / scale, tile_w / scale, 3), or None where nothing is stored.

        Raises ValueError where it cannot be decoded whole.
        """
        page = self.pages[level]
        data = self.tile_bytes(level, row, column)
        if data is None:
            return self._from_finer(level, scale, row, column) if level and self.vendor == "aperio" else None
        tile_h, tile_w = page.tile_h // scale, page.tile_w // scale
        tile = _decoded(data, page.codec, tile_h, tile_w)
        if tile.shape[:2] != (tile_h, tile_w):
            raise ValueError(f"decodes to {tile.shape[1]} x {tile.shape[0]} pixels, not {tile_w} x {tile_h}")
        if scale > 1 and (row == page.counts.shape[0] - 1 or column == page.counts.shape[1] - 1):
            _repeat_edge(tile, page, scale, row, column)
        return tile

    def tile_bytes(self, level: int, row: int, column: int) -> bytes | None:
        """Return one stored tile as a JPEG or JPEG 2000 file of its own; None where nothing is stored.

        Raises ValueError where it is cut off.
        """
        page = self.pages[level]
        count, offset = int(page.counts[row, column]), int(page.offsets[row, column])
        if count == 0 or offset == 0:
            return None
        data = os.pread(self._fd, count, offset)
        if len(data) < count:
            raise ValueError("the file ends before it")
        return page.head + without_colour_markers(data) if page.codec == "jpeg" else data

    def _from_finer(self, level: int, scale: int, row: int, column: int) -> np.ndarray | None:
        """Make a tile from the finer level, if that has it: Aperio leaves out single tiles of coarser levels by mistake."""
        from PIL import Image

        page, finer = self.pages[level], self.pages[level - 1]
        ratio_x, ratio_y = finer.width / page.width, finer.height / page.height
        x, y = round(column * page.tile_w * ratio_x), round(row * page.tile_h * ratio_y)
        w = min(round(page.tile_w * ratio_x), finer.width - x)
        h = min(round(page.tile_h * ratio_y), finer.height - y)
        rows = slice(y // finer.tile_h, (y + h - 1) // finer.tile_h + 1)
        if not finer.counts[rows, x // finer.tile_w : (x + w - 1) // finer.tile_w + 1].any():
            return None
        piece = Image.fromarray(self.read(level - 1, x, y, w, h))
        tile = np.empty((page.tile_h // scale, page.tile_w // scale, 3), np.uint8)
        tile[...] = self.background
        size = (round(w / ratio_x / scale), round(h / ratio_y / scale))
        tile[: size[1], : size[0]] = np.asarray(piece.resize(size, Image.Resampling.BOX))
        return tile

    def _check(self, level: int, header: Any) -> None:
        """Compare stored tiles of a level with the slide library's pixels. Raises NotDirectError where they differ."""
        page = self.pages[level]
        problem = ""
        for part in PARTS_CHECKED:
            row, column = (min(int(count * part), count - 1) for count in page.counts.shape)
            x, y = column * page.tile_w, row * page.tile_h
            w, h = min(page.tile_w, page.width - x, MOST_CHECKED_PX), min(page.tile_h, page.height - y, MOST_CHECKED_PX)
            try:
                tile = self.decode_tile(level, 1, row, column) if page.counts[row, column] else None
            except ValueError as error:
                problem = f"stored tile {column}, {row} of level {level}: {error}"
                continue
            if tile is None:
                continue
            expected, tile = header.read(level, x, y, w, h), tile[:h, :w]
            if not header.level_downsamples[level].is_integer():
                # The library shifts such a level by up to half a level-0 pixel, since it takes places in those.
                tile, expected = _means(tile), _means(expected)
            difference = float(np.abs(tile.astype(np.float32) - expected).mean())
            if difference > MAX_DIFFERENCE:
                raise NotDirectError(f"level {level} decodes {difference:.1f} grey levels away from {header.name}'s pixels")
            return
        if problem:
            raise NotDirectError(problem)


def _decoded(data: bytes, codec: str, height: int, width: int) -> np.ndarray:
    """uint8 (h, w, 3); of a JPEG the smallest that is not below height x width. Raises ValueError where it is torn."""
    if codec == "jpeg":
        return decode_jpeg(data, height, width)
    import imagecodecs

    if not data.rstrip(b"\0").endswith(EOI):  # zeroes are decoded, to noise
        raise ValueError("the JPEG 2000 stream has no end")
    try:
        tile = as_rgb(imagecodecs.jpeg2k_decode(data))
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    if codec == "jpeg2000 ycc":
        from PIL import Image

        tile = np.asarray(Image.fromarray(tile, "YCbCr").convert("RGB"))
    return tile


def _means(rgb: np.ndarray, side: int = 8) -> np.ndarray:
    """Average blocks of side x side pixels: float (h // side, w // side, 3); a picture smaller than one as it is."""
    rows, columns = rgb.shape[0] // side, rgb.shape[1] // side
    if not rows or not columns:
        return rgb
    means: np.ndarray = rgb[: rows * side, : columns * side].reshape(rows, side, columns, side, 3).mean(axis=(1, 3))
    return means


def _repeat_edge(tile: np.ndarray, page: Page, scale: int, row: int, column: int) -> None:
    """Give the last part pixel of a level its neighbour's value: what lies beyond the level is mixed into it."""
    spare_w = page.width - column * page.tile_w
    spare_h = page.height - row * page.tile_h
    if scale <= spare_w < page.tile_w and spare_w % scale:
        tile[:, spare_w // scale] = tile[:, spare_w // scale - 1]
    if scale <= spare_h < page.tile_h and spare_h % scale:
        tile[spare_h // scale] = tile[spare_h // scale - 1]


@lru_cache(maxsize=8)
def stored_pages(path: Path, size: int, mtime_ns: int) -> tuple[Page, ...]:
    """Parse the pages of a TIFF in tiles of JPEG or JPEG 2000, parsed once per process and file.

    size and mtime_ns only tell versions of the file apart.

    Raises NotDirectError where it is no TIFF or has none.
    """
    try:
        refusals = [(page, direct_refusal(page)) for page in tiff_pages(path, size, mtime_ns)]
        pages = [_page(page) for page, refusal in refusals if not refusal]
        reason = next((refusal for _, refusal in refusals if refusal), "holds no image")
    except NotDirectError:
        raise
    except Exception as error:  # tifffile has many errors of its own
        raise NotDirectError(f"no TIFF that tifffile parses: {one_line(error)[:80]}") from None
    if not pages:
        raise NotDirectError(reason)
    return tuple(pages)


def _page(page: Any) -> Page:
    colours = {"RGB": ADOBE_RGB, "YCBCR": ADOBE_YCBCR}.get(colours_of(page), b"")
    tables = page.jpegtables
    rows, columns = -(-page.imagelength // page.tilelength), -(-page.imagewidth // page.tilewidth)
    offsets, counts = (np.array(values, np.int64) for values in (page.dataoffsets, page.databytecounts))
    if len(offsets) != rows * columns or len(counts) != rows * columns:
        raise NotDirectError(f"lists {len(offsets)} tiles where {columns} x {rows} are needed")
    return Page(
        width=page.imagewidth,
        height=page.imagelength,
        tile_w=page.tilewidth,
        tile_h=page.tilelength,
        offsets=offsets.reshape(rows, columns),
        counts=counts.reshape(rows, columns),
        head=SOI + colours + (without_colour_markers(tables).removesuffix(EOI) if tables else b""),
        codec=JPEG_2000.get(int(page.compression), "jpeg"),
    )


def _page_of(pages: tuple[Page, ...], width: int, height: int) -> Page:
    """Return the one page of a size. Raises NotDirectError where there is none, or more than one."""
    fitting = [page for page in pages if (page.width, page.height) == (width, height)]
    if len(fitting) != 1:
        stored = "not stored as JPEG or JPEG 2000 tiles" if not fitting else f"stored {len(fitting)} times"
        raise NotDirectError(f"the level of {width} x {height} is {stored}")
    return fitting[0]
