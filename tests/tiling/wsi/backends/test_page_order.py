"""A TIFF's pages in any order: the largest is level 0, by its own resolution, and what is left out is told."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from annotations.errors import UserError
from tiling.cohort.scan import scan
from tiling.images.fit import probe_image
from tiling.images.run import default_size_px, import_images
from tiling.slide_file.read import SlideFile
from tiling.tiles.run import tile
from tiling.wsi.slide import Slide

STORED: dict[str, dict[str, Any]] = {
    "tiles jpeg": {"tile": (128, 128), "compression": "jpeg", "compressionargs": {"level": 95}},
    "tiles lzw": {"tile": (128, 128), "compression": "lzw"},
    "strips": {"rowsperstrip": 64},
}
READERS = ("direct", "openslide", "tiffslide", "image")


def halved(pixels: np.ndarray) -> np.ndarray:
    height, width = (side // 2 for side in pixels.shape[:2])
    return pixels.reshape(height, 2, width, 2, 3).mean((1, 3)).round().astype(np.uint8)


@pytest.fixture(scope="module")
def levels(picture: np.ndarray) -> list[np.ndarray]:
    """1024 x 768, 512 x 384 and 256 x 192 of one picture."""
    return [picture, halved(picture), halved(halved(picture))]


@pytest.fixture(scope="module")
def macro() -> np.ndarray:
    """What no level is: another picture of other proportions."""
    return np.random.default_rng(0).integers(0, 255, (300, 128, 3), np.uint8)


def write(path: Path, pages: Sequence[np.ndarray], flags: Sequence[int], storages: Sequence[str], **options: Any) -> Path:
    """Pages of 0.5 mpp where they are 1024 wide and in proportion else. flags: their subfile types; storages: of STORED."""
    with tifffile.TiffWriter(path, bigtiff=options.pop("bigtiff", False)) as file:
        for pixels, flag, storage in zip(pages, flags, storages, strict=True):
            file.write(
                pixels,
                photometric="rgb",
                metadata=None,
                subfiletype=flag,
                resolutionunit="CENTIMETER",
                resolution=(20000 * pixels.shape[1] / 1024,) * 2,
                **STORED[storage],
                **options,
            )
    return path


def check_is_the_largest(path: Path, picture: np.ndarray, reader: str = "auto", most_away: float = 1.5) -> str:
    """The note of a slide that must show the picture, 1024 x 768 at 0.5 mpp."""
    with Slide.open(path, reader=reader) as slide:
        info = slide.info
        assert (info.width_l0, info.height_l0) == (1024, 768)
        assert info.mpp == pytest.approx(0.5)
        assert np.abs(slide.read_region(0, 0, 1024, 768, 1024, 768).astype(int) - picture).mean() < most_away
        quarter = picture.reshape(192, 4, 256, 4, 3).mean((1, 3))
        assert np.abs(slide.read_region(0, 0, 1024, 768, 256, 192) - quarter).mean() < 1.5
        assert np.abs(slide.thumbnail(256) - quarter).mean() < 1.5
    return info.note


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("flagged", ["no page", "smaller pages", "all but the first"])
def test_pages_in_any_order_however_they_are_marked(
    tmp_path: Path, levels: list[np.ndarray], order: tuple[int, ...], kind: str, flagged: str
) -> None:
    flags = {
        "no page": [0, 0, 0],
        "smaller pages": [int(level > 0) for level in order],
        "all but the first": [0, 1, 1],
    }[flagged]
    path = write(tmp_path / "a.tif", [levels[i] for i in order], flags, [kind] * 3)
    note = check_is_the_largest(path, levels[0])
    with Slide.open(path) as slide:
        sizes = [(1024 >> level, 768 >> level) for level in order]
        left = [size for size in sizes if size not in slide.info.level_dimensions]
    assert not left or order[0] == 0  # of files whose largest page comes first, libraries tell what their levels are
    if flagged != "no page":  # a page that says it is a coarser copy is no loss
        left = []
    for width, height in left:
        assert f"{width} x {height}" in note
    assert note.startswith(f"leaves out {len(left)} of its 3 pages" if left else "")
    assert bool(note) == bool(left)


@pytest.mark.parametrize("kind", STORED)
def test_no_reader_shows_another_page(tmp_path: Path, levels: list[np.ndarray], kind: str) -> None:
    path = write(tmp_path / "a.tif", [levels[2], levels[0], levels[1]], [1, 0, 1], [kind] * 3)
    refused = {}
    for reader in READERS:
        try:
            check_is_the_largest(path, levels[0], reader)
        except UserError as error:
            refused[reader] = str(error)
    assert "openslide" in refused
    assert "tiffslide" not in refused
    assert "image" not in refused
    assert not any("\n" in line for line in refused.values())


def test_all_pages_of_one_picture_are_levels(tmp_path: Path, levels: list[np.ndarray]) -> None:
    for kind in STORED:
        path = write(tmp_path / "a.tif", [levels[2], levels[0], levels[1]], [1, 0, 1], [kind] * 3)
        with Slide.open(path) as slide:
            assert slide.info.level_dimensions == ((1024, 768), (512, 384), (256, 192))
            for level, pixels in enumerate(levels):
                read = slide.reader.read(level, 0, 0, *pixels.shape[1::-1])
                assert np.abs(read.astype(int) - pixels).mean() < 1


@pytest.mark.parametrize("thumbnail", ["strips", "tiles lzw", "tiles jpeg"])
@pytest.mark.parametrize("kind", ["strips", "tiles lzw", "tiles jpeg"])
def test_a_first_page_that_is_a_thumbnail_or_a_label(
    tmp_path: Path, levels: list[np.ndarray], macro: np.ndarray, thumbnail: str, kind: str
) -> None:
    path = write(tmp_path / "a.tif", [levels[2], levels[0]], [0, 0], [thumbnail, kind])
    assert check_is_the_largest(path, levels[0]) == ""
    path = write(tmp_path / "b.tif", [macro, levels[0], levels[1]], [0, 0, 1], [thumbnail, kind, kind])
    assert check_is_the_largest(path, levels[0]) == "leaves out 1 of its 3 pages (128 x 300 pixels)"


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("at", range(4))
def test_what_is_left_out_is_told_wherever_it_lies(
    tmp_path: Path, levels: list[np.ndarray], macro: np.ndarray, kind: str, at: int
) -> None:
    pages, flags = list(levels), [0, 1, 1]
    pages.insert(at, macro)
    flags.insert(at, 0)
    path = write(tmp_path / "a.tif", pages, flags, [kind] * 4)
    note = "leaves out 1 of its 4 pages (128 x 300 pixels)"
    assert check_is_the_largest(path, levels[0]) == note
    (outcome,) = scan([path], tmp_path / "m.csv", workers=1)
    assert outcome.info["row"]["problem"] == note
    assert not outcome.info["will_fail"]
    (outcome,) = tile([path], tmp_path / "out", 0.5, 128, tissue="none", workers=1)
    assert note in outcome.message
    with SlideFile(tmp_path / "out" / "a.h5") as file:
        assert len(file) == 48


def test_a_second_picture_of_the_same_size_is_told(tmp_path: Path, levels: list[np.ndarray]) -> None:
    path = write(tmp_path / "a.tif", [levels[2], levels[0], 255 - levels[0]], [0, 0, 0], ["tiles lzw"] * 3)
    assert check_is_the_largest(path, levels[0]) == "leaves out 1 of its 3 pages (1024 x 768 pixels)"
    path = write(tmp_path / "b.tif", [levels[0], 255 - levels[0]], [0, 0], ["tiles lzw", "strips"])
    assert check_is_the_largest(path, levels[0]) == "leaves out 1 of its 2 pages (1024 x 768 pixels)"
    path = write(tmp_path / "c.tif", [levels[0], 255 - levels[0]], [0, 0], ["tiles lzw"] * 2)
    assert check_is_the_largest(path, levels[0]) == "shows the first of its 2 channels or planes only"


def test_a_largest_page_without_a_resolution_has_none(tmp_path: Path, levels: list[np.ndarray]) -> None:
    for kind in STORED:
        with tifffile.TiffWriter(tmp_path / f"{kind}.tif") as file:
            file.write(levels[2], photometric="rgb", metadata=None, resolution=(5000, 5000), resolutionunit=3, **STORED[kind])
            file.write(levels[0], photometric="rgb", metadata=None, resolutionunit=1, **STORED[kind])
        for reader in ("auto", "image"):
            with Slide.open(tmp_path / f"{kind}.tif", reader=reader) as slide:
                assert (slide.info.width_l0, slide.info.mpp) == (1024, None), (kind, reader)


def test_a_larger_picture_beneath_a_page_is_level_0(tmp_path: Path, levels: list[np.ndarray]) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for pixels, mpp, below in ((levels[2], 2.0, 1), (levels[0], 0.5, None)):
            resolution = (1e4 / mpp,) * 2
            file.write(
                pixels,
                photometric="rgb",
                metadata=None,
                resolution=resolution,
                resolutionunit=3,
                subifds=below,
                **STORED["tiles lzw"],
            )
    check_is_the_largest(tmp_path / "a.tif", levels[0])
    with pytest.raises(UserError, match=r"a\.tif: not a readable slide \(image: its largest page lies beneath another"):
        Slide.open(tmp_path / "a.tif", reader="image")


def test_an_ome_tiff_whose_first_picture_is_a_label(tmp_path: Path, levels: list[np.ndarray], macro: np.ndarray) -> None:
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as file:
        for pixels, mpp in ((macro, 7.0), (levels[0], 0.5)):
            scale = {f"PhysicalSize{axis}": mpp for axis in "XY"} | {f"PhysicalSize{axis}Unit": "µm" for axis in "XY"}
            file.write(pixels, photometric="rgb", metadata=scale, **STORED["tiles lzw"])
    note = check_is_the_largest(tmp_path / "a.ome.tif", levels[0])
    assert note == "leaves out 1 of its 2 pages (128 x 300 pixels)"


def test_an_ome_pyramid_beneath_its_page_has_nothing_left_out(tmp_path: Path, levels: list[np.ndarray]) -> None:
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as file:
        scale = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
        for number, pixels in enumerate(levels):
            file.write(
                pixels,
                photometric="rgb",
                subfiletype=int(number > 0),
                subifds=None if number else 2,
                metadata=None if number else scale,
                **STORED["tiles jpeg"],
            )
    assert check_is_the_largest(tmp_path / "a.ome.tif", levels[0]) == ""


def test_a_scanners_own_file_is_as_before(
    tmp_path: Path, make_slide: Callable[..., Path], levels: list[np.ndarray], macro: np.ndarray
) -> None:
    """Aperio: level 0, thumbnail, levels, label, macro."""
    text = "Aperio Image Library v11\n1024x768 (128x128) JPEG/RGB Q=95|AppMag = 20|MPP = 0.5"
    with tifffile.TiffWriter(tmp_path / "a.svs") as file:
        for pixels, storage, flag in (
            (levels[0], "tiles jpeg", 0),
            (levels[2], "strips", 0),
            (levels[1], "tiles jpeg", 0),
            (macro, "strips", 1),
            (macro[:, :120].copy(), "strips", 9),
        ):
            file.write(pixels, photometric="rgb", metadata=None, description=text, subfiletype=flag, **STORED[storage])
    for reader in ("auto", "openslide", "tiffslide"):
        assert check_is_the_largest(tmp_path / "a.svs", levels[0], reader) == ""
        with Slide.open(tmp_path / "a.svs", reader=reader) as slide:
            assert slide.info.level_dimensions == ((1024, 768), (512, 384))


def test_import_takes_the_largest_page_and_tells_what_it_leaves_out(
    tmp_path: Path, levels: list[np.ndarray], macro: np.ndarray
) -> None:
    square = np.ascontiguousarray(levels[0][:512, 200:712])
    thumbnail = halved(halved(square))
    (tmp_path / "images").mkdir()
    path = write(tmp_path / "images" / "a.tif", [thumbnail, square, macro], [0, 0, 0], ["strips"] * 3)
    assert default_size_px([path]) == 512
    size, mpp = probe_image(path)
    assert (size, mpp.value) == ((512, 512), pytest.approx(1.0))
    for fit in ("tiles", "crop"):
        (outcome,) = import_images(path.parent, tmp_path / fit, size=512, fit=fit)
        assert outcome.ok, outcome.message
        assert "leaves out 1 of its 3 pages (128 x 300 pixels)" in outcome.message
        (made,) = (tmp_path / fit).glob("*.h5")
        with SlideFile(made) as file:
            assert file.mpp == pytest.approx(1.0)
            assert np.abs(file.tile(0).astype(int) - square).mean() < 2


@pytest.mark.parametrize("kind", ["tiles lzw", "strips"])
def test_a_mask_before_the_picture_is_no_picture(tmp_path: Path, levels: list[np.ndarray], kind: str) -> None:
    where = {key: value for key, value in STORED[kind].items() if key != "compression"}
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(levels[0][..., 0] < 200, photometric="mask", metadata=None, subfiletype=4, **where)
        file.write(levels[0], photometric="rgb", metadata=None, **STORED[kind])
    with Slide.open(tmp_path / "a.tif") as slide:
        np.testing.assert_array_equal(slide.read_region(0, 0, 1024, 768, 1024, 768), levels[0])
        assert slide.info.note == "leaves out 1 of its 2 pages (1024 x 768 pixels)"


def test_further_frames_of_other_images_are_not_taken(tmp_path: Path, levels: list[np.ndarray]) -> None:
    small, large = (Image.fromarray(pixels) for pixels in (levels[1], levels[0]))
    small.save(tmp_path / "a.png", save_all=True, append_images=[small])
    with Slide.open(tmp_path / "a.png") as slide:
        assert slide.info.width_l0 == 512
    large.save(tmp_path / "b.jpg", quality=95)
    with Slide.open(tmp_path / "b.jpg") as slide:
        assert slide.info.width_l0 == 1024
