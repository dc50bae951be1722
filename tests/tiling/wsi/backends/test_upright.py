"""Whatever orientation a file states, and whoever reads it: it is shown upright as the tag says, never scrambled."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from annotations.errors import UserError
from tiling.cohort.scan import scan
from tiling.images.run import import_images
from tiling.slide_file.read import SlideFile
from tiling.tiles.run import tile
from tiling.tissue.drawn_regions import read_mask
from tiling.wsi.backends.upright import TURNS
from tiling.wsi.slide import Slide

WIDTH, HEIGHT, SIDE = 600, 400, 128  # no multiple of a tile's sides: the last ones are cut
READERS = ("direct", "openslide", "tiffslide", "image")
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # by the words of the TIFF specification
    1: lambda stored: stored,
    2: np.fliplr,
    3: lambda stored: np.rot90(stored, 2),
    4: np.flipud,
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).swapaxes(0, 1),
    8: np.rot90,
}
KINDS: dict[str, dict[str, Any]] = {
    "tiles": {"tile": (SIDE, SIDE)},
    "tiles lzw": {"tile": (SIDE, SIDE), "compression": "lzw"},
    "tiles deflate": {"tile": (SIDE, SIDE), "compression": "deflate"},
    "tiles jpeg": {"tile": (SIDE, SIDE), "compression": "jpeg", "compressionargs": {"level": 95}},
    "tiles jpeg 2000": {"tile": (SIDE, SIDE), "compression": 33005},
    "BigTIFF tiles lzw": {"tile": (SIDE, SIDE), "compression": "lzw", "bigtiff": True, "byteorder": ">"},
    "strips": {"rowsperstrip": 50},
    "strips lzw": {"rowsperstrip": 50, "compression": "lzw"},
    "strips jpeg": {"rowsperstrip": 48, "compression": "jpeg", "compressionargs": {"level": 95}},
}


@pytest.fixture(scope="module")
def stored(picture: np.ndarray) -> np.ndarray:
    """uint8 (HEIGHT, WIDTH, 3): no two of the eight ways to turn it look alike."""
    return np.ascontiguousarray(picture[100 : 100 + HEIGHT, 60 : 60 + WIDTH])


def write(path: Path, pages: list[np.ndarray], orientations: list[int], subifds: bool = False, **options: Any) -> Path:
    """A TIFF of these pages, each of its own orientation; 0.5 mpp times the pages' ratio."""
    opening = {key: options.pop(key) for key in ("bigtiff", "byteorder") if key in options}
    with tifffile.TiffWriter(path, **opening) as file:
        for number, (pixels, orientation) in enumerate(zip(pages, orientations, strict=True)):
            file.write(
                pixels,
                photometric="rgb",
                metadata=None,
                subfiletype=int(number > 0),
                resolutionunit="CENTIMETER",
                extratags=[(274, 3, 1, orientation, True)] if orientation else [],
                resolution=(20000 * len(pixels) / len(pages[0]),) * 2,
                subifds=len(pages) - 1 if subifds and not number else None,
                **options,
            )
    return path


def shown(path: Path, reader: str = "auto") -> np.ndarray:
    with Slide.open(path, reader=reader) as slide:
        size = slide.info.width_l0, slide.info.height_l0
        return slide.read_region(0, 0, *size, *size)


def away(one: np.ndarray, other: np.ndarray) -> float:
    """Grey levels between two pictures, which must be of one shape."""
    assert one.shape == other.shape
    return float(np.abs(one.astype(int) - other).mean())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", KINDS)
def test_every_reader_shows_a_tiff_upright_or_refuses_it(
    tmp_path: Path, stored: np.ndarray, kind: str, orientation: int
) -> None:
    path = write(tmp_path / "a.tif", [stored], [orientation], **KINDS[kind])
    upright = UPRIGHT[orientation](stored)
    assert away(shown(path), upright) < 1
    refused = {}
    for reader in READERS:
        try:
            assert away(shown(path, reader), upright) < 1, reader
        except UserError as error:
            refused[reader] = str(error)
    assert len(refused) < len(READERS)
    assert not any("\n" in line for line in refused.values())


