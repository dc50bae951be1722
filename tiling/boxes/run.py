"""`annotate`: annotation files become the boxes of slide files; match by name, find the origin, clip to the tiles, write."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from annotations.errors import UserError
from tiling.boxes.match_files import annotation_files, match_files, owner_of, slide_context, stamp
from tiling.boxes.result import RESULT_ATTR, AnnotateResult, placement, reading_facts
from tiling.boxes.settings import AnnotateSettings, Reading, checked_choices, checked_mpp, named_classes, parse_point_size
from tiling.boxes.summary import BoxOutcomes
from tiling.jobs.outcome import ItemResult, Note, Outcome
from tiling.jobs.run import available_cpus, run_cohort
from tiling.slide_file.merge import PARTS_ATTR, Groups, files_to_read, merge_groups, read_groups, run_records
from tiling.slide_file.read import SlideFile, list_slide_files
from tiling.slide_file.write import parameters_hash, replace_groups
from tiling.storage.checksums import DAMAGED
from tiling.storage.locks import describe_changes, lock_file, lock_settings

if TYPE_CHECKING:
    from annotations.readers.geojson.large_file import Clipped, Grid

METHOD_VERSION = 4  # raise it when reading or clipping changes, so that old boxes are made anew
COUNTED = ("objects", "boxes", "repaired", "left_out", "outside")  # keys of Outcome.info that are summed
HASH_ATTR, RECORD_ATTR = "annotation_sha256", "annotation_parameters"
LEFT_OUT = (  # names among the counts of a table
    *("points_skipped", "lines_skipped", "empty", "malformed", "ignored", "invalid_dropped", "beyond", "zero_area", "tangled"),
    *("repeated", "unlisted_image"),
)
NO_ANNOTATIONS = "no annotations"
Work = tuple[Path, tuple[Path, ...]]  # a slide file and its annotation files


def annotate(
    folder: Path | str,
    annotations: Path | str | Sequence[Path | str],
    origin: str = "auto",
    kind: str = "auto",
    point_size: str | float | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    polygons: bool = False,
    timeout: float | None = None,
    append: bool = False,
    stream: bool = False,
    classes: Path | str | None = None,
    strict_classes: bool = False,
    annotation_mpp: float | None = None,
    nuclei: bool = False,
    split_values: bool = False,
    verbose: bool = False,
) -> BoxOutcomes:
    """Clip annotations to the tiles of every slide file of a folder and store them as /objects and /boxes.

    annotations: files of any dialect that annotations.read_annotations reads, and folders of them; a file belongs to the
    slide whose slide_id its name is or begins with, the longest one; several files of one slide are taken together; one file
    and one slide belong together whatever their names. origin: what coordinates count from, "level0" the slide's corner,
    "bounds" the corner of its scanned area, "auto" whichever puts more of the objects on tiles. kind: "tissue" or "cell"
    decides for all objects, "auto" is each object's own. point_size: side of the square a point becomes, "12um" (as is a bare
    number) or "24px" of level 0; None skips points. polygons: store the clipped outlines too (/boxes/polygon), which
    polygon masks need. append: add to the boxes a slide has instead of replacing them; files whose objects are there already
    are left out. stream: bound memory at some cost in time. classes: YAML that says what classes are called here
    (annotations.read_classmap); strict_classes: one it does not name fails the slide. annotation_mpp: micrometres per unit of
    the annotations' coordinates, where they are not of level 0. nuclei: take the nucleus of a QuPath cell for it.
    split_values: each connected piece (4-connected) of a value of a mask is an object, as in a mask of 0 and 255.
    verbose: list the outlines that were repaired, too, in the summary.

    Each outcome's info has objects, boxes, repaired, left_out, outside. A slide without annotations is fine and says so;
    one with the same boxes already is skipped. timeout: seconds after which a slide is given up. Raises UserError for
    settings and paths that cannot be, where no annotation file belongs to any slide, and where another run annotates the
    folder with other settings.
    """
    begun = perf_counter()
    choices, size = checked_choices(origin, kind), parse_point_size(point_size)
    class_map, mpp = named_classes(classes, strict_classes), checked_mpp(annotation_mpp)
    settings = AnnotateSettings(*choices, *size, polygons, class_map, mpp, nuclei, split_values)
    items, unused = _match(folder, annotations)
    used = sorted({path for _, files in items for path in files})
    processes = 1 if scheduler or stream else max(1, available_cpus() // min(workers or available_cpus(), len(items)))
    work = partial(annotate_slide, settings=settings, append=append, stream=stream, processes=processes)
    folder = Path(folder)
    run = partial(run_cohort, workers=workers, scheduler=scheduler, timeout=timeout)
    with lock_settings(folder, "annotate", {**asdict(settings), "append": append, "annotations": _digest(used)}):
        outcomes = run(items, work, title="annotate", name=_name, folder=folder, wrote=_file_of)
    _note_names(items, outcomes, unused)
    return BoxOutcomes(outcomes, "annotate", folder, COUNTED, perf_counter() - begun, verbose=verbose)


def _match(folder: Path | str, annotations: Path | str | Sequence[Path | str]) -> tuple[list[Work], list[str]]:
    """Return every slide file with its annotation files, and the names of files that belong to no slide."""
    slides = {path.stem: path.absolute() for path in list_slide_files(folder)}
    files = annotation_files(annotations)
    matched = match_files(list(slides), files)
    if not any(matched.values()) and len(files) == 1:  # a file of another program is no second slide
        matched |= match_files([slide_id for slide_id, path in slides.items() if _opens(path)], files)
    if not any(matched.values()):
        first = f"first slide {next(iter(slides))}, first file {files[0].name}"
        raise UserError(f"{folder}: no annotation file is named after a slide ({first}): name them <slide_id>.geojson")
    used = {path for paths in matched.values() for path in paths}
    unused = [path.name for path in files if path not in used]
    return [(path, matched[slide_id]) for slide_id, path in slides.items()], unused


def _note_names(items: Sequence[Work], outcomes: Sequence[Outcome], unused: Sequence[str]) -> None:
    """Note the file that was taken although it is named after no slide, and the files that were not taken."""
    left_out = f"{len(unused)} annotation files belong to no slide, for instance {unused[0]}" if unused else ""
    for (path, files), outcome in zip(items, outcomes, strict=True):
        if files and owner_of({path.stem: None}, files[0].name) is None:
            text = f"{files[0].name} is not named after it, and was taken as the only file for the only slide"
            outcome.notes.append(Note(text))
        elif not files and left_out and outcome.ok:
            outcome.notes = [Note(f"{NO_ANNOTATIONS} ({left_out})")]
    if left_out and all(files for _, files in items):
        print(f"annotate: {left_out}", file=sys.stderr, flush=True)


def _opens(path: Path) -> bool:
    try:
        with SlideFile(path):
            return True
    except UserError:
        return False


def annotate_slide(
    item: Work, settings: AnnotateSettings, append: bool = False, stream: bool = False, processes: int = 1
) -> ItemResult:
    """Annotate one slide file; info: objects, boxes, repaired, outside, left_out, origin.

    append, stream: as in annotate. processes: at most so many read one large file together.
    """
    path, files = item
    if not files:
        SlideFile(path).close()  # raises UserError where it cannot be read
        return ItemResult({"objects": 0, "boxes": 0}, [Note(NO_ANNOTATIONS)])
    reading = Reading(settings, stream, processes)
    with lock_file(path):
        return _append(path, files, reading) if append else _annotate(path, files, reading)


def _annotate(path: Path, files: Sequence[Path], reading: Reading) -> ItemResult:
    with SlideFile(path) as file:
        record = _record(file, files, reading.settings)
        digest = parameters_hash(record)[1]
        damaged = file.boxes_damaged
        attrs = {} if damaged else file.group_attrs("objects")
        if file.has_boxes and attrs.get(HASH_ATTR) == digest:
            return _item_result(AnnotateResult.from_json(attrs[RESULT_ATTR]), skipped=True)
        groups, result = _clip(file, files, reading)
    _sign(groups, digest, record, result)
    replace_groups(path, groups)
    redone = _reason_to_redo(json.loads(attrs[RECORD_ATTR]), record) if RECORD_ATTR in attrs else DAMAGED if damaged else ""
    return _item_result(result, redone)


def _append(path: Path, files: Sequence[Path], reading: Reading) -> ItemResult:
    """Annotate a slide file and keep the objects and boxes it has; where it has none, as without --append."""
    with SlideFile(path) as file:
        if file.boxes_damaged:
            raise UserError(f"{path}: its objects and boxes are damaged: annotate it anew, without --append")
        attrs = file.group_attrs("objects")
        if not file.has_boxes:
            return _annotate(path, files, reading)
        settings = replace(reading.settings, polygons=reading.settings.polygons or file.has_polygons)
        parts = run_records(attrs, RECORD_ATTR)
        new = files_to_read(path, files, _record(file, files, settings), parts)
        there = len(file.objects_table()["label"])
        if not new:
            info = {"objects": there, "boxes": len(file.boxes_table()["object"]), "repaired": 0, "outside": 0, "left_out": 0}
            names = ", ".join(path.name for path in files)
            return ItemResult(info, [Note(f"nothing added: the objects of {names} are there already")], skipped=True)
        groups, result = _clip(file, new, replace(reading, settings=settings))
        parts.append(_record(file, new, settings))
    result.there = there
    merged = merge_groups(path, read_groups(path), groups)
    record = {**parts[-1], "files": [stamp for part in parts for stamp in part["files"]]}
    _sign(merged, parameters_hash({"parts": parts})[1], record, result)
    merged["objects"]["attrs"][PARTS_ATTR] = json.dumps(parts, sort_keys=True)
    replace_groups(path, merged)
    return _item_result(result)


def _sign(groups: Groups, digest: str, record: Mapping[str, Any], result: AnnotateResult) -> None:
    """Write what made the groups into their attributes, which go when another command replaces the groups."""
    record_text = json.dumps(record, sort_keys=True)
    groups["objects"]["attrs"] |= {HASH_ATTR: digest, RECORD_ATTR: record_text, RESULT_ATTR: result.to_json()}
    groups["boxes"].setdefault("attrs", {})[HASH_ATTR] = digest


def _record(file: SlideFile, files: Sequence[Path], settings: AnnotateSettings) -> dict[str, Any]:
    """All that changes the result; the hash of it tells whether the boxes are up to date."""
    plain = json.loads(json.dumps(asdict(settings)))
    tiles = str(file.attrs["parameters_sha256"])
    return {"method_version": METHOD_VERSION, **plain, "tiles": tiles, "files": [stamp(path) for path in files]}


def _clip(file: SlideFile, files: Sequence[Path], reading: Reading) -> tuple[Groups, AnnotateResult]:
    """Return the groups /objects and /boxes, and the result. Raises UserError where a file lies off the slide as a whole."""
    from annotations.readers.geojson.large_file import join_clipped
    from annotations.slide_groups import annotation_groups

    settings = reading.settings
    grid = _grid(file, settings)
    clipped_files = [_clip_file(file, path, grid, reading) for path in files]
    clipped = join_clipped(clipped_files, grid)
    origin = _best_origin(clipped)
    for path, objects in zip(files, clipped_files, strict=True):
        _check_on_slide(file, path, objects, grid, origin)
    table, boxes = clipped.table, clipped.boxes[origin]
    unknown = settings.classes.unknown(table.labels) if settings.classes else ()
    table = settings.classes.applied(table) if settings.classes else table
    from_bounds = settings.origin == "bounds" or origin > 0
    result = AnnotateResult(
        **reading_facts(table, boxes),
        **placement(clipped, grid, origin),
        objects=len(table),
        boxes=len(boxes.object),
        repaired=int(table.counts.get("repaired", 0)),
        skipped=int(sum(table.counts.get(name, 0) for name in LEFT_OUT)),
        outside=int(boxes.counts.get("outside", 0)),
        origin="bounds" if from_bounds else "level0",
        shifted=list(file.bounds_xy) if from_bounds else [0, 0],
        tiles=len(file),
        points_skipped=int(table.counts.get("points_skipped", 0)),
        files=[path.name for path in files],
        repairs=[line.replace("\0", "#") for line in table.log.repairs],
        unknown_classes=list(unknown),
    )
    return annotation_groups(table, boxes, file.mpp_level0, clipped.area_l0), result


def _clip_file(file: SlideFile, path: Path, grid: Grid, reading: Reading) -> Clipped:
    """Return the objects of one annotation file and their boxes."""
    from annotations.readers.geojson.large_file import clip_file
    from annotations.readers.options import ReadOptions

    settings = reading.settings
    options = ReadOptions(
        kind=settings.kind,
        point_size_l0=settings.point_size_l0(file.mpp_level0),
        scale=None if settings.annotation_mpp is None else settings.annotation_mpp / file.mpp_level0,
        slide=slide_context(file, [path]),
        nuclei=settings.nuclei,
        split_values=settings.split_values,
    )
    return clip_file(path, grid, options, processes=reading.processes, stream=reading.stream)


def _grid(file: SlideFile, settings: AnnotateSettings) -> Grid:
    """The tiles, and the origins to try: of "auto" both where they differ, the slide's corner first."""
    from annotations.readers.geojson.large_file import Grid

    corner, scanned = (0.0, 0.0), (float(file.bounds_xy[0]), float(file.bounds_xy[1]))
    shifts = {"level0": (corner,), "bounds": (scanned,), "auto": (corner, scanned) if any(scanned) else (corner,)}
    return Grid(
        file.coords, file.size_l0, file.patch_size, file.dimensions_l0, shifts[settings.origin], polygons=settings.polygons
    )


