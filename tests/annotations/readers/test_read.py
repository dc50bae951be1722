"""Every dialect and container of GeoJSON, and every way a file can be bad."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import shapely

from annotations import Kind, UserError, read_annotations

SQUARE = [[0, 0], [10, 0], [10, 10], [0, 10], [0, 0]]
POLYGON = {"type": "Polygon", "coordinates": [SQUARE]}


def feature(geometry=POLYGON, *, outside=None, **properties):
    return {"type": "Feature", "id": "a", "geometry": geometry, "properties": properties, **(outside or {})}


def collection(*features):
    return {"type": "FeatureCollection", "features": list(features)}


def polygon(*rings):
    return {"type": "Polygon", "coordinates": [list(map(list, ring)) for ring in rings]}


def moved(dx, side=10):
    return [[x * side / 10 + dx, y * side / 10] for x, y in SQUARE]


@pytest.fixture
def read(tmp_path: Path):
    def run(document, **options):
        path = tmp_path / "slide.geojson"
        path.write_text(document if isinstance(document, str) else json.dumps(document))
        return read_annotations(path, **options)

    return run


CONTAINERS = {
    "collection": collection(feature()),
    "feature": feature(),
    "list": [feature()],
    "geometry": POLYGON,
    "list of geometries": [POLYGON],
    "collection without type": {"features": [feature()]},
    "feature without type": [{"geometry": POLYGON, "properties": {}}],
    "no properties": collection({"type": "Feature", "geometry": POLYGON, "properties": None}),
    "geometry collection": {"type": "GeometryCollection", "geometries": [POLYGON]},
    "three dimensions": polygon([[x, y, 0] for x, y in SQUARE]),
    "open ring": polygon(SQUARE[:-1]),
    "ellipse and plane": {**POLYGON, "isEllipse": True, "plane": {"c": -1, "z": 0, "t": 0}},
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_container(read, name):
    table = read(CONTAINERS[name])
    assert len(table) == 1
    assert shapely.equals(table.geometry[0], shapely.box(0, 0, 10, 10))
    assert table.kind.tolist() == [Kind.TISSUE]
    assert table.label.tolist() == [-1]
    assert (table.label.dtype, table.kind.dtype, table.id.dtype) == (np.int16, np.uint8, object)


@pytest.mark.parametrize("pack", ["gz", "zip", "bom"])
def test_packed(tmp_path, pack):
    text = json.dumps(collection(feature())).encode()
    path = tmp_path / f"slide.geojson.{pack}"
    if pack == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("slide.geojson", text)
            archive.writestr("__MACOSX/._slide.geojson", b"junk")
    else:
        path.write_bytes(gzip.compress(text) if pack == "gz" else b"\xef\xbb\xbf" + text)
    assert len(read_annotations(path)) == 1


CLASSES = [
    ({"name": "Tumor", "color": [200, 0, 0]}, "Tumor"),
    ({"name": "Tumor", "colorRGB": -3670016}, "Tumor"),
    ({"names": ["Tumor", "Positive"], "color": [1, 2, 3]}, "Tumor: Positive"),
    ("Tumor", "Tumor"),
    (3, "3"),
    ({"name": 3}, "3"),
    (None, None),
    ({}, None),
    ("", None),
    ({"names": []}, None),
]


@pytest.mark.parametrize(("classification", "expected"), CLASSES)
def test_classification(read, classification, expected):
    table = read(collection(feature(classification=classification, name="my favourite")))
    assert [table.labels[i] if i >= 0 else None for i in table.label] == [expected]


def test_classes_share_a_list_in_order_of_appearance(read):
    table = read([feature(classification=name) for name in ("b", "a", None, "b")])
    assert table.labels == ("b", "a")
    assert table.label.tolist() == [0, 1, -1, 0]


KINDS = [
    (feature(objectType="annotation"), Kind.TISSUE),
    (feature(objectType="detection"), Kind.CELL),
    (feature(objectType="cell", outside={"nucleusGeometry": POLYGON}), Kind.CELL),
    (feature(object_type="detection"), Kind.CELL),
    (feature(type="detection"), Kind.CELL),
    (feature(outside={"objectType": "detection"}), Kind.CELL),
    (feature(outside={"id": "PathCellObject"}), Kind.CELL),
    (feature(), Kind.TISSUE),
    (feature(objectType="tile"), None),
    (feature(objectType="tmaCore"), None),
    (feature(objectType="root"), None),
    (feature(outside={"id": "TMACoreObject"}), None),
]


@pytest.mark.parametrize(("item", "expected"), KINDS)
def test_kind(read, item, expected):
    table = read([item])
    assert table.kind.tolist() == ([] if expected is None else [expected])
    assert table.counts.get("ignored", 0) == (expected is None)
    for name, value in (("tissue", Kind.TISSUE), ("cell", Kind.CELL)):
        assert read([item], kind=name).kind.tolist() == ([] if expected is None else [value])


def test_type_that_is_no_object_type_is_a_class(read):
    assert read([feature(type="Neoplastic")]).labels == ("Neoplastic",)


def test_old_ids_become_numbers_and_measurements_are_ignored(read):
    old = feature(measurements=[{"name": "Area", "value": 3}], outside={"id": "PathDetectionObject"})
    new = feature(measurements={"Area": 3, "Odd": "NaN"}, metadata={"a": "b"})
    assert read([old, new, feature(outside={"id": 7})]).id.tolist() == ["0", "a", "7"]


def test_children_are_read(read):
    for name in ("inner", 5):  # a number takes the tolerant path
        table = read([feature(classification="outer", childObjects=[feature(classification=name, objectType="detection")])])
        assert table.labels == ("outer", str(name))
        assert table.kind.tolist() == [Kind.TISSUE, Kind.CELL]


def test_multipolygon_of_cells_is_exploded_only_as_cells(read):
    cells = feature({"type": "MultiPolygon", "coordinates": [[SQUARE], [moved(5)], [moved(40)]]}, classification="Neoplastic")
    table = read([feature(), cells], kind="cell")
    assert len(table) == 4
    assert table.id.tolist() == ["a", "a/0", "a/1", "a/2"]
    assert shapely.bounds(table.geometry)[:, 0].tolist() == [0, 0, 5, 40]
    assert table.counts == {"features": 2, "exploded": 2}
    tissue = read([feature(), cells])
    assert tissue.id.tolist() == ["a", "a"]
    assert tissue.counts["repaired"] == 1  # two of its parts overlap
    assert tissue.geometry[1].area == 250


def test_points_lines_and_nothing(read):
    items = [
        feature({"type": "Point", "coordinates": [5, 6]}, classification="p"),
        feature({"type": "MultiPoint", "coordinates": [[1, 1], [100, 100]]}, classification="m"),
        feature({"type": "LineString", "coordinates": [[1, 1], [2, 2]]}),
        feature({"type": "MultiLineString", "coordinates": [[[1, 1], [2, 2]]]}),
        feature(None),
        feature({"type": "Polygon", "coordinates": []}),
        feature({"type": "MultiPolygon", "coordinates": []}),
        feature(),
    ]
    table = read(items)
    assert len(table) == 1
    assert table.counts == {"features": 8, "points_skipped": 2, "lines_skipped": 2, "empty": 3}
    squares = read(items, point_size_l0=4)
    assert shapely.bounds(squares.geometry).tolist() == [[3, 4, 7, 8], [-1, -1, 3, 3], [98, 98, 102, 102], [0, 0, 10, 10]]
    assert [squares.labels[i] for i in squares.label[:3]] == ["p", "m", "m"]


def test_bow_tie_is_repaired_and_holes_stay(read):
    bow = polygon([[0, 0], [10, 10], [10, 0], [0, 10], [0, 0]])
    hole = polygon(moved(0, 100), [[x + 20, y + 20] for x, y in SQUARE])
    table = read([feature(bow), feature(hole)])
    assert table.counts["repaired"] == 1
    assert shapely.is_valid(table.geometry).all()
    assert shapely.area(table.geometry).tolist() == [50, 9900]


def test_a_loop_that_laps_itself_keeps_what_it_encloses(read):
    once = [[0, 0], [20, 0], [20, 20], [0, 20]]
    table = read([feature(polygon([*once, [0, -5], [10, -5], [10, 10], [-5, 10], [-5, 0]]))])
    assert table.counts["repaired"] == 1
    assert shapely.get_num_interior_rings(shapely.get_parts(table.geometry)).tolist() == [0]
    assert table.geometry[0].covers(shapely.Point(5, 5))


@pytest.mark.parametrize(
    "odd", [[[]], [], [[[0, 0], [1, 1], [2]]], [[[0, 0, 9], [5, 0, 9], [5, 5, 9]]], [[[1], [1, 2, 3], [4, 5]]]]
)
def test_one_odd_polygon_does_not_change_the_others(read, odd):
    table = read([feature(), feature({"type": "Polygon", "coordinates": odd}), feature(polygon(moved(5, 50), moved(9)))])
    others = table.geometry[[0, -1]]
    assert shapely.area(others).tolist() == [100, 2400]


def test_spike_leaves_only_its_polygon(read):
    table = read([feature(polygon([[0, 0], [10, 0], [10, 10], [10, 30], [10, 10], [0, 10], [0, 0]]))])
    assert shapely.get_type_id(table.geometry).tolist() == [3]
    assert table.geometry[0].area == 100


def test_damaged_rings_are_counted(read):
    two_points = feature(polygon([[0, 0], [5, 5]]))
    flat = feature(polygon([[0, 0], [5, 0], [9, 0], [0, 0]]))
    short_hole = feature(polygon(moved(0, 100), [[20, 20], [30, 30]]))
    table = read([two_points, flat, short_hole, feature(polygon([]))])
    assert len(table) == 1
    assert table.counts == {"features": 4, "invalid_dropped": 2, "holes_dropped": 1, "zero_area": 1}


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e308", "1e999", "null", '"NaN"'])
def test_positions_that_are_nowhere_are_dropped(read, value):
    text = json.dumps([feature(polygon([*SQUARE[:-1], [-777, 3], SQUARE[0]])), feature()]).replace("-777", value)
    table = read(text)
    assert table.counts == {"features": 2, "vertices_dropped": 1}
    assert shapely.area(table.geometry).tolist() == [100, 100]
    points = read(
        f'[{{"type": "Point", "coordinates": [{value}, 1]}}, {{"type": "Point", "coordinates": [5, 1]}}]', point_size_l0=2
    )
    assert len(points) == 1
    assert points.counts == {"features": 2, "vertices_dropped": 1}


def test_a_geometry_of_the_wrong_shape_is_counted_and_the_rest_read(read):
    wrong = [{"type": "Polygon", "coordinates": SQUARE}, {"type": "Polygon", "coordinates": 3}, {"type": "Cube"}, 5]
    table = read([*map(feature, wrong), feature()])
    assert len(table) == 1
    assert table.counts == {"features": 5, "malformed": 4}


def test_empty_collection(read):
    table = read(collection())
    assert (len(table), table.counts) == (0, {"features": 0})
    assert table.shifted(3, 4) is table


BAD = {
    "words": (b"hello", "line 1 column 1"),
    "truncated": (json.dumps(collection(feature())).encode()[:-9], "stops early, after byte"),
    "middle": (b'[{"type": "Feature",\n "geometry" nul}]', "line 2 column"),
    "empty": (b"", "empty"),
    "blank": (b" \n ", "empty"),
    "number": (b"3", "top level is a int"),
    "other json": (b'{"nuc": {}, "mag": 40}', "keys: nuc, mag"),
    "numbers": (b"[1, 2]", "item 0"),
    "no features": (b'{"type": "FeatureCollection"}', "list of features"),
    "xml": (b"<?xml version='1.0'?><Annotations/>", "XML"),
    "bytes": (b"\x89PNG\xff\xfe\x00", "not JSON"),
    "utf8": (b'["\xff\xff"]', "JSON"),
    "gzip": (gzip.compress(b"[]" * 100)[:-12], "archive"),
    "zip": (b"PK\x03\x04 not a zip", "archive"),
    "deep": (b"[" * 100_000, "JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file(tmp_path, name):
    content, reason = BAD[name]
    path = tmp_path / "bad.geojson"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_annotations(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert reason in message
    assert "\n" not in message


def test_bad_paths_and_arguments(tmp_path, read):
    with pytest.raises(UserError, match="no such file"):
        read_annotations(tmp_path / "none.geojson")
    with pytest.raises(UserError, match="folder"):
        read_annotations(tmp_path)
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("a", "[]")
        archive.writestr("b", "[]")
    with pytest.raises(UserError, match="2 files"):
        read_annotations(tmp_path / "two.zip")
    with pytest.raises(UserError, match="point size"):
        read(collection(), point_size_l0=-1)
    with pytest.raises(ValueError, match="kind"):
        read(collection(), kind="organ")


def test_real_export(test_data):
    path = test_data / "geojson" / "dlup_qupath05.geojson"
    table = read_annotations(path)
    raw = json.loads(path.read_text())["features"]
    assert len(table) == len(raw) == 3
    assert table.id.tolist() == [item["id"] for item in raw]
    assert table.kind.tolist() == [Kind.TISSUE] * 3
    for ours, item in zip(table.geometry, raw, strict=True):
        repaired = shapely.make_valid(shapely.geometry.shape(item["geometry"]))
        assert ours.area == pytest.approx(repaired.area)


def test_points_are_cells_even_when_the_points_tool_calls_them_annotations(tmp_path):
    """QuPath's points tool stores counted cells as MultiPoint annotations."""
    path = tmp_path / "points.geojson"
    path.write_text(
        '{"type": "Feature", "geometry": {"type": "MultiPoint", "coordinates": [[10, 10], [40, 20]]},'
        ' "properties": {"objectType": "annotation", "classification": {"name": "Lymphocyte"}}}'
    )
    table = read_annotations(path, point_size_l0=8)
    assert table.kind.tolist() == [Kind.CELL, Kind.CELL]
    assert [geometry.bounds for geometry in table.geometry] == [(6, 6, 14, 14), (36, 16, 44, 24)]
