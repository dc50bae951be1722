"""GeoParquet, and Parquet with a column of WKB -> table."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely

from annotations.errors import UserError, one_line
from annotations.geometry.rings import is_beyond, is_usable, polygon_parts
from annotations.objects import Kind, ObjectTable
from annotations.readers.class_name import class_of
from annotations.readers.geojson.decode import CONFIDENCE
from annotations.readers.geojson.qupath import columns_of, confidence_of, numbers_of
from annotations.readers.options import ReadOptions
from annotations.readers.table_builder import Objects, Points, table_of_outlines

if TYPE_CHECKING:
    import pyarrow as pa

CLASS_COLUMNS = ("label", "classification", "class", "class_name", "type", "name")
ID_COLUMNS = ("id", "object_id", "key")
KIND_COLUMNS = ("kind", "objectType", "object_type")
PACKED_COLUMN = "measurements"
_KINDS = {
    "annotation": Kind.TISSUE,
    "tissue": Kind.TISSUE,
    "detection": Kind.CELL,
    "cell": Kind.CELL,
    "proposal": Kind.PROPOSAL,
}
_POINTS, _POLYGONS, _LINES = (0, 4), (3, 6), (1, 2, 5)


def read_geoparquet(data: bytes, source: str, options: ReadOptions) -> ObjectTable:
    """Read every row, its geometry as WKB, level-0 pixels; a coordinate system it may state is not looked at.

    The geometry column is the one the file's "geo" metadata names, else `geometry`. Class, id, kind and confidence are the
    first of CLASS_COLUMNS, ID_COLUMNS, KIND_COLUMNS, CONFIDENCE there is; a class may be text, or QuPath's
    {"name": ...} as JSON text or as a struct. MultiPolygons that are cells become one row a part; other numeric columns
    are the measurements, and so is what a column `measurements` holds. Raises UserError where there is no such column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return _read(pq.read_table(io.BytesIO(data)), source, options)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: not a readable Parquet file: {one_line(error)}: save it again") from None


def _read(columns: pa.Table, source: str, options: ReadOptions) -> ObjectTable:
    geometry, far = _geometries(columns, source)
    names = [_first(columns, known) for known in (CLASS_COLUMNS, ID_COLUMNS, KIND_COLUMNS, CONFIDENCE)]
    classes, ids, kinds, stated = (_values(columns, name) for name in names)
    form = shapely.get_type_id(geometry)
    taken_for = [_KINDS.get(str(kind).lower(), Kind.TISSUE) for kind in kinds]
    objects = Objects(
        [str(i if value is None else value) for i, value in enumerate(ids)],
        [class_of(value) for value in classes],
        [
            options.kind_of(Kind.CELL if is_point else kind)
            for is_point, kind in zip(np.isin(form, _POINTS), taken_for, strict=True)
        ],
    )
    packed = _packed_measurements(columns)
    if names[-1] is None:
        stated = [confidence_of(numbers) for numbers in packed]
    if any(value is not None for value in stated):
        objects.confidence = [float("nan") if value is None else float(value) for value in stated]
    _lose(objects, geometry, far, form)
    outlines, owner = _outlines(geometry, form, np.array(objects.kind) == Kind.CELL, options.scale or 1.0)
    rows = np.flatnonzero(np.isin(form, _POINTS) & ~shapely.is_empty(geometry))
    xy, point_row = shapely.get_coordinates(geometry[rows], return_index=True)
    table, rows = table_of_outlines(objects, outlines, owner, Points(xy, rows[point_row]), options, source)
    return replace(table, measurements=_measurements(columns, rows, names, packed))


