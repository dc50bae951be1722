"""scan and tile: from slides to slide files."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from annotations.errors import UserError
from tiling.cohort.find_slides import find_slides
from tiling.cohort.manifest import read_manifest
from tiling.cohort.scan import scan, slide_items
from tiling.slide_file.read import SlideFile
from tiling.slide_file.write import replace_groups
from tiling.tiles.run import tile
from tiling.wsi.slide import Slide

MakeSlide = Callable[..., Path]


@pytest.fixture
def cohort(tmp_path: Path, make_slide: MakeSlide, picture: np.ndarray) -> Path:
    """A folder with a good slide, one without mpp, a broken one, and a text file."""
    folder = tmp_path / "cohort"
    make_slide(folder / "TCGA-AA-1234-01Z.svs", picture)
    make_slide(folder / "deep" / "silent.svs", picture, mpp=None, levels=1)
    (folder / "broken.svs").write_bytes(b"IJrE" * 50)
    (folder / "notes.txt").write_text("no slide")
    return folder


def test_scan_lists_every_slide_and_what_is_wrong_with_it(cohort: Path, tmp_path: Path) -> None:
    outcomes = scan([cohort], tmp_path / "manifest.csv")
    assert [outcome.ok for outcome in outcomes] == [True, False, True]
    with (tmp_path / "manifest.csv").open() as file:
        rows = {row["slide_id"]: row for row in csv.DictReader(file)}
    good = rows["TCGA-AA-1234-01Z"]
    assert (good["patient_id"], good["width_l0"], good["height_l0"], good["levels"]) == ("TCGA-AA-1234", "1024", "768", "3")
    assert (good["mpp"], good["mpp_source"], good["readable"], good["problem"]) == ("0.5", "openslide.mpp-x", "true", "")
    assert (rows["broken"]["readable"], "not a readable slide" in rows["broken"]["problem"]) == ("false", True)
    assert (rows["silent"]["readable"], rows["silent"]["mpp"]) == ("true", "")
    assert rows["silent"]["problem"].startswith("no mpp")


def test_equal_names_in_different_folders_get_their_folders_in_front(tmp_path: Path) -> None:
    for name in ("x/one/s.svs", "y/one/s.svs", "y/two/t.svs", "z/p.svs", "z/p.tif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    ids = {str(item.path.relative_to(tmp_path)): item.slide_id for item in find_slides([tmp_path])}
    assert ids == {
        "x/one/s.svs": "x_one_s",
        "y/one/s.svs": "y_one_s",
        "y/two/t.svs": "t",
        "z/p.svs": "p_svs",
        "z/p.tif": "p_tif",
    }


def test_files_folders_and_globs_name_a_slide_once(cohort: Path) -> None:
    items = find_slides([cohort / "*.svs", str(cohort), cohort / "broken.svs"])
    assert sorted(item.slide_id for item in items) == ["TCGA-AA-1234-01Z", "broken", "silent"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("slide_id\na\n", "no column path"),
        ("path\n", "lists no slide"),
        ("path,mpp\na.svs,half\n", "line 2: column mpp: half"),
        ("path,mpp\na.svs,-1\n", "line 2: column mpp: -1"),
        ('path\n""\n', "line 2: column path is empty"),
        ("path,slide_id\na.svs,x/y\n", "slide_id x/y"),
        ("path,slide_id\na.svs,x\nb.svs,x\n", "slide_id x stands for both"),
    ],
)
def test_bad_manifests_are_told_by_line_and_column(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(UserError, match=says):
        read_manifest(tmp_path / "m.csv")


def test_missing_and_empty_inputs_are_named(tmp_path: Path) -> None:
    for inputs, says in (
        ([tmp_path / "gone"], "no such file or folder"),
        ([tmp_path / "*.svs"], "no such file or folder"),
        ([tmp_path], "holds no slide"),
        ([tmp_path / "gone.csv"], "no such manifest"),
        ([tmp_path / "gone.csv", tmp_path], "given alone"),
    ):
        with pytest.raises(UserError, match=says):
            slide_items(inputs)
    with pytest.raises(UserError, match="is a folder"):
        scan([tmp_path], tmp_path)


def test_tiles_are_the_pixels_at_their_coords(slide_path: Path, picture: np.ndarray, tmp_path: Path) -> None:
    for pixels in ("jpeg", "none"):
        out = tmp_path / pixels
        (outcome,) = tile([slide_path], out, 1.0, 64, pixels=pixels, workers=1, quality=95)
        assert outcome.ok
        with SlideFile(out / "painted.h5") as file:
            assert file.has_pixels is (pixels == "jpeg")
            assert len(file) == outcome.info["tiles"] > 20
            assert file.size_l0 == 128
            assert (file.coords % 128 == 0).all()
            assert (file.tissue_fraction >= 0.1).all()
            for i in (0, len(file) // 2, len(file) - 1):
                x, y = file.coords[i]
                expected = picture[y : y + 128, x : x + 128].reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
                assert np.abs(file.tile(i) - expected).mean() <= 2
                assert file.tile(i).shape == (64, 64, 3)
                assert file.tile_bytes(i)[:2] == b"\xff\xd8"
            thumb, downsample = file.thumbnail()
            assert (thumb.shape, downsample) == ((768, 1024, 3), 1.0)
            assert file.tissue_mask().shape == thumb.shape[:2]


def test_a_second_run_skips_and_what_changed_is_done_again(make_slide: MakeSlide, picture: np.ndarray, tmp_path: Path) -> None:
    slide, out = make_slide(tmp_path / "a.svs", picture, levels=1), tmp_path / "out"

    def run(**options: object) -> tuple[bool, str]:
        (outcome,) = tile([slide], out, **({"mpp": 1.0, "size": 64, "workers": 1} | options))
        assert outcome.ok, outcome.message
        return outcome.skipped, outcome.message

    assert run() == (False, "")
    first = (out / "a.h5").read_bytes()
    assert run() == (True, "")
    assert (out / "a.h5").read_bytes() == first
    assert run(assume_mpp=0.3) == (True, "")  # the slide has its own mpp: the same result
    for change in (
        {"min_tissue": 0.5},
        {"overlap": 8},
        {"quality": 70},
        {"tissue": "none"},
        {"pixels": "none"},
        {"mpp": 1.5},
    ):
        assert run(**change)[0] is False
        assert run(**change)[0] is True
    run()
    boxes = {"xyxy": np.zeros((0, 4), np.float32)}
    replace_groups(out / "a.h5", {"boxes": boxes})
    os.utime(slide, ns=(1, 1))
    assert run() == (False, "its boxes are gone with the old tiles: run annotate again")
    (out / "a.h5").write_bytes(b"damaged")
    assert run()[0] is False
    with SlideFile(out / "a.h5") as file:
        assert file.parameters["mpp_level0"] == 0.5


def test_a_slide_that_is_done_is_not_opened_again(cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, out = tmp_path / "m.csv", tmp_path / "out"
    manifest.write_text(f"path,mpp\n{cohort / 'TCGA-AA-1234-01Z.svs'},0.5\n")
    (first,) = tile([manifest], out, 1.0, 64, workers=1)
    opened: list[Path] = []
    monkeypatch.setattr(Slide, "open", lambda path, **options: opened.append(path))
    (again,) = tile([manifest], out, 1.0, 64, workers=1)
    assert (first.ok, again.ok, again.skipped, again.info["tiles"]) == (True, True, True, first.info["tiles"])
    assert opened == []
    tile([manifest], out, 1.0, 64, workers=1, min_tissue=0.2)
    assert len(opened) == 1
    manifest.write_text(f"path,mpp\n{cohort / 'TCGA-AA-1234-01Z.svs'},0.4\n")
    tile([manifest], out, 1.0, 64, workers=1)
    assert len(opened) == 2


def test_a_bad_slide_stops_nobody(cohort: Path, tmp_path: Path) -> None:
    outcomes = {outcome.item: outcome for outcome in tile([cohort], tmp_path / "out", 1.0, 64, workers=2)}
    assert {name: outcome.ok for name, outcome in outcomes.items()} == {
        "TCGA-AA-1234-01Z": True,
        "broken": False,
        "silent": False,
    }
    for words in ("silent.svs", "openslide.mpp-x", "aperio.MPP", "manifest column mpp", "--assume-mpp", "resolution tags"):
        assert words in outcomes["silent"].message
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["TCGA-AA-1234-01Z.h5"]
    with SlideFile(tmp_path / "out" / "TCGA-AA-1234-01Z.h5") as file:
        assert file.patient_id == "TCGA-AA-1234"


def test_the_manifest_gives_names_patients_and_mpp(cohort: Path, tmp_path: Path) -> None:
    manifest = cohort / "manifest.csv"
    manifest.write_text("slide_id,path,patient_id,mpp\ns1,deep/silent.svs,P7,0.25\n")
    (outcome,) = tile([manifest], tmp_path / "out", 0.5, 64, workers=1)
    assert outcome.info["mpp_source"] == "manifest"
    with SlideFile(tmp_path / "out" / "s1.h5") as file:
        assert (file.slide_id, file.patient_id, file.mpp_level0, file.size_l0) == ("s1", "P7", 0.25, 128)
    manifest.write_text("slide_id,path,patient_id,mpp\ns1,deep/silent.svs,P8,0.25\n")
    (outcome,) = tile([manifest], tmp_path / "out", 0.5, 64, workers=1)
    assert outcome.skipped
    with SlideFile(tmp_path / "out" / "s1.h5") as file:
        assert file.patient_id == "P8"


def test_tissue_may_come_from_outlines(slide_path: Path, tmp_path: Path) -> None:
    pytest.importorskip("annotations.readers.read")
    square = [[256, 128], [512, 128], [512, 384], [256, 384], [256, 128]]
    feature = {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [square]},
        "properties": {"objectType": "annotation"},
    }
    outlines = tmp_path / "outlines"
    outlines.mkdir()
    (missing,) = tile([slide_path], tmp_path / "out", 0.5, 64, tissue=outlines, workers=1)
    assert not missing.ok
    assert "no outline painted.geojson" in missing.message
    (outlines / "painted.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    (outcome,) = tile([slide_path], tmp_path / "out", 0.5, 64, tissue=outlines, min_tissue=0.9, workers=1)
    assert outcome.ok, outcome.message
    with SlideFile(tmp_path / "out" / "painted.h5") as file:
        assert len(file) == 16
        assert file.coords.min(axis=0).tolist() == [256, 128]
        assert file.coords.max(axis=0).tolist() == [448, 320]


def test_a_slide_smaller_than_a_tile_gives_an_empty_file_and_says_why(slide_path: Path, tmp_path: Path) -> None:
    (outcome,) = tile([slide_path], tmp_path, 0.5, 2000, workers=1)
    assert outcome.ok
    assert "one is 2000 level-0 pixels wide" in outcome.message
    with SlideFile(tmp_path / "painted.h5") as file:
        assert len(file) == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mpp": 0.0}, "--mpp"),
        ({"mpp": float("nan")}, "--mpp"),
        ({"assume_mpp": -1.0}, "--assume-mpp"),
        ({"min_tissue": 1.5}, "--min-tissue"),
        ({"tissue": "nowhere"}, "--tissue nowhere"),
        ({"overlap": 64}, "--overlap 64"),
        ({"quality": 0}, "--quality 0"),
    ],
)
def test_settings_that_cannot_be_are_told_before_any_work(slide_path: Path, tmp_path: Path, options: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        tile([slide_path], tmp_path / "out", **({"mpp": 1.0, "size": 64} | options))
    assert not (tmp_path / "out").exists()


def test_an_mpp_finer_than_the_scan_names_both(slide_path: Path, tmp_path: Path) -> None:
    (outcome,) = tile([slide_path], tmp_path, 0.25, 64, workers=1)
    assert not outcome.ok
    assert "--mpp 0.25 is finer than the slide's 0.5" in outcome.message


def test_real_slides_tile_and_the_broken_one_does_not(test_data: Path, tmp_path: Path) -> None:
    slides = test_data / "slides"
    names = ["CMU-1-Small-Region.svs", "test3-DAPI.ndpi", "TCGA-CR-7395-01A-01-TS1.svs", "broken.svs", "boxes.tiff"]
    outcomes = {o.item: o for o in tile([slides / name for name in names], tmp_path, 0.5, 224, workers=1)}
    assert {name: outcome.ok for name, outcome in outcomes.items()} == {
        "CMU-1-Small-Region": True,
        "test3-DAPI": True,
        "TCGA-CR-7395-01A-01-TS1": False,
        "broken": False,
        "boxes": False,
    }
    assert "72 dpi" in outcomes["boxes"].message
    with SlideFile(tmp_path / "test3-DAPI.h5") as file:
        assert file.mpp_level0 == pytest.approx(0.2282, abs=1e-4)
        assert np.mean([file.tile(i).max() for i in range(len(file))]) > 100
    (outcome,) = tile([slides / "camelyon_jp2k.dcm"], tmp_path, 30.0, 64, workers=1)
    assert outcome.ok
    assert "outside 0.05..10" in outcome.message
    assert outcome.info["tiles"] > 50
