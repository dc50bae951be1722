"""Photographs -> one tile an image, many to a slide file: pixels, boxes, labels, scale, and what goes wrong."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from annotations.errors import UserError
from annotations.readers.coco.images import read_coco
from annotations.readers.xml.voc import read_voc
from tiling import SlideFile, import_images
from tiling.images.fit import fit_map, read_as_tile
from tiling.wsi.backends.upright import TURNS
from tiling.wsi.codec import decode, encode_jpeg

RED = np.array([230, 20, 30])


def photo(path: Path, width: int, height: int, box: tuple[int, int, int, int] | None = None, **options: Any) -> Path:
    """A grey picture with one red rectangle (x0, y0, x1, y1), as the format of the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rgb = np.full((height, width, 3), 128, np.uint8)
    if box is not None:
        rgb[box[1] : box[3], box[0] : box[2]] = RED
    Image.fromarray(rgb).save(path, **({"quality": 95, "subsampling": 0} if path.suffix == ".jpg" else {}), **options)
    return path


def red_box(tile: np.ndarray) -> list[float]:
    """Bounds of the red in a tile."""
    y, x = np.nonzero((tile[..., 0] > 180) & (tile[..., 1] < 75))
    return [x.min(), y.min(), x.max() + 1, y.max() + 1]


def xml(path: Path, boxes: list[tuple[str, tuple[float, ...]]], size: tuple[int, int] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    size_tag = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>" if size else ""
    corners = ("xmin", "ymin", "xmax", "ymax")
    objects = "".join(
        f"<object><name>{name}</name><bndbox>"
        + "".join(f"<{tag}>{value}</{tag}>" for tag, value in zip(corners, box, strict=True))
        + "</bndbox></object>"
        for name, box in boxes
    )
    path.write_text(f"<annotation>{size_tag}{objects}</annotation>")
    return path


def labels_of(out: Path) -> list[dict[str, str]]:
    with (out / "labels.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("fit", ["crop", "squash"])
@pytest.mark.parametrize(("width", "height"), [(500, 375), (333, 500), (64, 64), (40, 30), (900, 700)])
def test_boxes_go_where_the_pixels_go(tmp_path: Path, fit: str, width: int, height: int) -> None:
    """The red rectangle and its box agree in the tile to the pixel, whatever the aspect, enlarged or shrunk."""
    box = (width // 3, height // 4, width // 3 + width // 5, height // 4 + height // 3)
    photo(tmp_path / "in" / "a.jpg", width, height, box)
    xml(tmp_path / "xml" / "a.xml", [("thing", box)], (width, height))
    outcome = import_images(tmp_path / "in", tmp_path / "out", fit=fit, no_mpp=True, size=64, boxes=tmp_path / "xml")[0]
    assert (outcome.ok, outcome.item, outcome.info) == (True, "in-0000", {"tiles": 1, "boxes": 1, "objects": 1, "outside": 0})
    with SlideFile(tmp_path / "out" / "in-0000.h5") as file:
        stored, tile, table = file.boxes(0)[0], file.tile(0), file.objects_table()
        assert file.boxes_table()["visible"].tolist() == [1]
    sx, sy = (64 / width, 64 / height) if fit == "squash" else (64 / min(width, height),) * 2
    ox, oy = (0, 0) if fit == "squash" else ((width - min(width, height)) / 2, (height - min(width, height)) / 2)
    wanted = [(box[0] - ox) * sx, (box[1] - oy) * sy, (box[2] - ox) * sx, (box[3] - oy) * sy]
    assert np.allclose(stored, wanted, atol=1e-4)
    assert np.abs(np.array(red_box(tile)) - wanted).max() <= 1.01
    assert table["area_um2"][0] == pytest.approx((wanted[2] - wanted[0]) * (wanted[3] - wanted[1]), rel=1e-5)


def test_clipped_boxes_and_what_is_visible_of_them(tmp_path: Path) -> None:
    """A crop of 100 x 100 out of 200 x 100: half of one box is left, nothing of another."""
    photo(tmp_path / "in" / "a.jpg", 200, 100)
    coco = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 200, "height": 100}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": c, "bbox": box}
            for i, (c, box) in enumerate([(5, [40, 20, 20, 20]), (6, [0, 0, 10, 10]), (5, [60, 10, 30, 80])])
        ],
        "categories": [{"id": 5, "name": "dog"}, {"id": 6, "name": "cat"}],
    }
    (tmp_path / "c.json").write_text(json.dumps(coco))
    outcome = import_images(tmp_path / "in", tmp_path / "out", fit="crop", no_mpp=True, size=50, coco=tmp_path / "c.json")[0]
    assert outcome.info == {"tiles": 1, "boxes": 2, "objects": 3, "outside": 1}
    with SlideFile(tmp_path / "out" / "in-0000.h5") as file:
        boxes, table = file.boxes_table(), file.objects_table()
    assert boxes["xyxy"].tolist() == [[0, 10, 5, 20], [5, 5, 20, 45]]
    assert boxes["visible"].tolist() == [0.5, 1]
    assert [table["labels"][table["label"][i]] for i in boxes["object"]] == ["dog", "dog"]
    assert table["area_um2"].tolist() == [100, 25, 600]


