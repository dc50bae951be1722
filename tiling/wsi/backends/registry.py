"""Choose the backend of a slide: each is tried in order, or one is forced by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from annotations.errors import UserError, one_line
from tiling.storage.paths import shown, url_of
from tiling.wsi.backends.base import Reader
from tiling.wsi.backends.image import ImageReader
from tiling.wsi.backends.openslide import OpenSlideReader
from tiling.wsi.backends.tiff_pages import (
    LoopedTiffError,
    pages_of,
)
from tiling.wsi.backends.upright import UprightReader

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
            text = one_line(error).replace(f" {str(path)!r}", "") or type(error).__name__
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
        from tiling.wsi.backends.tiff_direct import DirectReader

        return DirectReader
    if name == "tiffslide":
        from tiling.wsi.backends.tiffslide import TiffSlideReader

        return TiffSlideReader
    return OpenSlideReader if name == "openslide" else ImageReader
