"""Find the slides of a cohort among files, folders, globs and URLs, and give each a name of its own."""

from __future__ import annotations

import glob
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from annotations.errors import UserError
from tiling.dicom import one_per_series
from tiling.manifest import SlideItem, id_of, patient_of
from tiling.urls import file_name, path_of, place, shown, url_of, urls_under

SLIDE_EXTENSIONS = frozenset(
    [".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide", ".dcm", ".qptiff", ".btf"]
)
IMAGE_EXTENSIONS = frozenset([".png", ".jpg", ".jpeg", ".bmp"])  # slides only where they are named


def find_slides(inputs: Iterable[Path | str]) -> list[SlideItem]:
    """Slides among files, folders (searched recursively by extension), globs and URLs, each once, in order of their paths.

    Of a DICOM series of many files one is taken, and a line on stderr says so. Slides of equal stems in different folders
    get their folder's name in front. Raises UserError for a path that does not exist and for one that holds no slide.
    """
    found: dict[str, Path] = {}
    for value in inputs:
        path = path_of(value)
        try:
            for each in _expanded(path):
                found.setdefault(place(each), each)
        except OSError as error:
            where = error.filename or path
            raise UserError(f"{where}: cannot be looked into: {error.strerror}: ask for the right to read it") from None
    if not found:
        raise UserError("no slides given: name files, folders or a manifest.csv")
    slides = one_per_series(found.values())
    if more := len(found) - len(slides):
        said = f"{more} of {len(found)} files left out: each belongs to the DICOM series of another and is read with it"
        print(said, file=sys.stderr, flush=True)
    return _with_unique_ids([SlideItem(path, id_of(path), patient_of(file_name(path))) for path in slides])


def _expanded(path: Path) -> list[Path]:
    if url := url_of(path):
        named = Path(file_name(path)).suffix.lower() in SLIDE_EXTENSIONS and "*" not in url
        return [path] if named else urls_under(url, SLIDE_EXTENSIONS)
    if path.is_dir():
        return _slides_under(path)
    if path.exists():
        return [path]
    matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
    if not matches:
        raise UserError(f"{path}: no such file or folder")
    return [slide for match in matches for slide in (_expanded(match) if match.is_dir() else [match])]


def _slides_under(folder: Path) -> list[Path]:
    known = SLIDE_EXTENSIONS | IMAGE_EXTENSIONS
    files = sorted(each for each in folder.rglob("*") if each.suffix.lower() in known and each.is_file())
    files = [each for each in files if not any(part.startswith(".") for part in each.relative_to(folder).parts)]
    slides = [each for each in files if each.suffix.lower() in SLIDE_EXTENSIONS]
    if slides:
        return slides
    said = f"holds no slide (looked for {' '.join(sorted(SLIDE_EXTENSIONS))}, in its folders too)"
    if files:
        pattern = files[0].parent / f"*{files[0].suffix}"
        said += f": images that are tiles go through odis-path import; where each is a slide, give them as '{pattern}'"
    raise UserError(f"{folder}: {said}")


def _with_unique_ids(items: list[SlideItem]) -> list[SlideItem]:
    """Put folder names in front of ids that occur more than once, as many as it takes, or the extension behind."""
    clashes: dict[str, list[SlideItem]] = {}
    for item in items:
        clashes.setdefault(item.slide_id, []).append(item)
    new_id = {group[0].path: slide_id for slide_id, group in clashes.items() if len(group) == 1}
    for group in clashes.values():
        if len(group) > 1:
            new_id |= dict(zip((item.path for item in group), _told_apart(group), strict=True))
    owner: dict[str, Path] = {}
    for path, slide_id in new_id.items():
        if slide_id in owner:
            raise UserError(f"{shown(path)}, {shown(owner[slide_id])}: both would be named {slide_id}: name them in a manifest")
        owner[slide_id] = path
    return [replace(item, slide_id=new_id[item.path]) for item in items]


def _told_apart(group: list[SlideItem]) -> list[str]:
    folders = [Path(place(item.path)).parts[1:-1] for item in group]
    names = [item.slide_id for item in group]
    for depth in range(1, max(len(parts) for parts in folders) + 1):
        longer = ["_".join([*parts[-depth:], name]).lstrip(".") for parts, name in zip(folders, names, strict=True)]
        if len(set(longer)) == len(group):
            return longer
    return [f"{name}_{Path(file_name(item.path)).suffix[1:]}" for name, item in zip(names, group, strict=True)]