def _geometries(columns: pa.Table, source: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the geometry of each row in two dimensions, None where it is not finite; and bool, beyond any slide."""
    stated = (columns.schema.metadata or {}).get(b"geo")
    geo = json.loads(stated) if stated else {}
    name = geo.get("primary_column", "geometry")
    if name not in columns.column_names:
        raise UserError(f"{source}: has no column {name!r} (but {', '.join(columns.column_names)[:200]}): name it geometry")
    encoding = geo.get("columns", {}).get(name, {}).get("encoding", "WKB")
    if encoding != "WKB":
        raise UserError(f"{source}: geometry encoded as {encoding}, not WKB: save it with geometry_encoding='WKB'")
    wkb = columns[name].to_pylist()
    if any(not isinstance(value, bytes | None) for value in wkb):
        raise UserError(f"{source}: column {name!r} holds no WKB: save it with geopandas.GeoDataFrame.to_parquet")
    geometry = np.asarray(shapely.from_wkb(np.array([*wkb, None], dtype=object)[:-1], on_invalid="ignore"), dtype=object)
    geometry = np.asarray(shapely.force_2d(geometry), dtype=object).reshape(-1)
    xy, row = shapely.get_coordinates(geometry, return_index=True)
    geometry[np.unique(row[~is_usable(xy)])] = None
    return geometry, np.isin(np.arange(len(geometry)), row[is_beyond(xy)])


def _lose(objects: Objects, geometry: np.ndarray, far: np.ndarray, form: np.ndarray) -> None:
    """Leave out what is no outline and no point."""
    empty = shapely.is_empty(geometry)
    reasons = {
        "beyond": far,
        "malformed": shapely.is_missing(geometry) & ~far,
        "empty": empty,
        "lines_skipped": np.isin(form, _LINES) & ~empty,
    }
    for reason, is_lost in reasons.items():
        for row in np.flatnonzero(is_lost).tolist():
            objects.lose(row, reason)


def _outlines(geometry: np.ndarray, form: np.ndarray, is_cell: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Return polygons, level-0 pixels, and the row of each; MultiPolygons of cells in parts, of collections what has area."""
    rows = np.flatnonzero(np.isin(form, (*_POLYGONS, 7)) & ~shapely.is_empty(geometry))
    outlines, cells = polygon_parts(geometry[rows]), is_cell[rows]
    parts, part_row = shapely.get_parts(outlines[cells], return_index=True)
    outlines = np.concatenate([parts, outlines[~cells]])
    owner = np.concatenate([rows[cells][part_row], rows[~cells]])
    order = np.argsort(owner, kind="stable")
    if scale != 1 and len(outlines):
        outlines = np.asarray(shapely.transform(outlines, lambda xy: xy * scale), dtype=object)
    return outlines[order], owner[order].astype(np.int64)


def _first(columns: pa.Table, names: Sequence[str]) -> str | None:
    """Return the first of the names that is a column."""
    return next((name for name in names if name in columns.column_names), None)


def _values(columns: pa.Table, name: str | None) -> list[Any]:
    return [None] * len(columns) if name is None else columns[name].to_pylist()


def _packed_measurements(columns: pa.Table) -> list[dict[str, float]]:
    """Return the measurements of QuPath of each row, where the file keeps it in one column: JSON text, a struct or a list."""
    if PACKED_COLUMN not in columns.column_names or _is_numeric(columns[PACKED_COLUMN]):
        return []
    return [numbers_of({PACKED_COLUMN: value}) for value in columns[PACKED_COLUMN].to_pylist()]


def _is_numeric(column: pa.ChunkedArray) -> bool:
    import pyarrow.types as kinds

    return bool(kinds.is_floating(column.type) or kinds.is_integer(column.type))


def _measurements(
    columns: pa.Table, rows: np.ndarray, used: Sequence[str | None], packed: list[dict[str, float]]
) -> dict[str, np.ndarray] | None:
    """Return numeric columns and packed measurements of the objects `rows`, float64 (n,) each; None where there are none."""
    measurements = {
        name: np.array(columns[name].to_pylist(), dtype=np.float64)[rows]
        for name in columns.column_names
        if name not in used and _is_numeric(columns[name])
    }
    numbers = [packed[row] for row in rows.tolist()] if packed else []
    for name, column in columns_of(numbers).items():
        measurements.setdefault(name, column)
    return measurements or None
