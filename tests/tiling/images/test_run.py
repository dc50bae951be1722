"""Images -> slide files: names, sizes, resolution, pixels, labels, boxes, and doing nothing twice."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from annotations.errors import UserError
from tiling import SlideFile, import_images
from tiling.images.listing import find_images


def save(path: Path, width: int = 64, height: int = 64, seed: int = 0, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rgb = np.random.default_rng(seed).integers(60, 220, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    rgb = np.kron(rgb, np.ones((8, 8, 1), np.uint8))[:height, :width]
    Image.fromarray(rgb).save(path, **options)
    return path


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Two class folders of JPEG tiles; one name occurs in both."""
    folder = tmp_path / "images"
    for number, name in enumerate(("A/one.jpg", "A/two.jpg", "B/one.jpg")):
        save(folder / name, seed=number, quality=80)
    return folder


def test_class_folders_become_slide_files_and_labels(classes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcomes = import_images(classes, out, mpp=0.5)
    assert [(outcome.item, outcome.ok, outcome.info["tiles"]) for outcome in outcomes] == [
        ("A__one", True, 1),
        ("two", True, 1),
        ("B__one", True, 1),
    ]
    with SlideFile(out / "A__one.h5") as file:
        assert file.tile_bytes(0) == (classes / "A" / "one.jpg").read_bytes()
        assert (file.patch_size, file.mpp, file.mpp_level0, file.size_l0) == (64, 0.5, 0.5, 64)
        assert file.coords.tolist() == [[0, 0]]
        assert file.tissue_fraction.tolist() == [1.0]
        assert file.dimensions_l0 == (64, 64)
        assert file.thumbnail() is not None
    with (out / "labels.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert rows[0] == {"slide_id": "A__one", "x": "0", "y": "0", "label": "A", "patient_id": "", "image": "A/one.jpg"}
    assert [row["label"] for row in rows] == ["A", "A", "B"]


def test_second_run_skips_and_notices_changes(classes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    import_images(classes, out, mpp=0.5)
    labels = (out / "labels.csv").read_text()
    stamps = {path.name: path.stat().st_mtime_ns for path in out.glob("*.h5")}
    again = import_images(classes, out, mpp=0.5)
    assert all(outcome.skipped for outcome in again)
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.h5")} == stamps
    assert (out / "labels.csv").read_text() == labels
    os.utime(classes / "A" / "two.jpg", ns=(1, 1))
    assert [outcome.skipped for outcome in import_images(classes, out, mpp=0.5)] == [True, False, True]
    assert not any(outcome.skipped for outcome in import_images(classes, out, mpp=0.25))


def test_whole_tiles_of_a_larger_image_in_row_major_order(tmp_path: Path) -> None:
    path = save(tmp_path / "field.png", 150, 70)
    outcome = import_images(path, tmp_path / "out", mpp=0.5, size=32)[0]
    assert outcome.info["tiles"] == 8
    with SlideFile(tmp_path / "out" / "field.h5") as file:
        assert file.coords.tolist() == [[x, y] for y in (0, 32) for x in (0, 32, 64, 96)]
        tile = file.tile(5)
    wanted = np.asarray(Image.open(path))[32:64, 32:64]
    assert np.abs(tile.astype(int) - wanted).mean() < 2


def test_default_size_and_an_image_that_is_too_small(tmp_path: Path) -> None:
    save(tmp_path / "in" / "large.png", 500, 300)
    small = save(tmp_path / "in" / "small.png", 500, 200)
    large, failed = import_images(tmp_path / "in", tmp_path / "out", mpp=0.5)
    assert (large.info["tiles"], failed.ok) == (2, False)
    assert failed.message == f"{small}: 500 x 200 pixels hold no tile of 224: ask for a smaller --size"
    assert not (tmp_path / "out" / "small.h5").exists()


def test_a_broken_image_fails_alone(classes: Path, tmp_path: Path) -> None:
    whole = (classes / "A" / "two.jpg").read_bytes()
    (classes / "A" / "two.jpg").write_bytes(whole[: len(whole) // 2])
    (classes / "B" / "three.png").write_bytes(b"no image")
    outcomes = {outcome.item: outcome for outcome in import_images(classes, tmp_path / "out", mpp=0.5)}
    assert {name for name, outcome in outcomes.items() if not outcome.ok} == {"two", "three"}
    assert "two.jpg: not a readable image" in outcomes["two"].message
    assert "two" not in (tmp_path / "out" / "labels.csv").read_text()


def test_mpp_from_argument_manifest_tags_or_a_clear_failure(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    save(folder / "tagged.png", dpi=(50800, 50800))
    save(folder / "screen.png", dpi=(72, 72), seed=1)
    save(folder / "listed.png", seed=2)
    manifest = tmp_path / "m.csv"
    manifest.write_text("image,patient_id,mpp,extra\nlisted.png,P7,0.3,x\nnot-here.png,P8,,\n")
    outcomes = {outcome.item: outcome for outcome in import_images(folder, tmp_path / "out", manifest=manifest)}
    assert not outcomes["screen"].ok
    assert "72 dpi" in outcomes["screen"].message
    assert "--mpp" in outcomes["screen"].message
    assert "\n" not in outcomes["screen"].message
    for name, mpp, patient in (("tagged", 0.5, ""), ("listed", 0.3, "P7")):
        with SlideFile(tmp_path / "out" / f"{name}.h5") as file:
            assert file.mpp == pytest.approx(mpp, rel=1e-4)
            assert file.patient_id == patient
    assert outcomes["tagged"].message == "not in the manifest"
    assert outcomes["listed"].message == ""


def test_manifest_renames_and_a_new_patient_reaches_a_finished_file(tmp_path: Path) -> None:
    path = save(tmp_path / "in" / "a.png")
    manifest = tmp_path / "m.csv"
    manifest.write_text("image,patient_id,slide_id\na.png,P1,renamed\n")
    import_images(path, tmp_path / "out", mpp=1, manifest=manifest)
    manifest.write_text("image,patient_id,slide_id\na.png,P2,renamed\n")
    assert import_images(path, tmp_path / "out", mpp=1, manifest=manifest)[0].skipped
    with SlideFile(tmp_path / "out" / "renamed.h5") as file:
        assert file.patient_id == "P2"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("picture,patient_id\na.png,P\n", "no column image"),
        ("image\nz.png\n", "lists none of the images"),
        ("image,mpp\na.png,fine\n", "not a number"),
        ("image,slide_id\na.png,../up\n", "cannot be a file name"),
        ("image,slide_id\na.png,s\nb.png,s\n", "stands for both"),
    ],
)
def test_bad_manifests_are_refused(tmp_path: Path, text: str, says: str) -> None:
    save(tmp_path / "in" / "a.png")
    save(tmp_path / "in" / "b.png")
    manifest = tmp_path / "m.csv"
    manifest.write_text(text)
    with pytest.raises(UserError, match=says):
        import_images(tmp_path / "in", tmp_path / "out", mpp=1, manifest=manifest)


def test_inputs_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        import_images(tmp_path / "none", tmp_path / "out")
    with pytest.raises(UserError, match="holds no image"):
        import_images(tmp_path, tmp_path / "out")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match="not a PNG"):
        import_images(tmp_path / "a.txt", tmp_path / "out")
    save(tmp_path / "a.png")
    with pytest.raises(UserError, match="--size 0"):
        import_images(tmp_path / "a.png", tmp_path / "out", mpp=1, size=0)


def test_names_stay_unique(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "x/y/b.png", "x/z/b.png", "c.tif"):
        save(tmp_path / name)
    save(tmp_path / ".hidden" / "d.png")
    names = {item.key: item.slide_id for item in find_images(tmp_path)}
    assert names == {"a.jpg": "a_jpg", "a.png": "a_png", "c.tif": "c", "x/y/b.png": "x__y__b", "x/z/b.png": "x__z__b"}
    assert not any(item.label for item in find_images(tmp_path))


def test_tiff_and_grey_and_transparent_images(tmp_path: Path) -> None:
    rgb = np.full((64, 64, 3), (200, 120, 160), np.uint8)
    Image.fromarray(rgb).save(tmp_path / "t.tif")
    Image.fromarray(rgb[..., 0]).save(tmp_path / "g.png")
    Image.fromarray(np.dstack([rgb, np.zeros((64, 64), np.uint8)])).save(tmp_path / "w.png")
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "k.jpg", quality=95)
    outcomes = import_images([tmp_path / name for name in ("t.tif", "g.png", "w.png", "k.jpg")], tmp_path / "out", mpp=1)
    assert all(outcome.ok for outcome in outcomes), outcomes
    means = {}
    for name in "tgwk":
        with SlideFile(tmp_path / "out" / f"{name}.h5") as file:
            means[name] = file.tile(0).mean(axis=(0, 1)).round().astype(int)
    assert np.abs(means["t"] - (200, 120, 160)).max() <= 2
    assert np.abs(means["g"] - 200).max() <= 1
    assert np.abs(means["w"] - 255).max() <= 1
    assert np.abs(means["k"] - (200, 120, 160)).max() <= 3


def test_coco_boxes_are_clipped_to_the_tiles(tmp_path: Path) -> None:
    for number, name in enumerate(("a.png", "b.png")):
        save(tmp_path / "in" / name, 128, 64, seed=number)
    boxes = [[10, 10, 20, 20], [50, 5, 28, 10], [0, 0, 4, 4]]
    coco = {
        "images": [{"id": 7, "file_name": "in/a.png", "width": 128, "height": 64}],
        "annotations": [{"id": i, "image_id": 7, "category_id": 3, "bbox": box} for i, box in enumerate(boxes)],
        "categories": [{"id": 3, "name": "gland"}],
    }
    (tmp_path / "boxes.json").write_text(json.dumps(coco))
    first, second = import_images(tmp_path / "in", tmp_path / "out", coco=tmp_path / "boxes.json", mpp=0.5, size=64)
    assert (first.info["objects"], first.info["boxes"], first.info["outside"]) == (3, 4, 0)
    assert "not in the COCO file" in second.message
    with SlideFile(tmp_path / "out" / "a.h5") as file:
        assert sorted(file.boxes(0).tolist()) == [[0, 0, 4, 4], [10, 10, 30, 30], [50, 5, 64, 15]]
        assert file.boxes(1).tolist() == [[0, 5, 14, 15]]
        table = file.objects_table()
        assert table["labels"] == ["gland"]
        assert sorted(table["area_um2"].tolist()) == [4, 70, 100]
        assert set(table["kind"].tolist()) == {1}
    with SlideFile(tmp_path / "out" / "b.h5") as file:
        assert not file.has_boxes
    again = import_images(tmp_path / "in", tmp_path / "out", coco=tmp_path / "boxes.json", mpp=0.5, size=64)
    assert [(outcome.skipped, outcome.info["boxes"]) for outcome in again] == [(True, 4), (True, 0)]


def test_coco_of_other_images_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.png")
    coco = {"images": [{"id": 1, "file_name": "z.png"}], "annotations": [], "categories": []}
    (tmp_path / "boxes.json").write_text(json.dumps(coco))
    with pytest.raises(UserError, match="names none of the images"):
        import_images(tmp_path / "in", tmp_path / "out", coco=tmp_path / "boxes.json", mpp=1)


def test_real_class_folders_with_two_workers(test_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "crc"
    for name in ("AC", "H"):
        (folder / name).mkdir(parents=True)
        for path in sorted((test_data / "crc5" / name).iterdir())[:4]:
            (folder / name / path.name).symlink_to(path)
    outcomes = import_images(folder, tmp_path / "out", mpp=0.5, workers=2)
    assert [outcome.info["tiles"] for outcome in outcomes] == [1] * 8
    with SlideFile(tmp_path / "out" / f"{outcomes[0].item}.h5") as file:
        assert file.patch_size == 224
        assert file.tile_bytes(0) == file.source.read_bytes()
