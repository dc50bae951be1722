"""Annotation files -> ObjectTable: containers, kinds, classes, repair."""

from __future__ import annotations

import gc
import gzip
import io
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from annotations.errors import UserError
from annotations.geojson import (
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
from annotations.positions import IrregularPositionError, rings_from_json, rings_from_lists
from annotations.rings import polygons_from_rings, repaired
from annotations.table import CELL, TISSUE, UNCLASSIFIED, ObjectTable, empty_table

Kind = Literal["auto", "tissue", "cell"]

_KIND_OF_TYPE = {"annotation": TISSUE, "detection": CELL, "cell": CELL}
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
_MAX_LABELS = np.iinfo(np.int16).max


def read_annotations(path: Path, *, kind: Kind = "auto", point_size_l0: float | None = None) -> ObjectTable:
    """Every polygon of a GeoJSON file (plain, .gz, or a .zip of one), in file order, level-0 pixels as written.

    kind: "auto" takes detections and cells as CELL, all else as TISSUE; "tissue" and "cell" decide for all. A
        MultiPolygon that is a cell becomes one row per polygon. TMA cores, tiles and the root are ignored and counted.
    point_size_l0: side of the square, level-0 pixels, that a Point or MultiPoint position becomes; None skips them.
    The table's counts: "features" read; "exploded" rows gained from MultiPolygons and MultiPoints; "ignored",
        "points_skipped", "lines_skipped", "empty", "malformed" features left out; "vertices_dropped" positions that
        are not finite; "repaired" invalid outlines; "invalid_dropped" outlines of too few points and "zero_area"
        ones, left out. Only what occurred is listed.
    Raises UserError (one line: file, place, way out) where the file is missing, not JSON or not GeoJSON.
    """
    if kind not in ("auto", "tissue", "cell"):
        raise ValueError(f"kind {kind!r}: one of auto, tissue, cell")
    if point_size_l0 is not None and not (np.isfinite(point_size_l0) and point_size_l0 > 0):
        raise UserError(f"point size {point_size_l0}: give a side in level-0 pixels above 0")
    path = Path(path)
    data = _content(path)
    with _collector_paused():
        return _parsed(data, kind, point_size_l0, str(path))


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


def _parsed(data: bytes, kind: Kind, point_size_l0: float | None, source: str) -> ObjectTable:
    """Its own function, so that the decoded positions are gone before the collector runs again."""
    try:
        features = decode_features(data, source)
        return _table(features, kind, point_size_l0, {"features": len(features)}, source)
    except IrregularPositionError:
        features = decode_features(data, source, tolerant=True)
        return _table(features, kind, point_size_l0, {"features": len(features)}, source)


def _content(path: Path) -> bytes:
    """The JSON text of a file, unpacked by what its first bytes say."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder: name a file in it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        elif data[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
            data = _only_member(path, data)
    except (EOFError, OSError, zlib.error, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        raise UserError(f"{path}: damaged or unsupported archive: {error}: export or copy it again") from None
    if data.lstrip()[:1] == b"<":
        raise UserError(f"{path}: XML, not GeoJSON: export the annotations as GeoJSON")
    return data


def _only_member(path: Path, data: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = [n for n in archive.namelist() if not n.endswith("/") and not n.startswith("__MACOSX/")]
        if len(names) != 1:
            raise UserError(f"{path}: the archive holds {len(names)} files: pack one GeoJSON file per archive")
        return archive.read(names[0])


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
        if found.name:
            return found.name
        return (found.names if isinstance(found.names, str) else ": ".join(found.names or ())) or None
    if found is None and properties is not None and properties.type is not None:
        # TIAToolbox keeps the class of a nucleus in `type`; QuPath's word for the object's type is no class.
        alias = properties.type.lower()
        return None if alias in _KIND_OF_TYPE or alias in _IGNORED_TYPES else properties.type or None
    return found or None


def _table(
    features: list[Feature], kind: Kind, point_size_l0: float | None, counts: dict[str, int], source: str
) -> ObjectTable:
    """Sort features by what their geometry is, build polygons in bulk, and bring them back into file order."""
    kinds, keep = _kinds(features, kind, counts)
    polygons: list = []  # JSON each, or rings each
    group: list[int] = []  # one number per row to be; the polygons of a MultiPolygon share it
    group_feature: list[int] = []
    points: list[tuple[float, float]] = []
    point_feature: list[int] = []
    skipped = {"points_skipped": 0, "lines_skipped": 0, "malformed": 0, "empty": 0}
    for row in keep:
        geometry = features[row].geometry
        if isinstance(geometry, Polygon):
            group.append(len(group_feature))
            group_feature.append(row)
            polygons.append(geometry.coordinates)
        elif isinstance(geometry, MultiPolygon | CleanedPolygons):
            parts = len(geometry.coordinates)
            first, rows = len(group_feature), parts if kinds[row] == CELL else 1
            group.extend(range(first, first + parts) if kinds[row] == CELL else [first] * parts)
            group_feature.extend([row] * rows)
            polygons.extend(geometry.coordinates)
            skipped["empty"] += not parts
        elif isinstance(geometry, Point | MultiPoint):
            found = [geometry.coordinates] if isinstance(geometry, Point) else geometry.coordinates
            if point_size_l0 is None:
                skipped["points_skipped"] += 1
            else:
                points.extend(found)
                point_feature.extend([row] * len(found))
        elif isinstance(geometry, LineString | MultiLineString):
            skipped["lines_skipped"] += 1
        elif isinstance(geometry, Malformed):
            skipped["malformed"] += 1
        else:
            skipped["empty"] += 1
    counts.update({name: n for name, n in skipped.items() if n})
    is_text = bool(polygons) and isinstance(polygons[0], msgspec.Raw)
    rings = rings_from_json(polygons) if is_text else rings_from_lists(polygons)
    outlines, of_group = polygons_from_rings(*rings, np.array(group, dtype=np.int64), counts)
    outlines, kept = repaired(outlines, counts)
    squares, of_point = _squares(points, point_size_l0, counts)
    feature = np.concatenate(
        [
            np.array(group_feature, dtype=np.int64)[of_group[kept]],
            np.array(point_feature, dtype=np.int64)[of_point],
        ]
    )
    geometry_all = np.concatenate([outlines, squares])
    order = np.argsort(feature, kind="stable")
    return _labelled(features, feature[order], geometry_all[order], kinds, counts, source)


def _kinds(features: list[Feature], kind: Kind, counts: dict[str, int]) -> tuple[np.ndarray, list[int]]:
    """uint8 kind of each feature, and the rows that are not ignored.

    A point is a cell whatever its object type: QuPath's points tool stores counted cells as annotations.
    """
    types = [_object_type(feature) for feature in features]
    keep = [row for row, name in enumerate(types) if name not in _IGNORED_TYPES]
    if ignored := len(types) - len(keep):
        counts["ignored"] = ignored
    if kind == "auto":
        points = [isinstance(feature.geometry, Point | MultiPoint) for feature in features]
        kinds = [CELL if point else _KIND_OF_TYPE.get(name or "", TISSUE) for name, point in zip(types, points, strict=True)]
        return np.array(kinds, dtype=np.uint8), keep
    return np.full(len(types), CELL if kind == "cell" else TISSUE, dtype=np.uint8), keep


def _squares(points: list, side_l0: float | None, counts: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Squares around points, and which point each belongs to."""
    import shapely

    from annotations.rings import usable

    xy = np.array(points, dtype=np.float64).reshape(-1, 2)
    good = usable(xy)
    if dropped := int((~good).sum()):
        counts["vertices_dropped"] = counts.get("vertices_dropped", 0) + dropped
    half = (side_l0 or 0.0) / 2
    x, y = xy[good].T
    return np.asarray(shapely.box(x - half, y - half, x + half, y + half), dtype=object), np.flatnonzero(good)


def _labelled(
    features: list[Feature], rows: np.ndarray, geometry: np.ndarray, kinds: np.ndarray, counts: dict[str, int], source: str
) -> ObjectTable:
    """The table of outlines `geometry`, each of feature `rows`; a feature of several rows numbers its ids."""
    if not len(rows):
        return empty_table(counts)
    used = np.zeros(len(features), dtype=bool)
    used[rows] = True
    index: dict[str, int] = {}
    label = np.full(len(features), UNCLASSIFIED, dtype=np.int64)
    ids = np.empty(len(features), dtype=object)
    for i in np.flatnonzero(used).tolist():
        feature = features[i]
        name = _class_name(feature)
        if name is not None:
            label[i] = index.setdefault(name, len(index))
        key = feature.id
        ids[i] = str(i) if key is None or key == "" or key in _TYPE_OF_OLD_ID else str(key)
    if len(index) > _MAX_LABELS:
        raise UserError(f"{source}: {len(index)} class names, {_MAX_LABELS} at most: put names of single objects in `name`")
    row_ids = ids[rows]
    first = np.concatenate([[True], rows[1:] != rows[:-1]])
    rank = np.arange(len(rows)) - np.maximum.accumulate(np.where(first, np.arange(len(rows)), 0))
    extra = np.flatnonzero(~first)
    if len(extra):
        counts["exploded"] = len(extra)
        for i in np.flatnonzero(~first | np.append(~first[1:], False)).tolist():
            row_ids[i] = f"{row_ids[i]}/{rank[i]}"
    return ObjectTable(geometry, row_ids, label[rows].astype(np.int16), kinds[rows], tuple(index), counts)
