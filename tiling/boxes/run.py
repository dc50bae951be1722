"""Annotation files -> boxes in the slide files: match by name, find the origin, clip to the tiles, write."""

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
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from annotations.errors import UserError
from tiling.boxes.match_files import annotation_files, match_files, owner_of, slide_context, stamp
from tiling.boxes.settings import AnnotateSettings, Kind, Origin, Reading, checked_mpp, named_classes, parse_point_size
from tiling.boxes.summary import CHANGED, RESULT_ATTR, BoxOutcomes, by_label, message, placement
from tiling.jobs.outcome import Outcome
from tiling.jobs.run import available_cpus, run_cohort
from tiling.slide_file.merge import PARTS_ATTR, files_to_read, merge_groups, read_groups, run_records
from tiling.slide_file.read import SlideFile, list_slide_files
from tiling.slide_file.write import parameters_hash, replace_groups
from tiling.storage.checksums import DAMAGED
from tiling.storage.locks import describe_changes, lock_file, lock_settings

if TYPE_CHECKING:
    from annotations.readers.geojson.large_file import Clipped, Grid


METHOD_VERSION = 4  # raise it when reading or clipping changes, so that old boxes are made anew
COUNTED = ("objects", "boxes", "repaired", "left_out", "outside")  # keys of Outcome.info that are summed
HASH_ATTR, RECORD_ATTR = "annotation_sha256", "annotation_parameters"
LEFT_OUT = (
    "points_skipped", "lines_skipped", "empty", "malformed", "ignored", "invalid_dropped", "beyond", "zero_area", "tangled",
    "repeated", "unlisted_image",
)  # fmt: skip
Work = tuple[Path, tuple[Path, ...]]


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
    decides for all objects, "auto" goes by what each says. point_size: side of the square a point becomes, "12um" (as is a bare
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
    if origin not in ("auto", "level0", "bounds"):
        raise UserError(f"--origin {origin}: is one of auto, level0, bounds")
    if kind not in ("auto", "tissue", "cell"):
        raise UserError(f"--kind {kind}: is one of auto, tissue, cell")
    settings = AnnotateSettings(
        cast("Origin", origin), cast("Kind", kind), *parse_point_size(point_size), polygons,
        named_classes(classes, strict_classes), checked_mpp(annotation_mpp), nuclei, split_values,
    )  # fmt: skip
    items, unused = _matched(folder, annotations)
    used = sorted({path for _, own in items for path in own})
    processes = 1 if scheduler or stream else max(1, available_cpus() // min(workers or available_cpus(), len(items)))
    work = partial(annotate_slide, settings=settings, append=append, stream=stream, processes=processes)
    folder = Path(folder)
    how: dict[str, Any] = {"workers": workers, "scheduler": scheduler, "timeout": timeout, "folder": folder, "wrote": _file_of}
    with lock_settings(folder, "annotate", {**asdict(settings), "append": append, "annotations": _in_short(used)}):
        outcomes = run_cohort(items, work, title="annotate", name=_name, **how)
    _tell_names(items, outcomes, unused)
    return BoxOutcomes(outcomes, "annotate", folder, COUNTED, perf_counter() - begun, verbose=verbose)


def _matched(folder: Path | str, annotations: Path | str | Sequence[Path | str]) -> tuple[list[Work], list[str]]:
    """Every slide file with its annotation files, and the names of files that belong to no slide."""
    slides = {path.stem: path.absolute() for path in list_slide_files(folder)}
    files = annotation_files(annotations)
    matched = match_files(list(slides), files)
    if not any(matched.values()) and len(files) == 1:  # what is no slide file is no second slide
        matched |= match_files([slide_id for slide_id, path in slides.items() if _opens(path)], files)
    if not any(matched.values()):
        first = f"first slide {next(iter(slides))}, first file {files[0].name}"
        raise UserError(f"{folder}: no annotation file is named after a slide ({first}): name them <slide_id>.geojson")
    used = {path for each in matched.values() for path in each}
    unused = [path.name for path in files if path not in used]
    return [(path, matched[slide_id]) for slide_id, path in slides.items()], unused


def _tell_names(items: Sequence[Work], outcomes: Sequence[Outcome], unused: Sequence[str]) -> None:
    """Say in the outcomes which file was taken although it is named after no slide, and that others were not."""
    left = f"{len(unused)} annotation files belong to no slide, for instance {unused[0]}" if unused else ""
    for (path, own), outcome in zip(items, outcomes, strict=True):
        if own and owner_of({path.stem: None}, own[0].name) is None:
            only = f"{own[0].name} is not named after it, and was taken as the only file for the only slide"
            outcome.message += f"; {only}" if outcome.message else only
        elif not own and left and outcome.ok:
            outcome.message += f" ({left})"
    if left and all(own for _, own in items):
        print(f"annotate: {left}", file=sys.stderr, flush=True)


def _opens(path: Path) -> bool:
    try:
        with SlideFile(path):
            return True
    except UserError:
        return False


def annotate_slide(
    item: Work, settings: AnnotateSettings, append: bool = False, stream: bool = False, processes: int = 1
) -> dict[str, Any]:
    """Annotate one slide file; returns objects, boxes, repaired, outside, left_out, origin, `message`, `skipped`.

    append, stream: as in annotate. processes: at most so many read one large file together.
    """
    path, files = item
    if not files:
        SlideFile(path).close()  # one that cannot be read is a failure all the same
        return {"objects": 0, "boxes": 0, "message": "no annotations"}
    how = Reading(settings, stream, processes)
    with lock_file(path):
        return _appended(path, files, how) if append else _annotated(path, files, how)


def _annotated(path: Path, files: Sequence[Path], how: Reading) -> dict[str, Any]:
    with SlideFile(path) as file:
        record = _record(file, files, how.settings)
        digest = parameters_hash(record)[1]
        damaged = file.boxes_damaged
        attrs = {} if damaged else file.group_attrs("objects")
        if file.has_boxes and attrs.get(HASH_ATTR) == digest:
            return _outcome(json.loads(attrs[RESULT_ATTR]), done=True)
        groups, result = _groups(file, files, how)
    _sign(groups, digest, record, result)
    replace_groups(path, groups)
    redone = {"redone": DAMAGED} if damaged else {}
    if RECORD_ATTR in attrs:
        redone = {"redone": describe_changes(*_in_words(json.loads(attrs[RECORD_ATTR]), record))}
    return {**_outcome(result), **redone}


def _appended(path: Path, files: Sequence[Path], how: Reading) -> dict[str, Any]:
    """The same with what is there left in its place; where nothing is, there is nothing to add to."""
    with SlideFile(path) as file:
        if file.boxes_damaged:
            raise UserError(f"{path}: its objects and boxes are damaged: annotate it anew, without --append")
        attrs = file.group_attrs("objects")
        if not file.has_boxes:
            return _annotated(path, files, how)
        how = replace(how, settings=replace(how.settings, polygons=how.settings.polygons or file.has_polygons))
        parts = run_records(attrs, RECORD_ATTR)
        new = files_to_read(path, files, _record(file, files, how.settings), parts)
        before = len(file.objects_table()["label"])
        if not new:
            nothing = {
                "objects": before,
                "boxes": len(file.boxes_table()["object"]),
                "repaired": 0,
                "outside": 0,
                "left_out": 0,
            }
            names = ", ".join(each.name for each in files)
            return {**nothing, "skipped": True, "message": f"nothing added: the objects of {names} are there already"}
        groups, result = _groups(file, new, how)
        parts.append(_record(file, new, how.settings))
    added = merge_groups(path, read_groups(path), groups)
    record = {**parts[-1], "files": [stamp for part in parts for stamp in part["files"]]}
    result["there"] = before
    _sign(added, parameters_hash({"parts": parts})[1], record, result)
    added["objects"]["attrs"][PARTS_ATTR] = json.dumps(parts, sort_keys=True)
    replace_groups(path, added)
    return _outcome(result)


def _sign(groups: dict[str, dict[str, Any]], digest: str, record: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Say on the groups what made them, so that it goes when another command replaces them."""
    groups["objects"]["attrs"] |= {
        HASH_ATTR: digest,
        RECORD_ATTR: json.dumps(record, sort_keys=True),
        RESULT_ATTR: json.dumps(result, sort_keys=True),
    }
    groups["boxes"].setdefault("attrs", {})[HASH_ATTR] = digest


def _clipped(file: SlideFile, path: Path, grid: Grid, how: Reading) -> Clipped:
    """One annotation file, its objects in rows and boxes."""
    from annotations.readers.geojson.large_file import clip_file
    from annotations.readers.options import ReadOptions

    settings = how.settings
    options = ReadOptions(
        kind=settings.kind,
        point_size_l0=settings.point_size_l0(file.mpp_level0),
        scale=None if settings.annotation_mpp is None else settings.annotation_mpp / file.mpp_level0,
        slide=slide_context(file, [path]),
        nuclei=settings.nuclei,
        split_values=settings.split_values,
    )
    return clip_file(path, grid, options, processes=how.processes, stream=how.stream)


def _record(file: SlideFile, files: Sequence[Path], settings: AnnotateSettings) -> dict[str, Any]:
    """All that changes the result; the hash of it tells whether the boxes are up to date."""
    plain = json.loads(json.dumps(asdict(settings)))
    tiles = str(file.attrs["parameters_sha256"])
    return {"method_version": METHOD_VERSION, **plain, "tiles": tiles, "files": [stamp(path) for path in files]}


def _groups(file: SlideFile, files: Sequence[Path], how: Reading) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Groups /objects and /boxes, and what became of the objects. Raises UserError where a file's lie off the slide."""
    from annotations.readers.geojson.large_file import join_clipped
    from annotations.slide_groups import annotation_groups

    grid = _grid(file, how.settings)
    pieces = [_clipped(file, path, grid, how) for path in files]
    clipped = join_clipped(pieces, grid)
    which = _origin(clipped)
    shift = grid.shifts[which]
    for path, each in zip(files, pieces, strict=True):
        _check_on_slide(file, path, each, which, shift)
    table, boxes, classes = clipped.table, clipped.boxes[which], how.settings.classes
    unknown = classes.unknown(table.labels) if classes else ()
    table = classes.applied(table) if classes else table
    counts = table.counts
    origin = "bounds" if how.settings.origin == "bounds" or which else "level0"
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
        "labels": by_label(table, boxes),
        "repairs": [line.replace("\0", "#") for line in table.log.repairs],
        "notes": list(table.log.notes),
        "unknown_classes": list(unknown),
        "ids": table.log.ids,
        "changed": {name: n for name in CHANGED if (n := int(counts.get(name, 0)))},
        **placement(clipped, grid, which),
    }
    groups = annotation_groups(table, boxes, file.mpp_level0)
    groups["objects"]["area_um2"] = np.asarray(clipped.area_l0 * file.mpp_level0**2, dtype=np.float32)
    if boxes.polygons is not None:
        groups["boxes"]["polygon"] = boxes.polygons.arrays()
    return groups, result


def _grid(file: SlideFile, settings: AnnotateSettings) -> Grid:
    """The tiles, and the origins in question: of "auto" both where they differ, the slide's corner first."""
    from annotations.readers.geojson.large_file import Grid

    moved = (float(file.bounds_xy[0]), float(file.bounds_xy[1]))
    shifts = {"level0": ((0.0, 0.0),), "bounds": (moved,), "auto": ((0.0, 0.0), moved) if any(moved) else ((0.0, 0.0),)}
    return Grid(
        file.coords, file.size_l0, file.patch_size, file.dimensions_l0, shifts[settings.origin], polygons=settings.polygons
    )


def _origin(clipped: Clipped) -> int:
    """Which shift puts more of the objects on tiles; the first where it is as good."""
    visible = [boxes.visible.sum(dtype=float) for boxes in clipped.boxes]
    return int(len(visible) > 1 and visible[0] * (1 + 1e-6) < visible[1])


def _check_on_slide(file: SlideFile, path: Path, each: Clipped, which: int, shift: tuple[float, float]) -> None:
    """Raises UserError where not one object of the file reaches the slide, with both extents."""
    if not len(each) or each.on_slide[which]:
        return
    width, height = file.dimensions_l0
    low_x, low_y, high_x, high_y = (each.extent_l0 + np.tile(shift, 2)).tolist()
    extent = f"x {low_x:.0f}..{high_x:.0f}, y {low_y:.0f}..{high_y:.0f}"
    slide = f"x 0..{width}, y 0..{height}"
    how = "is it of this slide, in level-0 pixels?"
    raise UserError(f"{path}: all {len(each)} objects lie off the slide {file.slide_id}: they span {extent}, it {slide}: {how}")


def _in_words(*records: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Records of runs with names in place of files and class maps; that a file was saved again is told by its time."""
    told = [{**record, "files": ", ".join(stamp["name"] for stamp in record["files"])} for record in records]
    for one in told:
        if one.get("classes"):
            one["classes"] = "; ".join(f"{name}: {label}" for name, label in one["classes"]["names"].items())
    if all(one["files"] == told[0]["files"] for one in told):
        for record, one in zip(records, told, strict=True):
            saved = max(stamp["mtime_ns"] for stamp in record["files"]) // 10**9
            one["files"] += f" of {datetime.fromtimestamp(saved):%Y-%m-%d %H:%M:%S}"
    return told


def _outcome(result: dict[str, Any], done: bool = False) -> dict[str, Any]:
    """The outcome of one slide, as the summary of the cohort shows it."""
    shown = {key: result[key] for key in ("objects", "boxes", "repaired", "outside", "origin")}
    shown["left_out"] = result["skipped"]
    return {**shown, "skipped": done, "message": message(result)}


def _in_short(files: Sequence[Path]) -> str:
    """Annotation files in a few words, which are others where one of them was saved again; where they lie does not matter."""
    digest = hashlib.sha256(repr([stamp(path) for path in files]).encode()).hexdigest()
    return f"{digest[:12]} ({len(files)} files, the first {files[0].name})"


def _file_of(item: Work) -> Path:
    return item[0]


def _name(item: Work) -> str:
    return item[0].stem
