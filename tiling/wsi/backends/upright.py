"""Orientation as TIFF and EXIF state it: positions and pixels as they are stored, and upright."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tiling.wsi.backends.tiff_pages import ORIENTATION, SparseTiles

if TYPE_CHECKING:
    from tiling.wsi.backends.base import Reader


@dataclass(frozen=True)
class Turn:
    """The turn that sets a stored picture upright: mirror it left to right, then top to bottom, then exchange its axes."""

    flip_x: bool = False
    flip_y: bool = False
    swap: bool = False

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of a stored picture -> of the upright one, and back."""
        return (height, width) if self.swap else (width, height)

    def array(self, stored: np.ndarray) -> np.ndarray:
        """(h, w, ...) as stored -> upright, a view."""
        turned = stored[:: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1]
        return turned.swapaxes(0, 1) if self.swap else turned

    def xy(self, xy: np.ndarray, stored: tuple[int, int]) -> np.ndarray:
        """Positions float (V, 2) in a picture as stored, of this width and height -> in the upright one."""
        x = stored[0] - xy[:, 0] if self.flip_x else xy[:, 0]
        y = stored[1] - xy[:, 1] if self.flip_y else xy[:, 1]
        return np.stack((y, x) if self.swap else (x, y), axis=1)

    def stored_box(self, x: int, y: int, w: int, h: int, stored: tuple[int, int]) -> tuple[int, int, int, int]:
        """A box x, y, w, h of the upright picture -> of the stored one, of this width and height."""
        if self.swap:
            x, y, w, h = y, x, h, w
        return (stored[0] - x - w if self.flip_x else x), (stored[1] - y - h if self.flip_y else y), w, h


TURNS = {  # orientation -> what sets it upright
    1: Turn(),
    2: Turn(flip_x=True),
    3: Turn(flip_x=True, flip_y=True),
    4: Turn(flip_y=True),
    5: Turn(swap=True),
    6: Turn(flip_y=True, swap=True),
    7: Turn(flip_x=True, flip_y=True, swap=True),
    8: Turn(flip_x=True, swap=True),
}


def exif_orientation(image: Any) -> int:
    """The orientation of an image of Pillow's, 1 to 8; 1 where it says nothing that can be read.

    1 of a TIFF as well: Pillow turns those as it loads them.
    """
    if image.format == "TIFF":
        return 1
    try:
        value = image.getexif().get(ORIENTATION, 1)
        return int(value) if value in TURNS else 1
    except Exception:  # of damaged EXIF, many; where the pixels are damaged, whoever decodes them tells
        return 1


class UprightReader:
    """A reader whose file is stored turned, read as it stands upright (see tiling.wsi.backends.base.Reader)."""

    scales: tuple[int, ...] = (1,)  # the part pixel that a scaled level ends with would lie at its other end
    orientation = 1

    def __init__(self, stored: Reader) -> None:
        self._stored, self._turn = stored, TURNS[stored.orientation]
        self.name, self.vendor, self.threadsafe = stored.name, stored.vendor, stored.threadsafe
        self.properties: Mapping[str, Any] = stored.properties
        self.tags_only = stored.tags_only
        self.level_downsamples = stored.level_downsamples
        self.level_dimensions = tuple(self._turn.size(*size) for size in stored.level_dimensions)
        turned = f"shown upright, as its orientation ({stored.orientation}) says"
        self.note = f"{stored.note}; {turned}" if stored.note else turned

    def read(self, level: int, x: int, y: int, w: int, h: int, scale: int = 1) -> np.ndarray:
        """uint8 (h, w, 3)"""
        box = self._turn.stored_box(x, y, w, h, self._stored.level_dimensions[level])
        return np.ascontiguousarray(self._turn.array(self._stored.read(level, *box, scale)))

    def expect_strips(self) -> None:
        self._stored.expect_strips()

    def sparse_tiles(self, level: int) -> SparseTiles | None:
        """The parts of a level that were not scanned; None where nothing is known to be missing."""
        stored, turn = self._stored.sparse_tiles(level), self._turn
        if stored is None:
            return None
        width, height = self._stored.level_dimensions[level]
        cut = (-width % stored.tile_w if turn.flip_x else 0), (-height % stored.tile_h if turn.flip_y else 0)
        return SparseTiles(*turn.size(stored.tile_w, stored.tile_h), turn.array(stored.missing), *turn.size(*cut))

    def close(self) -> None:
        self._stored.close()