def test_an_object_of_one_image_never_reaches_its_neighbour(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        photo(tmp_path / "in" / f"{name}.jpg", 80, 80)
    everywhere = [("x", (-500.0, -500.0, 500.0, 500.0))]
    xml(tmp_path / "xml" / "a.xml", everywhere)
    xml(tmp_path / "xml" / "d.xml", [("y", (0, 0, 40, 40)), *everywhere])
    outcome = import_images(tmp_path / "in", tmp_path / "out", fit="crop", no_mpp=True, size=40, boxes=tmp_path / "xml")[0]
    assert "2 images have no box file" in outcome.message
    with SlideFile(tmp_path / "out" / "in-0000.h5") as file:
        assert file.coords.tolist() == [[0, 0], [40, 0], [0, 40], [40, 40]]
        assert file.dimensions_l0 == (80, 80)
        assert [file.boxes(i).tolist() for i in range(3)] == [[[0, 0, 40, 40]], [], []]
        assert file.boxes(3).tolist() == [[0, 0, 20, 20], [0, 0, 40, 40]]
        table, boxes = file.objects_table(), file.boxes_table()
        assert [table["labels"][table["label"][i]] for i in boxes["object"]] == ["x", "y", "x"]
        assert table["id"].tolist() == ["a:0", "d:0", "d:1"]
        thumbnail = file.thumbnail()
        assert thumbnail is not None
        assert thumbnail[0].shape == (80, 80, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_pixels_and_boxes(tmp_path: Path, orientation: int) -> None:
    """Boxes drawn on the upright picture and boxes drawn on the stored one both land on the red, as pillow turns it."""
    from PIL import ImageOps

    box, exif = (20, 10, 50, 40), Image.Exif()
    exif[0x0112] = orientation
    path = photo(tmp_path / "in" / "a.jpg", 160, 80, box, exif=exif)
    with Image.open(path) as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    height, width = upright.shape[:2]
    fitted = read_as_tile(path, "squash", 80)
    assert fitted.size == (width, height)
    part = fit_map(fitted.size, "squash", 80)
    corners = np.array([box[:2], box[2:]], dtype=float)
    turned = TURNS[orientation].xy(corners, (160, 80))
    wanted = np.concatenate([turned.min(0), turned.max(0)])
    assert np.abs(np.array(red_box(upright)) - wanted).max() <= 1
    in_tile = part.to_tile(wanted.reshape(2, 2)).ravel()
    sizes = {"upright": (width, height)} | ({"stored": (160, 80)} if orientation >= 5 else {})
    for name, size in sizes.items():
        drawn = wanted if name == "upright" else box
        xml(tmp_path / name / "a.xml", [("x", tuple(drawn))], size)
        out = tmp_path / f"out_{name}"
        import_images(tmp_path / "in", out, fit="squash", no_mpp=True, size=80, boxes=tmp_path / name)
        with SlideFile(out / "in-0000.h5") as file:
            assert np.allclose(file.boxes(0)[0], in_tile, atol=1e-4)
            assert np.abs(np.array(red_box(file.tile(0))) - in_tile).max() <= 1.01


def test_shrinking_is_antialiased(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fine stripes become even grey; a large JPEG decoded at a quarter of its size gives what the whole of it gives."""
    stripes = np.zeros((900, 1300, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "s.png")
    tile = decode(read_as_tile(tmp_path / "s.png", "crop", 100).jpeg)
    assert np.abs(tile.astype(int) - 128).max() <= 3
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (45, 65, 3), dtype=np.uint8)).resize((1300, 900), Image.Resampling.BICUBIC)
    noise.save(tmp_path / "n.jpg", quality=95)
    with Image.open(tmp_path / "n.jpg") as image:
        wanted = image.convert("RGB").resize((100, 100), Image.Resampling.BICUBIC, box=(200, 0, 1100, 900))
    wanted = decode(encode_jpeg(np.asarray(wanted), 95)).astype(int)  # as the tile goes through JPEG too
    tiles = []
    for spare in (2, 1000):
        monkeypatch.setattr("tiling.images.fit.SPARE", spare)
        tiles.append(decode(read_as_tile(tmp_path / "n.jpg", "crop", 100).jpeg).astype(int))
    assert np.abs(tiles[1] - wanted).mean() < 0.5
    assert 0 < np.abs(tiles[0] - wanted).mean() < 2
    assert np.abs(np.roll(tiles[0], 1, axis=1) - wanted).mean() > 15


def test_every_kind_of_picture(tmp_path: Path) -> None:
    """CMYK, grey, palette, transparent, 16-bit, TIFF and a PNG that calls itself JPEG."""
    rgb = np.full((60, 90, 3), (200, 120, 160), np.uint8)
    folder = tmp_path / "in"
    folder.mkdir()
    picture = Image.fromarray(rgb)
    picture.convert("CMYK").save(folder / "a_cmyk.jpg", quality=95)
    picture.convert("L").save(folder / "b_grey.jpg", quality=95)
    picture.convert("P").save(folder / "c_palette.png")
    Image.fromarray(np.dstack([rgb, np.zeros((60, 90), np.uint8)])).save(folder / "d_clear.png")
    Image.fromarray((rgb[..., 0].astype(np.uint16)) * 257).save(folder / "e_deep.png")
    picture.save(folder / "f.tif")
    picture.save(folder / "g_png.JPEG", format="PNG")
    outcomes = import_images(folder, tmp_path / "out", fit="crop", no_mpp=True, size=30)
    assert [outcome.ok for outcome in outcomes] == [True], outcomes
    grey = round(0.299 * 200 + 0.587 * 120 + 0.114 * 160)
    wanted = [rgb[0, 0], (grey,) * 3, rgb[0, 0], (255,) * 3, (200,) * 3, rgb[0, 0], rgb[0, 0]]
    with SlideFile(tmp_path / "out" / "in-0000.h5") as file:
        assert len(file) == 7
        for i, colour in enumerate(wanted):
            assert np.abs(file.tile(i).mean(axis=(0, 1)) - colour).max() <= (12 if i == 2 else 4), i


def test_a_jpeg_of_the_right_size_keeps_its_bytes(tmp_path: Path) -> None:
    """Unless something is odd about it that pillow reads all the same (here, stray bytes before its tables)."""
    path = photo(tmp_path / "in" / "a.jpg", 48, 48)
    data = path.read_bytes()
    at = data.index(b"\xff\xdb")
    (tmp_path / "in" / "b.jpg").write_bytes(data[:at] + b"\x00\x11" + data[at:])
    outcomes = import_images(tmp_path / "in", tmp_path / "out", fit="crop", no_mpp=True, size=48)
    assert [outcome.ok for outcome in outcomes] == [True], outcomes
    with SlideFile(tmp_path / "out" / "in-0000.h5") as file:
        assert file.tile_bytes(0) == data
        assert file.tile_bytes(1) != (tmp_path / "in" / "b.jpg").read_bytes()
        assert np.abs(file.tile(1).astype(int) - file.tile(0)).max() <= 2


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Two class folders of five and three photographs."""
    for folder, count in (("n01", 5), ("n02", 3)):
        for i in range(count):
            photo(tmp_path / "in" / folder / f"{folder}_{i}.JPEG", 60 + i, 50, (i, 0, i + 20, 20))
    return tmp_path / "in"


def test_shards_of_class_folders_and_their_labels(classes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcomes = import_images(classes, out, fit="crop", no_mpp=True, size=32, shard=2, workers=2)
    assert [(outcome.item, outcome.info["tiles"]) for outcome in outcomes] == [
        ("n01-0000", 2),
        ("n01-0001", 2),
        ("n01-0002", 1),
        ("n02-0000", 2),
        ("n02-0001", 1),
    ]
    rows = labels_of(out)
    assert [row["image"] for row in rows] == [f"n01/n01_{i}.JPEG" for i in range(5)] + [f"n02/n02_{i}.JPEG" for i in range(3)]
    for row in rows:
        assert row["label"] == row["image"].split("/")[0]
        with SlideFile(out / f"{row['slide_id']}.h5") as file:
            at = file.coords.tolist().index([int(row["x"]), int(row["y"])])
            name = file._file["images/name"].asstr()[at]
            assert name == row["image"]
            assert file._file["images/size"][at].tolist() == [60 + int(name[-6]), 50]
            assert file.source == classes / row["label"]
            with Image.open(classes / name) as image:
                assert np.abs(file.tile(at).astype(int) - np.asarray(image.resize((32, 32), box=_crop(image)))).mean() < 6
    stamps = {path.name: path.stat().st_mtime_ns for path in out.glob("*.h5")}
    before = (out / "labels.csv").read_text()
    again = import_images(classes, out, fit="crop", no_mpp=True, size=32, shard=2)
    assert all(outcome.skipped for outcome in again)
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.h5")} == stamps
    assert (out / "labels.csv").read_text() == before
    os.utime(classes / "n01" / "n01_2.JPEG", ns=(1, 1))
    assert [outcome.skipped for outcome in import_images(classes, out, fit="crop", no_mpp=True, size=32, shard=2)] == [
        True,
        False,
        True,
        True,
        True,
    ]
    with pytest.raises(UserError, match=r"n01-0002.h5: of an earlier import with other images or another --shard: delete it"):
        import_images(classes, out, fit="crop", no_mpp=True, size=32, shard=3)


def _crop(image: Image.Image) -> tuple[float, float, float, float]:
    side = min(image.size)
    x, y = (image.width - side) / 2, (image.height - side) / 2
    return x, y, x + side, y + side


def test_a_bad_image_is_named_and_its_shard_goes_on(classes: Path, tmp_path: Path) -> None:
    """Left out, named, non-zero exit; its place stays free; mended, its shard alone is made again."""
    out, broken = tmp_path / "out", classes / "n01" / "n01_1.JPEG"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    xml(tmp_path / "xml" / "n02" / "n02_0.xml", [("x", (1, 1, 9, 9))], (60, 50))
    xml(tmp_path / "xml" / "n02" / "n02_2.xml", [("x", (1, 1, 9, 9))], (640, 480))
    call = {"fit": "crop", "no_mpp": True, "size": 32, "boxes": tmp_path / "xml"}
    outcomes = {outcome.item: outcome for outcome in import_images(classes, out, **call)}
    assert [(name, outcome.ok) for name, outcome in outcomes.items()] == [
        ("n01-0000", True),
        ("n02-0000", True),
        ("n01/n01_1.JPEG", False),
        ("n02/n02_2.JPEG", False),
    ]
    assert f"{broken}: not a readable image" in outcomes["n01/n01_1.JPEG"].message
    assert "its boxes are of an image of 640 x 480" in outcomes["n02/n02_2.JPEG"].message
    with SlideFile(out / "n01-0000.h5") as file:
        assert file.coords.tolist() == [[0, 0], [64, 0], [0, 32], [32, 32]]
    assert len(labels_of(out)) == 6
    again = import_images(classes, out, **call)
    assert [outcome.ok for outcome in again] == [True, True, False, False]
    assert not any(outcome.skipped for outcome in again)
    broken.write_bytes(whole)
    (tmp_path / "xml" / "n02" / "n02_2.xml").unlink()
    assert all(outcome.ok and not outcome.skipped for outcome in import_images(classes, out, **call))
    assert all(outcome.ok and outcome.skipped for outcome in import_images(classes, out, **call))
    assert len(labels_of(out)) == 8
    with SlideFile(out / "n01-0000.h5") as file:
        assert file.coords.tolist() == [[0, 0], [32, 0], [64, 0], [0, 32], [32, 32]]


def test_the_command_ends_non_zero_on_a_bad_image(classes: Path, tmp_path: Path) -> None:
    from odis_path.cli.app import app

    (classes / "n01" / "n01_0.JPEG").write_bytes(b"no image")
    args = ["import", str(classes), "--out", str(tmp_path / "out"), "--fit", "crop", "--size", "32", "--no-mpp"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 1
    assert "n01/n01_0.JPEG" in result.output
    (classes / "n01" / "n01_0.JPEG").unlink()
    assert CliRunner().invoke(app, [*args, "--workers", "1"]).exit_code == 0


def test_splits_around_class_folders(tmp_path: Path) -> None:
    for side in ("train", "val"):
        for label in ("cat", "dog"):
            photo(tmp_path / "in" / side / label / f"{side}{label}.jpg", 40, 40)
    import_images(tmp_path / "in", tmp_path / "out", fit="crop", no_mpp=True, size=32)
    rows = labels_of(tmp_path / "out")
    assert [(row["slide_id"], row["label"], row["split"]) for row in rows] == [
        ("train__cat-0000", "cat", "train"),
        ("train__dog-0000", "dog", "train"),
        ("val__cat-0000", "cat", "val"),
        ("val__dog-0000", "dog", "val"),
    ]
    import_images(tmp_path / "in" / "val", tmp_path / "only", fit="crop", no_mpp=True, size=32)
    assert [(row["slide_id"], row["split"]) for row in labels_of(tmp_path / "only")] == [
        ("val__cat-0000", "val"),
        ("val__dog-0000", "val"),
    ]


def test_patients_and_scales_are_never_mixed_in_a_file(tmp_path: Path) -> None:
    """mpp of a tile is the image's times the factor of its resizing; one patient and one mpp to a file."""
    for name, side in (("a", 64), ("b", 64), ("c", 128)):
        photo(tmp_path / "in" / f"{name}.jpg", side, side + 20)
    (tmp_path / "m.csv").write_text("image,patient_id\na.jpg,P1\nb.jpg,P2\nc.jpg,P1\n")
    call = {"fit": "crop", "size": 32, "manifest": tmp_path / "m.csv"}
    outcomes = import_images(tmp_path / "in", tmp_path / "out", mpp=0.25, **call)
    stored = []
    for outcome in outcomes:
        with SlideFile(tmp_path / "out" / f"{outcome.item}.h5") as file:
            stored.append((file.patient_id, file.mpp, file.parameters["mpp_nominal"]))
    assert stored == [("P1", 0.5, False), ("P2", 0.5, False), ("P1", 1.0, False)]
    plain = import_images(tmp_path / "in", tmp_path / "plain", no_mpp=True, **call)
    assert [outcome.info["tiles"] for outcome in plain] == [2, 1]
    with SlideFile(tmp_path / "plain" / "in-0000.h5") as file:
        assert (file.mpp, file.mpp_level0, file.size_l0) == (1, 1, 32)
        assert file.parameters["mpp_nominal"] is True
        assert bool(file.group_attrs("images")["mpp_nominal"]) is True


def test_no_scale_is_said_or_refused(tmp_path: Path) -> None:
    photo(tmp_path / "in" / "a.png", 90, 60)
    photo(tmp_path / "in" / "b.png", 90, 60, dpi=(50800, 50800))
    outcomes = {outcome.item: outcome for outcome in import_images(tmp_path / "in", tmp_path / "out", fit="crop", size=30)}
    assert outcomes["in-0000"].info["tiles"] == 1
    assert "--no-mpp for photographs" in outcomes["a.png"].message
    with SlideFile(tmp_path / "out" / "in-0000.h5") as file:
        assert file.mpp == pytest.approx(1.0, rel=1e-3)
    with pytest.raises(UserError, match="none of the 1 images can be imported with a scale"):
        import_images(tmp_path / "in" / "a.png", tmp_path / "o2", fit="crop")
    with pytest.raises(UserError, match="squashed has two mpp"):
        import_images(tmp_path / "in" / "b.png", tmp_path / "o3", fit="squash")
    tiles = import_images(tmp_path / "in" / "a.png", tmp_path / "o4", no_mpp=True, size=30)
    assert [outcome.info["tiles"] for outcome in tiles] == [6]
    with SlideFile(tmp_path / "o4" / "a.h5") as file:
        assert (file.mpp, file.parameters["mpp_nominal"]) == (1, True)


def test_box_files_for_whole_tiles_too(tmp_path: Path) -> None:
    photo(tmp_path / "in" / "a.png", 64, 32)
    photo(tmp_path / "in" / "b.png", 64, 32)
    xml(tmp_path / "xml" / "a.xml", [("x", (20, 8, 44, 24))], (64, 32))
    call = {"mpp": 0.5, "size": 32, "boxes": tmp_path / "xml"}
    first, second = import_images(tmp_path / "in", tmp_path / "out", **call)
    assert (first.info["boxes"], second.message) == (2, "no box file")
    with SlideFile(tmp_path / "out" / "a.h5") as file:
        assert [file.boxes(i).tolist() for i in range(2)] == [[[20, 8, 32, 24]], [[0, 8, 12, 24]]]
    assert all(outcome.skipped for outcome in import_images(tmp_path / "in", tmp_path / "out", **call))
    xml(tmp_path / "xml" / "a.xml", [], (640, 320))
    assert not import_images(tmp_path / "in", tmp_path / "out", **call)[0].ok


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"fit": "stretch"}, "--fit stretch: is one of tiles, crop, squash"),
        ({"fit": "crop", "shard": 0}, "--shard 0: is a number of images"),
        ({"shard": 10}, "--shard 10: goes with --fit crop"),
        ({"mpp": 0.5, "no_mpp": True}, "give one of the two"),
        ({"coco": "a.json", "boxes": "b"}, "give one of the two"),
        ({"boxes": "nowhere", "no_mpp": True}, "no such folder of box files"),
        ({"boxes": ".", "no_mpp": True}, r"holds the box file of no image \(looked for a.xml"),
    ],
)
def test_options_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], says: str) -> None:
    monkeypatch.chdir(tmp_path)
    photo(tmp_path / "in" / "a.png", 40, 40)
    with pytest.raises(UserError, match=says) as error:
        import_images(tmp_path / "in", tmp_path / "out", **options)
    assert "\n" not in str(error.value)