def _best_origin(clipped: Clipped) -> int:
    """The shift that puts more of the objects on tiles; the first where both put as much."""
    visible = [boxes.visible.sum(dtype=float) for boxes in clipped.boxes]
    return int(len(visible) > 1 and visible[0] * (1 + 1e-6) < visible[1])


def _check_on_slide(file: SlideFile, path: Path, objects: Clipped, grid: Grid, origin: int) -> None:
    """Raises UserError where not one object of the file reaches the slide, with both extents."""
    if not len(objects) or objects.on_slide[origin]:
        return
    width, height = file.dimensions_l0
    low_x, low_y, high_x, high_y = (objects.extent_l0 + np.tile(grid.shifts[origin], 2)).tolist()
    extents = f"they span x {low_x:.0f}..{high_x:.0f}, y {low_y:.0f}..{high_y:.0f}, it x 0..{width}, y 0..{height}"
    off = f"all {len(objects)} objects lie off the slide {file.slide_id}"
    raise UserError(f"{path}: {off}: {extents}: is it of this slide, in level-0 pixels?")


def _reason_to_redo(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Describe how two records differ: files by their names, or their times where only those differ; classes by name."""

    def readable(record: Mapping[str, Any]) -> dict[str, Any]:
        classes = record.get("classes")
        names = classes and "; ".join(f"{name}: {label}" for name, label in classes["names"].items())
        return {**record, "classes": names, "files": ", ".join(stamp["name"] for stamp in record["files"])}

    before, now = readable(old), readable(new)
    if before["files"] == now["files"]:
        for record, shown in ((old, before), (new, now)):
            saved = max(stamp["mtime_ns"] for stamp in record["files"]) // 10**9
            shown["files"] += f" of {datetime.fromtimestamp(saved):%Y-%m-%d %H:%M:%S}"
    return describe_changes(before, now)


def _item_result(result: AnnotateResult, redone: str = "", *, skipped: bool = False) -> ItemResult:
    info: dict[str, Any] = {name: getattr(result, name) for name in ("objects", "boxes", "repaired", "outside", "origin")}
    return ItemResult({**info, "left_out": result.skipped}, result.slide_notes(), redone, skipped)


def _digest(files: Sequence[Path]) -> str:
    """Identify annotation files by their names, sizes and times; their folder does not count."""
    digest = hashlib.sha256(repr([stamp(path) for path in files]).encode()).hexdigest()
    return f"{digest[:12]} ({len(files)} files, the first {files[0].name})"


def _file_of(item: Work) -> Path:
    return item[0]


def _name(item: Work) -> str:
    return item[0].stem
