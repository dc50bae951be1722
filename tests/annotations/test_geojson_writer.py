"""What is written is read back; COCO; tables put together."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid

import numpy as np
import pytest
import shapely

from annotations import Kind, UserError, concatenate, feature_collection, read_annotations, read_coco, write_geojson

RNG = np.random.default_rng(1)
STARS = [shapely.Point(*RNG.uniform(0, 9999, 2)).buffer(RNG.uniform(3, 90), quad_segs=4) for _ in range(30)]
HOLED = shapely.box(0, 0, 100, 100).difference(shapely.box(10, 10, 20, 20))
ISLANDS = shapely.MultiPolygon([shapely.box(0, 0, 5, 5), shapely.box(9, 9, 20, 20)])


@pytest.mark.parametrize("suffix", ["geojson", "geojson.gz"])
def test_round_trip(tmp_path, suffix):
    geometry = [*STARS, HOLED, ISLANDS]
    labels = [("Tumor", "Stroma", None)[i % 3] for i in range(len(geometry))]
    fc = feature_collection(geometry, labels=labels, object_type="annotation", colors={"Tumor": (200, 0, 0)})
    write_geojson(tmp_path / f"a.{suffix}", fc)
    assert [p.name for p in tmp_path.iterdir()] == [f"a.{suffix}"]
    table = read_annotations(tmp_path / f"a.{suffix}")
    assert table.counts == {"features": 32}
    assert [table.labels[i] if i >= 0 else None for i in table.label] == labels
    assert shapely.hausdorff_distance(table.geometry, np.array(geometry, dtype=object)).max() < 0.01
    assert table.id.tolist() == [item["id"] for item in fc["features"]]


def test_what_qupath_needs():
    fc = feature_collection(STARS, labels=["a", None, ""] * 10, object_type="detection", colors={"b": (1, 2, 3)})
    assert len({uuid.UUID(item["id"]) for item in fc["features"]}) == 30
    for item in fc["features"]:
        assert list(item) == ["type", "id", "geometry", "properties"]
        assert item["properties"]["objectType"] == "detection"
        color = item["properties"].get("classification", {"color": [0, 0, 0]})["color"]
        assert all(type(v) is int and 0 <= v <= 255 for v in color)
        assert len(color) == 3
    assert [("classification" in item["properties"]) for item in fc["features"][:3]] == [True, False, False]
    corner = fc["features"][0]["geometry"]["coordinates"][0][0]
    assert corner == [round(v, 2) for v in corner]


def test_ids_are_stable():
    def ids(**options):
        return [item["id"] for item in feature_collection(STARS[:2], labels=["a", "b"], **options)["features"]]

    assert ids(seed=3) == ids(seed=3) != ids(seed=4)
    known = str(uuid.uuid4())
    assert ids(ids=[known, "cell 7"])[0] == known
    assert ids(ids=[known, "cell 7"]) == ids(ids=[known, "cell 7"])


def test_invalid_is_mended_and_empty_refused(tmp_path):
    bow = shapely.Polygon([(0, 0), (10, 10), (10, 0), (0, 10)])
    pinched = shapely.Polygon([(0, 0), (10, 0.004), (20, 0), (20, 10), (10, 0.0041), (0, 10)])  # meets itself when rounded
    write_geojson(tmp_path / "a.geojson", feature_collection([bow, pinched], labels=[None, None]))
    table = read_annotations(tmp_path / "a.geojson")
    assert "repaired" not in table.counts
    assert len(table) == 2
    with pytest.raises(ValueError, match="geometry 1 is empty"):
        feature_collection([bow, shapely.Polygon()], labels=[None, None])
    with pytest.raises(ValueError, match="2 geometries, 1 labels"):
        feature_collection([bow, bow], labels=[None])
    with pytest.raises(UserError, match="cannot be written"):
        write_geojson(tmp_path / "none" / "a.geojson", feature_collection([], labels=[]))


TWO_TRIANGLES = [[0, 0, 4, 0, 0, 4], [10, 10, 20, 10, 20, 20]]
COCO = {
    "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
    "categories": [{"id": 5, "name": "gland"}, {"id": 9, "name": "cell"}],
    "annotations": [
        {"id": 10, "image_id": 1, "category_id": 9, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0},
        {"id": 11, "image_id": 1, "category_id": 5, "bbox": [0, 0, 9, 9], "segmentation": TWO_TRIANGLES},
        {"id": 12, "image_id": 1, "category_id": 77, "bbox": [5, 5, 1, 1], "segmentation": {"counts": [1], "size": [1, 1]}},
        {"id": 13, "image_id": 1, "category_id": 5, "bbox": [5, 5, 0, 1], "segmentation": []},
        {"image_id": 1},
    ],
}


def test_coco(tmp_path):
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(COCO))
    tables = read_coco(path)
    assert list(tables) == ["a.png", "b.png"]
    a, b = tables["a.png"], tables["b.png"]
    assert (len(b), b.labels) == (0, a.labels)
    assert a.labels == ("gland", "cell")
    assert a.id.tolist() == ["10", "11", "12"]
    assert a.label.tolist() == [1, 0, -1]
    assert a.kind.tolist() == [Kind.CELL] * 3
    assert shapely.bounds(a.geometry).tolist() == [[1, 2, 4, 6], [0, 0, 20, 20], [5, 5, 6, 6]]
    assert a.geometry[1].area == 58
    assert a.counts == {"features": 5, "masks_as_boxes": 1, "zero_area": 1, "empty": 1, "unknown_category": 1}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("[]", "not COCO json"),
        ("{", "not COCO json"),
        ('{"images": [], "annotations": [{"image_id": 3}]}', "annotation 0 names image 3"),
        ('{"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}], "annotations": []}', "two images"),
    ],
)
def test_bad_coco(tmp_path, change, reason):
    path = tmp_path / "coco.json"
    path.write_text(change)
    with pytest.raises(UserError, match=reason) as error:
        read_coco(path)
    assert str(error.value).startswith(f"{path}: ")


def test_tables_together(tmp_path):
    for name, labels in (("a", ["x", None]), ("b", ["y", "x"])):
        write_geojson(tmp_path / name, feature_collection([HOLED, ISLANDS], labels=labels))
    a, b = (read_annotations(tmp_path / name) for name in "ab")
    both = concatenate([a, b.shifted(1000, 0)])
    assert both.labels == ("x", "y")
    assert both.label.tolist() == [0, -1, 1, 0]
    assert both.label.dtype == np.int16
    assert both.counts == {"features": 4}
    assert shapely.bounds(both.geometry)[:, 0].tolist() == [0, 0, 1000, 1000]
    assert len(concatenate([])) == 0


def test_import_is_light():
    code = "import sys, annotations.readers.read, annotations.geometry.clip; "
    code += "print({'torch', 'geopandas', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
