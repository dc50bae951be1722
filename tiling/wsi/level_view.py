"""The header facts of a slide, and the view of one of its levels as it is decoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tiling.storage.slide_id import slide_stem
from tiling.wsi.backends.base import Reader, background_of
from tiling.wsi.mpp import Mpp, mpp_of

BLOCK_PIXELS = 8_000_000  # level pixels read in one piece (24 MB of RGB, 96 MB while they are averaged)


@dataclass(frozen=True)
class SlideInfo:
    """Header facts of a slide. Sizes and bounds in level-0 pixels, mpp in micrometres per level-0 pixel or None."""

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
    reader_why: str = ""
    note: str = ""

    @classmethod
    def of(cls, path: Path, reader: Reader, reader_why: str = "", assume_mpp: float | None = None) -> SlideInfo:
        """Collect what the reader of a slide says; reader_why: why it is this one; assume_mpp: of a file without an mpp."""
        mpp = mpp_of(reader.properties, tags_only=reader.tags_only)
        if mpp.value is None and assume_mpp is not None:
            mpp = Mpp(assume_mpp, "--assume-mpp")
        width, height = reader.level_dimensions[0]
        return cls(
            path=path,
            slide_id=slide_stem(path),
            width_l0=int(width),
            height_l0=int(height),
            level_downsamples=reader.level_downsamples,
            level_dimensions=reader.level_dimensions,
            mpp=mpp.value,
            mpp_source=mpp.source,
            vendor=reader.vendor,
            reader=reader.name,
            bounds_xy=(_bound(reader.properties, "x"), _bound(reader.properties, "y")),
            background=background_of(reader.properties),
            mpp_note=mpp.note,
            reader_why=reader_why,
            note=reader.note,
        )

    @property
    def size_l0(self) -> tuple[int, int]:
        return self.width_l0, self.height_l0

    @property
    def stated_mpp(self) -> Mpp:
        return Mpp(self.mpp, self.mpp_source, self.mpp_note)


def _bound(properties: Mapping[str, Any], axis: str) -> int:
    """Where what was scanned begins, in level-0 pixels along an axis; 0 where the file does not say."""
    values = (properties.get(f"{prefix}.bounds-{axis}") for prefix in ("openslide", "tiffslide"))
    return int(float(next((value for value in values if value is not None), 0)))


@dataclass(frozen=True)
class LevelView:
    """A level as it is decoded: divided by scale. downsample: level-0 pixels per pixel of it; width, height: in those."""

    level: int
    scale: int
    downsample: float
    width: int
    height: int


class Levels(Protocol):
    """The part of a slide that the checks of levels need (`wsi.slide.Slide` is one)."""

    info: SlideInfo
    reader: Reader
    placements: dict[int, Any]

    @property
    def textured_places(self) -> np.ndarray: ...

    def downsample(self, level: int) -> float | None: ...

    def full_view(self, level: int) -> LevelView: ...

    def read_block(
        self, view: LevelView, edges: tuple[int, int, int, int], read: Callable[..., np.ndarray] | None = None
    ) -> np.ndarray: ...

    def resample_block(
        self, view: LevelView, edges: tuple[int, ...], pixels: np.ndarray, box: tuple[float, ...], out_w: int, out_h: int
    ) -> np.ndarray: ...

    def reopen(self) -> None: ...


def pixel_bounds(view: LevelView, boxes_l0: np.ndarray) -> np.ndarray:
    """Find the whole pixels of a view that cover level-0 boxes: (N, 4) x0, y0, x1, y1 -> int64 (N, 4) in its pixels."""
    scaled = np.asarray(boxes_l0, np.float64) / view.downsample
    low = np.floor(scaled[:, :2] + 1e-6)
    high = np.maximum(low + 1, np.ceil(scaled[:, 2:] - 1e-6))
    return np.concatenate([low, high], axis=1).astype(np.int64)
