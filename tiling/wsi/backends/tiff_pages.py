"""The pages of a TIFF: their chain, the picture among them, their levels, and tiles that hold nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

HEAD_BYTES = 65536  # of a stored tile, to find its markers in
SAMPLES = {"MINISBLACK": 1, "MINISWHITE": 1, "PALETTE": 1, "SEPARATED": 4}  # of a colour; elsewhere 3
UNSPECIFIED = 0  # of what a TIFF may say of its extra samples: neither of the two kinds of transparency
ORIENTATION = 274  # TIFF tag
MAX_NAMED = 4  # pages in one line
REDUCED, MASK = 1, 4  # bits of a page's subfile type: a coarser copy of another page, and a transparency mask


class LoopedTiffError(ValueError):
    """The chain of a TIFF's pages has no end."""


@lru_cache(maxsize=1)  # for whoever asks next about the same file: lists of a million offsets are not kept for others
def tiff_pages(path: Path, size: int, mtime_ns: int) -> tuple[Any, ...]:
    """Parse the pages of a TIFF with those beneath them, as tifffile parses them. Raises its errors where it is no TIFF.

    Raises LoopedTiffError where a page is followed by an earlier one: every other library would read on for ever.
    """
    import tifffile

    with tifffile.TiffFile(path) as file:
        return all_pages(file)


def all_pages(file: Any) -> tuple[Any, ...]:
    """List the pages of an open TiffFile with those beneath them, in order. Raises LoopedTiffError."""
    import tifffile

    pages: list[Any] = []
    seen: set[int] = set()
    for page in file.pages:
        if page.offset in seen:
            raise LoopedTiffError("its directories form a loop")
        seen.add(page.offset)
        if isinstance(page, tifffile.TiffPage | tifffile.TiffFrame):
            whole = page.aspage()
            pages += [whole, *([sub.aspage() for sub in whole.pages] if whole.subifds and whole.pages else [])]
    return tuple(pages)


def pages_of(path: Path) -> tuple[Any, ...]:
    """List the pages of a file, none where it is no TIFF that tifffile parses. Raises LoopedTiffError."""
    try:
        stat = path.stat()
        return tiff_pages(path, stat.st_size, stat.st_mtime_ns)
    except LoopedTiffError:
        raise
    except Exception:
        return ()


def colours_of(page: Any) -> str:
    """Return the kind of samples that a page of tifffile's states: "RGB", "MINISBLACK" and so on."""
    return str(getattr(page.photometric, "name", page.photometric))


def compression_of(page: Any) -> str:
    """Return the name of a page's compression, or its number where it has none."""
    return str(getattr(page.compression, "name", page.compression))


def extras_of(page: Any) -> tuple[int, ...]:
    """Return the kinds of a page's samples beyond those of its colours; what it does not tell is unspecified."""
    count = max(0, page.samplesperpixel - SAMPLES.get(colours_of(page), 3))
    stated = tuple(int(kind) for kind in page.extrasamples)[:count]
    return (*stated, *(UNSPECIFIED for _ in range(count - len(stated))))


def size_of(page: Any) -> tuple[int, int]:
    """Return width and height of a page of tifffile's, or of a frame that shares another's tags."""
    return page.keyframe.imagewidth, page.keyframe.imagelength


def orientation_of(page: Any) -> int:
    """Return the orientation of a page, 1 to 8 as in EXIF; 1 where its tag is missing or means nothing."""
    value = page.keyframe.tags.valueof(ORIENTATION, 1)
    return int(value) if value in range(1, 9) else 1


def main_page(pages: Sequence[Any]) -> Any:
    """Return the picture among the pages of a plain TIFF: the largest, and the first of those; None without any."""
    return max((page for page in pages if not page.subfiletype & MASK), key=lambda page: math.prod(size_of(page)), default=None)


def is_reduction(page: Any, whole: Any) -> bool:
    """Tell whether a page may be a coarser level of one: one scale gives both sides, to a pixel, and both are turned alike."""
    (width, height), (whole_w, whole_h) = size_of(page), size_of(whole)
    if not (width < whole_w and height < whole_h) or page.subfiletype & MASK or orientation_of(page) != orientation_of(whole):
        return False
    return whole_w * (height - 1) < whole_h * (width + 1) and whole_h * (width - 1) < whole_w * (height + 1)


