"""`import --coco`: boxes in the image's own pixels, outlines where they are wanted, and every annotation accounted for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from annotations import UserError
from tiling.boxes.summary import BoxOutcomes
from tiling.images.run import import_images
from tiling.slide_file.read import SlideFile

FITS = ("tiles", "crop")


def picture(path: Path, width: int = 64, height: int = 64, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(width)
    Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(path, **options)
    return path


def image(id: int, name: str, width: float | None = None, height: float | None = None) -> dict[str, Any]:
    return {"id": id, "file_name": name, "width": width, "height": height}


def box(id: int, image_id: int, *bbox: float, category: int = 7, **more: Any) -> dict[str, Any]:
    return {"id": id, "image_id": image_id, "category_id": category, "bbox": bbox, **more}


def coco(path: Path, images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 7, "name": "Tumor"}]}))
    return path


def run(tmp_path: Path, fit: str, **options: Any) -> BoxOutcomes:
    call = {"mpp": 0.5, "fit": fit, "size": 64, "coco": tmp_path / "c.json", **options}
    return import_images(tmp_path / "in", tmp_path / "out", **call)


def stored_boxes(tmp_path: Path, name: str) -> list[list[float]]:
    with SlideFile(tmp_path / "out" / f"{name}.h5") as file:
        return [row for i in range(len(file)) for row in file.boxes(i).tolist()]


def slide_file(fit: str, name: str = "a") -> str:
    return name if fit == "tiles" else "in-0000"


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(("factor", "noted"), [(2, True), (0.5, True), (1, False)])
def test_boxes_of_an_image_of_another_size_are_scaled_to_it(tmp_path: Path, fit: str, factor: float, noted: bool) -> None:
    picture(tmp_path / "in" / "a.png")
    numbers = [value * factor for value in (8, 8, 40, 24)]
    coco(tmp_path / "c.json", [image(1, "a.png", 64 * factor, 64 * factor)], [box(101, 1, *numbers)])
    (outcome,) = run(tmp_path, fit)
    assert stored_boxes(tmp_path, slide_file(fit)) == [[8, 8, 48, 32]]
    assert ("scaled" in outcome.message) == noted


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(("width", "height", "hint"), [(64, 96, "the other way round"), (96, 96, ""), (500, 64, "")])
def test_boxes_of_an_image_of_another_shape_are_refused(tmp_path: Path, fit: str, width: int, height: int, hint: str) -> None:
    picture(tmp_path / "in" / "a.png", 96, 64)
    picture(tmp_path / "in" / "b.png")
    images = [image(1, "a.png", width, height), image(2, "b.png", 64, 64)]
    coco(tmp_path / "c.json", images, [box(1, 1, 0, 0, 9, 9), box(2, 2, 0, 0, 9, 9)])
    outcomes = run(tmp_path, fit)
    (failed,) = [outcome for outcome in outcomes if not outcome.ok]
    assert "a.png" in failed.message
    assert f"of an image of {width} x {height} pixels, it has 96 x 64{', ' if hint else ''}{hint}:" in failed.message
    assert stored_boxes(tmp_path, "b" if fit == "tiles" else "in-0000") == [[0, 0, 9, 9]]


@pytest.mark.parametrize("fit", FITS)
def test_images_that_state_no_size_are_taken_in_their_own_pixels(tmp_path: Path, fit: str) -> None:
    for name in ("a.png", "b.png"):
        picture(tmp_path / "in" / name)
    images = [image(1, "a.png"), image(2, "b.png", 128, 128)]
    coco(tmp_path / "c.json", images, [box(1, 1, 4, 4, 10, 10), box(2, 2, 4, 4, 20, 20)])
    run(tmp_path, fit)
    names = ("a", "b") if fit == "tiles" else ("in-0000",)
    assert [row for name in names for row in stored_boxes(tmp_path, name)] == [[4, 4, 14, 14], [2, 2, 12, 12]]


def every_loss(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        picture(tmp_path / "in" / name)
    images = [image(1, "a.png", 64, 64), image(2, "x/b.png", 64, 64), image(4, "missing.png", 64, 64)]
    annotations = [
        box(101, 1, 4, 4, 8, 8),
        box(102, 2, 4, 4, 8, 8, category=1234),
        box(103, 4, 1, 1, 9, 9),
        box(104, 2, 4, 4, 0, 0),
        box(105, 2, 600, 600, 9, 9),
        box(106, 99, 1, 1, 9, 9),
        box(107, 4, 1, 1, 0, 0),
        {"id": 108, "image_id": 2},
    ]
    coco(tmp_path / "c.json", images, annotations)


@pytest.mark.parametrize("fit", FITS)
def test_every_annotation_is_a_box_or_counted_by_reason_and_named(tmp_path: Path, fit: str) -> None:
    every_loss(tmp_path)
    outcomes = run(tmp_path, fit)
    text = "; ".join([*(outcome.message for outcome in outcomes), *outcomes.notes])
    for line in (
        "1 left out, no area (annotation 104)",
        "1 left out, on no tile (annotation 105)",
        "1 left out, no geometry (annotation 108)",
        "1 objects of a category that the file does not list, taken without a class (annotation 102)",
        "1 of the 3 images it lists are not here (missing.png)",
        "2 left out, of an image that is not here (annotation 103, 107)",
        "1 left out, of an image that the file does not list (annotation 106)",
    ):
        assert line in text, line
    rows = [row for result in outcomes.results for row in result.labels.values()]
    lost = sum(sum(row.skipped.values()) for row in rows)
    assert sum(row.objects for row in rows) == 3  # one of them on no tile
    assert sum(row.boxes for row in rows) == 2
    assert lost == 6
    again = run(tmp_path, fit)
    assert all(outcome.skipped for outcome in again)
    assert (again.notes, again.results) == (outcomes.notes, outcomes.results)
    assert "annotation 104" in "; ".join(outcome.message for outcome in again)


def test_a_python_user_is_told_by_the_summary_and_not_on_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    every_loss(tmp_path)
    outcomes = run(tmp_path, "tiles")
    assert capsys.readouterr().out == ""
    assert "of an image that the file does not list (annotation 106)" in outcomes.summary()
    assert "of an image that the file does not list (annotation 106)" in outcomes._repr_html_()


def command(tmp_path: Path, *more: str) -> str:
    """What `odis-path import` prints."""
    words = ["import", "in", "--coco", "c.json", "--out", "out", "--mpp", "0.5", "--size", "64", *more]
    done = subprocess.run([sys.executable, "-m", "odis_path", *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_shows_what_was_left_out(tmp_path: Path) -> None:
    every_loss(tmp_path)
    text = command(tmp_path, "--polygons")
    table = text[text.index("annotated, by class") :]
    for word in ("Tumor", "no area", "on no tile", "of an image that is not here", "that the file does not list"):
        assert word in table, word
    for number in range(102, 109):
        assert f"{number}" in text


def test_what_is_said_of_many_images_is_said_once(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(9)]
    for name in names:
        picture(tmp_path / "in" / name)
    annotations = [box(100 + i, i, 4, 4, 0, 0) for i in range(9)]
    coco(tmp_path / "c.json", [image(i, name, 64, 64) for i, name in enumerate(names)], annotations)
    notes = [line for line in command(tmp_path).splitlines() if line.startswith("note")]
    assert notes == ["note: 0 and 8 more: 9 left out, no area (annotation 100, 101, 102, 103, 104, ...)"]


@pytest.mark.parametrize("fit", [*FITS, "squash"])
def test_polygons_keeps_the_outlines_of_masks_and_polygons(tmp_path: Path, fit: str) -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[20:40, 10:30] = 1
    mask[25:30, 15:20] = 0
    edges = np.flatnonzero(np.diff(mask.T.reshape(-1))) + 1
    runs = {"size": [64, 64], "counts": np.diff([0, *edges.tolist(), 64 * 64]).tolist()}
    for name in ("a.png", "b.png", "c.png"):
        picture(tmp_path / "in" / name)
    triangle = [[40, 40, 60, 40, 60, 60]]
    annotations = [box(1, 1, 10, 20, 20, 20, segmentation=runs), box(2, 1, 40, 40, 20, 20, segmentation=triangle)]
    annotations.append(box(3, 3, 1, 2, 3, 4))
    coco(tmp_path / "c.json", [image(1, "a.png", 64, 64), image(3, "c.png", 64, 64)], annotations)
    run(tmp_path, fit, polygons=True)
    with SlideFile(tmp_path / "out" / f"{slide_file(fit)}.h5") as file:
        assert file.has_polygons
        rings = [[np.unique(ring, axis=0).tolist() for ring in file.polygon(row)] for row in range(2)]
        assert file.boxes(0).tolist() == [[10, 20, 30, 40], [40, 40, 60, 60]]
        if fit != "tiles":
            assert np.unique(file.polygon(2)[0], axis=0).tolist() == [[1, 2], [1, 6], [4, 2], [4, 6]]
            assert [len(file.boxes(i)) for i in range(3)] == [2, 0, 1]
    assert rings[0] == [[[10, 20], [10, 40], [30, 20], [30, 40]], [[15, 25], [15, 30], [20, 25], [20, 30]]]
    assert rings[1] == [[[40, 40], [60, 40], [60, 60]]]
    outcomes = run(tmp_path, fit, polygons=True)
    assert all(outcome.skipped for outcome in outcomes)
    outcomes = run(tmp_path, fit)
    assert not any(outcome.skipped for outcome in outcomes)
    with SlideFile(tmp_path / "out" / f"{slide_file(fit)}.h5") as file:
        assert not file.has_polygons


def test_polygons_without_boxes_are_refused(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "a.png")
    with pytest.raises(UserError, match="--polygons: needs the boxes"):
        import_images(tmp_path / "in", tmp_path / "out", mpp=0.5, polygons=True)


def test_a_large_mask_of_a_reduced_copy_follows_the_image(tmp_path: Path) -> None:
    """A run-length mask tells the size of an image that the file states none of."""
    picture(tmp_path / "in" / "a.png")
    runs = {"size": [128, 128], "counts": [0, 64 * 128, 64 * 128]}
    coco(tmp_path / "c.json", [image(1, "a.png")], [{"id": 1, "image_id": 1, "category_id": 7, "segmentation": runs}])
    run(tmp_path, "tiles")
    assert stored_boxes(tmp_path, "a") == [[0, 0, 32, 64]]


@pytest.mark.parametrize("fit", FITS)
def test_boxes_drawn_on_the_picture_as_it_is_stored_are_turned_with_it(tmp_path: Path, fit: str) -> None:
    """Orientation 6, stored 64 wide and 128 high: upright it is 128 wide, and its stored lower left is its upper left."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path / "in" / "a.jpg", 64, 128, exif=exif)
    for width, height, scale in ((64, 128, 1), (32, 64, 2), (128, 64, 0)):
        numbers = (40, 0, 10, 10) if not scale else [value / scale for value in (0, 78, 10, 10)]
        coco(tmp_path / "c.json", [image(1, "a.jpg", width, height)], [box(1, 1, *numbers)])
        run(tmp_path, fit)
        left = 40 if fit == "tiles" else 8  # the middle 64 of 128 columns begin at 32
        assert stored_boxes(tmp_path, slide_file(fit)) == [[left, 0, left + 10, 10]], (width, height)


