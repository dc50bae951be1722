"""annotate --polygons: what is stored, when it is made anew, and that nothing is lost on the way."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from annotations.errors import UserError
from tests.tiling.boxes.test_run import feature, rectangle, save, slide_file
from tiling import SlideFile, replace_groups
from tiling.boxes.run import annotate
from tiling.slide_file import write as slidewrite

BLOB = feature({"type": "Polygon", "coordinates": [[[60.5, 20], [140, 33.3], [151.25, 70], [90, 61], [60.5, 20]]]})


def ring_area(ring: np.ndarray) -> float:
    x, y = ring.T
    return abs(float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y))) / 2


def test_the_outlines_are_stored_beside_the_boxes(tmp_path: Path) -> None:
    path = slide_file(tmp_path / "s", "a", mpp=0.3)
    source = save(tmp_path / "a.geojson", rectangle(50, 20, 250, 60), BLOB)
    (outcome,) = annotate(tmp_path / "s", source, polygons=True)
    assert outcome.ok
    with h5py.File(path) as file:
        group = file["boxes/polygon"]
        assert set(group) == {"xy", "ring_offsets", "offsets", "crc32"}
        assert [group[name].dtype for name in ("xy", "ring_offsets", "offsets")] == [np.float32, np.int64, np.int64]
        assert group["offsets"].shape == (len(file["boxes/object"]) + 1,)
        assert set(file["boxes"]) == {"xyxy", "offsets", "object", "visible", "polygon"}
    with SlideFile(path) as file:
        assert file.has_polygons
        table, areas = file.boxes_table(), file.objects_table()["area_um2"]
        assert len(table["object"]) == 3
        for row, xyxy in enumerate(table["xyxy"]):
            (ring,) = file.polygon(row)
            assert ring.dtype == np.float64
            np.testing.assert_array_equal(xyxy, np.concatenate([ring.min(0), ring.max(0)]).astype(np.float32))
            area_um2 = areas[table["object"][row]] * table["visible"][row]
            assert ring_area(ring) * file.mpp**2 == pytest.approx(area_um2, rel=1e-5)
        for row in (-1, 3):
            with pytest.raises(IndexError, match=f"box {row} of 3"):
                file.polygon(row)


def test_a_run_with_another_flag_is_made_anew(tmp_path: Path) -> None:
    path = slide_file(tmp_path / "s", "a")
    source = save(tmp_path / "a.geojson", BLOB)
    for polygons, skipped in ((False, False), (True, False), (True, True), (False, False), (False, True), (True, False)):
        (outcome,) = annotate(tmp_path / "s", source, polygons=polygons)
        assert (outcome.ok, outcome.skipped) == (True, skipped)
        with SlideFile(path) as file:
            assert file.has_polygons is polygons
            record = json.loads(file.group_attrs("objects")["annotation_parameters"])
            assert record["polygons"] is polygons


def test_boxes_are_the_same_with_and_without(tmp_path: Path) -> None:
    path = slide_file(tmp_path / "s", "a", mpp=0.3)
    source = save(tmp_path / "a.geojson", rectangle(50, 20, 150, 60), BLOB)
    tables = []
    for polygons in (False, True):
        annotate(tmp_path / "s", source, polygons=polygons)
        with SlideFile(path) as file:
            tables.append(file.boxes_table())
    for name, array in tables[0].items():
        np.testing.assert_array_equal(array, tables[1][name])


def test_a_file_without_polygons_says_what_to_run(tmp_path: Path) -> None:
    path = slide_file(tmp_path / "s", "a")
    for _ in range(2):
        with SlideFile(path) as file:
            assert not file.has_polygons
            with pytest.raises(UserError, match=r"a\.h5: holds no polygons: run odis-path annotate with --polygons"):
                file.polygon(0)
        annotate(tmp_path / "s", save(tmp_path / "a.geojson", BLOB))


def test_a_crash_leaves_the_old_outlines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = slide_file(tmp_path / "s", "a")
    annotate(tmp_path / "s", save(tmp_path / "a.geojson", BLOB), polygons=True)
    before = path.read_bytes()
    write = slidewrite._write_array

    def power_cut(group: h5py.Group, name: str, value: object) -> None:
        if name == "ring_offsets":
            raise RuntimeError("power cut")
        write(group, name, value)

    monkeypatch.setattr(slidewrite, "_write_array", power_cut)
    (outcome,) = annotate(tmp_path / "s", save(tmp_path / "a.geojson", rectangle(1, 1, 9, 9)), polygons=True, workers=1)
    assert not outcome.ok
    assert "power cut" in outcome.message
    assert path.read_bytes() == before
    assert [file.name for file in (tmp_path / "s").iterdir()] == ["a.h5"]


def test_other_groups_come_and_go_and_outlines_stay(tmp_path: Path) -> None:
    path = slide_file(tmp_path / "s", "a")
    annotate(tmp_path / "s", save(tmp_path / "a.geojson", BLOB), polygons=True)
    with SlideFile(path) as file:
        before = file.polygon(1)
    replace_groups(path, {"more": {"rows": np.arange(3)}})
    with SlideFile(path) as file:
        np.testing.assert_array_equal(file.polygon(1), before)


def test_many_outlines_are_stored_in_chunks_of_a_mebibyte(tmp_path: Path) -> None:
    path = slide_file(tmp_path / "s", "a")
    angle = np.linspace(0, 2 * np.pi, 40_000)
    rings = [np.stack([50 + r * np.cos(angle), 50 + r * np.sin(angle)], 1).tolist() for r in range(10, 46, 5)]
    annotate(tmp_path / "s", save(tmp_path / "a.geojson", *(rounded(ring) for ring in rings)), polygons=True)
    with h5py.File(path) as file:
        xy = file["boxes/polygon/xy"]
        assert xy.shape[0] > 250_000
        assert (xy.chunks, xy.compression) == ((1 << 17, 2), None)
    with SlideFile(path) as file:
        radii = [np.hypot(*(file.polygon(row)[0] - 50).T).mean() for row in range(len(rings))]
        assert radii == pytest.approx(range(10, 46, 5), abs=1e-3)


def rounded(ring: list[list[float]]) -> dict:
    return feature({"type": "Polygon", "coordinates": [[*ring[:-1], ring[0]]]})
