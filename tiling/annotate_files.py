"""Annotation files of a slide: which files they are, and what their readers need to know of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiling.slidefile import SlideFile
from tiling.slidewrite import source_stamp

if TYPE_CHECKING:
    from annotations.frame import SlideFrame

SUFFIXES = (
    ".geojson.gz", ".geojson.zip", ".json.gz", ".json.zip", ".geojson", ".json", ".zip",
    ".xml", ".xml.gz", ".annotations", ".ndpa", ".parquet", ".geoparquet",
)  # fmt: skip
MASK_SUFFIXES = (".png", ".tif", ".tiff")  # looked for in folders that hold nothing else: pictures abound
SIDECAR = ".classes.json"
OFFSETS = ("hamamatsu.XOffsetFromSlideCentre", "hamamatsu.YOffsetFromSlideCentre")


def files_below(folder: Path) -> list[Path]:
    """Annotation files of a folder and its folders, by extension, hidden ones left out; label images where that is all."""
    below = [each for each in sorted(folder.rglob("*")) if each.is_file()]
    below = [each for each in below if not any(part.startswith(".") for part in each.relative_to(folder).parts)]
    below = [each for each in below if not each.name.lower().endswith(SIDECAR)]
    vector = [each for each in below if each.name.lower().endswith(SUFFIXES)]
    return vector or [each for each in below if each.name.lower().endswith(MASK_SUFFIXES)]


def stamp(path: Path) -> dict[str, Any]:
    """Name, size and time of an annotation file, and of the classes beside a label image."""
    found = {"name": path.name, **dict(zip(("size", "mtime_ns"), source_stamp(path), strict=True))}
    for beside in (path.with_name(path.name + SIDECAR), path.with_name(path.stem.removesuffix(".ome") + SIDECAR)):
        if path.name.lower().endswith(MASK_SUFFIXES) and beside.is_file():
            return {**found, "classes": list(source_stamp(beside))}
    return found


def frame_of(file: SlideFile, files: Sequence[Path]) -> SlideFrame:
    """The slide as readers of annotations need it; opened for NDPA alone, which counts from the centre of the glass."""
    from annotations.frame import SlideFrame

    offset = _offset_nm(file.source) if any(path.name.lower().endswith(".ndpa") for path in files) else None
    return SlideFrame(file.slide_id, file.dimensions_l0, file.mpp_level0, offset)


def _offset_nm(source: Path) -> tuple[float, float] | None:
    """Nanometres from the centre of the glass to the slide's; None where the slide is gone or does not say."""
    import openslide

    try:
        with openslide.OpenSlide(source) as slide:
            x, y = (float(slide.properties[name]) for name in OFFSETS)
    except (openslide.OpenSlideError, OSError, KeyError, ValueError):
        return None
    return x, y
