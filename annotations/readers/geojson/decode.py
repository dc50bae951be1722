"""GeoJSON bytes -> typed features: every dialect of QuPath and of the programs that imitate it.

Well-formed files go through one msgspec decoder. A file that departs from the types (NaN literals, three-dimensional
positions, numbers as class names, a feature without "type") is read again by the tolerant path, feature by feature.
The coordinates of polygons stay JSON at first: annotations.geometry.rings parses them in bulk.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import msgspec
import numpy as np

from annotations.errors import UserError
from annotations.geometry.rings import IrregularPositionError, Ring, rings_of
from annotations.readers.class_name import unpacked

NOTHING = msgspec.Raw()


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the cyclic collector: it would walk millions of small tuples, none of them in a cycle, again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class Point(msgspec.Struct, tag_field="type", tag="Point", gc=False):
    coordinates: tuple[float, float]


class MultiPoint(msgspec.Struct, tag_field="type", tag="MultiPoint", gc=False):
    coordinates: Ring


class LineString(msgspec.Struct, tag_field="type", tag="LineString", gc=False):
    coordinates: msgspec.Raw = msgspec.Raw()


class MultiLineString(msgspec.Struct, tag_field="type", tag="MultiLineString", gc=False):
    coordinates: msgspec.Raw = msgspec.Raw()


class Polygon(msgspec.Struct, tag_field="type", tag="Polygon", gc=False):
    coordinates: msgspec.Raw


class MultiPolygon(msgspec.Struct, tag_field="type", tag="MultiPolygon", gc=False):
    coordinates: list[msgspec.Raw]


class GeometryCollection(msgspec.Struct, tag_field="type", tag="GeometryCollection", gc=False):
    geometries: list[Point | MultiPoint | LineString | MultiLineString | Polygon | MultiPolygon]


class Malformed(msgspec.Struct, tag_field="type", tag="", gc=False):
    """Stands for a geometry that could not be understood."""


class CleanedPolygons(msgspec.Struct, tag_field="type", tag=" cleaned", gc=False):
    """Outlines of a Polygon or (several) a MultiPolygon, read tolerantly: positions are pairs of numbers, NaN among them."""

    coordinates: list[list[Ring]]
    several: bool = False


Simple = Point | MultiPoint | LineString | MultiLineString | Polygon | MultiPolygon
Geometry = Simple | GeometryCollection


class Classification(msgspec.Struct, gc=False):
    name: str | None = None
    names: list[str] | str | None = None


class Properties(msgspec.Struct, gc=False):
    object_type: str | None = msgspec.field(default=None, name="objectType")
    object_type_snake: str | None = msgspec.field(default=None, name="object_type")
    type: str | None = None
    classification: Classification | str | None = None
    # NUMBER_KEYS: JSON still, as few files are asked for it.
    measurements: msgspec.Raw = NOTHING
    probability: msgspec.Raw = NOTHING
    confidence: msgspec.Raw = NOTHING
    score: msgspec.Raw = NOTHING
    prob: msgspec.Raw = NOTHING
    type_prob: msgspec.Raw = NOTHING
    children: list[Feature] | None = msgspec.field(default=None, name="childObjects")


class Feature(msgspec.Struct, tag_field="type", tag="Feature", gc=False):
    geometry: Geometry | CleanedPolygons | Malformed | None = None
    properties: Properties | None = None
    id: str | int | None = None
    object_type: str | None = msgspec.field(default=None, name="objectType")
    object_type_snake: str | None = msgspec.field(default=None, name="object_type")
    classification: Classification | str | None = None


class FeatureCollection(msgspec.Struct, tag_field="type", tag="FeatureCollection", gc=False):
    features: list[Feature]


Document = list[Feature] | FeatureCollection | Feature | Geometry
_decoder: msgspec.json.Decoder[Document] = msgspec.json.Decoder(Document)
_DEPTH = {"Point": 0, "MultiPoint": 1, "LineString": 1, "MultiLineString": 2, "Polygon": 2, "MultiPolygon": 3}
COORDINATES = b'"coordinates"'
GEOMETRY_KEYS = {"coordinates", "features", "geometries", "geometry"}  # to read one of two would lose outlines
_CLASS = {c.__name__: c for c in (Point, MultiPoint)}
# What detectors call how sure they are: StarDist and InstanSeg in QuPath (among its measurements), TIAToolbox, CellViT, others.
CONFIDENCE = ("detection probability", "probability", "confidence", "score", "prob", "type_prob")
NUMBER_KEYS = {"measurements", *CONFIDENCE[1:]}  # properties that hold numbers
CELL_SIDE_L0 = 256.0  # 64 um at 40x; no cell is longer
CELL_SHARE = 0.9  # of the area: a few of a detector's cells run together, and a region has specks around it
SAMPLED = 1000
CELL_SET = "cell set"  # the object type given to a MultiPolygon of all cells of a class, which CellViT calls an annotation


def decode_features(data: bytes, source: str, *, tolerant: bool = False) -> list[Feature]:
    """Return all features of a document, children and members of geometry collections included, in file order.

    data: the JSON text; source: what errors call the file; tolerant: take the tolerant path at once, for positions that
    turned out to be irregular. A geometry that could not be understood is a Malformed.
    Raises UserError where the text is not JSON or not GeoJSON, with the position.
    """
    data = data.removeprefix(b"\xef\xbb\xbf")
    if not data[:64].strip() and not data.strip():
        raise UserError(f"{source}: the file is empty: export the annotations again")
    try:
        if tolerant:
            return _tolerant(_loads(data, source), source)
        try:
            document = _decoder.decode(data)
        except msgspec.DecodeError as error:
            if "truncated" in str(error):
                raise UserError(f"{source}: the JSON stops early, after byte {len(data)}: export or copy it again") from None
            return _tolerant(_loads(data, source), source)
        except UnicodeDecodeError:
            return _tolerant(_loads(data, source), source)
        features = _expanded(_top(document))
        if isinstance(document, list):
            _mark_cell_sets(features)
    except RecursionError:
        raise UserError(f"{source}: JSON nested too deeply: export the annotations as GeoJSON") from None
    if data.count(COORDINATES) > len(features) - [feature.geometry for feature in features].count(None):
        _refuse_duplicates(data, features, source)
    return features


def _top(document: Any) -> list[Feature]:
    if isinstance(document, FeatureCollection):
        return document.features
    if isinstance(document, list):
        return document
    return [document if isinstance(document, Feature) else Feature(geometry=document)]


def _expanded(features: list[Feature]) -> list[Feature]:
    """Expand features: their children behind them; a geometry collection as one feature per member."""
    parents = [feature for feature in features if feature.properties is not None and feature.properties.children]
    if not parents and not [feature for feature in features if type(feature.geometry) is GeometryCollection]:
        return features
    expanded: list[Feature] = []
    for feature in features:
        if type(feature.geometry) is GeometryCollection:
            expanded += [msgspec.structs.replace(feature, geometry=member) for member in feature.geometry.geometries or (None,)]
        else:
            expanded.append(feature)
        if feature.properties is not None and feature.properties.children:
            expanded += _expanded(feature.properties.children)
    return expanded


def _mark_cell_sets(features: list[Feature]) -> None:
    """Set the type CELL_SET for features of a bare list that are CellViT's: classed "annotations", each all cells of its class.

    QuPath's own annotations may be such a MultiPolygon too, but their pieces are larger. Before 0.4 its ids told the type.
    """
    for feature in features:
        geometry, own = feature.geometry, feature.properties
        if not isinstance(geometry, MultiPolygon | CleanedPolygons) or own is None:
            continue
        if not isinstance(own.classification, Classification) or not own.classification.name:
            continue
        types = (own.object_type, own.object_type_snake, own.type, feature.object_type, feature.object_type_snake)
        if any(name and name.lower() != "annotation" for name in types) or str(feature.id).startswith("Path"):
            continue
        if not (isinstance(geometry, CleanedPolygons) and not geometry.several) and is_cell_multipolygon(geometry.coordinates):
            feature.properties = msgspec.structs.replace(own, object_type=CELL_SET)


def _loads(data: bytes, source: str) -> Any:
    """Read by the standard library, which takes NaN, Infinity and UTF-16, and knows line and column of an error."""
    try:
        return json.loads(data, object_pairs_hook=partial(_unique_geometry, source=source), parse_int=_integer)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise UserError(f"{source}: not JSON, {where}: {error.msg}: export the annotations as GeoJSON") from None
    except UnicodeDecodeError as error:
        where = f"{error.encoding} text: {error.reason} at byte {error.start}"
        raise UserError(f"{source}: not JSON in {where}: save it as UTF-8, or export it again") from None


def _integer(text: str) -> int | float:
    """Read an integer too large for a float as infinite, as it is with a decimal point."""
    return int(text) if len(text) < 300 else float(text)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON. Raises ValueError where a key comes twice."""
    document = dict(pairs)
    if len(document) < len(pairs):
        raise ValueError("a key comes twice")
    return document


