"""GeoJSON features as QuPath means them: kinds, classes, nuclei, confidences -> ObjectTable.

Measurements are read on demand: they are most of a file's text, and clipping has no use for them.
"""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np

from annotations.errors import UserError
from annotations.geometry.rings import (
    IrregularPositionError,
    polygons_from_rings,
    rings_from_json,
    rings_from_lists,
    why_dropped,
    why_lost,
)
from annotations.objects import Kind, KindOption, ObjectTable, empty_table
from annotations.readers.class_name import class_of, joined, unpacked
from annotations.readers.geojson.decode import (
    CELL_SET,
    NOTHING,
    SURE_KEYS,
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
    Properties,
    decode_features,
)
from annotations.readers.geojson.decode import _members as members_of
from annotations.readers.table_builder import add, mended, numbered, numbered_ids, read_log, squares

_KIND_OF_TYPE = {"annotation": Kind.TISSUE, "detection": Kind.CELL, "cell": Kind.CELL, CELL_SET: Kind.CELL}
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


def _parsed(data: bytes, kind: KindOption, point_size_l0: float | None, source: str, measurements: bool = False) -> ObjectTable:
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
    """Features sorted by kind of content.

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
    is_cell = kinds == Kind.CELL
    for row in keep:
        geometry = features[row].geometry
        if isinstance(geometry, Polygon):
            group.append(len(group_feature))
            group_feature.append(row)
            polygons.append(geometry.coordinates)
        elif isinstance(geometry, MultiPolygon | CleanedPolygons):
            found.cell_sets |= _object_type(features[row]) == CELL_SET
            parts = len(geometry.coordinates)
            first, rows = len(group_feature), parts if is_cell[row] else 1
            group.extend(range(first, first + parts) if is_cell[row] else [first] * parts)
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
    kind: KindOption,
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
    log = read_log(table.id, table.label, table.labels, flags, reasons, dict(skipped))
    return replace(table, log=log.with_notes(_CELL_SETS) if found.cell_sets and kind == "auto" else log)


def _kinds(features: list[Feature], kind: KindOption, counts: dict[str, int]) -> tuple[np.ndarray, list[int]]:
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
            Kind.CELL if type(feature.geometry) in _POINTS else _KIND_OF_TYPE.get(name or "", Kind.TISSUE)
            for name, feature in zip(types, features, strict=True)
        ]
        return np.fromiter(kinds, np.uint8, len(kinds)), keep
    return np.full(len(types), Kind.CELL if kind == "cell" else Kind.TISSUE, dtype=np.uint8), keep


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


# What detectors call how sure they are: StarDist and InstanSeg in QuPath, TIAToolbox, CellViT, others.
CONFIDENCE = ("detection probability", "probability", "confidence", "score", "prob", "type_prob")
TOGETHER = 10_000
MAX_CONFIDENCE = 1e30  # beyond it, it is damage, and no float32


def stated_confidences(several: Sequence[Properties | None]) -> np.ndarray | None:
    """Confidences that a detector states of n objects, float32 (n,), NaN where it does not; None where it never does."""
    if not any(_may_say(several[start : start + TOGETHER]) for start in range(0, len(several), TOGETHER)):
        return None
    found = [None if properties is None else _stated_confidence(properties) for properties in several]
    return None if found.count(None) == len(found) else np.array(found, dtype=np.float32)  # None becomes NaN


def _may_say(several: Sequence[Properties | None]) -> bool:
    """Tell whether any of many objects may have a confidence: of millions nearly none has, so they are looked at together."""
    known = [p for p in several if p is not None]
    if [p for p in known if not (p.probability is p.confidence is p.score is p.prob is p.type_prob is NOTHING)]:
        return True
    text = b"".join([p.measurements for p in known])
    return b"rob" in text or b"onfidence" in text or b"core" in text


def _stated_confidence(p: Properties) -> float | None:
    """The first of CONFIDENCE among measurements and plain properties; None where none is."""
    stated = {name: raw for name in SURE_KEYS if (raw := getattr(p, name)) is not NOTHING}
    try:
        numbers = numbers_of({name: msgspec.json.decode(raw) for name, raw in stated.items()})
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return confidence_of(numbers)


def confidence_of(numbers: dict[str, float]) -> float | None:
    """The first of CONFIDENCE among measurements; None where none is."""
    found = {name.lower(): value for name, value in numbers.items() if abs(value) < MAX_CONFIDENCE}  # NaN is not
    return next((found[name] for name in CONFIDENCE if name in found), None)


def with_measurements(table: ObjectTable, rows: np.ndarray, data: bytes, features: int, source: str) -> ObjectTable:
    """The table with measurements.

    rows: (n,) the feature of each object, counted as decode_features expands the document; features:
    how many it found. Raises UserError where the two ways of counting differ.
    """
    found = _per_feature(_document(data))
    if len(found) != features:
        raise UserError(f"{source}: damaged, so that measurements cannot be told apart: read it without them")
    mine = [found[row] for row in rows.tolist()]
    names = dict.fromkeys(name for one in mine for name in one)
    columns = {name: np.array([one.get(name, np.nan) for one in mine], dtype=np.float64) for name in names}
    return replace(table, measurements=columns)


def nuclei_as_geometry(data: bytes) -> bytes:
    """A GeoJSON document in which every cell that has a nucleusGeometry has it for its geometry; what cannot be read stays."""
    try:
        document = _document(data)
    except (ValueError, RecursionError):
        return data
    for item in _features(document):
        properties = item.get("properties")
        inside = properties.get("nucleusGeometry") if isinstance(properties, dict) else None  # where geopandas puts it
        if isinstance(nucleus := unpacked(item.get("nucleusGeometry") or inside), dict):
            item["geometry"] = nucleus
    return json.dumps(document).encode()


def _document(data: bytes) -> Any:
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return json.loads(data.decode(errors="replace"))


def _features(document: Any) -> list[dict[str, Any]]:
    """The features of a document and their children, in file order."""
    if isinstance(document, dict) and isinstance(document.get("features"), list):
        document = document["features"]
    found: list[dict[str, Any]] = []
    for item in document if isinstance(document, list) else [document]:
        found.append(item if isinstance(item, dict) else {})  # what is no feature counts as one without geometry
        properties = found[-1].get("properties")
        children = unpacked(properties.get("childObjects")) if isinstance(properties, dict) else None
        if isinstance(children, list):
            found += _features(children)
    return found


def _per_feature(document: Any) -> list[dict[str, float]]:
    """Measurements of each feature, those of a geometry collection once a member."""
    found = []
    for item in _features(document):
        members = members_of(item.get("geometry", item))
        found += [numbers_of(item.get("properties"))] * len(members)
    return found


def numbers_of(properties: Any) -> dict[str, float]:
    """Name -> number: QuPath's mapping or its older list of name and value, as JSON text too, and plain numbers of others."""
    if not isinstance(properties, dict):
        return {}
    stated = unpacked(properties.get("measurements"))
    pairs: list[tuple[Any, Any]] = [(name, value) for name, value in properties.items() if name.lower() in CONFIDENCE]
    if isinstance(stated, dict):
        pairs += stated.items()
    elif isinstance(stated, list):
        pairs += [(one.get("name"), one.get("value")) for one in stated if isinstance(one, dict)]
    found = {}
    for name, value in pairs:
        try:
            found[str(name)] = float(value)  # takes "NaN" and "Infinity"
        except (TypeError, ValueError):
            continue
    return found
