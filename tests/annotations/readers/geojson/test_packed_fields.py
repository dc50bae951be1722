"""Nested fields kept as JSON inside a text, as geopandas and GDAL write them: the same in GeoJSON and in Parquet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely

from annotations import Kind, read_annotations
from annotations.readers.geojson.large_file import read_chunk
from annotations.readers.options import ReadOptions

SQUARE = {"type": "Polygon", "coordinates": [[[0, 0], [10, 0], [10, 10], [0, 10], [0, 0]]]}
SMALL = {"type": "Polygon", "coordinates": [[[2, 2], [4, 2], [4, 4], [2, 4], [2, 2]]]}
CLASSES = [
    ('{ "name": "Tumor", "color": [ 200, 0, 0 ] }', "Tumor"),
    ('{"names": ["Tumor", "Positive"]}', "Tumor: Positive"),
    ('{"names": "[\\"Tumor\\", \\"Positive\\"]"}', "Tumor: Positive"),
    ('["Tumor", "Positive"]', "Tumor: Positive"),
    ('{"name": "Tum\\"or \\u00e4"}', 'Tum"or ä'),
    (json.dumps(json.dumps({"name": "Tumor"})), "Tumor"),
    ("{'name': 'Tumor', 'color': [200, 0, 0]}", "Tumor"),
    ('  {"name": "Tumor"}\n', "Tumor"),
    ('{"name": 3}', "3"),
    ('{"name": null, "names": null}', None),
    ('{"name": ""}', None),
    ("{}", None),
    ("null", None),
    ("{grade 3}", "{grade 3}"),
    ('{"name": "Tumor"', '{"name": "Tumor"'),
    ("[1] gland", "[1] gland"),
    ('"quoted"', '"quoted"'),
    ("Tumor", "Tumor"),
    ('{"name": "half \\ud800"}', "half ?"),
    ("[" * 5000, "[" * 5000),
]


def feature(geometry: Any = SQUARE, **properties: Any) -> dict[str, Any]:
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def save(path: Path, *features: dict[str, Any], text: str = "") -> Path:
    path.write_text(text or json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def labels(table: Any) -> list[str | None]:
    return table.class_names()


@pytest.mark.parametrize(("text", "name"), CLASSES, ids=range(len(CLASSES)))
def test_a_class_kept_as_json_text_is_read_alike_in_geojson_and_in_parquet(tmp_path: Path, text: str, name: str | None) -> None:
    geopandas = pytest.importorskip("geopandas")
    path = save(tmp_path / "a.geojson", feature(classification=text), feature(classification="Stroma"))
    assert labels(read_annotations(path)) == [name, "Stroma"]
    assert labels(read_chunk(path.read_bytes(), "a", ReadOptions())) == [name, "Stroma"]
    damaged = save(tmp_path / "b.geojson", text=path.read_text().replace("[10, 10]", "[10, NaN], [10, 10]"))
    assert labels(read_annotations(damaged)) == [name, "Stroma"]  # the tolerant way
    rows = geopandas.GeoDataFrame({"classification": [text, "Stroma"]}, geometry=[shapely.box(0, 0, 9, 9)] * 2)
    rows.to_parquet(tmp_path / "a.parquet")
    assert labels(read_annotations(tmp_path / "a.parquet")) == [name, "Stroma"]


def test_a_class_beside_the_properties_and_a_missing_one(tmp_path: Path) -> None:
    outside = feature() | {"classification": '{"name": "Tumor"}'}
    typed = feature(classification="null", type="Lymphocyte")
    table = read_annotations(save(tmp_path / "a.geojson", outside, feature(classification=None), typed))
    assert labels(table) == ["Tumor", None, "Lymphocyte"]


@pytest.mark.parametrize("listed", [False, True])
def test_measurements_kept_as_json_text(tmp_path: Path, listed: bool) -> None:
    geopandas = pytest.importorskip("geopandas")
    numbers: Any = {"Area": 7.5, "Detection probability": 0.75}
    if listed:
        numbers = [{"name": name, "value": value} for name, value in numbers.items()]
    texts = [json.dumps(numbers), None, '{"Area": "much"']
    path = save(tmp_path / "a.geojson", *(feature(objectType="cell", measurements=text) for text in texts))
    rows = geopandas.GeoDataFrame({"objectType": ["cell"] * 3, "measurements": texts}, geometry=[shapely.box(0, 0, 9, 9)] * 3)
    rows.to_parquet(tmp_path / "a.parquet")
    for name in ("a.geojson", "a.parquet"):
        table = read_annotations(path.with_name(name), measurements=True)
        assert np.array_equal(table.confidence, np.array([0.75, np.nan, np.nan], np.float32), equal_nan=True), name
        assert table.measurements is not None
        assert np.array_equal(table.measurements["Area"], [7.5, np.nan, np.nan], equal_nan=True), name


def test_nuclei_and_children_kept_as_json_text(tmp_path: Path) -> None:
    child = json.dumps([feature(SMALL, objectType="cell", classification='{"name": "Immune"}')])
    cell = feature(objectType="cell", nucleusGeometry=json.dumps(SMALL))
    path = save(tmp_path / "a.geojson", cell, feature(childObjects=child, metadata='{"note": "x"}'))
    table = read_annotations(path, nuclei=True, measurements=True)
    assert [geometry.area for geometry in table.geometry] == [4, 100, 4]
    assert (labels(table), table.kind.tolist()) == ([None, None, "Immune"], [Kind.CELL, 0, Kind.CELL])


def test_what_geopandas_makes_of_a_qupath_file(tmp_path: Path) -> None:
    """Read and written again by geopandas, the text columns too: the classes stay."""
    geopandas = pytest.importorskip("geopandas")
    pytest.importorskip("pyogrio")
    first = feature(objectType="annotation", classification={"name": "Tumor", "color": [1, 2, 3]}, measurements={"A": 1.5})
    rows = geopandas.read_file(save(tmp_path / "a.geojson", first, feature(classification={"names": ["A", "B"]})))
    rows["classification"] = [value if isinstance(value, str) else json.dumps(value) for value in rows["classification"]]
    rows.to_file(tmp_path / "b.geojson", driver="GeoJSON")
    rows.to_parquet(tmp_path / "b.parquet")
    (tmp_path / "c.geojson").write_text(rows.to_json())
    for name in ("b.geojson", "b.parquet", "c.geojson"):
        assert labels(read_annotations(tmp_path / name)) == ["Tumor", "A: B"], name
