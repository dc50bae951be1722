"""One slide, whatever its format: what it is, and its pixels at any resolution."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from annotations.errors import UserError
from tiling.mpp import Mpp, mpp_of
from tiling.readers import READERS, Reader
from tiling.resample import area_resize

LEVEL_TOLERANCE = 1.01  # a level 1% coarser than wanted still serves: 2.0005 counts as 2
BLOCK_PIXELS = 16_000_000  # level pixels read in one piece (48 MB of RGB)


@dataclass(frozen=True)
class SlideInfo:
    """What the headers say. Sizes and bounds in level-0 pixels, mpp in micrometres per level-0 pixel or None."""

    path: Path
    slide_id: str
    width_l0: int
    height_l0: int
    level_downsamples: tuple[float, ...]
    level_dimensions: tuple[tuple[int, int], ...]
    mpp: float | None
    mpp_source: str
    vendor: str
    reader: str
    bounds_xy: tuple[int, int] = (0, 0)
    background: tuple[int, int, int] = (255, 255, 255)
    mpp_note: str = ""

    @property
    def mpp_found(self) -> Mpp:
        return Mpp(self.mpp, self.mpp_source, self.mpp_note)


class Slide:
    """An open slide; a context manager. Made by `Slide.open`."""

    def __init__(self, info: SlideInfo, reader: Reader) -> None:
        self.info = info
        self._reader = reader

    @classmethod
    def open(cls, path: Path | str, assume_mpp: float | None = None) -> Slide:
        """Open with OpenSlide, else tiffslide, else as a plain image.

        assume_mpp fills in where the file has no mpp of its own. Raises UserError where the file is missing or nothing
        reads it.
        """
        path = Path(path)
        if not path.exists():
            raise UserError(f"{path}: no such slide")
        reader = _open_reader(path)
        found = mpp_of(reader.properties, tags_only=reader.tags_only)
        if found.value is None and assume_mpp is not None:
            found = Mpp(assume_mpp, "--assume-mpp")
        width, height = reader.level_dimensions[0]
        colour = str(reader.properties.get("openslide.background-color") or "FFFFFF")
        info = SlideInfo(
            path=path,
            slide_id=slide_stem(path),
            width_l0=int(width),
            height_l0=int(height),
            level_downsamples=reader.level_downsamples,
            level_dimensions=reader.level_dimensions,
            mpp=found.value,
            mpp_source=found.source,
            vendor=reader.vendor,
            reader=reader.name,
            bounds_xy=(_bound(reader, "x"), _bound(reader, "y")),
            background=(int(colour[0:2], 16), int(colour[2:4], 16), int(colour[4:6], 16)),
            mpp_note=found.note,
        )
        return cls(info, reader)

    def close(self) -> None:
        self._reader.close()

    def __enter__(self) -> Slide:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def best_level(self, downsample: float) -> int:
        """The coarsest level that is at least as fine as `downsample` (level-0 pixels per wanted pixel)."""
        fitting = [i for i, value in enumerate(self.info.level_downsamples) if value <= downsample * LEVEL_TOLERANCE]
        return max(fitting, key=lambda i: self.info.level_downsamples[i], default=0)

    def read_region(self, x_l0: float, y_l0: float, w_l0: float, h_l0: float, out_w: int, out_h: int) -> np.ndarray:
        """uint8 (out_h, out_w, 3): the area x, y, w, h in level-0 pixels, area-averaged from the best level.

        What lies beyond the slide or was not scanned has the background colour.
        """
        level = self.best_level(min(w_l0 / out_w, h_l0 / out_h))
        downsample = self.info.level_downsamples[level]
        rows = max(1, int(BLOCK_PIXELS / max(1.0, w_l0 / downsample) / (h_l0 / downsample / out_h)))
        bands = []
        for top in range(0, out_h, rows):
            count = min(rows, out_h - top)
            step = h_l0 / out_h
            box = (x_l0, y_l0 + top * step, x_l0 + w_l0, y_l0 + (top + count) * step)
            corner, block = self._block(level, *box)
            bands.append(area_resize(block, self._inside(level, corner, *box), out_w, count))
        return bands[0] if len(bands) == 1 else np.concatenate(bands)

    def read_tiles(self, coords_l0: np.ndarray, size_l0: float, patch_px: int) -> Iterator[np.ndarray]:
        """Tiles of side `size_l0` at `coords_l0` (int64 (N, 2), ordered by (y, x)) as uint8 (patch_px, patch_px, 3).

        Neighbours of a row are read in one piece; memory stays bounded whatever N is.
        """
        level = self.best_level(size_l0 / patch_px)
        self._reader.expect_strips()
        widest_l0 = max(size_l0, BLOCK_PIXELS / (size_l0 / self.info.level_downsamples[level]) ** 2 * size_l0)
        for start, stop in _runs(coords_l0, size_l0, min(widest_l0, 64 * size_l0)):
            x0, y0 = (float(value) for value in coords_l0[start])
            corner, block = self._block(level, x0, y0, float(coords_l0[stop - 1][0]) + size_l0, y0 + size_l0)
            for x, y in coords_l0[start:stop]:
                box = (float(x), float(y), float(x) + size_l0, float(y) + size_l0)
                yield area_resize(block, self._inside(level, corner, *box), patch_px, patch_px)

    def thumbnail(self, max_side_px: int) -> np.ndarray:
        """uint8 (h, w, 3): the whole slide, its longer side `max_side_px`; never enlarged."""
        width, height = self.info.width_l0, self.info.height_l0
        downsample = max(1.0, max(width, height) / max_side_px)
        out_w, out_h = max(1, round(width / downsample)), max(1, round(height / downsample))
        return self.read_region(0, 0, width, height, out_w, out_h)

    def _block(self, level: int, x0: float, y0: float, x1: float, y1: float) -> tuple[tuple[int, int], np.ndarray]:
        """The level's pixels that cover a level-0 box: corner (x, y) in level pixels, and uint8 (h, w, 3)."""
        downsample = self.info.level_downsamples[level]
        left, top = (int(np.floor(value / downsample + 1e-6)) for value in (x0, y0))
        right = max(left + 1, int(np.ceil(x1 / downsample - 1e-6)))
        bottom = max(top + 1, int(np.ceil(y1 / downsample - 1e-6)))
        width, height = self.info.level_dimensions[level]
        inner = (max(left, 0), max(top, 0), min(right, width), min(bottom, height))
        w, h = inner[2] - inner[0], inner[3] - inner[1]
        if (w, h) == (right - left, bottom - top):
            return (left, top), self._read(level, inner[0], inner[1], w, h)
        block = np.empty((bottom - top, right - left, 3), np.uint8)
        block[:] = np.array(self.info.background, np.uint8)
        if w > 0 and h > 0:
            piece = self._read(level, inner[0], inner[1], w, h)
            block[inner[1] - top : inner[3] - top, inner[0] - left : inner[2] - left] = piece
        return (left, top), block

    def _inside(
        self, level: int, corner: tuple[int, int], x0: float, y0: float, x1: float, y1: float
    ) -> tuple[float, float, float, float]:
        """A level-0 box in pixels of a block whose corner is given."""
        downsample = self.info.level_downsamples[level]
        box = (x0 / downsample - corner[0], y0 / downsample - corner[1])
        far = (x1 / downsample - corner[0], y1 / downsample - corner[1])
        clean = [round(value, 6) for value in (*box, *far)]
        return clean[0], clean[1], clean[2], clean[3]

    def _read(self, level: int, x: int, y: int, w: int, h: int) -> np.ndarray:
        try:
            return self._reader.read(level, x, y, w, h)
        except Exception as error:  # each library has errors of its own
            what = " ".join(str(error).split())
            where = f"level {level}, x {x}, y {y}, {w} x {h}"
            raise UserError(f"{self.info.path}: cannot decode pixels at {where}: {what}: is the file whole?") from None


