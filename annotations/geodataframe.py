"""A table as a GeoDataFrame, for users who go on with geopandas."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from annotations.table import ObjectTable

if TYPE_CHECKING:
    import geopandas

KINDS = ("tissue", "cell", "proposal")


def as_geodataframe(table: ObjectTable) -> geopandas.GeoDataFrame:
    """One row an object: id, label (None where unclassified), kind (tissue, cell, proposal), source, confidence, a column a
    measurement, geometry. Coordinates are level-0 pixels, so there is no coordinate reference system (crs is None).
    """
    import geopandas

    nothing = np.full(len(table), None, dtype=object)
    columns: dict[str, Any] = {
        "id": table.id,
        "label": np.array([*table.class_names(), None], dtype=object)[:-1],
        "kind": np.array([KINDS[kind] for kind in table.kind.tolist()], dtype=object),
        "source": nothing if table.source is None else table.source,
        "confidence": np.full(len(table), np.nan, np.float32) if table.confidence is None else table.confidence,
    }
    for name, values in (table.measurements or {}).items():
        columns[name if name not in columns and name != "geometry" else f"{name} (measured)"] = values
    return geopandas.GeoDataFrame(columns, geometry=table.geometry, crs=None)
