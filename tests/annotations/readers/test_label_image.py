"""Masks as programs save them: which pixels are an object, in how many pieces a value lies, and those pieces as objects."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import shapely
from PIL import Image

from annotations import read_annotations
from annotations.errors import UserError
from annotations.readers.slide_context import SlideContext

imagecodecs = pytest.importorskip("imagecodecs")
tifffile = pytest.importorskip("tifffile")

SIDE = 96
SLIDE = SlideContext("slide", (SIDE, SIDE), 0.5)


def squares(value: int = 1) -> np.ndarray:
    """uint8 (96, 96): 25 squares of 8 pixels, the first two of which touch at a corner."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    for i in range(25):
        y, x = (16 * step + 4 for step in divmod(i, 5))
        mask[y : y + 8, x : x + 8] = value
    mask[4:12, 20:28] = 0
    mask[12:20, 12:20] = value
    mask[20:28, 4:12] = 0
    mask[20:28, 36:44] = value
    return mask


BINARY = squares()
PIECES = 24


def grey_png(mask: np.ndarray, depth: int) -> bytes:
    """A grey PNG of 1, 2 or 4 bits a pixel, as no common library writes it."""
    bits = np.unpackbits(mask[..., None], axis=2)[..., 8 - depth :].reshape(len(mask), -1)
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in bits)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", mask.shape[1], mask.shape[0], depth, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def palette(mask: np.ndarray, colours: list[int], form: str = "PNG", **options: object) -> bytes:
    picture = Image.fromarray(mask, "P")
    picture.putpalette(colours)
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def tiff(array: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def colour(*channels: np.ndarray) -> np.ndarray:
    return np.stack(channels, axis=2)


WHITE = np.full_like(BINARY, 255)
SAVED: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "0 and 1": (".png", lambda: imagecodecs.png_encode(BINARY), "1"),
    "0 and 255": (".png", lambda: imagecodecs.png_encode(BINARY * 255), "255"),
    "0 and 255, TIFF": (".tif", lambda: tiff(BINARY * 255), "255"),
    "0 and 65535": (".png", lambda: imagecodecs.png_encode(BINARY.astype(np.uint16) * 65535), "65535"),
    "signed": (".tif", lambda: tiff(BINARY.astype(np.int32) * 9), "9"),
    "1 bit": (".png", lambda: grey_png(BINARY, 1), "1"),
    "4 bits": (".png", lambda: grey_png(BINARY * 3, 4), "3"),
    "bool": (".tif", lambda: tiff(BINARY.astype(bool)), "1"),
    "bool, white is 0": (".tif", lambda: tiff(BINARY > 0, photometric="miniswhite"), "1"),
    "bytes, white is 0": (".tif", lambda: tiff(BINARY * 255, photometric="miniswhite"), "255"),
    "palette, black and white": (".png", lambda: palette(BINARY, [0, 0, 0, 255, 255, 255]), "1"),
    "palette, white and black": (".png", lambda: palette(1 - BINARY, [255, 255, 255, 0, 0, 0]), "255"),
    "palette, VOC": (".png", lambda: palette(BINARY * 2, [0, 0, 0, 128, 0, 0, 0, 128, 0]), "2"),
    "palette, white ground": (".png", lambda: palette(BINARY, [255, 255, 255, 128, 0, 0]), "1"),
    "palette, transparent ground": (".png", lambda: palette(BINARY, [0, 0, 0, 128, 0, 0], transparency=0), "1"),
    "palette, TIFF": (".tif", lambda: palette(BINARY * 2, [0, 0, 0, 128, 0, 0, 0, 128, 0], "TIFF"), "2"),
    "colour": (".png", lambda: imagecodecs.png_encode(colour(*[BINARY * 255] * 3)), "255"),
    "colour, opaque": (".png", lambda: imagecodecs.png_encode(colour(*[BINARY * 255] * 3, WHITE)), "255"),
    "grey, opaque": (".png", lambda: imagecodecs.png_encode(colour(BINARY * 7, WHITE)), "7"),
    "colour, TIFF": (".tif", lambda: tiff(colour(*[BINARY * 255] * 3), photometric="rgb"), "255"),
    "colour, in planes": (
        ".tif",
        lambda: tiff(np.stack([BINARY * 255] * 3), photometric="rgb", planarconfig="separate"),
        "255",
    ),
}


