"""Choose the backend of a slide: each is tried in order, or one is forced by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from annotations.errors import UserError, one_line
from tiling.storage.paths import display_path, url_of
from tiling.wsi.backends.base import Reader
from tiling.wsi.backends.image import ImageReader
from tiling.wsi.backends.openslide import OpenSlideReader
from tiling.wsi.backends.tiff_direct import DirectReader
from tiling.wsi.backends.tiff_pages import LoopedTiffError, pages_of
from tiling.wsi.backends.tiffslide import TiffSlideReader
from tiling.wsi.backends.upright import UprightReader

READERS: dict[str, Callable[[Path], Reader]] = {  # in the order in which they are tried
    "direct": DirectReader,
    "openslide": OpenSlideReader,
    "tiffslide": TiffSlideReader,
    "image": ImageReader,
}


def open_reader(path: Path, wanted: str = "auto") -> tuple[Reader, str]:
    """Open a file with the first of `READERS` that reads it, or with the wanted one; returns it and why it is this one.

    Raises UserError for a reader of no such name and where none reads the file; the line tells the reason of each.
    """
    if wanted not in ("auto", *READERS):
        raise UserError(f"--reader {wanted}: choose among auto, {', '.join(READERS)}")
    url = url_of(path)
    try:
        pages_of(path)
    except LoopedTiffError as error:
        raise UserError(
            f"{display_path(path)}: not a readable slide: {error}: copy it again or convert it to a tiled TIFF"
        ) from None
    refusals: list[str] = []
    for name in (wanted,) if wanted != "auto" else ("tiffslide",) if url else READERS:
        try:
            reader = READERS[name](path)
        except Exception as error:  # each library has errors of its own; all are told below
            reason = one_line(error).replace(f" {str(path)!r}", "") or type(error).__name__
            refusals.append(f"{name}: {reason[:120]}")
            continue
        why = f"its stored {reader.stores} tiles are read directly" if isinstance(reader, DirectReader) else ""
        why = "asked for" if wanted != "auto" else "a URL" if url else "; ".join(refusals) or why
        return UprightReader(reader) if reader.orientation != 1 else reader, why
    hint = "copy it again or convert it to a tiled TIFF" if wanted == "auto" else "leave out --reader to try the others"
    if url:
        hint = "is it there, and does its server give parts of files (ranges)? Else download it"
    raise UserError(f"{display_path(path)}: not a readable slide ({'; '.join(refusals)}): {hint}")