def _unique_geometry(pairs: list[tuple[str, Any]], source: str) -> dict[str, Any]:
    """Make an object of JSON. Raises UserError where a key that holds outlines comes twice: only the last would be read."""
    document = dict(pairs)
    if len(document) < len(pairs):
        for key in GEOMETRY_KEYS & document.keys():
            if any([value for name, value in pairs if name == key][:-1]):
                raise UserError(f"{source}: an object has {key!r} twice, and only one can be meant: export it again")
    return document


def _refuse_duplicates(data: bytes, features: list[Feature], source: str) -> None:
    """Look into a document whose word "coordinates" comes more often than outlines were read.

    A nucleus beside its cell is no surprise; anything else is looked into. Raises UserError where a key comes twice.
    """
    read = sum(feature.geometry is not None for feature in features)
    if data.count(COORDINATES) - data.count(b'"nucleusGeometry"') > read:
        _loads(data, source)


def _tolerant(document: Any, source: str) -> list[Feature]:
    is_list = isinstance(document, list)
    if isinstance(document, dict):
        kind = document.get("type")
        if kind == "FeatureCollection" or (kind is None and isinstance(document.get("features"), list)):
            document = document.get("features")
            if not isinstance(document, list):
                raise UserError(f"{source}: a FeatureCollection without a list of features: export it again")
        elif kind in ("Feature", "GeometryCollection", *_DEPTH) or (kind is None and "geometry" in document):
            document = [document]
        else:
            keys = " ".join((_text(", ".join(map(str, list(document)[:6]))) or "").split()) or "none"
            raise UserError(
                f"{source}: not GeoJSON (type {str(kind)[:60]!r}; keys: {keys:.200}): give a FeatureCollection or features"
            )
    if not isinstance(document, list):
        raise UserError(f"{source}: not GeoJSON, the top level is a {type(document).__name__}: give a FeatureCollection")
    features = [feature for number, item in enumerate(document) for feature in _tolerant_features(item, number, source)]
    if is_list:
        _mark_cell_sets(features)
    return features


