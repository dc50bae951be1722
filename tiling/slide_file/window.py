"""Square windows anywhere on a slide's tiles: pixels across the borders of tiles, and boxes of objects that a border cuts.

A window is given in pixels of one of the tiles, from that tile's top-left corner; it may begin and end outside it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property, lru_cache
from math import ceil, floor

import numpy as np

from annotations.errors import UserError
from tiling.slide_file.read import SlideFile
from tiling.storage.checksums import DamagedError

DECODED = 9  # tiles kept: a tile and those around it, for the next window of the same tile


class TileWindows:
    """The windows of a slide file, as long as it is open.

    Pixels come from stored tiles first, the own one before its neighbours, then from the slide where it can be read; what
    neither has repeats the edge of the tile. Tiles that are images of their own (`import --fit`) have no neighbours.
    """

    def __init__(self, file: SlideFile) -> None:
        self.file = file
        self._scale = file.size_l0 / file.patch_size  # level-0 pixels a pixel of a tile
        self._alone = bool(file.group_attrs("images"))
        self._slide_readable = not self._alone
        self._tile = lru_cache(DECODED)(file.tile)

    def corner(self, tile: int, box: np.ndarray, side_px: int) -> tuple[int, int]:
        """Left and top of the window that is centred on a box, float (4,) in pixels of the tile, moved into the slide."""
        centre = (np.asarray(box[:2], np.float64) + np.asarray(box[2:], np.float64)) / 2
        low, high = self._extent(tile)
        x, y = (_inside(floor(c - side_px / 2 + 0.5), side_px, a, b) for c, a, b in zip(centre, low, high, strict=True))
        return x, y

    def read(self, tile: int, x: int, y: int, side_px: int) -> np.ndarray:
        """Pixels x to x + side_px, y to y + side_px in the frame of a tile: uint8 (side_px, side_px, 3).

        Raises UserError where no pixels are stored and the slide cannot be read, DamagedError where stored ones are damaged.
        """
        file = self.file
        if not file.has_pixels:
            return self.file.region(tile, x, y, side_px)
        own = self._tile(tile)
        if min(x, y) >= 0 and max(x, y) + side_px <= len(own):
            return own[y : y + side_px, x : x + side_px]
        window, known = np.zeros((side_px, side_px, 3), np.uint8), np.zeros((side_px, side_px), bool)
        _paste(window, known, own, -x, -y)
        for row, left, top in self._neighbours(tile, x, y, side_px):
            if not known[_span(top - y, len(own), side_px), _span(left - x, len(own), side_px)].all():
                _paste(window, known, self._tile(row), left - x, top - y)
        if not known.all():
            rest = self._beyond(tile, x, y, side_px, own)
            window[~known] = rest[~known]
        return window

    def whole_boxes(self, most_px: int) -> np.ndarray:
        """Boxes of /boxes with the parts of their objects in other tiles: float64 (M, 4) in pixels of each box's own tile.

        Objects longer than most_px keep the part in their tile: no window shows them whole.
        """
        if most_px not in self._whole:
            own, bounds = self.file.boxes_table()["xyxy"].astype(np.float64), self.file.box_bounds_l0
            low, high = (np.full((len(self._parts), 2), end) for end in (np.inf, -np.inf))
            np.minimum.at(low, self._part_of, bounds[:, :2])
            np.maximum.at(high, self._part_of, bounds[:, 2:])
            joined = (self._parts > 1) & ((high - low).max(axis=1, initial=0) <= most_px * self._scale)
            whole = np.concatenate([low, high], axis=1)[self._part_of] - np.tile(self._corners, 2)
            self._whole[most_px] = np.where(joined[self._part_of, None], whole / self._scale, own)
        return self._whole[most_px]

    def outlines(self, row: int, most_px: int) -> list[list[np.ndarray]]:
        """The outline behind a row of /boxes, and those of its object's parts in other tiles, in pixels of its own tile.

        As `SlideFile.polygon` gives them, one list of rings a part; most_px: as for `whole_boxes`.
        """
        whole, own = self.whole_boxes(most_px)[row], self.file.boxes_table()["xyxy"][row].astype(np.float64)
        if np.array_equal(whole, own):
            return [self.file.polygon(row)]
        parts = np.flatnonzero(self._part_of == self._part_of[row])
        shift = (self._corners[parts] - self._corners[row]) / self._scale
        return [[ring + to for ring in self.file.polygon(int(part))] for part, to in zip(parts, shift, strict=True)]

    # --- which tiles and boxes belong together

    @cached_property
    def _whole(self) -> dict[int, np.ndarray]:
        return {}

    @cached_property
    def _corners(self) -> np.ndarray:
        """Corner of the tile of each box in level-0 pixels: int64 (M, 2)."""
        corners: np.ndarray = self.file.coords[self.file.box_tiles]
        return corners

    @cached_property
    def _objects(self) -> tuple[np.ndarray, np.ndarray]:
        """The object that each box is a part of, int64 (M,), and the number of parts of each, int64 (objects,)."""
        objects = self.file.boxes_table()["object"]
        if self._alone:  # tiles beside each other are other images
            return np.arange(len(objects)), np.ones(len(objects), np.int64)
        _, part_of, parts = np.unique(objects, return_inverse=True, return_counts=True)
        return part_of, parts

    @property
    def _part_of(self) -> np.ndarray:
        return self._objects[0]

    @property
    def _parts(self) -> np.ndarray:
        return self._objects[1]

    @cached_property
    def _cells(self) -> dict[tuple[int, int], list[int]]:
        """Tiles by where their corners lie, in cells of the side of a tile; none that could not be decoded."""
        cells: dict[tuple[int, int], list[int]] = defaultdict(list)
        for row, (x, y) in enumerate((self.file.coords // self.file.size_l0).astype(int).tolist()):
            cells[x, y].append(row)
        for row in self.file.bad_tiles.tolist():
            x, y = (self.file.coords[row] // self.file.size_l0).astype(int).tolist()
            cells[x, y].remove(row)
        return cells

    def _neighbours(self, tile: int, x: int, y: int, side_px: int) -> Iterator[tuple[int, int, int]]:
        """Other tiles that reach into a window, with their corners in the frame of `tile`."""
        if self._alone:
            return
        coords, side_l0 = self.file.coords, self.file.size_l0
        left_l0, top_l0 = coords[tile] + np.array([x, y]) * self._scale
        columns, rows = (
            range(floor(start / side_l0) - 1, floor((start + side_px * self._scale) / side_l0) + 1)
            for start in (left_l0, top_l0)
        )
        for key in ((column, row) for row in rows for column in columns):
            for other in self._cells.get(key, ()):
                if other != tile:
                    left, top = np.rint((coords[other] - coords[tile]) / self._scale).astype(int).tolist()
                    yield other, left, top

    # --- what no stored tile has

    def _extent(self, tile: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """First and last whole pixel of the slide (of the image, where each tile is one) in the frame of a tile."""
        if self._alone:
            return (0, 0), (self.file.patch_size, self.file.patch_size)
        x, y = self.file.coords[tile].tolist()
        width, height = self.file.dimensions_l0
        low, high = ((-c / self._scale for c in (x, y)), ((width - x) / self._scale, (height - y) / self._scale))
        return tuple(ceil(v - 1e-6) for v in low), tuple(floor(v + 1e-6) for v in high)

    def _beyond(self, tile: int, x: int, y: int, side_px: int, own: np.ndarray) -> np.ndarray:
        """The window as the slide has it or, where it cannot be read, with the edges of the tile repeated."""
        if self._slide_readable:
            try:
                return self.file.region(tile, x, y, side_px)
            except DamagedError:
                raise
            except (UserError, OSError):
                self._slide_readable = False  # gone, or another machine's: the stored tiles are all there is
        columns, rows = (np.clip(np.arange(start, start + side_px), 0, len(own) - 1) for start in (x, y))
        return own[rows[:, None], columns[None]]


def _inside(start: int, side_px: int, low: int, high: int) -> int:
    """A start moved so that a window lies between low and high, in their middle where it is larger."""
    if high - low < side_px:
        return floor((low + high - side_px) / 2)
    return min(max(start, low), high - side_px)


def _span(start: int, length: int, side_px: int) -> slice:
    """Pixels of a window that start to start + length covers."""
    return slice(max(0, start), max(0, min(side_px, start + length)))


def _paste(window: np.ndarray, known: np.ndarray, tile: np.ndarray, left: int, top: int) -> None:
    """Put a tile whose corner lies at (left, top) of the window where the window is not known yet."""
    rows, columns = _span(top, len(tile), len(window)), _span(left, len(tile), len(window))
    new = ~known[rows, columns]
    part = tile[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    window[rows, columns][new] = part[new]
    known[rows, columns] = True
