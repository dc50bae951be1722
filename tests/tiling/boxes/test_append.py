"""annotate --append: what is there stays, what is new comes behind it, nothing comes twice, and a crash changes nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import h5py
import numpy as np
import pytest

from annotations.readers.geojson import large_file
from tests.tiling.boxes.test_run import feature, rectangle, save, slide_file
from tiling import SlideFile, replace_groups
from tiling.boxes.run import annotate
from tiling.slide_file import write as slidewrite

TISSUE = (rectangle(50, 20, 250, 160, "stroma"), rectangle(10, 110, 30, 120, "gland"))
CELLS = (
    rectangle(90, 30, 120, 40, "lymphocyte", "cell"),
    rectangle(60, 30, 70, 40, "gland", "cell"),
    rectangle(1, 1, 4, 4, "new", "cell"),
)


def contents(path: Path) -> dict:
    with SlideFile(path) as file:
        boxes, objects = file.boxes_table(), file.objects_table()
        tile = file.box_tiles
        row = boxes["object"]
        names = [objects["labels"][i] for i in objects["label"]]
        polygons = [file.polygon(i) for i in range(len(row))] if file.has_polygons else [None] * len(row)
        return {
            "rows": sorted(zip(tile.tolist(), row.tolist(), map(tuple, boxes["xyxy"].tolist()), boxes["visible"], strict=True)),
            "order": bool((np.lexsort((row, tile)) == np.arange(len(row))).all()),
            "objects": list(zip(names, objects["kind"].tolist(), objects["area_um2"].tolist(), strict=True)),
            "rings": [None if p is None else [ring.tolist() for ring in p] for p in polygons],
        }


@pytest.mark.parametrize("polygons", [False, True])
def test_added_is_as_read_together(tmp_path: Path, polygons: bool) -> None:
    tissue, cells = save(tmp_path / "a_1.geojson", *TISSUE), save(tmp_path / "a_2.geojson", *CELLS)
    one, two = (slide_file(tmp_path / name, "a") for name in ("one", "two"))
    annotate(one.parent, [tissue, cells], polygons=polygons)
    annotate(two.parent, tissue, polygons=polygons)
    (outcome,) = annotate(two.parent, cells, append=True)
    assert outcome.ok
    assert not outcome.skipped
    assert outcome.info["objects"] == 3
    assert "added to 2 objects that were there" in outcome.message
    stored = contents(two)
    assert stored == contents(one)
    assert stored["order"]
    assert len(stored["objects"]) == 5  # the stroma lies in six tiles and has one row
    assert sum(row[1] == 0 for row in stored["rows"]) == 6


def test_where_there_is_nothing_it_is_a_plain_run(tmp_path: Path) -> None:
    path = slide_file(tmp_path / "s", "a")
    source = save(tmp_path / "a.geojson", *TISSUE)
    (outcome,) = annotate(tmp_path / "s", source, append=True)
    assert (outcome.info["objects"], outcome.message) == (2, "")
    before = contents(path)
    assert annotate(tmp_path / "s", source)[0].skipped
    assert contents(path) == before


def test_the_same_again_is_skipped_and_says_so(tmp_path: Path) -> None:
    path = slide_file(tmp_path / "s", "a")
    tissue, cells = save(tmp_path / "a_1.geojson", *TISSUE), save(tmp_path / "a_2.geojson", *CELLS)
    annotate(tmp_path / "s", tissue)
    annotate(tmp_path / "s", cells, append=True)
    before = path.read_bytes()
    for again in (cells, tissue, [tissue, cells]):
        (outcome,) = annotate(tmp_path / "s", again, append=True)
        assert (outcome.ok, outcome.skipped) == (True, True)
        assert outcome.message.startswith("nothing added: the objects of a_")
        assert path.read_bytes() == before
    extra = save(tmp_path / "a_3.geojson", rectangle(0, 0, 9, 9))
    (outcome,) = annotate(tmp_path / "s", [tissue, cells, extra], append=True)
    assert (outcome.info["objects"], outcome.skipped) == (1, False)
    assert len(contents(path)["objects"]) == 6


def test_a_file_that_changed_or_is_read_otherwise_is_refused(tmp_path: Path) -> None:
    path = slide_file(tmp_path / "s", "a")
    tissue, cells = save(tmp_path / "a_1.geojson", *TISSUE), save(tmp_path / "a_2.geojson", *CELLS)
    annotate(tmp_path / "s", tissue)
    annotate(tmp_path / "s", cells, append=True)
    before = path.read_bytes()
    (outcome,) = annotate(tmp_path / "s", cells, append=True, kind="tissue")
    assert not outcome.ok
    assert "objects of a_2.geojson are there already, with other settings (kind): leave out --append" in outcome.message
    os.utime(cells, ns=(1, 1))
    (outcome,) = annotate(tmp_path / "s", cells, append=True)
    assert not outcome.ok
    assert "with another content" in outcome.message
    assert path.read_bytes() == before


def test_without_append_all_is_replaced(tmp_path: Path) -> None:
    path = slide_file(tmp_path / "s", "a")
    tissue, cells = save(tmp_path / "a_1.geojson", *TISSUE), save(tmp_path / "a_2.geojson", *CELLS)
    annotate(tmp_path / "s", tissue)
    first = contents(path)
    annotate(tmp_path / "s", cells, append=True)
    (outcome,) = annotate(tmp_path / "s", tissue)
    assert not outcome.skipped
    assert contents(path) == first
    with SlideFile(path) as file:
        assert "annotation_parts" not in file.group_attrs("objects")
    annotate(tmp_path / "s", cells, append=True)  # which is no longer there


def test_outlines_for_all_or_for_none(tmp_path: Path) -> None:
    path = slide_file(tmp_path / "s", "a")
    annotate(tmp_path / "s", save(tmp_path / "a_1.geojson", *TISSUE))
    before = path.read_bytes()
    (outcome,) = annotate(tmp_path / "s", save(tmp_path / "a_2.geojson", *CELLS), append=True, polygons=True)
    assert not outcome.ok
    assert "outlines are stored for all boxes or for none" in outcome.message
    assert path.read_bytes() == before


def test_proposals_are_added_to_and_columns_filled(tmp_path: Path) -> None:
    path = slide_file(tmp_path / "s", "a")
    objects = {"id": ["p"], "label": np.zeros(1, np.int16), "kind": np.full(1, 2, np.uint8), "area_um2": np.ones(1, np.float32)}
    boxes = {
        "xyxy": np.array([[1, 2, 3, 4]], np.float32),
        "offsets": np.repeat([0, 1], [8, 1]),
        "object": np.zeros(1, np.int32),
    }
    boxes["visible"] = np.ones(1, np.float32)
    extra = {"score": np.full(1, 0.5, np.float32), "attrs": {"labels": ["nucleus"], "proposed": "yes"}}
    replace_groups(path, {"objects": {**objects, **extra}, "boxes": boxes})
    (outcome,) = annotate(tmp_path / "s", save(tmp_path / "a.geojson", *CELLS), append=True)
    assert outcome.ok, outcome.message
    stored = contents(path)
    assert [name for name, *_ in stored["objects"]] == ["nucleus", "lymphocyte", "gland", "new"]
    assert (7, 0, (1, 2, 3, 4), 1) in stored["rows"]
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["objects/score"][...], np.array([0.5, np.nan, np.nan, np.nan], np.float32))
        assert file["objects"].attrs["proposed"] == "yes"
    assert annotate(tmp_path / "s", tmp_path / "a.geojson", append=True)[0].skipped


def test_a_crash_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = slide_file(tmp_path / "s", "a")
    annotate(tmp_path / "s", save(tmp_path / "a_1.geojson", *TISSUE))
    before = path.read_bytes()
    write = slidewrite._write_array

    def power_cut(group: h5py.Group, name: str, value: object) -> None:
        if name == "visible":
            raise RuntimeError("power cut")
        write(group, name, value)

    with monkeypatch.context() as patched:
        patched.setattr(slidewrite, "_write_array", power_cut)
        cells = save(tmp_path / "a_2.geojson", *CELLS)
        (outcome,) = annotate(tmp_path / "s", cells, append=True, workers=1)
    assert "power cut" in outcome.message
    assert path.read_bytes() == before
    assert annotate(tmp_path / "s", cells, append=True)[0].info["objects"] == 3


def test_stream_gives_the_same_boxes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (slide_file(tmp_path / name, "a", bounds=(30, 10)) for name in ("one", "two"))
    many = [feature({"type": "Polygon", "coordinates": [[[x, 5], [x + 9, 5], [x, 70]]]}) for x in range(300)]
    source = save(tmp_path / "a.geojson", *many)
    annotate(one.parent, source)
    monkeypatch.setattr(large_file, "LARGE_BYTES", 0)
    called: list[str] = []
    monkeypatch.setattr(
        large_file, "clip_table", lambda table, grid, clip=large_file.clip_table: called.append("part") or clip(table, grid)
    )
    annotate(two.parent, source, stream=True)
    assert called
    assert contents(one) == contents(two)
    with h5py.File(one) as a, h5py.File(two) as b:
        for name in ("id", "label", "area_um2"):
            assert a["objects"][name][...].tolist() == b["objects"][name][...].tolist()
        records = [json.loads(file["objects"].attrs["annotation_parameters"]) for file in (a, b)]
        assert records[0] == records[1]
