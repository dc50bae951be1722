"""A file read in parts, here and in other processes, is the file read whole."""

from __future__ import annotations

import gzip
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from annotations import UserError, read_annotations
from annotations.readers.geojson import large_file
from annotations.readers.geojson.large_file import Clipped, Grid, clip_file, clip_table, split_features
from annotations.readers.options import ReadOptions

CORNERS = np.array([[x, y] for y in range(0, 200, 40) for x in range(0, 200, 40)])
GRID = Grid(CORNERS, 50.0, 32, (200.0, 200.0), ((0.0, 0.0), (30.0, -7.5)), polygons=True)


def feature(x: float, y: float, side: float = 15, name: str = "a", **more) -> dict:
    ring = [[x, y], [x + side, y + 1], [x + side, y + side], [x, y + side], [x, y]]
    properties = {"objectType": "cell", "classification": {"name": name}, "note": '}, {"type": "Feature", "geometry": {'}
    return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": properties, **more}


def many(n: int = 60) -> list[dict]:
    rng = np.random.default_rng(0)
    items = [feature(*rng.integers(-20, 200, 2).tolist(), side=5 + i % 40, name=f"c{(i * 7) % 5}") for i in range(n)]
    for i, item in enumerate(items):
        if i % 3:
            item["id"] = f"id {i}"
        if i % 11 == 5:
            item["id"] = "PathAnnotationObject"
    islands = {
        "type": "MultiPolygon",
        "coordinates": [feature(5, 5)["geometry"]["coordinates"], [[[90, 90], [99, 90], [99, 99]]]],
    }
    items[9]["geometry"] = islands
    items[21] = {**items[21], "id": None, "geometry": islands}
    items[30]["geometry"] = {"type": "Polygon", "coordinates": [[[0, 0], [30, 30], [30, 0], [0, 30]]]}  # to be repaired
    items[31]["geometry"] = {"type": "Polygon", "coordinates": [[[0, 0], [30, 30]]]}
    items[40]["geometry"] = {"type": "Point", "coordinates": [60, 60]}
    items[41]["geometry"] = None
    return items


def same(a: Clipped, b: Clipped) -> None:
    for name in ("id", "label", "kind", "source"):
        np.testing.assert_array_equal(getattr(a.table, name), getattr(b.table, name), err_msg=name)
    assert (a.table.labels, a.table.counts, a.table.log) == (b.table.labels, b.table.counts, b.table.log)
    np.testing.assert_array_equal(a.area_l0, b.area_l0)
    np.testing.assert_array_equal(a.extent_l0, b.extent_l0)
    assert a.on_slide == b.on_slide
    for ours, expected in zip(a.boxes, b.boxes, strict=True):
        assert ours.counts == expected.counts
        for name in ("xyxy", "offsets", "object", "visible"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(expected, name), err_msg=name)
        assert ours.polygons is not None
        assert expected.polygons is not None
        for name, array in ours.polygons.arrays().items():
            np.testing.assert_array_equal(array, expected.polygons.arrays()[name], err_msg=name)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_file, "LARGE_BYTES", 0)
    monkeypatch.setattr(large_file, "PER_PROCESS_BYTES", 1)
    monkeypatch.setattr(large_file, "split_features", partial(split_features, chunk_bytes=1500))


def save(path: Path, document: object, **layout) -> Path:
    path.write_text(document if isinstance(document, str) else json.dumps(document, **layout))
    return path


LAYOUTS = {
    "collection": lambda items: {"type": "FeatureCollection", "features": items},
    "list": lambda items: items,
    "more behind": lambda items: {"type": "FeatureCollection", "features": items, "bbox": [0, 0, 1, 1], "crs": {"a": [{}]}},
    "more before": lambda items: {"type": "FeatureCollection", "name": '"features": [', "bbox": [1], "features": items},
    "geometry first": lambda items: [dict(sorted(item.items())) for item in items],
    "id first": lambda items: [{"id": i, **item} for i, item in enumerate(items)],
    "one": lambda items: items[:1],
}


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"kind": "tissue", "point_size_l0": 9.0}, {"scale": 0.5, "point_size_l0": 3.0}])
@pytest.mark.usefixtures("small_parts")
def test_in_parts_as_whole(tmp_path, layout, indent, options):
    path = save(tmp_path / "a.geojson", LAYOUTS[layout](many()), indent=indent)
    parts = split_features(path, chunk_bytes=1500)
    assert parts is not None
    assert len(parts) > 7 or layout == "one"
    whole = clip_table(read_annotations(path, **options), GRID)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(large_file, "read_annotations", must_not_be_called)
        same(clip_file(path, GRID, ReadOptions(**options)), whole)


