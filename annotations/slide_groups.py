"""Arrange objects and their boxes as the groups of a slide file, ready to be written."""

from __future__ import annotations

from typing import Any

import numpy as np

from annotations.geometry.clip import TileBoxes
from annotations.objects import ObjectTable


def annotation_groups(
    table: ObjectTable, boxes: TileBoxes, mpp_level0: float, area_l0: np.ndarray | None = None
) -> dict[str, dict[str, Any]]:
    """Return the groups "objects" and "boxes" of a slide file: dataset name -> array, and "attrs".

    table: n objects, level-0 pixels; boxes: those objects cut to the slide's N tiles (M rows)
    mpp_level0: micrometres a level-0 pixel, for `area_um2`; area_l0: float (n,), level-0 pixels, None: of the geometry
    objects: id (n,) str, label (n,) int16, kind (n,) uint8, area_um2 (n,) float32; attr labels, list of names; where any is
        known, confidence (n,) float32, NaN where it is not
    boxes: xyxy (M, 4) float32, offsets (N + 1,) int64, object (M,) int32, visible (M,) float32; where boxes have outlines,
        polygon, a group of arrays
    """
    import shapely

    if len(boxes.object) and int(boxes.object.max()) >= len(table):
        raise ValueError(f"boxes name object {int(boxes.object.max())}, the table has {len(table)}")
    area_um2 = (shapely.area(table.geometry) if area_l0 is None else area_l0) * mpp_level0**2
    sure = table.confidence
    known = {} if sure is None or np.isnan(sure).all() else {"confidence": sure.astype(np.float32)}
    return {
        "objects": {
            "id": [str(name) for name in table.id],
            "label": table.label.astype(np.int16),
            "kind": table.kind.astype(np.uint8),
            "area_um2": np.asarray(area_um2, dtype=np.float32),
            **known,
            "attrs": {"labels": list(table.labels)},
        },
        "boxes": {
            "xyxy": boxes.xyxy.astype(np.float32),
            "offsets": boxes.offsets.astype(np.int64),
            "object": boxes.object.astype(np.int32),
            "visible": boxes.visible.astype(np.float32),
            **({"polygon": boxes.polygons.arrays()} if boxes.polygons is not None else {}),
        },
    }
