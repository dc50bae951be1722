"""Detectors that write GeoJSON in ways of their own: all cells of a class as one annotation, and how sure they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import shapely

from annotations import Kind, read_annotations

SQUARE = [[0, 0], [10, 0], [10, 10], [0, 10]]
POLYGON = {"type": "Polygon", "coordinates": [[*SQUARE, SQUARE[0]]]}
BOX = shapely.box(0, 0, 10, 10)


def moved(dx: float, dy: float = 0.0) -> list[list[float]]:
    return [[x + dx, y + dy] for x, y in SQUARE]


def save(path: Path, document: object) -> Path:
    path.write_text(json.dumps(document))
    return path


def same(geometry, expected) -> bool:
    return bool(shapely.equals(geometry, expected).all())


def cell_set(name: str, parts: list, **properties) -> dict:
    """What CellViT's cells.geojson holds of a class."""
    properties = {"objectType": "annotation", "classification": {"name": name, "color": [255, 0, 0]}, **properties}
    geometry = {"type": "MultiPolygon", "coordinates": [[[*part, part[0]]] for part in parts]}
    return {"type": "Feature", "id": f"id of {name}", "geometry": geometry, "properties": properties}


def test_cellvit_geojson_is_exploded_although_it_says_annotation(tmp_path: Path) -> None:
    sets = [cell_set("Neoplastic", [SQUARE, moved(40), moved(80)]), cell_set("Dead", [moved(0, 40)])]
    table = read_annotations(save(tmp_path / "cells.geojson", sets))
    assert same(table.geometry, [BOX, *(shapely.box(x, 0, x + 10, 10) for x in (40, 80)), shapely.box(0, 40, 10, 50)])
    assert table.id.tolist() == ["id of Neoplastic/0", "id of Neoplastic/1", "id of Neoplastic/2", "id of Dead"]
    assert (table.class_names(), table.kind.tolist()) == (["Neoplastic"] * 3 + ["Dead"], [Kind.CELL] * 4)
    assert len(table.log.notes) == 1
    assert "--kind tissue" in table.log.notes[0]
    # What no typed reader takes goes another way to the same.
    damaged = [*sets, {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [[[0, "x"]]]}, "properties": {}}]
    again = read_annotations(save(tmp_path / "cells.geojson", damaged))
    assert same(again.geometry, table.geometry)
    assert (again.id.tolist(), again.kind.tolist()) == (table.id.tolist(), table.kind.tolist())
    assert len(read_annotations(save(tmp_path / "cells.geojson", sets), kind="tissue")) == 2


LARGE = [[x * 100, y * 100] for x, y in SQUARE]


@pytest.mark.parametrize(
    "document",
    [
        {"type": "FeatureCollection", "features": [cell_set("Tumor", [SQUARE, moved(40)])]},
        [cell_set("Tumor", [LARGE, *(moved(2000 + 20 * i) for i in range(50))])],  # a region with specks around it
        [{**cell_set("Tumor", [SQUARE, moved(40)]), "id": "PathAnnotationObject"}],
        [cell_set("Tumor", [SQUARE, moved(40)], classification=None)],
    ],
    ids=["a collection", "large", "old", "no class"],
)
def test_an_annotation_in_pieces_stays_one_region(tmp_path: Path, document: object) -> None:
    table = read_annotations(save(tmp_path / "a.geojson", document))
    assert (len(table), table.kind.tolist(), table.log.notes) == (1, [Kind.TISSUE], ())


@pytest.mark.parametrize(
    ("properties", "expected"),
    [
        ({"measurements": [{"name": "Area", "value": 3}, {"name": "Probability", "value": 0.5}]}, 0.5),
        ({"measurements": {"Area: probably": 7.0, "Score": "0.25"}}, 0.25),
        ({"score": 0.75, "measurements": {"Area": 3.0}}, 0.75),
        ({"measurements": {"Detection probability": 0.5}, "score": 0.75}, 0.5),
        ({"type_prob": 0.125}, 0.125),
        ({"confidence": "high"}, None),
        ({"measurements": {"Detection probability": "NaN"}, "probability": 1e308}, None),
        ({"prob": [1, 2], "measurements": [3, {"name": None}]}, None),
        ({}, None),
    ],
)
def test_confidence_wherever_a_program_keeps_it(tmp_path: Path, properties: dict, expected: float | None) -> None:
    item = {"type": "Feature", "geometry": POLYGON, "properties": {"objectType": "detection", **properties}}
    # A position of three numbers, and one that is none, send the file down the other ways.
    for more in ([], [[0, 0, 7]], [["x", 1]]):
        other = {**item, "geometry": {"type": "Polygon", "coordinates": [[*more, *SQUARE]]}, "properties": {}}
        table = read_annotations(save(tmp_path / "a.geojson", [item, other]))
        if expected is None:
            assert table.confidence is None
        else:
            assert np.array_equal(table.confidence, [expected, np.nan][: len(table)], equal_nan=True)
