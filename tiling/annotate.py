"""Annotation files -> boxes in the slide files: match by name, find the origin, clip to the tiles, write."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from annotations.errors import UserError
from tiling.cohort import Outcome, run_cohort
from tiling.slidefile import SlideFile, list_slide_files
from tiling.slidewrite import parameters_hash, replace_groups, source_stamp

if TYPE_CHECKING:
    from annotations.clip import TileBoxes
    from annotations.table import ObjectTable

METHOD_VERSION = 1  # raise it when reading or clipping changes, so that old boxes are made anew
HASH_ATTR, RECORD_ATTR, RESULT_ATTR = "annotation_sha256", "annotation_parameters", "annotation_result"
SUFFIXES = (".geojson.gz", ".geojson.zip", ".json.gz", ".json.zip", ".geojson", ".json", ".zip")
LEFT_OUT = ("points_skipped", "lines_skipped", "empty", "malformed", "ignored", "invalid_dropped", "zero_area")
FEW_INSIDE = 0.1  # a smaller share of objects on tiles is worth a warning
POINT_SIZE = re.compile(r"^\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*(um|µm|μm|px|)\s*$")

Origin = Literal["auto", "level0", "bounds"]
Kind = Literal["auto", "tissue", "cell"]
Work = tuple[Path, tuple[Path, ...]]


@dataclass(frozen=True)
class AnnotateSettings:
    """point_size: side of the square a point becomes, in point_unit ("um", or "px" of level 0); None skips points.

    polygons: store the clipped outlines too, as /boxes/polygon.
    """

    origin: Origin = "auto"
    kind: Kind = "auto"
    point_size: float | None = None
    point_unit: str = "um"
    polygons: bool = False

    def point_size_l0(self, mpp_level0: float) -> float | None:
        """The side in level-0 pixels."""
        if self.point_size is None or self.point_unit == "px":
            return self.point_size
        return self.point_size / mpp_level0


def annotate_cohort(
    folder: Path | str,
    annotations: Path | str | Sequence[Path | str],
    origin: str = "auto",
    kind: str = "auto",
    point_size: str | float | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    polygons: bool = False,
) -> list[Outcome]:
    """Clip annotations to the tiles of every slide file of a folder and store them as /objects and /boxes.

    annotations: GeoJSON files (also .gz, .zip) and folders of them; a file belongs to the slide whose slide_id its name
    is or begins with, the longest one; several files of one slide are taken together; one file and one slide belong
    together whatever their names. origin: what coordinates count from, "level0" the slide's corner, "bounds" the corner
    of its scanned area, "auto" whichever puts more of the objects on tiles. kind: "tissue" or "cell" decides for all
    objects, "auto" goes by what each says. point_size: side of the square a point becomes, "12um" (as is a bare
    number) or "24px" of level 0; None skips points. polygons: store the clipped outlines too (/boxes/polygon), which
    polygon masks need.

    Each outcome's info has objects, boxes, repaired, left_out, outside. A slide without annotations is fine and says so;
    one with the same boxes already is skipped. Raises UserError for settings and paths that cannot be, and where no
    annotation file belongs to any slide.
    """
    if origin not in ("auto", "level0", "bounds"):
        raise UserError(f"--origin {origin}: is one of auto, level0, bounds")
    if kind not in ("auto", "tissue", "cell"):
        raise UserError(f"--kind {kind}: is one of auto, tissue, cell")
    settings = AnnotateSettings(cast("Origin", origin), cast("Kind", kind), *parse_point_size(point_size), polygons)
    slides = {path.stem: path.absolute() for path in list_slide_files(folder)}
    files = annotation_files(annotations)
    matched = match_files(list(slides), files)
    if not any(matched.values()):
        first = f"first slide {next(iter(slides))}, first file {files[0].name}"
        raise UserError(f"{folder}: no annotation file is named after a slide ({first}): name them <slide_id>.geojson")
    used = {path for each in matched.values() for path in each}
    unused = [path.name for path in files if path not in used]
    items: list[Work] = [(path, matched[slide_id]) for slide_id, path in slides.items()]
    work = partial(annotate_slide, settings=settings)
    outcomes = run_cohort(items, work, title="annotate", workers=workers, scheduler=scheduler, name=_name)
    for (_, own), outcome in zip(items, outcomes, strict=True):
        if not own and unused:
            outcome.message += f" ({len(unused)} annotation files belong to no slide, for instance {unused[0]})"
    return outcomes


def annotate_slide(item: Work, settings: AnnotateSettings) -> dict[str, Any]:
    """Annotate one slide file; returns objects, boxes, repaired, outside, left_out, origin, `message`, `skipped`."""
    path, files = item
    if not files:
        return {"objects": 0, "boxes": 0, "message": "no annotations"}
    with SlideFile(path) as file:
        record = _record(file, files, settings)
        digest = parameters_hash(record)[1]
        attrs = file.group_attrs("objects")
        if file.has_boxes and attrs.get(HASH_ATTR) == digest:
            return _outcome(json.loads(attrs[RESULT_ATTR]), done=True)
        point_size_l0 = settings.point_size_l0(file.mpp_level0)
        tables = [_read(each, settings.kind, point_size_l0) for each in files]
        groups, result = _groups(file, files, tables, settings)
    groups["objects"]["attrs"] |= {
        HASH_ATTR: digest,  # on the group, so that it goes when another command replaces the group
        RECORD_ATTR: json.dumps(record, sort_keys=True),
        RESULT_ATTR: json.dumps(result, sort_keys=True),
    }
    groups["boxes"].setdefault("attrs", {})[HASH_ATTR] = digest
    replace_groups(path, groups)
    return _outcome(result)


def parse_point_size(value: str | float | None) -> tuple[float | None, str]:
    """ "12um", "24px", a bare number (micrometres) or None -> (number or None, "um" or "px")."""
    if value is None:
        return None, "um"
    match = POINT_SIZE.match(str(value))
    try:
        number = float(match.group(1)) if match else math.nan
    except ValueError:
        number = math.nan
    if match is None or not (math.isfinite(number) and number > 0):
        raise UserError(f"--point-size {value}: give a number above 0 with its unit, 12um or 24px (of level 0)")
    return number, "px" if match.group(2) == "px" else "um"


def annotation_files(annotations: Path | str | Sequence[Path | str]) -> list[Path]:
    """Annotation files among files and folders (searched recursively by extension), absolute, each once, in order."""
    inputs = [annotations] if isinstance(annotations, str | Path) else list(annotations)
    found: dict[Path, None] = {}
    for value in inputs:
        path = Path(value).expanduser()
        if path.is_file():
            found[path.absolute()] = None
            continue
        if not path.is_dir():
            raise UserError(f"{path}: no such file or folder of annotations")
        below = [each for each in sorted(path.rglob("*")) if each.name.lower().endswith(SUFFIXES) and each.is_file()]
        below = [each for each in below if not any(part.startswith(".") for part in each.relative_to(path).parts)]
        if not below:
            raise UserError(f"{path}: holds no annotations (looked for {' '.join(SUFFIXES)}, in its folders too)")
        found |= dict.fromkeys(each.absolute() for each in below)
    if not found:
        raise UserError("no annotations given: name GeoJSON files or their folder")
    return list(found)


def match_files(slide_ids: Sequence[str], files: Sequence[Path]) -> dict[str, tuple[Path, ...]]:
    """slide_id -> its annotation files, in order; the longest slide_id that a file's name is or begins with has it."""
    matched: dict[str, list[Path]] = {slide_id: [] for slide_id in slide_ids}
    for path in files:
        if (owner := _owner(matched, path.name)) is not None:
            matched[owner].append(path)
    if len(slide_ids) == len(files) == 1:
        matched[slide_ids[0]] = list(files)
    return {slide_id: tuple(paths) for slide_id, paths in matched.items()}