def slide_stem(path: Path) -> str:
    """File name without its extension, and without `.ome` before it."""
    stem = path.stem
    return stem[:-4] if stem.lower().endswith(".ome") else stem


def _open_reader(path: Path) -> Reader:
    said = []
    for reader in READERS:
        try:
            return reader(path)
        except Exception as error:  # each library has errors of its own; all are told below
            text = " ".join(str(error).split()).replace(f" {str(path)!r}", "") or type(error).__name__
            said.append(f"{reader.name}: {text[:120]}")
    raise UserError(f"{path}: not a readable slide ({'; '.join(said)}): copy it again or convert it to a tiled TIFF")


def _bound(reader: Reader, axis: str) -> int:
    for prefix in ("openslide", "tiffslide"):
        value = reader.properties.get(f"{prefix}.bounds-{axis}")
        if value is not None:
            return int(float(value))
    return 0


def _runs(coords_l0: np.ndarray, size_l0: float, widest_l0: float) -> Sequence[tuple[int, int]]:
    """Cut tiles into runs of neighbours in one row: no gap wider than a tile, no run wider than `widest_l0`."""
    runs: list[tuple[int, int]] = []
    start = 0
    for i in range(1, len(coords_l0) + 1):
        if i < len(coords_l0):
            (x, y), (before, row) = coords_l0[i], coords_l0[i - 1]
            near = y == row and x - before <= 2 * size_l0
            if near and x + size_l0 - coords_l0[start][0] <= widest_l0:
                continue
        runs.append((start, i))
        start = i
    return runs if len(coords_l0) else []
