"""GeoJSON features as QuPath means them: kinds, classes, nuclei, confidences -> ObjectTable.

Measurements are read on demand: they are most of a file's text, and clipping has no use for them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np

from annotations.errors import UserError
from annotations.geometry.rings import IrregularPositionError, rings_of
from annotations.objects import Kind, ObjectTable
from annotations.readers.class_name import class_of, joined, unpacked
from annotations.readers.geojson.decode import (
    CELL_SET,
    CONFIDENCE,
    NOTHING,
    NUMBER_KEYS,
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
    geometry_members,
)
from annotations.readers.options import ReadOptions
from annotations.readers.table_builder import Objects, build_table, points_of

_KIND_OF_TYPE = {"annotation": Kind.TISSUE, "detection": Kind.CELL, "cell": Kind.CELL, CELL_SET: Kind.CELL}
_CELL_SETS = "a list of MultiPolygons of cells, one a class (CellViT), taken for cells: --kind tissue keeps each whole"
UNKNOWN = "\ufffd"  # stands for what a file cannot store
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


def read_geojson(data: bytes, source: str, options: ReadOptions, *, id_prefix: str = "") -> ObjectTable:
    """Read every feature of a GeoJSON document, as annotations.readers.read.read_annotations says.

    id_prefix: begins the id of a feature that has none, which is its number; it is taken out of other ids.
    Raises UserError where the text is no GeoJSON.
    """
    data = _nuclei_as_geometry(data) if options.nuclei else data
    for tolerant in (False, True):
        features = decode_features(data, source, tolerant=tolerant)
        try:
            table, rows = _table(features, options, source, id_prefix)
            break
        except IrregularPositionError:
            if tolerant:
                raise
    return _with_measurements(table, rows, data, len(features), source) if options.measurements else table


def _table(features: list[Feature], options: ReadOptions, source: str, id_prefix: str) -> tuple[ObjectTable, np.ndarray]:
    """Return the table of features, and the feature of each of its rows."""
    types = _object_types(features)
    kinds = _kinds(features, types, options)
    objects = Objects(
        [_id(feature.id, number, id_prefix) for number, feature in enumerate(features)],
        [_class_name(feature) for feature in features],
        kinds,
        _confidences([feature.properties for feature in features]),
    )
    keep = [row for row, name in enumerate(types) if name not in _IGNORED_TYPES]
    objects.counts["ignored"] = len(types) - len(keep)
    geometries = _sort(features, keep, kinds == Kind.CELL, objects)
    owner, group = np.array(geometries.owner, dtype=np.int64), np.array(geometries.group, dtype=np.int64)
    points = points_of(geometries.points, geometries.point_owner)
    table, rows = build_table(objects, rings_of(geometries.polygons), owner, points, options, source, group=group)
    cell_sets = options.kind == "auto" and CELL_SET in types
    return (table.with_notes(_CELL_SETS) if cell_sets else table), rows


def _id(key: str | int | None, number: int, prefix: str) -> str:
    if key is None or key == "" or key in _TYPE_OF_OLD_ID:
        return f"{prefix}{number}"
    return str(key).replace(prefix, UNKNOWN) if prefix else str(key)


def _object_type(feature: Feature) -> str | None:
    """Return the object type in lower case, wherever the dialect has it; None where it has none."""
    properties = feature.properties
    name = feature.object_type or feature.object_type_snake
    if properties is not None:
        name = properties.object_type or properties.object_type_snake or name
        if name is None and properties.type is not None:
            alias = properties.type.lower()
            if alias in _KIND_OF_TYPE or alias in _IGNORED_TYPES:
                return alias
    if name is None and type(feature.id) is str:
        return _TYPE_OF_OLD_ID.get(feature.id)
    return name.lower() if name is not None else None


def _class_name(feature: Feature) -> str | None:
    """Return the class; derived classes joined as QuPath shows them; None where there is none."""
    properties = feature.properties
    stated = properties.classification if properties is not None else None
    if stated is None:
        stated = feature.classification
    if isinstance(stated, Classification):
        return stated.name or joined(stated.names)
    name = class_of(stated) if stated is not None else None
    if name is None and properties is not None and properties.type is not None:
        # TIAToolbox keeps the class of a nucleus in `type`; QuPath's word for the object's type is no class.
        alias = properties.type.lower()
        return None if alias in _KIND_OF_TYPE or alias in _IGNORED_TYPES else properties.type or None
    return name or None


@dataclass
class _Geometries:
    """Polygons and points of features.

    polygons: JSON each, or rings each; owner: the feature of each; group: a number of each, which the parts of a MultiPolygon
    share that is one object. points, point_owner: positions, and the feature of each.
    """

    polygons: list[Any] = field(default_factory=list)
    owner: list[int] = field(default_factory=list)
    group: list[int] = field(default_factory=list)
    points: list[tuple[float, float]] = field(default_factory=list)
    point_owner: list[int] = field(default_factory=list)


def _sort(features: list[Feature], keep: list[int], is_cell: np.ndarray, objects: Objects) -> _Geometries:
    """Sort features `keep` by what their geometry is; those without polygon or point are lost."""
    plain = [geometry.coordinates for row in keep if type(geometry := features[row].geometry) is Polygon]
    if len(plain) == len(keep):  # as of cells nearly always
        return _Geometries(plain, keep, keep)
    result = _Geometries()
    groups = 0
    for row in keep:
        geometry = features[row].geometry
        if isinstance(geometry, Polygon):
            result.polygons.append(geometry.coordinates)
            result.owner.append(row)
            result.group.append(groups)
            groups += 1
        elif isinstance(geometry, MultiPolygon | CleanedPolygons) and geometry.coordinates:
            parts = len(geometry.coordinates)
            result.polygons.extend(geometry.coordinates)
            result.owner.extend([row] * parts)
            result.group.extend(range(groups, groups + parts) if is_cell[row] else [groups] * parts)
            groups += parts
        elif isinstance(geometry, Point | MultiPoint) and geometry.coordinates:
            points = [geometry.coordinates] if isinstance(geometry, Point) else geometry.coordinates
            result.points.extend(points)
            result.point_owner.extend([row] * len(points))
        elif isinstance(geometry, LineString | MultiLineString):
            objects.lose(row, "lines_skipped")
        else:
            objects.lose(row, "malformed" if isinstance(geometry, Malformed) else "empty")
    return result


def _object_types(features: list[Feature]) -> list[str | None]:
    """Return the object type of each feature; most have it where QuPath has it, as QuPath writes it."""
    known = _KIND_OF_TYPE
    return [
        p.object_type if (p := feature.properties) is not None and p.object_type in known else _object_type(feature)
        for feature in features
    ]


def _kinds(features: list[Feature], types: list[str | None], options: ReadOptions) -> np.ndarray:
    """Return the kind of each feature, uint8 (n,).

    A point is a cell whatever its object type: QuPath's points tool stores counted cells as annotations.
    """
    if options.kind != "auto":
        return np.full(len(features), options.kind_of(Kind.TISSUE), dtype=np.uint8)
    kinds = (
        Kind.CELL if type(feature.geometry) in _POINTS else _KIND_OF_TYPE.get(name or "", Kind.TISSUE)
        for name, feature in zip(types, features, strict=True)
    )
    return np.fromiter(kinds, np.uint8, len(features))


TOGETHER = 10_000
MAX_CONFIDENCE = 1e30  # beyond it, it is damage, and no float32


def _confidences(properties: Sequence[Properties | None]) -> np.ndarray | None:
    """Return confidences that a detector states of n objects, float64 (n,), NaN where it does not; None where it never does."""
    if not any(_may_state(properties[start : start + TOGETHER]) for start in range(0, len(properties), TOGETHER)):
        return None
    stated = [None if item is None else _confidence(item) for item in properties]
    return None if stated.count(None) == len(stated) else np.array(stated, dtype=np.float64)  # None becomes NaN


def _may_state(properties: Sequence[Properties | None]) -> bool:
    """Tell whether any of many objects may have a confidence: of millions nearly none has, so they are looked at together."""
    known = [p for p in properties if p is not None]
    if [p for p in known if not (p.probability is p.confidence is p.score is p.prob is p.type_prob is NOTHING)]:
        return True
    text = b"".join([p.measurements for p in known])
    return b"rob" in text or b"onfidence" in text or b"core" in text


def _confidence(p: Properties) -> float | None:
    """Return the first of CONFIDENCE among measurements and plain properties; None where none is."""
    try:
        numbers = {name: msgspec.json.decode(raw) for name in NUMBER_KEYS if (raw := getattr(p, name)) is not NOTHING}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return confidence_of(numbers_of(numbers))


def confidence_of(numbers: dict[str, float]) -> float | None:
    """Return the first of CONFIDENCE among measurements; None where none is."""
    usable = {name.lower(): value for name, value in numbers.items() if abs(value) < MAX_CONFIDENCE}  # NaN is not
    return next((usable[name] for name in CONFIDENCE if name in usable), None)


def _with_measurements(table: ObjectTable, rows: np.ndarray, data: bytes, features: int, source: str) -> ObjectTable:
    """Return the table with measurements.

    rows: (n,) the feature of each object, counted as decode_features expands the document; features:
    how many it found. Raises UserError where the two ways of counting differ.
    """
    numbers = _per_feature(_document(data))
    if len(numbers) != features:
        raise UserError(f"{source}: damaged, so that measurements cannot be told apart: read it without them")
    return replace(table, measurements=columns_of([numbers[row] for row in rows.tolist()]))


def columns_of(numbers: Sequence[dict[str, float]]) -> dict[str, np.ndarray]:
    """Return the measurements of n objects by name, float64 (n,) each, NaN where an object has none of the name."""
    names = dict.fromkeys(name for row in numbers for name in row)
    return {name: np.array([row.get(name, np.nan) for row in numbers], dtype=np.float64) for name in names}


def _nuclei_as_geometry(data: bytes) -> bytes:
    """Make the nucleusGeometry of every cell that has one its geometry, in a GeoJSON document; what cannot be read stays."""
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
    """Return the features of a document and their children, in file order."""
    if isinstance(document, dict) and isinstance(document.get("features"), list):
        document = document["features"]
    features: list[dict[str, Any]] = []
    for item in document if isinstance(document, list) else [document]:
        feature = item if isinstance(item, dict) else {}  # what is no feature counts as one without geometry
        features.append(feature)
        properties = feature.get("properties")
        children = unpacked(properties.get("childObjects")) if isinstance(properties, dict) else None
        if isinstance(children, list):
            features += _features(children)
    return features


def _per_feature(document: Any) -> list[dict[str, float]]:
    """Return measurements of each feature, those of a geometry collection once a member."""
    numbers = []
    for item in _features(document):
        numbers += [numbers_of(item.get("properties"))] * len(geometry_members(item.get("geometry", item)))
    return numbers


def numbers_of(properties: Any) -> dict[str, float]:
    """Return name -> number: QuPath's mapping or its older list of name and value, as JSON text too, and plain confidences."""
    if not isinstance(properties, dict):
        return {}
    stated = unpacked(properties.get("measurements"))
    pairs: list[tuple[Any, Any]] = [(name, value) for name, value in properties.items() if name.lower() in CONFIDENCE]
    if isinstance(stated, dict):
        pairs += stated.items()
    elif isinstance(stated, list):
        pairs += [(item.get("name"), item.get("value")) for item in stated if isinstance(item, dict)]
    numbers = {}
    for name, value in pairs:
        try:
            numbers[str(name)] = float(value)  # takes "NaN" and "Infinity"
        except (TypeError, ValueError):
            continue
    return numbers