def _owner(slide_ids: Mapping[str, object], name: str) -> str | None:
    """Try the name cut at each separator from its end: quick for many slides, and the longest slide_id comes first."""
    for end in range(len(name), 0, -1):
        if (end == len(name) or name[end] in "._-") and name[:end] in slide_ids:
            return name[:end]
    return None


def _read(path: Path, kind: Kind, point_size_l0: float | None) -> ObjectTable:
    from annotations.read import read_annotations

    return read_annotations(path, kind=kind, point_size_l0=point_size_l0)


def _record(file: SlideFile, files: Sequence[Path], settings: AnnotateSettings) -> dict[str, Any]:
    """All that changes the result; the hash of it tells whether the boxes are up to date."""
    stamps = [{"name": path.name, "size": size, "mtime_ns": mtime} for path in files for size, mtime in [source_stamp(path)]]
    tiles = str(file.attrs["parameters_sha256"])
    return {"method_version": METHOD_VERSION, **asdict(settings), "tiles": tiles, "files": stamps}


def _groups(
    file: SlideFile, files: Sequence[Path], tables: Sequence[ObjectTable], settings: AnnotateSettings
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Groups /objects and /boxes, and what became of the objects. Raises UserError where a file's lie off the slide."""
    from annotations.group import annotation_groups
    from annotations.table import concatenate

    table, boxes, origin = _placed(file, concatenate(tables), settings)
    shift = file.bounds_xy if origin == "bounds" else (0, 0)
    for path, each in zip(files, tables, strict=True):
        _check_on_slide(file, path, each, shift)
    counts = table.counts
    result = {
        "objects": len(table),
        "boxes": len(boxes.object),
        "repaired": int(counts.get("repaired", 0)),
        "skipped": int(sum(counts.get(name, 0) for name in LEFT_OUT)),
        "outside": int(boxes.counts.get("outside", 0)),
        "origin": origin,
        "tiles": len(file),
        "points_skipped": int(counts.get("points_skipped", 0)),
        "shifted": list(file.bounds_xy) if origin == "bounds" else [0, 0],
        "files": [path.name for path in files],
    }
    groups = annotation_groups(table, boxes, file.mpp_level0)
    if boxes.polygons is not None:
        groups["boxes"]["polygon"] = boxes.polygons.arrays()
    return groups, result


def _placed(file: SlideFile, table: ObjectTable, settings: AnnotateSettings) -> tuple[ObjectTable, TileBoxes, str]:
    """The objects in level-0 pixels, their boxes, and the origin that was taken."""
    from annotations.clip import clip_to_tiles

    def clipped(each: ObjectTable) -> TileBoxes:
        return clip_to_tiles(each.geometry, file.coords, file.size_l0, file.patch_size, polygons=settings.polygons)

    origin = settings.origin
    if origin == "auto" and not any(file.bounds_xy):
        origin = "level0"
    if origin == "level0":
        return table, clipped(table), "level0"
    moved = table.shifted(*file.bounds_xy)
    moved_boxes = clipped(moved)
    if origin == "auto":
        boxes = clipped(table)
        if boxes.visible.sum(dtype=float) * (1 + 1e-6) >= moved_boxes.visible.sum(dtype=float):
            return table, boxes, "level0"
    return moved, moved_boxes, "bounds"


def _check_on_slide(file: SlideFile, path: Path, table: ObjectTable, shift: tuple[int, int]) -> None:
    """Raises UserError where not one object of the file reaches the slide, with both extents."""
    import shapely

    if not len(table):
        return
    width, height = file.dimensions_l0
    low_x, low_y, high_x, high_y = shapely.bounds(table.geometry).T
    low_x, high_x, low_y, high_y = low_x + shift[0], high_x + shift[0], low_y + shift[1], high_y + shift[1]
    if ((low_x < width) & (high_x > 0) & (low_y < height) & (high_y > 0)).any():
        return
    extent = f"x {low_x.min():.0f}..{high_x.max():.0f}, y {low_y.min():.0f}..{high_y.max():.0f}"
    slide = f"x 0..{width}, y 0..{height}"
    how = "is it of this slide, in level-0 pixels?"
    raise UserError(
        f"{path}: all {len(table)} objects lie off the slide {file.slide_id}: they span {extent}, it {slide}: {how}"
    )


def _outcome(result: dict[str, Any], done: bool = False) -> dict[str, Any]:
    """What the cohort shows of one slide."""
    shown = {key: result[key] for key in ("objects", "boxes", "repaired", "outside", "origin")}
    shown["left_out"] = result["skipped"]
    return {**shown, "skipped": done, "message": _message(result)}


def _message(result: dict[str, Any]) -> str:
    objects, inside = result["objects"], result["objects"] - result["outside"]
    remarks = []
    if len(result["files"]) > 1:
        remarks.append(f"taken together: {', '.join(result['files'])}")
    if result["origin"] == "bounds":
        remarks.append(f"origin: the scanned area's corner, moved by {tuple(result['shifted'])}")
    if result["points_skipped"]:
        remarks.append(f"{result['points_skipped']} points skipped: give them an extent with --point-size 12um")
    if not objects:
        remarks.append("the annotations hold no outline")
    elif not result["tiles"]:
        remarks.append("the slide has no tiles")
    elif inside < FEW_INSIDE * objects:
        remarks.append(f"warning: annotations sit off the tissue: {inside} of {objects} objects touch a tile")
    return "; ".join(remarks)


def _name(item: Work) -> str:
    return item[0].stem
