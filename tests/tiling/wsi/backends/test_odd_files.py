"""Files that libraries open and show wrongly or in part: they are shown right, or refused, and what is left out is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from annotations.errors import UserError
from tiling.cohort.scan import scan
from tiling.slide_file.read import SlideFile
from tiling.tiles.run import tile
from tiling.wsi.slide import Slide


def rgba(picture: np.ndarray) -> np.ndarray:
    """The picture with its upper 100 rows black and transparent."""
    pixels = np.dstack([picture, np.full(picture.shape[:2], 255, np.uint8)])
    pixels[:100] = 0
    return pixels


def as_stored(mode: str) -> Callable[[Path, np.ndarray], None]:
    return lambda path, picture: Image.fromarray(picture).convert(mode).save(path)


ODD_COLOURS: dict[str, Callable[[Path, np.ndarray], Any]] = {
    "PALETTE": lambda path, picture: Image.fromarray(picture).quantize(256).save(path),
    "SEPARATED": as_stored("CMYK"),
    "CIELAB": as_stored("LAB"),
    "MINISWHITE": lambda path, picture: tifffile.imwrite(path, 255 - picture[..., 1], photometric="miniswhite"),
    "YCBCR": lambda path, picture: tifffile.imwrite(
        path, np.asarray(Image.fromarray(picture).convert("YCbCr")), photometric="ycbcr"
    ),
    "RGB in 4": lambda path, picture: tifffile.imwrite(path, rgba(picture), photometric="rgb", extrasamples=["unassalpha"]),
}


@pytest.mark.parametrize("colours", ODD_COLOURS)
def test_strips_of_odd_colours_are_shown_as_the_picture(tmp_path: Path, picture: np.ndarray, colours: str) -> None:
    ODD_COLOURS[colours](tmp_path / "a.tif", picture)
    expected = picture.astype(int)
    if colours == "MINISWHITE":
        expected = np.repeat(expected[..., 1:2], 3, axis=2)
    elif colours == "RGB in 4":
        expected[:100] = 255
    with Slide.open(tmp_path / "a.tif") as slide:
        assert slide.info.reader == "image"
        pixels = slide.read_region(0, 0, 1024, 768, 1024, 768)
    assert np.abs(pixels - expected).mean() < 4
    with pytest.raises(UserError, match=rf"a\.tif: not a readable slide \(tiffslide: its colours are {colours}.*not convert"):
        Slide.open(tmp_path / "a.tif", reader="tiffslide")


def test_jpeg_2000_of_luminance_and_colour_differences_is_not_shown_as_rgb(tmp_path: Path, picture: np.ndarray) -> None:
    import imagecodecs

    tile = imagecodecs.jpeg2k_encode(np.ascontiguousarray(picture[:256, :256]), level=40, codecformat="j2k", mct=False)
    options = {"shape": (256, 256, 3), "dtype": np.uint8, "tile": (256, 256), "compression": 33003, "photometric": "rgb"}
    tifffile.imwrite(tmp_path / "a.tif", iter([tile]), **options)
    with pytest.raises(UserError, match=r"tiffslide: its colours are RGB in 3 samples \(APERIO_JP2000_YCBC\)"):
        Slide.open(tmp_path / "a.tif", reader="tiffslide")


@pytest.mark.parametrize("kind", [np.float32, np.int16, np.int32, np.uint32])
def test_pixels_of_other_depths_are_refused_at_once(tmp_path: Path, picture: np.ndarray, kind: Any) -> None:
    tifffile.imwrite(tmp_path / "a.tif", picture[..., 1].astype(kind), photometric="minisblack")
    for reader in ("auto", "tiffslide", "image"):
        with pytest.raises(UserError, match=r"a\.tif: not a readable slide .*its pixels are .*convert it to 8 bits") as error:
            Slide.open(tmp_path / "a.tif", reader=reader)
        assert "\n" not in str(error.value)
    (outcome,) = scan([tmp_path / "a.tif"], tmp_path / "m.csv", workers=1)
    assert not outcome.ok


def test_pixels_of_1_bit_and_of_16_in_either_byte_order_are_read(tmp_path: Path, picture: np.ndarray) -> None:
    Image.fromarray(picture[..., 1] > 200).save(tmp_path / "bit.tif")
    with Slide.open(tmp_path / "bit.tif") as slide:
        pixels = slide.read_region(0, 0, 1024, 768, 1024, 768)
    np.testing.assert_array_equal(pixels[..., 0], (picture[..., 1] > 200) * 255)
    tifffile.imwrite(tmp_path / "big.tif", picture[..., 1].astype(np.uint16) * 257, photometric="minisblack", byteorder=">")
    for reader in ("tiffslide", "image"):
        with Slide.open(tmp_path / "big.tif", reader=reader) as slide:
            pixels = slide.read_region(0, 0, 1024, 768, 1024, 768)
        np.testing.assert_array_equal(pixels[..., 0], picture[..., 1])


@pytest.mark.parametrize("options", [{}, {"tile": (256, 256)}], ids=["strips", "tiles"])
def test_12_bits_in_16_are_not_tiled_in_silence(tmp_path: Path, picture: np.ndarray, options: dict) -> None:
    deep = (picture[..., 1].astype(np.uint16) * 16 + 15).clip(0, 4095)
    tifffile.imwrite(tmp_path / "a.tif", deep, photometric="minisblack", **options)
    (outcome,) = tile([tmp_path / "a.tif"], tmp_path / "out", 0.5, 128, assume_mpp=0.5, workers=1)
    assert not outcome.ok
    assert "a.tif: its overview is black, nothing in it brighter than 16 of 255" in outcome.message
    (outcome,) = tile([tmp_path / "a.tif"], tmp_path / "out", 0.5, 128, assume_mpp=0.5, tissue="none", workers=1)
    assert outcome.ok
    assert "warning: its overview is black" in outcome.message


@pytest.mark.parametrize(
    ("axes", "count", "reader"),
    [("CYX", 2, "tiffslide"), ("CYX", 3, "tiffslide"), ("CYX", 5, "tiffslide"), ("ZYXS", 4, "image")],
)
def test_channels_and_planes_that_are_not_shown_are_told_by_every_reader(
    tmp_path: Path, picture: np.ndarray, axes: str, count: int, reader: str
) -> None:
    if axes == "CYX":
        pixels = np.stack([picture[..., i % 3] for i in range(count)])
    else:
        pixels = np.stack([picture] + [255 - picture] * (count - 1))
    photometric = "minisblack" if axes == "CYX" else "rgb"
    tifffile.imwrite(tmp_path / "a.ome.tif", pixels, photometric=photometric, metadata={"axes": axes})
    with Slide.open(tmp_path / "a.ome.tif") as slide:
        pixels, info = slide.read_region(0, 0, 1024, 768, 1024, 768), slide.info
    together = axes == "CYX" and count == 3  # shown as red, green and blue
    assert info.reader == reader
    assert info.note == ("" if together else f"shows the first of its {count} channels or planes only")
    first = picture if together or axes == "ZYXS" else np.repeat(picture[..., :1], 3, axis=2)
    np.testing.assert_array_equal(pixels, first)


def noise(side: int, mean: float, spread: float) -> np.ndarray:
    grey = np.random.default_rng(0).normal(mean, spread, (side, side, 1))
    return np.repeat(grey.clip(0, 255).astype(np.uint8), 3, axis=2)


def write_every_other_pixel(path: Path, level: np.ndarray) -> None:
    """A slide whose second level is every other pixel of the first, which no average of noise is."""
    with tifffile.TiffWriter(path) as file:
        for number in range(2):
            text = f"Aperio Image Library v11\n{len(level)}x{len(level)} (256x256) JPEG/RGB Q=95|MPP = 0.25"
            file.write(
                level,
                tile=(256, 256),
                compression="jpeg",
                compressionargs={"level": 95},
                photometric="rgb",
                metadata=None,
                subfiletype=number,
                description=text,
            )
            level = level[::2, ::2]


def test_a_level_is_judged_inside_the_tissue_not_at_its_edge(tmp_path: Path) -> None:
    level = noise(2048, 120, 15)
    y, x = np.mgrid[:2048, :2048]
    level[np.hypot(x - 1024, y - 1024) > 800] = 245
    write_every_other_pixel(tmp_path / "a.svs", level)
    with Slide.open(tmp_path / "a.svs") as slide:
        assert slide.faithful_level(2.0) == 0
        assert slide.skipped_levels == {1}


def test_tiles_of_a_level_that_is_no_average_are_copied_only_when_it_is_asked_for(tmp_path: Path) -> None:
    write_every_other_pixel(tmp_path / "a.svs", noise(1024, 150, 40))
    options: dict[str, Any] = {"tissue": "none", "pixels": "copy", "workers": 1}
    for resample, mpp, copied in (
        ("fast", 0.5, False),
        ("exact", 0.5, False),
        ("pyramid", 0.5, True),
        ("exact", 0.25, True),
    ):
        out = tmp_path / f"{resample}_{mpp}"
        (outcome,) = tile([tmp_path / "a.svs"], out, mpp, 256, resample=resample, **options)
        assert outcome.ok, outcome.message
        assert ("recoded at quality 90" in outcome.message) != copied
        with SlideFile(out / "a.h5") as file:
            spread = file.tile(0).std()
        assert (spread > 30) == copied  # an average of four pixels varies half as much


def test_stored_tiles_are_copied_at_an_mpp_that_is_no_round_number(tmp_path: Path, picture: np.ndarray) -> None:
    tifffile.imwrite(
        tmp_path / "a.svs",
        picture,
        tile=(240, 240),
        compression="jpeg",
        photometric="rgb",
        metadata=None,
        description="Aperio Image Library v11\n1024x768 (240x240) JPEG/RGB Q=95|MPP = 0.4415",
    )
    (outcome,) = tile([tmp_path / "a.svs"], tmp_path, 0.4415, 240, tissue="none", pixels="copy", workers=1)
    assert (outcome.ok, outcome.message) == (True, "")
    with SlideFile(tmp_path / "a.h5") as file:
        assert file.size_l0 == 240
    with Slide.open(tmp_path / "a.svs") as slide:
        assert slide.choose_view(file.size_l0 / 120, np.array([[240.0, 0, 480, 240]])).scale == 2
