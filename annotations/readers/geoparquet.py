"""GeoParquet, and Parquet with a column of WKB -> table."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import shapely

from annotations.errors import UserError
from annotations.geometry.rings import beyond, polygon_parts, usable
from annotations.objects import Kind, ObjectTable
from annotations.readers.class_name import class_of
from annotations.readers.geojson.qupath import confidence_of, numbers_of
from annotations.readers.table_builder import Objects, add, kind_of, table_of_outlines

CLASS_COLUMNS = ("label", "classification", "class", "class_name", "type", "name")
ID_COLUMNS = ("id", "object_id", "key")
KIND_COLUMNS = ("kind", "objectType", "object_type")
PACKED_COLUMN = "measurements"
CONFIDENCE_COLUMNS = ("confidence", "score", "probability", "prob", "type_prob")
_KINDS = {
    "annotation": Kind.TISSUE,
    "tissue": Kind.TISSUE,
    "detection": Kind.CELL,
    "cell": Kind.CELL,
    "proposal": Kind.PROPOSAL,
}
_POINTS, _POLYGONS, _LINES = (0, 4), (3, 6), (1, 2, 5)


def read_geoparquet(data: bytes, source: str, *, kind: str, point_size_l0: float | None, scale: float) -> ObjectTable:
    """Every row, its geometry as WKB, level-0 pixels; a coordinate system it may state is not looked at.

    The geometry column is the one the file's "geo" metadata names, else `geometry`. Class, id, kind and confidence are the
    first of CLASS_COLUMNS, ID_COLUMNS, KIND_COLUMNS, CONFIDENCE_COLUMNS there is; a class may be text, or QuPath's
    {"name": ...} as JSON text or as a struct. MultiPolygons that are cells become one row a part; other numeric columns
    are the measurements, and so is what a column `measurements` holds. Raises UserError where there is no such column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return _read(pq.read_table(io.BytesIO(data)), source, kind, point_size_l0, scale)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: not a readable Parquet file: {' '.join(str(error).split())}: save it again") from None


def _read(columns: Any, source: str, kind: str, point_size_l0: float | None, scale: float) -> ObjectTable:
    geometry, far = _geometries(columns, source)
    label, ids, kinds, sure = (
        next((name for name in names if name in columns.column_names), None)
        for names in (CLASS_COLUMNS, ID_COLUMNS, KIND_COLUMNS, CONFIDENCE_COLUMNS)
    )
    n, counts = len(geometry), {"features": len(geometry)}
    objects = Objects(
        [str(i if value is None else value) for i, value in enumerate(_values(columns, ids, n))],
        [class_of(value) for value in _values(columns, label, n)],
        [],
    )
    form = shapely.get_type_id(geometry)
    said = [_KINDS.get(str(value).lower()) for value in _values(columns, kinds, n)]
    auto = [Kind.CELL if form[i] in _POINTS else Kind.TISSUE if value is None else value for i, value in enumerate(said)]
    objects.kind = [kind_of(kind, value) for value in auto]
    packed = _packed_measurements(columns)
    if sure is not None:
        objects.confidence = [float("nan") if value is None else float(value) for value in _values(columns, sure, n)]
    elif packed:
        stated = [confidence_of(one) for one in packed]
        if stated.count(None) < n:
            objects.confidence = [float("nan") if value is None else value for value in stated]
    _lose(objects, geometry, far, form, counts)
    outlines, owner = _outlines(geometry, form, np.array(objects.kind, dtype=np.uint8), scale)
    at = np.flatnonzero(np.isin(form, _POINTS) & ~shapely.is_empty(geometry))
    xy, which = shapely.get_coordinates(geometry[at], return_index=True)
    table, rows = table_of_outlines(
        objects, outlines, owner, np.unique(owner), (xy, at[which]), counts, point_size_l0, scale, source
    )
    return _measured(table, rows, columns, {label, ids, kinds, sure}, packed)


