"""TIFF pages that a library shows wrongly without a word: they get a reader that shows them right, or are refused."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import simplejpeg
import tifffile

from annotations.errors import UserError
from tiling.wsi.slide import Slide

WIDTH, HEIGHT, SIDE = 300, 200, 128  # no multiple of a tile's width
JFIF = b"\xff\xe0\x00\x10JFIF\0\x01\x01\0\0\x01\0\x01\0\0"
ADOBE_RGB = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"


@pytest.fixture
def small(picture: np.ndarray) -> np.ndarray:
    """uint8 (HEIGHT, WIDTH, 3) out of the tissue and the glass beside it."""
    return np.ascontiguousarray(picture[300 : 300 + HEIGHT, 20 : 20 + WIDTH])


def deep(array: np.ndarray) -> np.ndarray:
    return array.astype(np.uint16) * 257


def write(path: Path, pixels: np.ndarray, photometric: str, extras: str = "", **options: Any) -> Path:
    """extras: kinds of the extra samples, "x" unspecified, "a" unassociated alpha, "p" associated (premultiplied) alpha."""
    kinds = [{"x": "unspecified", "a": "unassalpha", "p": "assocalpha"}[extra] for extra in extras]
    options = {"tile": (SIDE, SIDE), "compression": "deflate", "metadata": None, "extrasamples": kinds or None} | options
    tifffile.imwrite(path, pixels, photometric=photometric, **options)
    return path


def shown(path: Path, reader: str = "auto") -> tuple[np.ndarray, str, str]:
    """All pixels of level 0, by which reader, and its remark."""
    with Slide.open(path, reader=reader) as slide:
        size = slide.info.width_l0, slide.info.height_l0
        return slide.read_region(0, 0, *size, *size), slide.info.reader, slide.info.note


def first_of(count: int) -> str:
    return f"shows the first of its {count} channels or planes only"


GREYS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str, str, str, str]] = {
    "16 bits": (deep, "minisblack", "", "tiffslide", ""),
    "16 bits, 0 is white": (lambda grey: 65535 - deep(grey), "miniswhite", "", "image", ""),
    "16 bits, 3 pages": (lambda grey: deep(np.stack([grey, 255 - grey, grey // 2])), "minisblack", "", "image", first_of(3)),
    "8 bits, 2 channels": (lambda grey: np.dstack([grey, 255 - grey]), "minisblack", "x", "tiffslide", first_of(2)),
    "16 bits, 2 channels": (lambda grey: deep(np.dstack([grey, 255 - grey])), "minisblack", "x", "tiffslide", first_of(2)),
    "8 bits, 4 channels": (lambda grey: np.dstack([grey, *[grey // 2] * 3]), "minisblack", "xxx", "tiffslide", first_of(4)),
    "8 bits and alpha": (lambda grey: np.dstack([grey, np.full_like(grey, 255)]), "minisblack", "a", "image", ""),
    "8 bits and premultiplied alpha": (
        lambda grey: np.dstack([grey, np.full_like(grey, 255)]),
        "minisblack",
        "p",
        "image",
        "",
    ),
}


@pytest.mark.parametrize("kind", GREYS)
def test_tiles_of_grey_in_more_than_8_bits_are_not_left_to_openslide(tmp_path: Path, small: np.ndarray, kind: str) -> None:
    made, photometric, extras, reader, note = GREYS[kind]
    path = write(tmp_path / "a.tif", made(small[..., 1]), photometric, extras, planarconfig="contig" if extras else None)
    pixels, *reader_and_note = shown(path)
    assert reader_and_note == [reader, note]
    np.testing.assert_array_equal(pixels, np.repeat(small[..., 1:2], 3, axis=2))
    with pytest.raises(UserError, match=r"a\.tif: not a readable slide \(openslide: it would mix up the last column of tiles"):
        Slide.open(path, reader="openslide")


def test_16_bits_of_grey_are_mixed_up_in_a_coarser_level_too(tmp_path: Path, small: np.ndarray) -> None:
    grey = deep(small[:, :256, 1])
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for number, level in enumerate((np.tile(grey, (2, 3)), np.tile(grey, (2, 3))[::2, ::2], grey[:100, :192])):
            file.write(level, tile=(SIDE, SIDE), photometric="minisblack", metadata=None, subfiletype=number > 0)
    with Slide.open(tmp_path / "a.tif") as slide:
        assert slide.info.reader == "tiffslide"


def test_grey_that_openslide_reads_right_stays_with_it(tmp_path: Path, small: np.ndarray) -> None:
    grey = small[..., 1]
    apart = write(tmp_path / "apart.tif", np.stack([deep(grey), deep(grey // 2)]), "minisblack", "x", planarconfig="separate")
    whole = write(tmp_path / "whole.tif", deep(grey[:, :256]), "minisblack")
    plain = write(tmp_path / "plain.tif", grey, "minisblack")
    for path, note in ((apart, first_of(2)), (whole, ""), (plain, "")):
        pixels, *reader_and_note = shown(path)
        assert reader_and_note == ["openslide", note]
        np.testing.assert_array_equal(pixels, np.repeat(grey[:, : pixels.shape[1], None], 3, axis=2))


def test_grey_with_alpha_in_16_bits_is_refused_by_all(tmp_path: Path, small: np.ndarray) -> None:
    both = deep(np.dstack([small[..., 1], np.full((HEIGHT, WIDTH), 255)]))
    path = write(tmp_path / "a.tif", both, "minisblack", "a", planarconfig="contig")
    with pytest.raises(
        UserError, match=r"openslide: it would mix up.*of 32 bits; tiffslide: its colours are MINISBLACK in 2"
    ) as error:
        Slide.open(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("extras", ["x", "xx", "xxx"])
def test_channels_beside_rgb_are_not_taken_for_transparency(tmp_path: Path, small: np.ndarray, extras: str, bits: int) -> None:
    others = [np.zeros((HEIGHT, WIDTH), np.uint8)] * len(extras)
    pixels = np.dstack([small, *others])
    path = write(tmp_path / "a.tif", pixels if bits == 8 else deep(pixels), "rgb", extras)
    pixels, reader, note = shown(path)
    assert (reader, note) == ("tiffslide", f"shows the first 3 of its {3 + len(extras)} channels only")
    np.testing.assert_array_equal(pixels, small)
    with pytest.raises(UserError, match=rf"openslide: it would take one of {3 + len(extras)} channels for transparency"):
        Slide.open(path, reader="openslide")


def test_a_fourth_channel_of_which_the_file_says_nothing_is_not_taken_for_transparency(
    tmp_path: Path, small: np.ndarray
) -> None:
    path = write(tmp_path / "a.tif", np.dstack([small, np.zeros((HEIGHT, WIDTH), np.uint8)]), "rgb", "x")
    data = path.read_bytes()
    assert data.count(b"\x52\x01\x03\x00") == 1
    path.write_bytes(data.replace(b"\x52\x01\x03\x00", b"\xf0\xff\x03\x00"))  # the tag of extra samples, now of no meaning
    pixels, reader, note = shown(path)
    assert (reader, note) == ("tiffslide", "shows the first 3 of its 4 channels only")
    np.testing.assert_array_equal(pixels, small)


def test_channels_apart_are_not_taken_for_transparency(tmp_path: Path, small: np.ndarray) -> None:
    planes = np.dstack([small, np.zeros((HEIGHT, WIDTH), np.uint8)]).transpose(2, 0, 1)
    path = write(tmp_path / "rgb.tif", planes, "rgb", "x", planarconfig="separate")
    pixels, *reader_and_note = shown(path)
    assert reader_and_note == ["image", "shows the first 3 of its 4 channels only"]
    np.testing.assert_array_equal(pixels, small)
    path = write(tmp_path / "grey.tif", planes[[1, 0, 2, 3]], "minisblack", "xxx", planarconfig="separate")
    pixels, *reader_and_note = shown(path)
    assert reader_and_note == ["image", first_of(4)]
    np.testing.assert_array_equal(pixels[..., 0], small[..., 1])


def test_transparency_that_is_told_is_still_shown(tmp_path: Path, small: np.ndarray) -> None:
    alpha = np.full((HEIGHT, WIDTH), 255, np.uint8)
    alpha[:100] = 0
    pixels, *reader_and_note = shown(write(tmp_path / "a.tif", np.dstack([small, alpha]), "rgb", "a"))
    assert reader_and_note == ["openslide", ""]
    assert (pixels[:100] == 255).all()
    np.testing.assert_array_equal(pixels[100:], small[100:])


ENCODED: dict[str, Callable[[np.ndarray], bytes]] = {
    "deflate": imagecodecs.zlib_encode,
    "lzw": imagecodecs.lzw_encode,
    "webp": lambda tile: imagecodecs.webp_encode(tile, lossless=True),
    "jpeg": lambda tile: simplejpeg.encode_jpeg(tile, quality=98, colorsubsampling="444"),
}


def tiles_of(pixels: np.ndarray, encode: Callable[[np.ndarray], bytes]) -> list[bytes]:
    below, beside = -pixels.shape[0] % SIDE, -pixels.shape[1] % SIDE
    padded = np.pad(pixels, ((0, below), (0, beside), (0, 0)), mode="edge")
    return [
        encode(np.ascontiguousarray(padded[y : y + SIDE, x : x + SIDE]))
        for y in range(0, padded.shape[0], SIDE)
        for x in range(0, padded.shape[1], SIDE)
    ]


def write_tiles(path: Path, tiles: list[bytes], compression: str, photometric: str = "rgb", **options: Any) -> Path:
    options = {"shape": (HEIGHT, WIDTH, 3), "dtype": np.uint8, "metadata": None} | options
    tifffile.imwrite(path, iter(tiles), tile=(SIDE, SIDE), compression=compression, photometric=photometric, **options)
    return path


@pytest.mark.parametrize("compression", ENCODED)
def test_tiles_that_were_not_scanned_are_white_through_tiffslide(tmp_path: Path, small: np.ndarray, compression: str) -> None:
    tiles = tiles_of(small, ENCODED[compression])
    tiles[1] = tiles[5] = b""
    photometric, byteorder = ("ycbcr", "<") if compression == "jpeg" else ("rgb", ">")
    path = write_tiles(tmp_path / "a.tif", tiles, compression, photometric, byteorder=byteorder)
    reader = "tiffslide" if compression == "jpeg" else "auto"
    pixels, name, _ = shown(path, reader)
    assert name == "tiffslide"
    expected = small.copy()
    expected[:SIDE, SIDE : 2 * SIDE] = expected[SIDE:, 2 * SIDE :] = 255
    assert np.abs(pixels.astype(int) - expected).max() <= (12 if compression == "jpeg" else 0)
    with Slide.open(path, reader=reader) as slide:  # parts that begin and end inside of tiles
        for x, y, w, h in ((100, 90, 60, 70), (130, 10, 20, 30), (250, 120, 50, 80)):
            np.testing.assert_array_equal(slide.read_region(x, y, w, h, w, h), pixels[y : y + h, x : x + w])


def test_what_was_not_scanned_is_white_in_each_level_where_it_is(tmp_path: Path, picture: np.ndarray) -> None:
    """Level 1 is 2.005 times coarser: no place of it is a whole number of pixels of level 0."""
    coarse = np.ascontiguousarray(picture[200:400, 300:600])
    fine = np.ascontiguousarray(picture[200:601, 300:901])
    stored = [tiles_of(fine, imagecodecs.zlib_encode), tiles_of(coarse, imagecodecs.zlib_encode)]
    stored[0][3] = stored[1][4] = b""
    with tifffile.TiffWriter(tmp_path / "a.tif", byteorder=">") as file:
        for number, (level, tiles) in enumerate(zip((fine, coarse), stored, strict=True)):
            file.write(
                iter(tiles),
                shape=level.shape,
                dtype=np.uint8,
                tile=(SIDE, SIDE),
                compression="deflate",
                photometric="rgb",
                metadata=None,
                subfiletype=number,
                subifds=1 - number,
            )
    with Slide.open(tmp_path / "a.tif", reader="tiffslide") as slide:
        reader = slide.reader
        assert reader.level_dimensions == ((601, 401), (300, 200))
        for x in (*range(1, 128, 7), *range(256, 300)):
            np.testing.assert_array_equal(reader.read(1, x, 3, 1, 1), coarse[3:4, x : x + 1])
        levels = [reader.read(0, 0, 0, 601, 401), reader.read(1, 0, 0, 300, 200)]
    fine[:SIDE, 3 * SIDE : 4 * SIDE] = coarse[SIDE:, SIDE : 2 * SIDE] = 255
    np.testing.assert_array_equal(levels[0], fine)
    np.testing.assert_array_equal(levels[1], coarse)


def test_strips_that_were_not_stored_are_white(tmp_path: Path, small: np.ndarray) -> None:
    tifffile.imwrite(tmp_path / "a.tif", small, photometric="rgb", compression="deflate", rowsperstrip=50, metadata=None)
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+") as file:
        counts = file.pages[0].tags["StripByteCounts"]
        counts.overwrite([0 if i == 2 else value for i, value in enumerate(counts.value)])
    pixels, *_ = shown(tmp_path / "a.tif", "tiffslide")
    small[100:150] = 255
    np.testing.assert_array_equal(pixels, small)


def without_markers(stream: bytes) -> bytes:
    """A JPEG as simplejpeg writes it, without its JFIF marker."""
    assert stream[2:4] == b"\xff\xe0"
    return stream[:2] + stream[4 + int.from_bytes(stream[4:6], "big") :]


@pytest.mark.parametrize("stored", ["RGB", "YCBCR"])
def test_markers_that_contradict_the_colours_of_a_tiff_are_not_believed(tmp_path: Path, small: np.ndarray, stored: str) -> None:
    def encode(tile: np.ndarray) -> bytes:
        if stored == "RGB":
            data = imagecodecs.jpeg8_encode(tile, level=98, colorspace="rgb", outcolorspace="rgb", subsampling="444")
            at = data.index(b"\xff\xdb")
            return data[:2] + JFIF + data[at:]
        return b"\xff\xd8" + ADOBE_RGB + without_markers(ENCODED["jpeg"](tile))[2:]

    options = {"compressionargs": {"outcolorspace": "rgb"}} if stored == "RGB" else {"subsampling": (1, 1)}
    path = write_tiles(tmp_path / "a.tif", tiles_of(small, encode), "jpeg", stored.lower(), **options)
    with pytest.raises(UserError, match=rf"tiffslide: its colours are {stored}, which markers in its JPEG tiles contradict"):
        Slide.open(path, reader="tiffslide")
    for reader in ("direct", "openslide", "image"):
        assert np.abs(shown(path, reader)[0].astype(int) - small).mean() < 2


@pytest.mark.parametrize("has_marker", [True, False])
def test_markers_that_agree_with_a_tiff_or_are_not_there_are_read(tmp_path: Path, small: np.ndarray, has_marker: bool) -> None:
    streams = tiles_of(small, ENCODED["jpeg"])
    streams = streams if has_marker else [without_markers(stream) for stream in streams]
    path = write_tiles(tmp_path / "a.tif", streams, "jpeg", "ycbcr", subsampling=(1, 1))
    assert np.abs(shown(path, "tiffslide")[0].astype(int) - small).mean() < 2


def test_grey_of_4_bits_is_not_shown_dark(tmp_path: Path) -> None:
    """Two pixels a byte: written as bytes, then told to be half as wide."""
    values = np.arange(16, dtype=np.uint8).repeat(4)[None].repeat(64, axis=0)
    tifffile.imwrite(tmp_path / "a.tif", values[:, ::2] * 16 + values[:, 1::2], photometric="minisblack", metadata=None)
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+") as file:
        file.pages[0].tags["ImageWidth"].overwrite(64)
        file.pages[0].tags["BitsPerSample"].overwrite(4)
    pixels, reader, _ = shown(tmp_path / "a.tif")
    assert reader == "image"
    np.testing.assert_array_equal(pixels[..., 0], values * 17)
    with pytest.raises(UserError, match="tiffslide: its pixels are of 4 bits: 8 and 16 bits unsigned are read"):
        Slide.open(tmp_path / "a.tif", reader="tiffslide")


@pytest.mark.parametrize("reader", ["openslide", "tiffslide"])
def test_tiles_over_what_was_not_scanned_are_counted_whoever_reads(tmp_path: Path, reader: str) -> None:
    from tiling.tiles.run import tile

    rgb = np.full((512, 512, 3), (150, 60, 120), np.uint8)
    path = tmp_path / "a.tif"
    tiles = (b"" if at == 3 else zlib.compress(np.ascontiguousarray(rgb[:256, :256]).tobytes()) for at in range(4))
    tifffile.imwrite(
        path,
        tiles,
        shape=rgb.shape,
        dtype=np.uint8,
        tile=(256, 256),
        compression="adobe_deflate",
        photometric="rgb",
        metadata=None,
        resolution=(20000, 20000),
        resolutionunit="CENTIMETER",
    )
    (outcome,) = tile([path], tmp_path / "out", 0.5, 128, tissue="none", workers=1, reader=reader)
    assert outcome.info["tiles"] == 16
    assert "4 tiles reach into what was not scanned" in outcome.message


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "lzw"])
def test_channels_of_16_bits_stored_apart_are_right_or_refused(tmp_path: Path, byteorder: Any, compression: str | None) -> None:
    rgb = np.random.default_rng(0).integers(0, 65536, (60, 80, 3), np.uint16)
    tifffile.imwrite(
        tmp_path / "a.tif",
        np.moveaxis(rgb, -1, 0).copy(),
        planarconfig="separate",
        photometric="rgb",
        metadata=None,
        compression=compression,
        byteorder=byteorder,
        rowsperstrip=16,
    )
    if compression is None:
        with pytest.raises(UserError, match="channels of 16 bits stored apart and not compressed"):
            Slide.open(tmp_path / "a.tif", assume_mpp=0.5)
        return
    with Slide.open(tmp_path / "a.tif", assume_mpp=0.5) as slide:
        assert (slide.read_region(0, 0, 80, 60, 80, 60) == rgb >> 8).all()