def test_the_file_name_with_most_folders_in_common_means_an_image(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "val" / "a.png")
    images = [image(1, "train/a.png", 64, 64), image(2, "val/a.png", 64, 64)]
    coco(tmp_path / "c.json", images, [box(101, 1, 1, 1, 2, 2), box(102, 2, 4, 4, 8, 8)])
    outcomes = run(tmp_path, "tiles")
    assert stored_boxes(tmp_path, "a") == [[4, 4, 12, 12]]
    assert any("train/a.png" in note for note in outcomes.notes)
    assert any("annotation 101" in note for note in outcomes.notes)


def test_two_file_names_that_mean_one_image_are_refused(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "a.png")
    coco(tmp_path / "c.json", [image(1, "x/a.png"), image(2, "y/a.png")], [box(1, 1, 1, 1, 2, 2), box(2, 2, 1, 1, 2, 2)])
    with pytest.raises(UserError, match=r"x/a.png and y/a.png both mean .*a.png"):
        run(tmp_path, "tiles")


def test_box_files_tell_what_they_lose_too(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "a.png")
    corners = "<xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax>"
    objects = [corners.format(4, 4, 12, 12), corners.format(4, 4, 4, 4), corners.format(500, 500, 510, 510)]
    text = "".join(f"<object><name>Tumor</name><bndbox>{box}</bndbox></object>" for box in objects)
    (tmp_path / "xml").mkdir()
    (tmp_path / "xml" / "a.xml").write_text(f"<annotation>{text}<object><name>Tumor</name></object></annotation>")
    outcomes = run(tmp_path, "tiles", coco=None, boxes=tmp_path / "xml")
    for line in ("no area (annotation a:1)", "on no tile (annotation a:2)", "no geometry (annotation a:3)"):
        assert line in outcomes[0].message
    assert outcomes.results[0].labels["Tumor"].skipped == {"zero_area": 1, "outside": 1, "empty": 1}
