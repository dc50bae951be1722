"""Objects -> GeoJSON that QuPath opens: UUID ids, a colour with every class, valid rings, two decimals."""

from __future__ import annotations

import colorsys
import contextlib
import gzip
import os
import uuid
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from annotations.errors import UserError

if TYPE_CHECKING:
    from annotations.objects import ObjectTable

DECIMALS = 2  # as QuPath writes
_NAMESPACE = uuid.UUID("6f9f6c43-0a3c-5f0e-9a53-3c1f2b9a7d10")
_POLYGONAL = (3, 6)


def feature_collection(
    geometries: Sequence[Any] | np.ndarray,
    *,
    labels: Sequence[str | None],
    object_type: str | Sequence[str] = "annotation",
    colors: Mapping[str, tuple[int, int, int]] | None = None,
    ids: Sequence[str] | None = None,
    seed: int = 0,
    measurements: Sequence[Mapping[str, float]] | None = None,
    names: Sequence[str | None] | None = None,
) -> dict[str, Any]:
    """Return a FeatureCollection as plain dicts, one feature per geometry, in order.

    geometries: n shapely geometries, level-0 pixels; invalid polygons are repaired
    labels: n class names, None or "" for unclassified; object_type: QuPath's, for all of them or n of them
    colors: class name -> (r, g, b) of 0..255; a class without one gets a colour that its name decides
    ids: n ids, kept where they are UUIDs, else turned into one that the text decides; without, UUIDs drawn from `seed`
    measurements: n mappings of name to number, which QuPath shows beside each object; what is not finite is left out
    names: n names that QuPath shows, None for none
    Raises ValueError where lengths differ or a geometry is empty.
    """
    import shapely

    geometry = np.empty(len(geometries), dtype=object)
    geometry[:] = list(geometries)
    if len(labels) != len(geometry) or (ids is not None and len(ids) != len(geometry)):
        raise ValueError(f"{len(geometry)} geometries, {len(labels)} labels, {'no' if ids is None else len(ids)} ids")
    geometry = _rounded(geometry)
    if (empty := np.flatnonzero(shapely.is_empty(geometry) | shapely.is_missing(geometry))).size:
        raise ValueError(f"geometry {empty[0]} is empty (of {empty.size} such)")
    uuids = _random_ids(len(geometry), seed) if ids is None else [_uuid(text) for text in ids]
    types = [object_type] * len(geometry) if isinstance(object_type, str) else list(object_type)
    paint = {name: list(_color(name, colors)) for name in {label for label in labels if label}}
    features = []
    for i, (text, uid, label, kind) in enumerate(zip(shapely.to_geojson(geometry), uuids, labels, types, strict=True)):
        properties: dict[str, Any] = {"objectType": kind}
        if names is not None and names[i]:
            properties["name"] = names[i]
        if label:
            properties["classification"] = {"name": label, "color": paint[label]}
        if measurements is not None and measurements[i]:
            properties["measurements"] = {key: float(v) for key, v in measurements[i].items() if np.isfinite(v)}
        features.append({"type": "Feature", "id": uid, "geometry": msgspec.json.decode(text), "properties": properties})
    return {"type": "FeatureCollection", "features": features}


def table_features(table: ObjectTable, **options: Any) -> dict[str, Any]:
    """Return a table as a FeatureCollection: cells and proposals as detections, tissue as annotations; options as above."""
    kinds = ("annotation", "detection", "detection")
    measured = table.measurements or {}
    if table.confidence is not None:
        measured = {"confidence": table.confidence, **measured}
    rows = [{name: float(values[i]) for name, values in measured.items()} for i in range(len(table))] if measured else None
    return feature_collection(
        table.geometry,
        labels=table.class_names(),
        object_type=[kinds[kind] for kind in table.kind.tolist()],
        ids=list(table.id),
        measurements=rows,
        **options,
    )


def encode_geojson(fc: Mapping[str, Any]) -> bytes:
    """Return a FeatureCollection as the text of a .geojson file."""
    return msgspec.json.encode(fc)


def write_geojson(path: Path, fc: Mapping[str, Any]) -> None:
    """Write a FeatureCollection, gzipped where the name ends in .gz; the file appears complete or not at all."""
    path = Path(path)
    data = encode_geojson(fc)
    if path.suffix == ".gz":
        data = gzip.compress(data, mtime=0)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # where nothing can be written, nothing can be removed either
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"{path}: cannot be written: {error.strerror}: check the folder") from None
        raise
    with contextlib.suppress(OSError):  # some network mounts cannot
        _fsync_folder(path.parent)


def _fsync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _rounded(geometry: np.ndarray) -> np.ndarray:
    """Round coordinates to two decimals, valid before and after."""
    import shapely

    from annotations.geometry.rings import polygon_parts

    geometry = geometry.copy()
    if len(bad := _invalid_polygons(geometry)):
        geometry[bad] = polygon_parts(shapely.make_valid(geometry[bad]))
    rounded = np.asarray(shapely.transform(geometry, lambda xy: np.round(xy, DECIMALS)), dtype=object).reshape(-1)
    if len(bad := _invalid_polygons(rounded)):
        rounded[bad] = shapely.set_precision(geometry[bad], 10.0**-DECIMALS)
    return rounded


def _invalid_polygons(geometry: np.ndarray) -> np.ndarray:
    import shapely

    return np.flatnonzero(np.isin(shapely.get_type_id(geometry), _POLYGONAL) & ~shapely.is_valid(geometry))


def _random_ids(n: int, seed: int) -> list[str]:
    raw = np.random.default_rng(seed).bytes(16 * n)
    return [str(uuid.UUID(bytes=raw[16 * i : 16 * i + 16], version=4)) for i in range(n)]


def _uuid(text: str) -> str:
    try:
        return str(uuid.UUID(text))
    except ValueError:
        return str(uuid.uuid5(_NAMESPACE, text))


def _color(name: str, colors: Mapping[str, tuple[int, int, int]] | None) -> tuple[int, int, int]:
    if colors is not None and name in colors:
        r, g, b = (int(v) for v in colors[name])
    else:
        hue = zlib.crc32(name.encode()) / 2**32
        r, g, b = (round(255 * v) for v in colorsys.hsv_to_rgb(hue, 0.75, 0.9))
    return r, g, b