def _tolerant_features(item: Any, number: int, source: str) -> list[Feature]:
    """Return a feature from plain dicts; several where its geometry is a collection; its children behind it."""
    if isinstance(item, dict) and item.get("type") in ("GeometryCollection", *_DEPTH):
        item = {"geometry": item}
    if not isinstance(item, dict) or not ("geometry" in item or item.get("type") == "Feature"):
        if number:  # damage in a list of features; a list that begins like this is none
            return [Feature(geometry=None if isinstance(item, dict) else Malformed())]
        raise UserError(f"{source}: not GeoJSON, item {number} of the list is no Feature: give a FeatureCollection or features")
    raw = item.get("properties")
    props: dict[str, Any] = raw if isinstance(raw, dict) else {}
    key = item.get("id")
    own = Properties(
        object_type=_text(props.get("objectType")),
        object_type_snake=_text(props.get("object_type")),
        type=_text(props.get("type")),
        classification=_classification(props.get("classification")),
    )
    for name in NUMBER_KEYS & props.keys():
        setattr(own, name, _raw(props[name]))
    feature = Feature(
        id=_text(key) if isinstance(key, str) else key if isinstance(key, int) else None,
        object_type=_text(item.get("objectType")),
        object_type_snake=_text(item.get("object_type")),
        classification=_classification(item.get("classification")),
        properties=own,
    )
    members = geometry_members(item.get("geometry"))
    features = [msgspec.structs.replace(feature, geometry=_geometry(member)) for member in members]
    children = unpacked(props.get("childObjects"))
    for child in children if isinstance(children, list) else ():
        features += _tolerant_features(child, number, source)
    return features


