"""Annotation files -> boxes: names, origin, points, failures that leave the slide file alone, doing nothing twice."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest

from annotations.errors import UserError
from tiling import SlideFile, SlideMeta, import_images, replace_groups, write_slide_file
from tiling.boxes.match_files import match_files
from tiling.boxes.run import annotate
from tiling.boxes.settings import parse_point_size


def slide_file(folder: Path, slide_id: str, *, bounds: tuple[int, int] = (0, 0), mpp: float = 0.5, offset: int = 0) -> Path:
    """4 x 2 tiles of 100 target pixels (at 0.5 um) from (offset, offset) on a slide of 2000 x 1500 level-0 pixels."""
    step = round(100 * 0.5 / mpp)
    coords = np.array([(offset + x * step, offset + y * step) for y in range(2) for x in range(4)])
    meta = SlideMeta(slide_id, folder / "none.svs", 2000, 1500, 0.5, mpp, 100, bounds_xy=bounds)
    path = folder / f"{slide_id}.h5"
    write_slide_file(path, meta=meta, coords=coords)
    return path


def rectangle(x0: float, y0: float, x1: float, y1: float, name: str = "tumour", kind: str = "annotation") -> dict:
    ring = [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]
    return feature({"type": "Polygon", "coordinates": [ring]}, name, kind)


def feature(geometry: dict, name: str = "cell", kind: str = "detection") -> dict:
    properties = {"objectType": kind, "classification": {"name": name, "color": [200, 0, 0]}}
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def save(path: Path, *features: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"type": "FeatureCollection", "features": list(features)}))
    return path


def test_objects_and_boxes_are_stored(tmp_path: Path) -> None:
    path = slide_file(tmp_path / "s", "a")
    source = save(tmp_path / "a.geojson", rectangle(50, 20, 150, 60), rectangle(10, 110, 30, 120, "gland", "cell"))
    (outcome,) = annotate(tmp_path / "s", source)
    assert outcome.ok
    assert not outcome.skipped
    wanted = {"objects": 2, "boxes": 3, "repaired": 0, "left_out": 0, "outside": 0, "origin": "level0"}
    assert outcome.info == wanted
    assert outcome.message == ""
    with SlideFile(path) as file:
        assert file.boxes(0).tolist() == [[50, 20, 100, 60]]
        assert file.boxes(1).tolist() == [[0, 20, 50, 60]]
        assert file.boxes(4).tolist() == [[10, 10, 30, 20]]
        table = file.objects_table()
        assert table["labels"] == ["tumour", "gland"]
        assert table["kind"].tolist() == [0, 1]
        assert table["area_um2"].tolist() == [1000, 50]
        assert file.boxes_table()["visible"].tolist() == [0.5, 0.5, 1.0]
        record = json.loads(file.group_attrs("objects")["annotation_parameters"])
        assert record["files"] == [
            {"name": "a.geojson", "size": source.stat().st_size, "mtime_ns": source.stat().st_mtime_ns},
        ]
        assert record["origin"] == "auto"
        assert len(file.group_attrs("boxes")["annotation_sha256"]) == 64


def test_exact_footprint_is_used(tmp_path: Path) -> None:
    path = slide_file(tmp_path / "s", "a", mpp=0.3)
    annotate(tmp_path / "s", save(tmp_path / "a.geojson", rectangle(0, 0, 166.5, 60)))
    with SlideFile(path) as file:
        assert file.size_l0 == pytest.approx(166.667, abs=1e-3)
        assert file.boxes(0)[0].tolist() == pytest.approx([0, 0, 99.9, 36], abs=1e-4)


def test_a_second_run_skips_until_something_changes(tmp_path: Path) -> None:
    path = slide_file(tmp_path / "s", "a")
    source = save(tmp_path / "a.geojson", rectangle(50, 20, 150, 60))
    first = annotate(tmp_path / "s", source)[0]
    before = path.stat().st_mtime_ns
    again = annotate(tmp_path / "s", source)[0]
    assert again.skipped
    assert again.info == first.info
    assert path.stat().st_mtime_ns == before
    assert not annotate(tmp_path / "s", source, kind="cell")[0].skipped
    os.utime(source, ns=(1, 1))
    assert not annotate(tmp_path / "s", source, kind="cell")[0].skipped
    replace_groups(path, {"objects": None, "boxes": None})
    assert not annotate(tmp_path / "s", source, kind="cell")[0].skipped


def test_files_are_matched_by_the_longest_slide_id() -> None:
    names = ["s1.geojson", "s1_2.geojson", "s1_2_cells.json", "s1.svs.geojson.gz", "s1-tissue.zip", "s10.geojson", "x.json"]
    matched = match_files(["s1", "s1_2"], [Path(name) for name in names])
    assert {key: [path.name for path in paths] for key, paths in matched.items()} == {
        "s1": ["s1.geojson", "s1.svs.geojson.gz", "s1-tissue.zip"],
        "s1_2": ["s1_2.geojson", "s1_2_cells.json"],
    }
    assert match_files(["a"], [Path("other.geojson")]) == {"a": (Path("other.geojson"),)}
    assert match_files(["a_0.98"], [Path("a_0.98.geojson"), Path("b")])["a_0.98"] == (Path("a_0.98.geojson"),)


def test_several_files_of_one_slide_and_slides_without(tmp_path: Path) -> None:
    for name in ("a", "b"):
        slide_file(tmp_path / "s", name)
    save(tmp_path / "g" / "a_tissue.geojson", rectangle(0, 0, 100, 100, "stroma"))
    cells = save(tmp_path / "a_cells.json", rectangle(5, 5, 10, 10, "lymphocyte", "cell"), rectangle(6, 6, 9, 9, "stroma"))
    (tmp_path / "g" / "a_cells.geojson.gz").write_bytes(gzip.compress(cells.read_bytes()))
    save(tmp_path / "g" / "c.geojson", rectangle(0, 0, 1, 1))
    first, second = annotate(tmp_path / "s", tmp_path / "g")
    assert first.info["objects"] == 3
    assert "a_cells.geojson.gz, a_tissue.geojson" in first.message
    assert second.ok
    assert second.message == "no annotations (1 annotation files belong to no slide, for instance c.geojson)"
    with SlideFile(tmp_path / "s" / "a.h5") as file:
        assert sorted(file.objects_table()["labels"]) == ["lymphocyte", "stroma"]
    with SlideFile(tmp_path / "s" / "b.h5") as file:
        assert not file.has_boxes


def test_the_only_file_under_any_other_name_is_taken_with_a_note(tmp_path: Path) -> None:
    slide_file(tmp_path / "s", "a")
    other = save(tmp_path / "slide 7.geojson", rectangle(0, 0, 100, 100))
    note = "slide 7.geojson is not named after it, and was taken as the only file for the only slide"
    for skipped in (False, True):
        (outcome,) = annotate(tmp_path / "s", other)
        assert (outcome.ok, outcome.skipped, outcome.info["objects"], outcome.message) == (True, skipped, 1, note)
    off = save(tmp_path / "slide 7.geojson", rectangle(9000, 9000, 9100, 9100))
    (failed,) = annotate(tmp_path / "s", off)
    assert not failed.ok
    assert failed.message.endswith(f"; {note}")
    named = save(tmp_path / "a_cells.geojson", rectangle(0, 0, 100, 100))
    assert "named after" not in annotate(tmp_path / "s", named)[0].message


def test_files_of_no_slide_are_told_where_every_slide_has_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slide_file(tmp_path / "s", "a")
    save(tmp_path / "g" / "a.geojson", rectangle(0, 0, 100, 100))
    save(tmp_path / "g" / "b.geojson", rectangle(0, 0, 100, 100))
    (outcome,) = annotate(tmp_path / "s", tmp_path / "g")
    assert (outcome.ok, outcome.message) == (True, "")
    assert capsys.readouterr().err == "annotate: 1 annotation files belong to no slide, for instance b.geojson\n"


def test_a_mask_of_one_value_is_told_and_split_where_that_is_asked_for(tmp_path: Path) -> None:
    from PIL import Image

    path = slide_file(tmp_path / "s", "a")
    mask = np.zeros((150, 200), np.uint8)
    for x in (0, 10, 20):
        mask[2:8, x + 2 : x + 8] = 255
    (tmp_path / "g").mkdir()
    Image.fromarray(mask).save(tmp_path / "g" / "a.png")
    (whole,) = annotate(tmp_path / "s", tmp_path / "g")
    assert whole.info["objects"] == 1
    assert "value 255 lies in 3 pieces and is one object: --split-values makes each piece one" in whole.message
    assert annotate(tmp_path / "s", tmp_path / "g")[0].skipped
    (split,) = annotate(tmp_path / "s", tmp_path / "g", split_values=True)
    assert (split.skipped, split.info["objects"], split.redone) == (False, 3, "split_values False, now True")
    with SlideFile(path) as file:
        assert file.objects_table()["id"].tolist() == ["255/0", "255/1", "255/2"]
        assert file.boxes(0)[0].tolist() == [20, 20, 80, 80]


def test_nothing_matches(tmp_path: Path) -> None:
    for name in ("a", "b"):
        slide_file(tmp_path / "s", name)
    with pytest.raises(UserError, match=r"first slide a, first file z\.geojson"):
        annotate(tmp_path / "s", save(tmp_path / "z.geojson", rectangle(0, 0, 1, 1)))
    with pytest.raises(UserError, match="no such file or folder"):
        annotate(tmp_path / "s", tmp_path / "nowhere")
    with pytest.raises(UserError, match="--origin corner"):
        annotate(tmp_path / "s", tmp_path, origin="corner")
    with pytest.raises(UserError, match="--kind nucleus"):
        annotate(tmp_path / "s", tmp_path, kind="nucleus")


def test_origin_of_a_slide_with_bounds(tmp_path: Path) -> None:
    path = slide_file(tmp_path / "s", "a", bounds=(1000, 1000), offset=1000)
    relative = save(tmp_path / "rel" / "a.geojson", rectangle(50, 20, 150, 60))
    absolute = save(tmp_path / "abs" / "a.geojson", rectangle(1050, 1020, 1150, 1060))
    for source, origin, taken in (
        (relative, "auto", "bounds"),
        (absolute, "auto", "level0"),
        (relative, "bounds", "bounds"),
        (absolute, "level0", "level0"),
    ):
        (outcome,) = annotate(tmp_path / "s", source, origin=origin)
        assert outcome.info["origin"] == taken
        assert ("(1000, 1000)" in outcome.message) == (taken == "bounds")
        with SlideFile(path) as file:
            assert file.boxes(0).tolist() == [[50, 20, 100, 60]]
    (outcome,) = annotate(tmp_path / "s", relative, origin="level0")
    assert outcome.info["outside"] == 1
    assert "warning: annotations sit off the tissue: 0 of 1" in outcome.message


def test_objects_off_the_slide_fail_with_both_extents(tmp_path: Path) -> None:
    path = slide_file(tmp_path / "s", "a")
    before = path.read_bytes()
    source = save(tmp_path / "a.geojson", rectangle(5000, 6000, 5100, 6100))
    (outcome,) = annotate(tmp_path / "s", source)
    assert not outcome.ok
    for text in (str(source), "x 5000..5100, y 6000..6100", "x 0..2000, y 0..1500"):
        assert text in outcome.message
    assert path.read_bytes() == before


def test_a_file_that_is_not_json_fails_alone(tmp_path: Path) -> None:
    paths = [slide_file(tmp_path / "s", name) for name in ("a", "b")]
    before = paths[0].read_bytes()
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "a.geojson").write_text('{"type": "FeatureCollection", "features": [')
    save(tmp_path / "g" / "b.geojson", rectangle(0, 0, 10, 10))
    bad, good = annotate(tmp_path / "s", tmp_path / "g", workers=2)
    assert (bad.ok, good.ok) == (False, True)
    assert "a.geojson" in bad.message
    assert "\n" not in bad.message
    assert paths[0].read_bytes() == before


def test_points_need_an_extent(tmp_path: Path) -> None:
    path = slide_file(tmp_path / "s", "a", mpp=0.25)
    points = [feature({"type": "Point", "coordinates": [x, 100]}) for x in (50, 120)]
    source = save(tmp_path / "a.geojson", *points, feature({"type": "LineString", "coordinates": [[0, 0], [1, 1]]}))
    (outcome,) = annotate(tmp_path / "s", source)
    assert outcome.info["objects"] == 0
    assert outcome.info["left_out"] == 3
    assert "2 points skipped: give them an extent with --point-size" in outcome.message
    for size, side in (("12um", 24), (12, 24), ("24px", 12), ("6 µm", 12)):
        (outcome,) = annotate(tmp_path / "s", source, point_size=size)
        assert (outcome.info["objects"], outcome.info["left_out"]) == (2, 1)
        with SlideFile(path) as file:
            x0, y0, x1, y1 = file.boxes(0)[0].tolist()
            assert (x1 - x0, y1 - y0) == (side, side)
            assert ((x0 + x1) / 2, (y0 + y1) / 2) == (25, 50)


@pytest.mark.parametrize("value", ["12mm", "", "0", "-3um", "um", "1.2.3px", "nan"])
def test_point_sizes_that_cannot_be(value: str) -> None:
    with pytest.raises(UserError, match="--point-size"):
        parse_point_size(value)


def test_invalid_outlines_are_repaired_and_counted(tmp_path: Path) -> None:
    slide_file(tmp_path / "s", "a")
    bow = [[0, 0], [80, 80], [80, 0], [0, 80], [0, 0]]
    source = save(tmp_path / "a.geojson", feature({"type": "Polygon", "coordinates": [bow]}, kind="annotation"))
    (outcome,) = annotate(tmp_path / "s", source)
    assert (outcome.info["objects"], outcome.info["repaired"], outcome.info["boxes"]) == (1, 1, 1)


def test_a_slide_without_tiles(tmp_path: Path) -> None:
    meta = SlideMeta("a", tmp_path / "none.svs", 2000, 1500, 0.5, 0.5, 100)
    write_slide_file(tmp_path / "s" / "a.h5", meta=meta, coords=np.zeros((0, 2)))
    (outcome,) = annotate(tmp_path / "s", save(tmp_path / "a.geojson", rectangle(0, 0, 10, 10)))
    assert outcome.ok
    assert outcome.info["outside"] == 1
    assert outcome.message == "the slide has no tiles"


def test_real_points_on_imported_images(test_data: Path, tmp_path: Path) -> None:
    data = test_data / "brca_m2c"
    images = sorted((data / "images").iterdir())[:3]
    imported = import_images(images, tmp_path / "s", mpp=0.5, size=224, manifest=data / "manifest.csv")
    assert all(outcome.ok and not outcome.message for outcome in imported)
    outcomes = annotate(tmp_path / "s", data / "geojson", point_size="12um")
    for path, outcome in zip(images, outcomes, strict=True):
        features = json.loads((data / "geojson" / f"{path.stem}.geojson").read_text())["features"]
        assert outcome.info["objects"] == len(features)
        assert outcome.info["boxes"] >= len(features) - outcome.info["outside"] > 0.5 * len(features)
        with SlideFile(tmp_path / "s" / f"{path.stem}.h5") as file:
            assert file.patient_id == path.name[:12]
            table, boxes = file.objects_table(), file.boxes_table()
            assert set(table["kind"].tolist()) == {1}
            assert set(table["labels"]) <= {feature["properties"]["classification"]["name"] for feature in features}
            whole = boxes["xyxy"][boxes["visible"] == 1]
            assert (whole[:, 2:] - whole[:, :2]).tolist() == [[24, 24]] * len(whole)
            assert table["area_um2"] == pytest.approx(144)
