"""Slide files -> GeoJSON that QuPath opens: tissue, tiles, boxes, and the labels that evaluate predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import numpy as np

from annotations.errors import UserError
from odis_path.features.read import source_of
from tiling.jobs.outcome import ItemResult, notes_of
from tiling.jobs.run import run_cohort
from tiling.jobs.summary import Outcomes
from tiling.slide_file.read import SlideFile, h5_files, list_slide_files
from tiling.storage.atomic import atomic_path
from tiling.storage.csv_file import parse_number, parse_whole_number, read_csv_file
from tiling.storage.slide_id import checked_id

PARTS = ("tissue", "tiles", "boxes", "labels")
TISSUE_CLASS = "Tissue"
KIND_TYPES = ("annotation", "detection", "detection")  # QuPath's types of tissue, cells, proposals
Feature = dict[str, Any]  # of GeoJSON
SCORE = "score "  # begins the columns of predictions.csv that hold the scores


@dataclass(frozen=True)
class Predicted:
    """Rows of predictions.csv for one slide. xy: int64 (n, 2) tile corners, level-0 pixels; object: int64 (n,), -1: tiles;
    label, truth: n names; scores: n mappings of "score <class>" to number.
    """

    xy: np.ndarray
    object: np.ndarray
    label: list[str]
    truth: list[str]
    scores: list[dict[str, float]]


def export_geojson(
    folder: Path | str,
    out: Path | str,
    what: Sequence[str] | None = None,
    predictions: Path | str | None = None,
    origin: str = "auto",
    workers: int | None = None,
) -> Outcomes:
    """Write `<out>/<slide_id>.geojson` for every slide file of a folder (or of the slides behind a folder of features).

    what: some of tissue (regions of the mask), tiles (squares, with their class where tiles have one, and their share of
    tissue), boxes (rectangles with the class of their object), labels (tiles or boxes as evaluate's predictions.csv classes
    them, with its scores); None: tissue and labels where predictions are given, else tissue, tiles and boxes. predictions:
    that CSV. origin: "bounds" counts from the corner of the scanned area, as QuPath shows slides that have one, "level0"
    from the slide's, "auto" is "bounds" where there are any.
    Each outcome's info has the number of features of each part. Raises UserError for options and files that cannot be.
    """
    begun = perf_counter()
    if origin not in ("auto", "level0", "bounds"):
        raise UserError(f"--origin {origin}: is one of auto, level0, bounds")
    parts = tuple(what) if what is not None else ("tissue", "labels") if predictions else ("tissue", "tiles", "boxes")
    if not parts or (wrong := [part for part in parts if part not in PARTS]):
        raise UserError(f"--what {','.join(wrong if parts else ())}: take some of {', '.join(PARTS)}")
    if ("labels" in parts) != (predictions is not None):
        raise UserError("--what labels and --predictions go together: give the predictions.csv that evaluate wrote")
    predicted = read_predictions(Path(predictions)) if predictions is not None else {}
    paths = slide_files(Path(folder))
    if predicted and not predicted.keys() & {path.stem for path in paths}:
        raise UserError(f"{predictions}: no slide of {folder} (first: {next(iter(predicted))}): give the folder evaluated")
    _refuse_twins(paths)
    out = Path(out)
    items = [(path, predicted.get(path.stem)) for path in paths]
    work = partial(export_slide, out=out, parts=parts, origin=origin)
    outcomes = run_cohort(items, work, title="export", workers=workers, name=_name, folder=out)
    return Outcomes(outcomes, "export", out, PARTS if what is None else parts, perf_counter() - begun)


def export_slide(item: tuple[Path, Predicted | None], out: Path, parts: Sequence[str], origin: str) -> ItemResult:
    """Write the GeoJSON of one slide file; info: the number of features of each part."""
    from annotations.geojson_writer import encode_geojson

    path, predicted = item
    counts: dict[str, int] = {}
    features: list[Feature] = []
    notes = []
    with SlideFile(path) as file:
        shift = np.array(file.bounds_xy, dtype=float) if origin != "level0" else np.zeros(2)
        for part in parts:
            made = _PART[part](file, shift) if part != "labels" else predicted_features(file, shift, predicted)
            counts[part] = len(made)
            features += made
            if not made:
                notes.append(f"no {part}")
        if shift.any():
            notes.append(f"counts from the scanned area's corner {file.bounds_xy}, as QuPath does")
        with atomic_path(out / f"{file.slide_id}.geojson") as temporary:
            temporary.write_bytes(encode_geojson({"type": "FeatureCollection", "features": features}))
    return ItemResult(counts, notes_of(*notes))


def tissue_features(file: SlideFile, shift: np.ndarray) -> list[Feature]:
    """Make a feature of each region of the tissue mask, class Tissue."""
    import shapely

    from annotations.geometry.trace_mask import trace_outlines

    mask, thumbnail = file.tissue_mask(), file.thumbnail()
    if mask is None or thumbnail is None or not mask.any():
        return []
    regions = shapely.get_parts(trace_outlines(mask.astype(np.uint8))[1])
    scale = thumbnail[1]
    regions = shapely.transform(regions, lambda xy: xy * scale)
    # The last column and row of the overview may reach over the edge of the slide.
    regions = shapely.get_parts(shapely.intersection(regions, shapely.box(0, 0, *file.dimensions_l0)))
    regions = regions[(shapely.get_type_id(regions) == 3) & (shapely.area(regions) > 0)]
    return _features(regions, shift, [TISSUE_CLASS] * len(regions), "annotation", file, "tissue")


def tile_features(file: SlideFile, shift: np.ndarray) -> list[Feature]:
    """Make a square of each tile, objectType tile, with its class where annotations give it one."""
    from tiling.slide_file.tile_labels import tile_labels

    number, names = tile_labels(file)
    labels = [names[i] if i >= 0 else None for i in number.tolist()]
    shares = [{"tissue fraction": value} for value in file.tissue_fraction.tolist()]
    return _features(tile_squares(file, np.arange(len(file))), shift, labels, "tile", file, "tile", shares)


def box_features(file: SlideFile, shift: np.ndarray) -> list[Feature]:
    """Make a rectangle of each box, with the class of its object; an object in several tiles has a box in each."""
    table, objects = file.boxes_table(), file.objects_table()
    row = table["object"]
    labels = file.object_classes()[row].tolist()
    types = [KIND_TYPES[kind] for kind in objects["kind"][row].tolist()]
    measured = [{"visible": value} for value in table["visible"].tolist()]
    if (confidence := objects.get("confidence")) is not None:  # NaN where a detector did not say
        measured = [
            {**measures, "confidence": value} for measures, value in zip(measured, confidence[row].tolist(), strict=True)
        ]
    return _features(box_rectangles(file, np.arange(len(row))), shift, labels, types, file, "box", measured)


_PART = {"tissue": tissue_features, "tiles": tile_features, "boxes": box_features}


def predicted_features(file: SlideFile, shift: np.ndarray, predicted: Predicted | None) -> list[Feature]:
    """Make features of tiles or boxes with the class predicted for them, its scores, and the true class as name.

    Raises UserError where a row is of no tile or box of the file.
    """
    if predicted is None:
        return []
    tile_at = {tuple(xy): i for i, xy in enumerate(file.coords.tolist())}
    tiles = [tile_at.get(tuple(xy), -1) for xy in predicted.xy.tolist()]
    if -1 in tiles:
        x, y = predicted.xy[tiles.index(-1)].tolist()
        raise UserError(f"{file.path}: has no tile at {x}, {y}, which the predictions name: tiled anew since? embed it again")
    rows = np.array(tiles, dtype=np.int64)
    is_tile = predicted.object < 0
    if is_tile.all():
        outlines, kind = tile_squares(file, rows), "tile"
    else:
        table = file.boxes_table()
        box_at = {pair: i for i, pair in enumerate(zip(file.box_tiles.tolist(), table["object"].tolist(), strict=True))}
        boxes = [box_at.get(pair, -1) for pair in zip(tiles, predicted.object.tolist(), strict=True)]
        if -1 in boxes:
            number = int(predicted.object[boxes.index(-1)])
            raise UserError(f"{file.path}: has no box of object {number} in that tile: annotated anew since? embed it again")
        outlines, kind = box_rectangles(file, np.array(boxes, dtype=np.int64)), "detection"
    names = [f"true: {name}" if name else None for name in predicted.truth]
    return _features(outlines, shift, predicted.label, kind, file, "predicted", predicted.scores, names)


def tile_squares(file: SlideFile, rows: np.ndarray) -> np.ndarray:
    """Return the squares of tiles, level-0 pixels."""
    import shapely

    low = file.coords[rows].astype(float)
    return np.asarray(shapely.box(*low.T, *(low + file.size_l0).T), dtype=object).reshape(-1)


def box_rectangles(file: SlideFile, rows: np.ndarray) -> np.ndarray:
    """Return the rectangles of rows of /boxes, level-0 pixels."""
    import shapely

    return np.asarray(shapely.box(*file.box_bounds_l0[rows].T), dtype=object).reshape(-1)


def _features(
    outlines: np.ndarray,
    shift: np.ndarray,
    labels: Sequence[str | None],
    types: str | Sequence[str],
    file: SlideFile,
    part: str,
    measurements: Sequence[Mapping[str, float]] | None = None,
    names: Sequence[str | None] | None = None,
) -> list[Feature]:
    import shapely

    from annotations.geojson_writer import feature_collection

    if not len(outlines):
        return []
    moved = shapely.transform(outlines, lambda xy: xy - shift) if shift.any() else outlines
    ids = [f"{file.slide_id}/{part}/{i}" for i in range(len(outlines))]
    collection = feature_collection(moved, labels=labels, object_type=types, ids=ids, measurements=measurements, names=names)
    return cast(list[Feature], collection["features"])


def slide_files(folder: Path) -> list[Path]:
    """List the slide files of a folder, or those that the feature files of a folder were made of. Raises UserError."""
    paths = h5_files(folder) if folder.is_dir() else []
    # What is no feature file among them is a failure, by its own name.
    sources = [source[1] if (source := source_of(path)) else path for path in paths]
    if sources == paths:
        return list_slide_files(folder)
    behind = [path for path in sources if path not in paths]
    if not any(path.is_file() for path in behind):
        raise UserError(f"{folder}: the slide file {behind[0]} behind its features is gone: give the folder of slide files")
    return sources


def _refuse_twins(paths: Sequence[Path]) -> None:
    """Raise UserError where two slide files are called alike inside: one export would take the place of the other."""
    owners: dict[str, Path] = {}
    for path in paths:
        try:
            with SlideFile(path) as file:
                slide_id = file.slide_id
        except UserError:  # a failure of its own
            continue
        if (first := owners.setdefault(slide_id, path)) != path:
            raise UserError(f"{path}: slide_id {slide_id} is also in {first.name}: one slide, one file")


def read_predictions(path: Path) -> dict[str, Predicted]:
    """Read slide_id -> its rows of a predictions.csv that odis-path evaluate wrote. Raises UserError for any other file."""
    needed = ("slide_id", "x", "y", "object", "label", "predicted")
    table = read_csv_file(path, needed, "no such file: give evaluate's predictions.csv")
    if missing := sorted(set(needed) - set(table.columns)):
        raise UserError(f"{path}: lacks the columns {', '.join(missing)}: give evaluate's predictions.csv")
    by_slide: dict[str, list[dict[str, str]]] = {}
    for _, row in table.rows:
        by_slide.setdefault(row["slide_id"], []).append(row)
    for slide_id in by_slide:
        checked_id(slide_id, path)
    try:
        return {slide_id: _predicted(own) for slide_id, own in by_slide.items()}
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}: give evaluate's predictions.csv") from None


def _predicted(rows: Sequence[Mapping[str, str]]) -> Predicted:
    xy = np.array([(parse_whole_number(row["x"]), parse_whole_number(row["y"])) for row in rows], dtype=np.int64)
    numbers = np.array([parse_whole_number(row["object"]) for row in rows], dtype=np.int64)
    if (xy < 0).all() and (numbers < 0).all():
        raise ValueError("predictions of whole slides have no place on them")
    scores = [
        {key: parse_number(value) for key, value in row.items() if key and key.startswith(SCORE) and value} for row in rows
    ]
    return Predicted(xy, numbers, [row["predicted"] for row in rows], [row["label"] for row in rows], scores)


def _name(item: tuple[Path, Predicted | None]) -> str:
    return item[0].stem