def geometry_members(geometry: Any) -> list[Any]:
    """Return a geometry, or those of a collection, of collections in it too; None for an empty one."""
    geometries: list[Any] = []
    stack = [geometry]
    while stack:
        value = stack.pop()
        if not (isinstance(value, dict) and value.get("type") == "GeometryCollection"):
            geometries.append(value)
            continue
        members = value.get("geometries")
        stack.extend(reversed(members) if isinstance(members, list) and members else [members or None])
    return geometries


def _raw(value: Any) -> msgspec.Raw:
    """Return a value as JSON again; null where it cannot be."""
    try:
        return msgspec.Raw(msgspec.json.encode(value))
    except (ValueError, TypeError, OverflowError, RecursionError):
        return msgspec.Raw(b"null")


def _text(value: Any) -> str | None:
    """Return text as it can be stored: half a pair of surrogates, which JSON can hold, cannot."""
    return None if value is None or isinstance(value, dict | list) else str(value).encode("utf-8", "replace").decode()


def _classification(value: Any) -> Classification | str | None:
    if not isinstance(value, dict):
        return _text(value)
    names = value.get("names")
    return Classification(
        _text(value.get("name")), [_text(str(name)) or "" for name in names] if isinstance(names, list) else _text(names)
    )


def _geometry(value: Any) -> Simple | CleanedPolygons | Malformed | None:
    """Return a geometry from plain dicts: positions cut to x, y, what is no number becomes NaN; None where there is none."""
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind in _DEPTH:
        if kind in ("LineString", "MultiLineString"):
            return LineString()
        try:
            positions = _positions(value.get("coordinates") or [], _DEPTH[kind])
            if kind in ("Polygon", "MultiPolygon"):
                several = kind == "MultiPolygon"
                return CleanedPolygons(positions if several else [positions], several)
            return _CLASS[kind](positions)
        except (TypeError, ValueError, IndexError, OverflowError):
            pass
    return Malformed()


def _positions(value: Any, depth: int) -> Any:
    if depth > 1:
        return [_positions(part, depth - 1) for part in value]
    array = np.array(value, dtype=np.float64)  # takes None and "NaN" for NaN
    if depth == 0:
        return (float(array[0]), float(array[1]))
    if array.size and (array.ndim != 2 or array.shape[1] < 2):
        raise ValueError("positions are not pairs of numbers")
    return array[:, :2].tolist() if array.size else []


def is_cell_multipolygon(polygons: Sequence[msgspec.Raw] | Sequence[list[Ring]]) -> bool:
    """Tell whether nearly all of the area is in polygons no longer than a cell, level-0 pixels.

    polygons: the coordinates of a MultiPolygon, JSON or lists; of many a sample is looked at.
    """
    try:
        rings = rings_of(polygons[:: max(1, len(polygons) // SAMPLED)])
    except IrregularPositionError:
        return False
    is_outline = np.zeros(len(rings.length), dtype=bool)
    is_outline[(np.cumsum(rings.per_polygon) - rings.per_polygon)[rings.per_polygon > 0]] = True
    filled = np.flatnonzero(rings.length)
    if not len(filled):
        return False
    start = (np.cumsum(rings.length) - rings.length)[filled]
    with np.errstate(invalid="ignore", over="ignore"):
        sides = np.maximum.reduceat(rings.xy, start) - np.minimum.reduceat(rings.xy, start)
        sides = sides[is_outline[filled] & np.isfinite(sides).all(axis=1)]
        area = sides.prod(axis=1)
        return bool(area[sides.max(axis=1, initial=0) <= CELL_SIDE_L0].sum() > CELL_SHARE * area.sum())