def must_not_be_called(path: Path, options: ReadOptions):
    raise AssertionError(f"{path} was read whole")


@pytest.mark.usefixtures("small_parts")
def test_two_processes_as_one(tmp_path, monkeypatch):
    path = save(tmp_path / "a.geojson", many(200))
    monkeypatch.setattr(large_file, "read_annotations", must_not_be_called)
    same(clip_file(path, GRID, ReadOptions(), processes=2), clip_table(read_annotations(path), GRID))


@pytest.mark.usefixtures("small_parts")
def test_numbers_that_are_none_stay_in_their_part(tmp_path, monkeypatch):
    monkeypatch.setattr(large_file, "read_annotations", must_not_be_called)
    items = many()
    items[3]["geometry"]["coordinates"][0].append([float("nan"), 1])
    items[50]["properties"]["classification"] = 7
    path = save(tmp_path / "a.geojson", items)
    clipped = clip_file(path, GRID, ReadOptions())
    same(clipped, clip_table(read_annotations(path), GRID))
    assert clipped.table.counts["vertices_dropped"] == 1


def nested() -> list[dict]:
    items = many()
    items[5]["properties"]["childObjects"] = many(45)
    return items


WHOLE = {
    "children": json.dumps(nested()),
    "bare geometries": json.dumps([item["geometry"] for item in many()]),
    "features twice": '{"features": [], "type": "FeatureCollection", "features": ' + json.dumps(many(50)) + "}",
    "another type": '{"type": "Something", "features": ' + json.dumps(many(50)) + "}",
    "a comma too many": json.dumps(many())[:-1] + ",]",
    "text behind": json.dumps(many()) + "x",
    "cut off": json.dumps(many())[:-300],
}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.usefixtures("small_parts")
def test_what_cannot_be_cut_is_read_whole(tmp_path, monkeypatch, name):
    path = save(tmp_path / "a.geojson", WHOLE[name])
    called = []

    def read(file: Path, options: ReadOptions):
        called.append(file)
        return read_annotations(file, options)

    monkeypatch.setattr(large_file, "read_annotations", read)

    def attempt(clip):
        try:
            return clip()
        except UserError as error:
            return str(error)

    wanted = attempt(lambda: clip_table(read_annotations(path), GRID))
    clipped = attempt(lambda: clip_file(path, GRID, ReadOptions()))
    if isinstance(wanted, str):
        assert clipped == wanted
    else:
        same(clipped, wanted)
    assert called == [path]


@pytest.mark.usefixtures("small_parts")
def test_bounded_memory_is_promised_or_refused(tmp_path, monkeypatch):
    path = save(tmp_path / "a.geojson", nested())
    assert len(clip_file(path, GRID, ReadOptions(), stream=True)) > 60
    monkeypatch.setattr(large_file, "STREAM_BYTES", 1000)
    with pytest.raises(UserError, match=r"a\.geojson: cannot be read in parts .*: unpack it, or leave out --stream"):
        clip_file(path, GRID, ReadOptions(), stream=True)
    packed = tmp_path / "c.geojson.gz"
    packed.write_bytes(gzip.compress(json.dumps(many(2000)).encode()))
    monkeypatch.setattr(large_file, "STREAM_BYTES", 2 * packed.stat().st_size)
    with pytest.raises(UserError, match="unpack it, or leave out --stream"):
        clip_file(packed, GRID, ReadOptions(), stream=True)
    flat = save(tmp_path / "b.geojson", many())
    monkeypatch.setattr(large_file, "read_annotations", must_not_be_called)
    assert len(clip_file(flat, GRID, ReadOptions(), stream=True)) > 50


def test_ids_and_classes_can_be_stored(tmp_path):
    path = save(tmp_path / "a.geojson", [feature(3, 3, name="a\0b", id="x\0y"), feature(9, 9)])
    table = clip_file(path, GRID, ReadOptions()).table
    assert table.id.tolist() == ["x\ufffdy", "1"]
    assert table.labels == ("a\ufffdb", "a")