def _geometries(columns: Any, source: str) -> tuple[np.ndarray, np.ndarray]:
    """The geometry of each row in two dimensions, None where there is none or it is not finite; bool, beyond any slide."""
    stated = (columns.schema.metadata or {}).get(b"geo")
    geo = json.loads(stated) if stated else {}
    name = geo.get("primary_column", "geometry")
    if name not in columns.column_names:
        raise UserError(f"{source}: has no column {name!r} (but {', '.join(columns.column_names)[:200]}): name it geometry")
    encoding = geo.get("columns", {}).get(name, {}).get("encoding", "WKB")
    if encoding != "WKB":
        raise UserError(f"{source}: geometry encoded as {encoding}, not WKB: save it with geometry_encoding='WKB'")
    found = columns[name].to_pylist()
    if any(not isinstance(value, bytes | None) for value in found):
        raise UserError(f"{source}: column {name!r} holds no WKB: save it with geopandas.GeoDataFrame.to_parquet")
    geometry = np.asarray(shapely.from_wkb(np.array([*found, None], dtype=object)[:-1], on_invalid="ignore"), dtype=object)
    geometry = np.asarray(shapely.force_2d(geometry), dtype=object).reshape(-1)
    xy, row = shapely.get_coordinates(geometry, return_index=True)
    geometry[np.unique(row[~usable(xy)])] = None
    return geometry, np.isin(np.arange(len(geometry)), row[beyond(xy)])


def _lose(objects: Objects, geometry: np.ndarray, far: np.ndarray, form: np.ndarray, counts: dict[str, int]) -> None:
    """Count what is no outline and no point."""
    empty = shapely.is_empty(geometry)
    reasons = {
        "beyond": far,
        "malformed": shapely.is_missing(geometry) & ~far,
        "empty": empty,
        "lines_skipped": np.isin(form, _LINES) & ~empty,
    }
    for reason, where in reasons.items():
        rows = np.flatnonzero(where)
        add(counts, reason, len(rows))
        objects.lost += [(row, reason) for row in rows.tolist()]


def _outlines(geometry: np.ndarray, form: np.ndarray, kinds: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Polygons in level-0 pixels and the row of each; MultiPolygons of cells in parts, of collections what has an area."""
    rows = np.flatnonzero(np.isin(form, (*_POLYGONS, 7)) & ~shapely.is_empty(geometry))
    outlines = polygon_parts(geometry[rows])
    cells = kinds[rows] == Kind.CELL
    parts, of = shapely.get_parts(outlines[cells], return_index=True)
    outlines = np.concatenate([parts, outlines[~cells]])
    owner = np.concatenate([rows[cells][of], rows[~cells]])
    order = np.argsort(owner, kind="stable")
    if scale != 1 and len(outlines):
        outlines = np.asarray(shapely.transform(outlines, lambda xy: xy * scale), dtype=object)
    return outlines[order], owner[order].astype(np.int64)


def _values(columns: Any, name: str | None, n: int) -> list[Any]:
    return [None] * n if name is None else columns[name].to_pylist()


def _packed_measurements(columns: Any) -> list[dict[str, float]]:
    """The measurements of QuPath of each row, where the file keeps it in one column: JSON text, a struct or a list."""
    if PACKED_COLUMN not in columns.column_names or _is_numeric(columns[PACKED_COLUMN]):
        return []
    return [numbers_of({PACKED_COLUMN: value}) for value in columns[PACKED_COLUMN].to_pylist()]


def _is_numeric(column: Any) -> bool:
    import pyarrow.types as kinds

    return kinds.is_floating(column.type) or kinds.is_integer(column.type)


def _measured(
    table: ObjectTable, rows: np.ndarray, columns: Any, used: set[str | None], packed: list[dict[str, float]]
) -> ObjectTable:
    found = {
        name: np.array(columns[name].to_pylist(), dtype=np.float64)[rows]
        for name in columns.column_names
        if name not in used and _is_numeric(columns[name])
    }
    some = [packed[row] for row in rows.tolist()] if packed else []
    for name in dict.fromkeys(name for one in some for name in one):
        found.setdefault(name, np.array([one.get(name, np.nan) for one in some], dtype=np.float64))
    return replace(table, measurements=found or None)