@pytest.mark.parametrize("orientation", [1, 2, 6, 7])
@pytest.mark.parametrize("kind", ["tiles lzw", "tiles jpeg", "strips"])
@pytest.mark.parametrize("subifds", [False, True])
def test_all_levels_of_a_pyramid_are_upright(
    tmp_path: Path, stored: np.ndarray, kind: str, subifds: bool, orientation: int
) -> None:
    half = stored.reshape(HEIGHT // 2, 2, WIDTH // 2, 2, 3).mean((1, 3)).round().astype(np.uint8)
    path = write(tmp_path / "a.tif", [stored, half], [orientation] * 2, subifds, **KINDS[kind])
    with Slide.open(path) as slide:
        for level, pixels in enumerate((stored, half)[: len(slide.info.level_dimensions)]):
            upright = UPRIGHT[orientation](pixels)
            assert slide.info.level_dimensions[level] == upright.shape[1::-1]
            assert away(slide.reader.read(level, 0, 0, *upright.shape[1::-1]), upright) < 1
        whole = slide.read_region(0, 0, *slide.info.level_dimensions[0], 60, 60)
    upright = UPRIGHT[orientation](stored)
    average = np.asarray(Image.fromarray(np.ascontiguousarray(upright)).resize((60, 60), Image.Resampling.BOX))
    assert away(whole, average) < 1.5


@pytest.mark.parametrize("orientation", [1, 3, 5, 8])
@pytest.mark.parametrize("kind", ["tiles lzw", "tiles jpeg", "strips"])
def test_tiles_and_parts_lie_where_the_upright_picture_has_them(
    tmp_path: Path, stored: np.ndarray, kind: str, orientation: int
) -> None:
    path = write(tmp_path / "a.tif", [stored], [orientation], **KINDS[kind])
    upright = UPRIGHT[orientation](stored)
    with Slide.open(path) as slide:
        for x, y, w, h in ((0, 0, 30, 50), (130, 90, 71, 200), (350, 345, 50, 55)):
            assert away(slide.read_region(x, y, w, h, w, h), upright[y : y + h, x : x + w]) < 2
    (outcome,) = tile([path], tmp_path / "out", 0.5, 100, tissue="none", workers=1)
    assert outcome.ok, outcome.message
    assert ("shown upright, as its orientation" in outcome.message) == (orientation > 1)
    with SlideFile(tmp_path / "out" / "a.h5") as file:
        assert len(file) == 24
        for i, (x, y) in enumerate(file.coords.tolist()):
            assert away(file.tile(i), upright[y : y + 100, x : x + 100]) < 2


def test_tiles_without_pixels_of_a_slide_that_is_turned_since_are_refused(tmp_path: Path, stored: np.ndarray) -> None:
    path = write(tmp_path / "a.tif", [stored], [1], **KINDS["tiles lzw"])
    (outcome,) = tile([path], tmp_path / "out", 0.5, 100, tissue="none", workers=1, pixels="none")
    assert outcome.ok
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages[0].tags["Orientation"].overwrite(6)
    with (
        SlideFile(tmp_path / "out" / "a.h5") as file,
        pytest.raises(UserError, match=r"a\.h5: its slide is 400 x 600 pixels, 600 x 400 when it was tiled: run odis"),
    ):
        file.tile(0)


def test_copied_tiles_of_a_turned_slide_are_upright(tmp_path: Path, stored: np.ndarray) -> None:
    path = write(tmp_path / "a.tif", [stored], [3], **KINDS["tiles jpeg"])
    (outcome,) = tile([path], tmp_path / "out", 0.5, SIDE, tissue="none", workers=1, pixels="copy")
    assert outcome.ok
    with SlideFile(tmp_path / "out" / "a.h5") as file:
        for i, (x, y) in enumerate(file.coords.tolist()):
            assert away(file.tile(i), np.rot90(stored, 2)[y : y + SIDE, x : x + SIDE]) < 2


@pytest.mark.parametrize("orientation", [0, 9, 77])
@pytest.mark.parametrize("kind", ["tiles lzw", "strips"])
def test_an_orientation_that_means_nothing_is_none(tmp_path: Path, stored: np.ndarray, kind: str, orientation: int) -> None:
    path = write(tmp_path / "a.tif", [stored], [orientation], **KINDS[kind])
    np.testing.assert_array_equal(shown(path), stored)


@pytest.mark.parametrize("kind", ["tiles lzw", "tiles jpeg", "strips"])
@pytest.mark.parametrize("orientations", [(1, 3), (6, 1), (2, 4), (3, 0)])
def test_a_level_of_another_orientation_is_left_out_and_told(
    tmp_path: Path, stored: np.ndarray, kind: str, orientations: tuple[int, int]
) -> None:
    half = np.ascontiguousarray(stored[::2, ::2])
    path = write(tmp_path / "a.tif", [stored, half], list(orientations), **KINDS[kind])
    assert away(shown(path), UPRIGHT[orientations[0]](stored)) < 1
    with Slide.open(path) as slide:
        assert len(slide.info.level_dimensions) == 1
        assert "leaves out 1 of its 2 pages (300 x 200 pixels)" in slide.info.note


def test_an_ome_tiff_is_shown_upright(tmp_path: Path, stored: np.ndarray) -> None:
    for side in (None, (SIDE, SIDE)):
        tifffile.imwrite(
            tmp_path / "a.ome.tif",
            stored,
            photometric="rgb",
            tile=side,
            extratags=[(274, 3, 1, 6, True)],
            ome=True,
            metadata={"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5, "PhysicalSizeXUnit": "µm", "PhysicalSizeYUnit": "µm"},
        )
        np.testing.assert_array_equal(shown(tmp_path / "a.ome.tif"), np.rot90(stored, -1))
        with Slide.open(tmp_path / "a.ome.tif") as slide:
            assert slide.info.mpp == 0.5


def test_an_aperio_file_is_shown_upright(tmp_path: Path, stored: np.ndarray) -> None:
    text = f"Aperio Image Library v11\n{WIDTH}x{HEIGHT} ({SIDE}x{SIDE}) JPEG/RGB Q=95|AppMag = 20|MPP = 0.5"
    for compression in ("jpeg", "lzw"):
        options: dict[str, Any] = {"tile": (SIDE, SIDE), "compression": compression, "description": text}
        path = write(tmp_path / f"{compression}.svs", [stored], [6], **options)
        assert away(shown(path), np.rot90(stored, -1)) < 2
        with Slide.open(path) as slide:
            assert (slide.info.mpp, slide.info.vendor) == (0.5, "aperio")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_unscanned_tiles_are_white_and_counted_where_they_stand_upright(tmp_path: Path, orientation: int) -> None:
    size = 4 * SIDE - 28, 3 * SIDE - 28
    tiles = [np.full((SIDE, SIDE, 3), 90, np.uint8).tobytes()] * 12
    tiles[1] = tiles[11] = b""
    tifffile.imwrite(
        tmp_path / "a.tif",
        iter(tiles),
        shape=(size[1], size[0], 3),
        dtype=np.uint8,
        tile=(SIDE, SIDE),
        photometric="rgb",
        metadata=None,
        extratags=[(274, 3, 1, orientation, True)],
        resolution=(20000, 20000),
        resolutionunit="CENTIMETER",
    )
    expected = np.full((size[1], size[0], 3), 90, np.uint8)
    expected[:SIDE, SIDE : 2 * SIDE] = expected[2 * SIDE :, 3 * SIDE :] = 255
    upright = UPRIGHT[orientation](expected)
    np.testing.assert_array_equal(shown(tmp_path / "a.tif"), upright)
    (outcome,) = tile([tmp_path / "a.tif"], tmp_path / "out", 0.5, 50, tissue="none", workers=1)
    with SlideFile(tmp_path / "out" / "a.h5") as file:
        reaching = sum((upright[y : y + 50, x : x + 50] == 255).any() for x, y in file.coords.tolist())
    assert f"{reaching} tiles reach into what was not scanned" in outcome.message


def as_exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    return exif.tobytes()


def write_photograph(path: Path, pixels: np.ndarray, orientation: int) -> Path:
    options: dict[str, Any] = {".jpg": {"quality": 95, "subsampling": 0}, ".webp": {"lossless": True}}.get(path.suffix, {})
    Image.fromarray(pixels).save(path, exif=as_exif(orientation), dpi=(50800, 50800), **options)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_photographs_are_shown_upright_by_scan_and_tile(
    tmp_path: Path, stored: np.ndarray, suffix: str, orientation: int
) -> None:
    path = write_photograph(tmp_path / f"a{suffix}", stored, orientation)
    upright = UPRIGHT[orientation](stored)
    assert away(shown(path), upright) < 1
    (outcome,) = scan([path], tmp_path / "m.csv", workers=1)
    row = outcome.info["row"]
    assert (row["width_l0"], row["height_l0"]) == upright.shape[1::-1]
    (outcome,) = tile([tmp_path / "m.csv"], tmp_path / "out", 0.5, 100, tissue="none", assume_mpp=0.5, workers=1)
    assert outcome.ok, outcome.message
    with SlideFile(tmp_path / "out" / "a.h5") as file:
        for i, (x, y) in enumerate(file.coords.tolist()):
            assert away(file.tile(i), upright[y : y + 100, x : x + 100]) < 2


@pytest.mark.parametrize("orientation", [1, 2, 6, 8])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("fit", ["tiles", "crop"])
def test_import_shows_images_upright(tmp_path: Path, stored: np.ndarray, suffix: str, fit: str, orientation: int) -> None:
    square = np.ascontiguousarray(stored[:256, 100:356])
    path = tmp_path / f"a{suffix}"
    if suffix == ".tif":
        write(path, [square], [orientation], **KINDS["tiles lzw"])
    else:
        write_photograph(path, square, orientation)
    (outcome,) = import_images(path, tmp_path / "out", mpp=0.5, size=256, fit=fit)
    assert outcome.ok, outcome.message
    (made,) = (tmp_path / "out").glob("*.h5")
    with SlideFile(made) as file:
        assert away(file.tile(0), UPRIGHT[orientation](square)) < 2


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
def test_boxes_of_an_import_refer_to_the_upright_image(tmp_path: Path, stored: np.ndarray, suffix: str) -> None:
    marked = stored.copy()
    marked[40:90, 300:420] = 0, 0, 0
    path = tmp_path / "images" / f"a{suffix}"
    path.parent.mkdir()
    write(path, [marked], [6]) if suffix == ".tif" else write_photograph(path, marked, 6)
    box = [HEIGHT - 90, 300, 50, 120]  # x, y, width, height when upright
    coco = {
        "images": [{"id": 1, "file_name": path.name, "width": HEIGHT, "height": WIDTH}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": box}],
        "categories": [{"id": 1, "name": "black"}],
    }
    (tmp_path / "c.json").write_text(json.dumps(coco))
    (outcome,) = import_images(path.parent, tmp_path / "out", coco=tmp_path / "c.json", mpp=0.5, size=HEIGHT)
    assert outcome.ok, outcome.message
    with SlideFile(tmp_path / "out" / "a.h5") as file:
        x0, y0, x1, y1 = file.boxes(0)[0].round().astype(int).tolist()
        inside = file.tile(0)[y0 + 4 : y1 - 4, x0 + 4 : x1 - 4]
    assert (x1 - x0, y1 - y0) == (50, 100)  # cut off at the tile's lower edge
    assert inside.max() < 20


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize("exif", [b"garbage", b"", b"II*\0\xff\xff\xff\xff", b"II*\0\x08\0\0\0\x05\0\x12\x01\x03\0"])
def test_damaged_exif_turns_and_costs_nothing(tmp_path: Path, stored: np.ndarray, suffix: str, exif: bytes) -> None:
    square = np.ascontiguousarray(stored[:256, 100:356])
    path = tmp_path / f"a{suffix}"
    Image.fromarray(square).save(path, exif=b"Exif\0\0" + exif, quality=95)
    for fit in ("tiles", "crop"):
        (outcome,) = import_images(path, tmp_path / fit, mpp=0.5, size=256, fit=fit)
        assert outcome.ok, outcome.message
        (made,) = (tmp_path / fit).glob("*.h5")
        with SlideFile(made) as file:
            assert away(file.tile(0), square) < 3


def test_a_tiff_under_another_name_is_turned_once(tmp_path: Path, stored: np.ndarray) -> None:
    square = np.ascontiguousarray(stored[:256, 100:356])
    write(tmp_path / "a.tif", [square], [6]).rename(tmp_path / "a.png")
    for fit in ("tiles", "crop"):
        (outcome,) = import_images(tmp_path / "a.png", tmp_path / fit, mpp=0.5, size=256, fit=fit)
        assert outcome.ok, outcome.message
        (made,) = (tmp_path / fit).glob("*.h5")
        with SlideFile(made) as file:
            assert away(file.tile(0), np.rot90(square, -1)) < 2


def test_a_mask_is_read_upright(tmp_path: Path, stored: np.ndarray) -> None:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[:100, :200] = 255
    Image.fromarray(mask).save(tmp_path / "m.png", exif=as_exif(6))
    path = write(tmp_path / "a.tif", [stored], [6])
    with Slide.open(path) as slide:
        marked = read_mask(tmp_path / "m.png", slide.info, (60, 40))
    assert marked[:20, 30:].all()
    assert marked.sum() == 200


@pytest.mark.parametrize("orientation", range(1, 9))
def test_positions_boxes_and_pixels_are_turned_alike(orientation: int) -> None:
    turn, stored = TURNS[orientation], np.arange(6 * 4).reshape(4, 6)
    upright = turn.array(stored)
    np.testing.assert_array_equal(upright, UPRIGHT[orientation](stored))
    assert turn.size(6, 4) == upright.shape[::-1]
    for y, x in np.ndindex(*stored.shape):
        ((a, b),) = turn.xy(np.array([[x + 0.5, y + 0.5]]), (6, 4)).tolist()
        assert upright[int(b), int(a)] == stored[y, x]
        left, top, *sides = turn.stored_box(int(a), int(b), 1, 1, (6, 4))
        assert (left, top, sides) == (x, y, [1, 1])


def test_pillow_agrees(stored: np.ndarray) -> None:
    from PIL import ImageOps

    for orientation, upright in UPRIGHT.items():
        data = io.BytesIO()
        Image.fromarray(stored).save(data, "PNG", exif=as_exif(orientation))
        with Image.open(data) as image:
            np.testing.assert_array_equal(np.asarray(ImageOps.exif_transpose(image)), upright(stored))