@pytest.mark.parametrize("form", SAVED)
def test_a_binary_mask_is_the_same_however_it_was_saved(form: str, tmp_path: Path) -> None:
    suffix, data, value = SAVED[form]
    path = tmp_path / f"slide{suffix}"
    path.write_bytes(data())
    whole = read_annotations(path, slide=SLIDE)
    assert (whole.id.tolist(), len(shapely.get_parts(whole.geometry))) == ([value], PIECES)
    assert (
        whole.log.notes[-1] == f"value {value} lies in {PIECES} pieces and is one object: --split-values makes each piece one"
    )
    split = read_annotations(path, slide=SLIDE, split_values=True)
    assert split.id.tolist() == [f"{value}/{i}" for i in range(PIECES)]
    assert split.log.notes[-1] == f"value {value} lies in {PIECES} pieces, each an object"
    assert shapely.union_all(split.geometry).symmetric_difference(whole.geometry[0]).area == 0
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    assert (shapely.contains_xy(whole.geometry[0], x, y) == (BINARY > 0)).all()


def test_pieces_are_those_that_share_a_side_and_keep_their_class(tmp_path: Path) -> None:
    from scipy import ndimage

    mask = np.random.default_rng(0).integers(0, 4, (60, 60)).astype(np.uint8)
    mask[:, 58:] = 0
    mask[10:20, 58:] = 9
    (tmp_path / "slide.png").write_bytes(imagecodecs.png_encode(mask))
    (tmp_path / "slide.classes.json").write_text(json.dumps({"1": "tumour", "2": "stroma"}))
    table = read_annotations(tmp_path / "slide.png", scale=1.0, split_values=True)
    wanted = {value: ndimage.label(mask == value)[1] for value in (1, 2, 3, 9)}
    of = [int(name.partition("/")[0]) for name in table.id.tolist()]
    assert {value: of.count(value) for value in wanted} == wanted
    assert table.id.tolist()[-1] == "9"
    assert (shapely.get_type_id(table.geometry) == 3).all()
    assert shapely.is_valid(table.geometry).all()
    assert len(set(table.id.tolist())) == len(table)
    named = {1: "tumour", 2: "stroma"}
    assert table.class_names() == [named.get(value) for value in of]
    most = sorted(wanted.items(), key=lambda pair: -pair[1])
    pieces = ", ".join(f"{value} in {count}" for value, count in most[:3])
    assert table.log.notes == (f"3 of 4 mask values lie in several pieces ({pieces}), each piece an object",)


def test_values_in_one_piece_each_are_no_note(tmp_path: Path) -> None:
    from scipy import ndimage

    (tmp_path / "slide.png").write_bytes(imagecodecs.png_encode(ndimage.label(BINARY)[0].astype(np.uint8)))
    for split in (False, True):
        table = read_annotations(tmp_path / "slide.png", scale=1.0, split_values=split)
        assert table.id.tolist() == [str(i) for i in range(1, PIECES + 1)]
        assert table.log.notes == ()


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (colour(BINARY * 255, BINARY * 0, BINARY * 0), "no label image"),
        (colour(*[WHITE] * 3, BINARY * 255), "transparent in parts"),
        (BINARY.astype(np.float32), "no label image"),
    ],
)
def test_what_may_mean_anything_is_refused_in_one_line(image: np.ndarray, says: str, tmp_path: Path) -> None:
    path = tmp_path / "slide.tif"
    path.write_bytes(tiff(image))
    with pytest.raises(UserError, match=says) as refused:
        read_annotations(path, slide=SLIDE)
    assert str(refused.value).startswith(f"{path}: ")
    assert "\n" not in str(refused.value)