BOMB = (
    '<!DOCTYPE a [<!ENTITY b "bbbbbbbb"><!ENTITY c "&b;&b;&b;&b;">]><annotation><object><name>&c;</name></object></annotation>'
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BOMB, "holds a DOCTYPE or an ENTITY"),
        ('<!DOCTYPE a SYSTEM "file:///etc/hostname"><annotation/>', "holds a DOCTYPE or an ENTITY"),
        ("<annotation><object>", "not XML"),
        ("", "not XML"),
        ("<annotation><object><name>&c;</name></object></annotation>", "not XML"),
        ("<a><object><bndbox><xmin>one</xmin></bndbox></object></a>", "object 0: xmin is 'one'"),
        ("<a><object><bndbox><ymin>1</ymin></bndbox></object></a>", "object 0: xmin is ''"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_box_files_that_are_refused(tmp_path: Path, text: str, says: str, encoding: str) -> None:
    (tmp_path / "a.xml").write_bytes(text.encode(encoding))
    with pytest.raises(UserError, match=says) as error:
        read_voc(tmp_path / "a.xml")
    assert str(error.value).startswith(f"{tmp_path / 'a.xml'}: ")
    assert "\n" not in str(error.value)


def test_what_a_box_file_says(tmp_path: Path) -> None:
    path = xml(tmp_path / "a.xml", [("dog", (1, 2, 11, 22)), ("cat", (5, 5, 5, 9)), ("", (0, 0, 2.5, 2))], (30, 40))
    path.write_text(path.read_text().replace("</annotation>", "<object><name>dog</name></object></annotation>"))
    table, size = read_voc(path)
    assert size == (30, 40)
    assert table.labels == ("dog", "cat")
    assert (table.label.tolist(), table.id.tolist()) == ([0, -1], ["a:0", "a:2"])
    assert [geometry.bounds for geometry in table.geometry] == [(1, 2, 11, 22), (0, 0, 2.5, 2)]
    assert table.counts == {"features": 4, "empty": 1, "zero_area": 1}
    assert read_voc(xml(tmp_path / "b.xml", [], (0, 0)))[1] is None


def test_coco_in_bulk_is_coco_one_by_one(tmp_path: Path) -> None:
    """Images with plain boxes only take another path than the rest: the same tables as where each image is alone."""
    rng = np.random.default_rng(3)
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(20)]
    annotations: list[dict[str, Any]] = []
    for i in range(18):
        for _ in range(rng.integers(1, 4)):
            box = rng.uniform(1, 50, 4).round(2).tolist()
            annotations.append({"id": len(annotations), "image_id": i, "category_id": int(rng.integers(0, 3)), "bbox": box})
    annotations[4]["bbox"][2] = 0
    annotations[9]["segmentation"] = [[0, 0, 10, 0, 10, 10]]
    del annotations[12]["category_id"]
    categories = [{"id": 0, "name": "b"}, {"id": 1, "name": "a"}]
    (tmp_path / "all.json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    together = read_coco(tmp_path / "all.json")
    odd = {"id": 10**6, "image_id": 0, "bbox": [0, 0, 1, 1], "segmentation": [[0, 0, 1, 0, 1, 1]]}
    for i, image in enumerate(images):  # an outline beside the boxes keeps an image off the bulk path
        own = [annotation for annotation in annotations if annotation["image_id"] == i]
        with_odd = {"images": [image], "annotations": [*own, {**odd, "image_id": i}], "categories": categories}
        (tmp_path / "one.json").write_text(json.dumps(with_odd))
        alone, here = read_coco(tmp_path / "one.json")[f"{i}.jpg"], together[f"{i}.jpg"]
        assert here.id.tolist() == alone.id.tolist()[:-1]
        assert here.label.tolist() == alone.label.tolist()[:-1]
        assert [geometry.wkt for geometry in here.geometry] == [geometry.wkt for geometry in alone.geometry][:-1]
        assert here.counts == {**alone.counts, "features": alone.counts["features"] - 1}


def test_a_crash_leaves_the_old_shard(classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stops the writing, the file under its name is the old one, whole, and no other file is left."""
    call = {"fit": "crop", "no_mpp": True, "size": 32}
    import_images(classes, tmp_path / "out", **call)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    os.utime(classes / "n01" / "n01_2.JPEG", ns=(1, 1))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tiling.slide_file.write._PixelWriter.add", full)
    outcomes = import_images(classes, tmp_path / "out", **call)
    assert [(outcome.item, outcome.ok) for outcome in outcomes] == [("n01-0000", False), ("n02-0000", True)]
    after = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.suffix == ".h5"}
    assert after == {name: data for name, data in before.items() if name.endswith(".h5")}
