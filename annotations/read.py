"""Annotation files -> ObjectTable: which reader it is for, and GeoJSON itself: kinds, classes, repair."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from annotations.build import add, mended, numbered, numbered_ids, remarks_of, squares
from annotations.classname import class_of, joined
from annotations.content import content, dialect
from annotations.dialects import read_dialect
from annotations.errors import UserError
from annotations.frame import SlideFrame
from annotations.geojson import (
    CELL_SET,
    Classification,
    CleanedPolygons,
    Feature,
    LineString,
    Malformed,
    MultiLineString,
    MultiPoint,
    MultiPolygon,
    Point,
    Polygon,
    decode_features,
)
from annotations.measurements import nuclei_as_geometry, stated_confidences, with_measurements
from annotations.positions import IrregularPositionError, rings_from_json, rings_from_lists
from annotations.rings import polygons_from_rings, why_dropped, why_lost
from annotations.table import CELL, TISSUE, ObjectTable, empty_table

Kind = Literal["auto", "tissue", "cell"]

_KIND_OF_TYPE = {"annotation": TISSUE, "detection": CELL, "cell": CELL, CELL_SET: CELL}
_CELL_SETS = "a list of MultiPolygons of cells, one a class (CellViT), taken for cells: --kind tissue keeps each whole"
_POINTS = (Point, MultiPoint)
_IGNORED_TYPES = frozenset({"tmacore", "root", "tile"})
# Before QuPath 0.4 the feature's id was the name of its Java class.
_TYPE_OF_OLD_ID = {
    "PathAnnotationObject": "annotation",
    "PathDetectionObject": "detection",
    "PathCellObject": "cell",
    "PathTileObject": "tile",
    "TMACoreObject": "tmacore",
    "PathRootObject": "root",
}


def read_annotations(
    path: Path | str,
    *,
    kind: Kind = "auto",
    point_size_l0: float | None = None,
    scale: float | None = None,
    frame: SlideFrame | None = None,
    measurements: bool = False,
    nuclei: bool = False,
    split_values: bool = False,
) -> ObjectTable:
    """Every object of an annotation file, in file order, level-0 pixels.

    What the file is, its content decides: GeoJSON of any dialect (plain, .gz, or a .zip of one), HoVer-Net's and CellViT's
    json, COCO json, GeoParquet, XML of ASAP, ImageScope and NDP.view, label images (PNG, TIFF).
    kind: "auto" takes detections, cells and what cell detectors write as CELL, all else as TISSUE; "tissue" and "cell"
        decide for all. A MultiPolygon that is a cell becomes one row per polygon. TMA cores, tiles and the root of QuPath
        are ignored and counted.
    point_size_l0: side of the square, level-0 pixels, that a Point or MultiPoint position becomes; None skips them.
    scale: level-0 pixels per unit of the file's coordinates; None goes by what the dialect says, which is 1 for most.
    frame: the slide, for the dialects that do not count level-0 pixels or hold several slides.
    measurements: read those of GeoJSON too (GeoParquet's always are). nuclei: take the nucleus of a QuPath cell for it.
    split_values: each connected piece of a value of a label image is an object, not the value.
    The table's counts: "features" read; "exploded" rows gained from MultiPolygons and MultiPoints; "ignored",
        "points_skipped", "lines_skipped", "empty", "malformed" features left out; "vertices_dropped" positions that
        are not finite; "repaired" invalid outlines; "invalid_dropped" outlines of too few points and "zero_area"
        ones, left out. Only what occurred is listed. Its remarks say the same by class.
    Raises UserError (one line: file, place, way out) where the file is missing or of no known kind, where the frame lacks
    what its dialect needs, and for XML with a document type or entities.
    """
    if kind not in ("auto", "tissue", "cell"):
        raise ValueError(f"kind {kind!r}: one of auto, tissue, cell")
    for name, value in (("point size", point_size_l0), ("scale", scale)):
        if value is not None and not (np.isfinite(value) and value > 0):
            raise UserError(f"{name} {value}: give a number of level-0 pixels above 0")
    path = Path(path)
    data = content(path)
    with _collector_paused():
        form = dialect(data, str(path))
        if form == "geojson":
            data = nuclei_as_geometry(data) if nuclei else data
            table = _parsed(
                data, kind, None if point_size_l0 is None else point_size_l0 / (scale or 1), str(path), measurements
            )
            table = table.scaled(scale or 1)
        else:
            table = read_dialect(form, data, path, kind, point_size_l0, scale, frame or SlideFrame(), split_values)
    return replace(table, source=np.full(len(table), path.name, dtype=object))


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Millions of small tuples and no cycles: the cyclic collector would only walk them again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _parsed(data: bytes, kind: Kind, point_size_l0: float | None, source: str, measurements: bool = False) -> ObjectTable:
    """Its own function, so that the decoded positions are gone before the collector runs again."""
    for tolerant in (False, True):
        features = decode_features(data, source, tolerant=tolerant)
        rows: list[np.ndarray] = []
        try:
            table = _table(features, kind, point_size_l0, {"features": len(features)}, source, rows)
            break
        except IrregularPositionError:
            if tolerant:
                raise
    return with_measurements(table, rows[0], data, len(features), source) if measurements else table


def _object_type(feature: Feature) -> str | None:
    """The object type in lower case, wherever the dialect has it; None where it has none."""
    properties = feature.properties
    found = feature.object_type or feature.object_type_snake
    if properties is not None:
        found = properties.object_type or properties.object_type_snake or found
        if found is None and properties.type is not None:
            alias = properties.type.lower()
            if alias in _KIND_OF_TYPE or alias in _IGNORED_TYPES:
                return alias
    if found is None and type(feature.id) is str:
        return _TYPE_OF_OLD_ID.get(feature.id)
    return found.lower() if found is not None else None


def _class_name(feature: Feature) -> str | None:
    """The class; derived classes joined as QuPath shows them; None where there is none."""
    properties = feature.properties
    found = properties.classification if properties is not None else None
    if found is None:
        found = feature.classification
    if isinstance(found, Classification):
        return found.name or joined(found.names)
    if found is not None:
        found = class_of(found)
    if found is None and properties is not None and properties.type is not None:
        # TIAToolbox keeps the class of a nucleus in `type`; QuPath's word for the object's type is no class.
        alias = properties.type.lower()
        return None if alias in _KIND_OF_TYPE or alias in _IGNORED_TYPES else properties.type or None
    return found or None


@dataclass
class _Sorted:
    """What features hold, by what it is.

    polygons: JSON each, or rings each; group: the row to be of each, shared by the polygons of a MultiPolygon;
    group_feature: the feature of each row to be. points, point_feature: positions, and the feature of each.
    lost: (feature, reason) of what is left out. cell_sets: MultiPolygons are among them that CellViT made of cells.
    """

    polygons: list = field(default_factory=list)
    group: list[int] = field(default_factory=list)
    group_feature: list[int] = field(default_factory=list)
    points: list[tuple[float, float]] = field(default_factory=list)
    point_feature: list[int] = field(default_factory=list)
    lost: list[tuple[int, str]] = field(default_factory=list)
    cell_sets: bool = False


def _sorted(features: list[Feature], keep: list[int], kinds: np.ndarray, *, with_points: bool) -> _Sorted:
    """Features `keep` by what their geometry is."""
    plain = [geometry.coordinates for row in keep if type(geometry := features[row].geometry) is Polygon]
    if len(plain) == len(keep):  # as of cells nearly always
        return _Sorted(plain, list(range(len(keep))), list(keep))
    found = _Sorted()
    group, group_feature, polygons, lost = found.group, found.group_feature, found.polygons, found.lost
    for row in keep:
        geometry = features[row].geometry
        if isinstance(geometry, Polygon):
            group.append(len(group_feature))
            group_feature.append(row)
            polygons.append(geometry.coordinates)
        elif isinstance(geometry, MultiPolygon | CleanedPolygons):
            found.cell_sets |= _object_type(features[row]) == CELL_SET
            parts = len(geometry.coordinates)
            first, rows = len(group_feature), parts if kinds[row] == CELL else 1
            group.extend(range(first, first + parts) if kinds[row] == CELL else [first] * parts)
            group_feature.extend([row] * rows)
            polygons.extend(geometry.coordinates)
            if not parts:
                lost.append((row, "empty"))
        elif isinstance(geometry, Point | MultiPoint):
            points = [geometry.coordinates] if isinstance(geometry, Point) else geometry.coordinates
            if not points:
                lost.append((row, "empty"))
            elif not with_points:
                lost.append((row, "points_skipped"))
            else:
                found.points.extend(points)
                found.point_feature.extend([row] * len(points))
        elif isinstance(geometry, LineString | MultiLineString):
            lost.append((row, "lines_skipped"))
        else:
            lost.append((row, "malformed" if isinstance(geometry, Malformed) else "empty"))
    return found


def _table(
    features: list[Feature],
    kind: Kind,
    point_size_l0: float | None,
    counts: dict[str, int],
    source: str,
    rows_out: list[np.ndarray] | None = None,
) -> ObjectTable:
    """Sort features by what their geometry is, build polygons in bulk, and bring them back into file order.

    rows_out: gets the feature of each row of the table, int64 (n,).
    """
    kinds, keep = _kinds(features, kind, counts)
    found = _sorted(features, keep, kinds, with_points=point_size_l0 is not None)
    lost = found.lost
    for name, n in sorted(Counter(reason for _, reason in lost).items()):
        add(counts, name, n)
    is_text = bool(found.polygons) and isinstance(found.polygons[0], msgspec.Raw)
    rings = rings_from_json(found.polygons) if is_text else rings_from_lists(found.polygons)
    groups = np.array(found.group, dtype=np.int64)
    before, of_group = polygons_from_rings(*rings, groups, counts)
    outlines, kept, was_bad, reasons = mended(before, counts)
    feature_of = np.array(found.group_feature, dtype=np.int64)
    if len(of_group) < len(feature_of):
        gone = np.setdiff1d(groups, of_group)
        lost += zip(feature_of[gone].tolist(), why_dropped(rings, groups, gone), strict=True)
    unkept = np.delete(np.arange(len(of_group)), kept)
    lost += zip(feature_of[of_group[unkept]].tolist(), why_lost(before[unkept]), strict=True)
    boxes, of_point = squares(np.array(found.points, dtype=np.float64).reshape(-1, 2), point_size_l0, counts)
    feature = np.concatenate([feature_of[of_group[kept]], np.array(found.point_feature, dtype=np.int64)[of_point]])
    order = np.argsort(feature, kind="stable")
    if rows_out is not None:
        rows_out.append(feature[order])
    flags = np.concatenate([was_bad, np.zeros(len(boxes), dtype=bool)])[order]
    table = _labelled(features, feature[order], np.concatenate([outlines, boxes])[order], kinds, counts, source)
    skipped = Counter((_class_name(features[row]) or "", reason) for row, reason in lost)
    remarks = remarks_of(table.id, table.label, table.labels, flags, reasons, dict(skipped))
    return replace(table, remarks=remarks.noted(_CELL_SETS) if found.cell_sets and kind == "auto" else remarks)


def _kinds(features: list[Feature], kind: Kind, counts: dict[str, int]) -> tuple[np.ndarray, list[int]]:
    """uint8 kind of each feature, and the rows that are not ignored.

    A point is a cell whatever its object type: QuPath's points tool stores counted cells as annotations.
    """
    known = _KIND_OF_TYPE  # most features have their type where QuPath has it, as QuPath writes it
    types = [
        p.object_type if (p := feature.properties) is not None and p.object_type in known else _object_type(feature)
        for feature in features
    ]
    keep = [row for row, name in enumerate(types) if name not in _IGNORED_TYPES]
    if ignored := len(types) - len(keep):
        counts["ignored"] = ignored
    if kind == "auto":
        kinds = [
            CELL if type(feature.geometry) in _POINTS else _KIND_OF_TYPE.get(name or "", TISSUE)
            for name, feature in zip(types, features, strict=True)
        ]
        return np.array(kinds, dtype=np.uint8), keep
    return np.full(len(types), CELL if kind == "cell" else TISSUE, dtype=np.uint8), keep


def _labelled(
    features: list[Feature], rows: np.ndarray, geometry: np.ndarray, kinds: np.ndarray, counts: dict[str, int], source: str
) -> ObjectTable:
    """The table of outlines `geometry`, each of feature `rows`; a feature of several rows numbers its ids."""
    if not len(rows):
        return empty_table(counts)
    used, of_row = np.unique(rows, return_inverse=True)
    some = [features[i] for i in used.tolist()]
    labels, label = numbered([_class_name(feature) for feature in some], source)
    keys = [feature.id for feature in some]
    ids = [
        str(i) if key is None or key == "" or key in _TYPE_OF_OLD_ID else str(key)
        for i, key in zip(used.tolist(), keys, strict=True)
    ]
    row_ids = numbered_ids([ids[i] for i in of_row.tolist()], rows, counts)
    sure = stated_confidences([feature.properties for feature in some])
    confidence = None if sure is None else sure[of_row]
    return ObjectTable(geometry, row_ids, label[of_row], kinds[rows], labels, counts, confidence=confidence)