def skipped_pages(pages: Sequence[Any], series: Any, sizes: Sequence[tuple[int, int]]) -> str:
    """Say which pages are neither shown nor said to be reductions of what is; an empty string where there are none.

    series: tifffile's that is shown, whose planes are told elsewhere. sizes: width and height of the levels that are read.
    """
    whole, shown = series.keyframe, {page.offset for page in series if page is not None}

    def is_there(page: Any) -> bool:
        is_level = size_of(page) in sizes[1:] and not page.subfiletype & MASK
        is_said_reduced = page.subfiletype & REDUCED or len(page.treeindex) > 1
        return is_level or page.offset in shown or (is_said_reduced and is_reduction(page, whole))

    skipped = [size_of(page) for page in pages if not is_there(page)]
    sizes_text = ", ".join(f"{width} x {height}" for width, height in skipped[:MAX_NAMED])
    sizes_text += ", ..." if skipped[MAX_NAMED:] else ""
    return f"leaves out {len(skipped)} of its {len(pages)} pages ({sizes_text} pixels)" if skipped else ""


def not_shown(path: Path, sizes: Sequence[tuple[int, int]]) -> str:
    """Say which channels, planes and pages of a TIFF one picture of its largest page leaves out; an empty string where none.

    sizes: width and height of the levels that are read.
    """
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            pages = all_pages(file)
            size = size_of(main_page(pages))
            alike = (s for s in file.series if size_of(s.keyframe) == size and not s.keyframe.subfiletype & MASK)
            series = next(alike, file.series[0])
            return joined(planes(series), skipped_pages(pages, series, sizes))
    except Exception:  # tifffile has many errors of its own
        return ""


def joined(*notes: str) -> str:
    return "; ".join(note for note in notes if note)


def planes(series: Any) -> str:
    """Say how many channels or planes there are of a series of tifffile's, where that is more than one picture shows."""
    sizes = dict(zip(series.axes, series.shape, strict=True))
    samples = sizes.pop("S", 1)
    planes = int(np.prod([size for axis, size in sizes.items() if axis not in "YX"]))
    shown = samples - extras_of(series.keyframe).count(UNSPECIFIED)
    if planes == 1 and 1 < shown < samples:
        return f"shows the first {shown} of its {samples} channels only"
    count = planes * (1 if shown == samples else samples)
    return f"shows the first of its {count} channels or planes only" if count > 1 else ""


@dataclass(frozen=True)
class SparseTiles:
    """The stored tiles of a level that hold nothing. missing: bool (rows, columns).

    tile_w, tile_h: the size of a tile in pixels of the level. cut_x, cut_y: by how many pixels the first column and row are
    smaller, in a level that is turned.
    """

    tile_w: int
    tile_h: int
    missing: np.ndarray
    cut_x: int = 0
    cut_y: int = 0

    def paint(self, pixels: np.ndarray, x: int, y: int) -> None:
        """Make white what is missing, in place. pixels: uint8 (h, w, 3) of the level, read at x, y."""
        height, width = pixels.shape[:2]
        top, left = y // self.tile_h, x // self.tile_w
        part = self.missing[top : (y + height - 1) // self.tile_h + 1, left : (x + width - 1) // self.tile_w + 1]
        for row, column in np.argwhere(part).tolist():
            a, b = (top + row) * self.tile_h - y, (left + column) * self.tile_w - x
            pixels[max(a, 0) : a + self.tile_h, max(b, 0) : b + self.tile_w] = 255


def sparse_tiles_of(page: Any) -> SparseTiles | None:
    """Return the empty tiles or strips of a page of tifffile's (of its first plane, where they are apart); None of none.

    Those that a file does not list count as empty: some leave out the last ones.
    """
    head = page.keyframe
    width, height = head.imagewidth, head.imagelength
    tile_w = head.tilewidth if head.is_tiled else width
    tile_h = head.tilelength if head.is_tiled else min(head.rowsperstrip, height)
    rows, columns = -(-height // tile_h), -(-width // tile_w)
    stored = np.zeros((2, rows * columns), bool)
    for i, values in enumerate((page.dataoffsets, page.databytecounts)):
        listed = np.asarray(values[: rows * columns], np.int64)
        stored[i, : len(listed)] = listed > 0
    missing = ~stored.all(axis=0)
    return SparseTiles(tile_w, tile_h, missing.reshape(rows, columns)) if missing.any() else None


def first_stored(page: Any) -> bytes:
    """Read the first bytes of the first stored tile or strip that is not empty."""
    file = page.parent.filehandle
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=False):
        if offset and count:
            file.seek(offset)
            return bytes(file.read(min(count, HEAD_BYTES)))
    return b""
