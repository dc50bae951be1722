"""The slide that a slide file was tiled from, for pixels that are not stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from annotations.errors import UserError
from tiling.wsi.slide import Slide


class TiledFrom(Protocol):
    """A slide file, as far as it tells of its slide."""

    @property
    def path(self) -> Path: ...

    @property
    def source(self) -> Path: ...

    @property
    def parameters(self) -> dict[str, Any]: ...

    @property
    def dimensions_l0(self) -> tuple[int, int]: ...

    def check_source(self) -> None: ...


def open_source(file: TiledFrom) -> Slide:
    """The slide as `tile` read it. Raises UserError where it is gone, or has another size than when it was tiled."""
    file.check_source()
    asked = file.parameters
    resample, reader = str(asked.get("resample") or "fast"), str(asked.get("reader") or "auto")
    slide = Slide.open(file.source, reader=reader, resample=resample)
    if (size := (slide.info.width_l0, slide.info.height_l0)) != file.dimensions_l0:
        slide.close()
        here, then = (f"{width} x {height}" for width, height in (size, file.dimensions_l0))
        raise UserError(f"{file.path}: its slide is {here} pixels, {then} when it was tiled: run odis-path tile again")
    if hasattr(slide.reader, "share_cache"):
        slide.reader.share_cache()  # many slides stay open at a time
    return slide
