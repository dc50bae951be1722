"""Annotation files: find them, match them to slides by name, and tell their readers about the slide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from annotations.errors import UserError
from tiling.slide_file.read import SlideFile
from tiling.slide_file.write import source_stamp
from tiling.storage.paths import expand_home

if TYPE_CHECKING:
    from annotations.readers.slide_context import SlideContext

SUFFIXES = (
    *(".geojson", ".geojson.gz", ".geojson.zip", ".json", ".json.gz", ".json.zip", ".zip"),
    *(".xml", ".xml.gz", ".annotations", ".ndpa", ".parquet", ".geoparquet"),
)
MASK_SUFFIXES = (".png", ".tif", ".tiff")  # looked for in folders that hold nothing else: pictures abound
SIDECAR = ".classes.json"
OFFSETS = ("hamamatsu.XOffsetFromSlideCentre", "hamamatsu.YOffsetFromSlideCentre")


def files_below(folder: Path) -> list[Path]:
    """Annotation files of a folder and its folders, by extension, hidden ones left out; label images where that is all."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.lower().endswith(SIDECAR)]
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    vector = [path for path in files if path.name.lower().endswith(SUFFIXES)]
    return vector or [path for path in files if path.name.lower().endswith(MASK_SUFFIXES)]


def stamp(path: Path) -> dict[str, Any]:
    """Name, size and time of an annotation file, and of the classes beside a label image."""
    values = {"name": path.name, **dict(zip(("size", "mtime_ns"), source_stamp(path), strict=True))}
    for beside in (path.with_name(path.name + SIDECAR), path.with_name(path.stem.removesuffix(".ome") + SIDECAR)):
        if path.name.lower().endswith(MASK_SUFFIXES) and beside.is_file():
            return {**values, "classes": list(source_stamp(beside))}
    return values


def slide_context(file: SlideFile, files: Sequence[Path]) -> SlideContext:
    """The slide as readers of annotations need it; opened for NDPA alone, which counts from the centre of the glass."""
    from annotations.readers.slide_context import SlideContext

    offset = _offset_nm(file.source) if any(path.name.lower().endswith(".ndpa") for path in files) else None
    return SlideContext(file.slide_id, file.dimensions_l0, file.mpp_level0, offset)


def _offset_nm(source: Path) -> tuple[float, float] | None:
    """Nanometres from the centre of the glass to the slide's; None where the slide is gone or does not say."""
    import openslide

    try:
        with openslide.OpenSlide(source) as slide:
            x, y = (float(slide.properties[name]) for name in OFFSETS)
    except (openslide.OpenSlideError, OSError, KeyError, ValueError):
        return None
    return x, y


def annotation_files(annotations: Path | str | Sequence[Path | str]) -> list[Path]:
    """Annotation files among files and folders (searched recursively by extension), absolute, each once, in order."""
    inputs = [annotations] if isinstance(annotations, str | Path) else list(annotations)
    files: dict[Path, None] = {}
    for value in inputs:
        path = expand_home(value)
        if path.is_file():
            files[path.absolute()] = None
            continue
        if not path.is_dir():
            raise UserError(f"{path}: no such file or folder of annotations")
        below = files_below(path)
        if not below:
            looked = " ".join((*SUFFIXES, *MASK_SUFFIXES))
            raise UserError(f"{path}: holds no annotations (looked for {looked}, in its folders too)")
        files |= dict.fromkeys(file.absolute() for file in below)
    if not files:
        raise UserError("no annotations given: name GeoJSON files or their folder")
    return list(files)


def match_files(slide_ids: Sequence[str], files: Sequence[Path]) -> dict[str, tuple[Path, ...]]:
    """slide_id -> its annotation files, in order; the longest slide_id that a file's name is or begins with has it."""
    matched: dict[str, list[Path]] = {slide_id: [] for slide_id in slide_ids}
    for path in files:
        if (owner := owner_of(matched, path.name)) is not None:
            matched[owner].append(path)
    if len(slide_ids) == len(files) == 1:
        matched[slide_ids[0]] = list(files)
    return {slide_id: tuple(paths) for slide_id, paths in matched.items()}


def owner_of(slide_ids: Mapping[str, object], name: str) -> str | None:
    """Try the name cut at each separator from its end: quick for many slides, and the longest slide_id comes first."""
    for end in range(len(name), 0, -1):
        if (end == len(name) or name[end] in "._-") and name[:end] in slide_ids:
            return name[:end]
    return None
