"""Opening slides, their mpp, their pixels, their tissue."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from annotations.errors import UserError
from tiling.tissue.mask import rasterise, tissue_mask, tissue_outlines
from tiling.wsi.mpp import mpp_of, settle_mpp
from tiling.wsi.patches import read_tiles
from tiling.wsi.resample import area_resize
from tiling.wsi.slide import Slide


def area_reference(
    rgb: np.ndarray, x: float, y: float, w: float, h: float, out_w: int, out_h: int, fine: int = 8
) -> np.ndarray:
    """Area average by brute force: every output pixel is the mean of fine x fine points in it, in pixels of rgb."""
    xs = np.minimum((x + (np.arange(out_w * fine) + 0.5) * w / (out_w * fine)).astype(int), rgb.shape[1] - 1)
    ys = np.minimum((y + (np.arange(out_h * fine) + 0.5) * h / (out_h * fine)).astype(int), rgb.shape[0] - 1)
    return rgb[np.ix_(ys, xs)].reshape(out_h, fine, out_w, fine, 3).mean(axis=(1, 3))


def test_info_tells_what_the_headers_say(slide_path: Path) -> None:
    with Slide.open(slide_path) as slide:
        info = slide.info
    assert (info.slide_id, info.reader, info.vendor) == ("painted", "direct", "aperio")
    assert (info.width_l0, info.height_l0, info.level_downsamples) == (1024, 768, (1.0, 2.0, 4.0))
    assert (info.mpp, info.mpp_source, info.bounds_xy) == (0.5, "openslide.mpp-x", (0, 0))


@pytest.mark.parametrize(
    "region",
    [
        (100, 80, 256, 256, 256, 256),
        (101, 83, 300, 300, 224, 224),
        (64, 32, 512, 512, 128, 128),
        (33, 17, 700.5, 700.5, 224, 224),
    ],
)
def test_regions_are_area_averages_of_the_picture(slide_path: Path, picture: np.ndarray, region: tuple) -> None:
    with Slide.open(slide_path) as slide:
        pixels = slide.read_region(*region)
    assert pixels.shape == (region[5], region[4], 3)
    assert np.abs(pixels - area_reference(picture, *region)).mean() <= 2


def test_beyond_the_slide_is_background(slide_path: Path) -> None:
    with Slide.open(slide_path) as slide:
        corner = slide.read_region(-50, -50, 100, 100, 100, 100)
        outside = slide.read_region(5000, 5000, 100, 100, 50, 50)
    assert (corner[:50, :50] == 255).all()
    assert abs(int(corner[60:, 60:].mean()) - 245) <= 2
    assert (outside == 255).all()


def test_tiles_read_in_strips_equal_tiles_read_alone(slide_path: Path) -> None:
    coords = np.array([(x, y) for y in (0, 151, 302) for x in (0, 150, 301, 700)], np.int64)
    with Slide.open(slide_path) as slide:
        together = list(read_tiles(slide, coords, 150.6, 100))
        alone = [slide.read_region(int(x), int(y), 150.6, 150.6, 100, 100) for x, y in coords]
    assert len(together) == len(coords)
    for first, second in zip(together, alone, strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("seed", range(5))
def test_area_resize_against_brute_force(seed: int) -> None:
    random = np.random.default_rng(seed)
    rgb = random.integers(0, 255, (60, 70, 3), dtype=np.uint8)
    x0, y0 = random.uniform(0, 10, 2)
    box = (x0, y0, x0 + random.uniform(30, 59), y0 + random.uniform(30, 49))
    pixels = area_resize(rgb, box, 17, 13)
    expected = area_reference(rgb, x0, y0, box[2] - x0, box[3] - y0, 17, 13, fine=64)
    assert np.abs(pixels - expected).mean() < 1


def test_plain_images_are_slides_of_one_level(tmp_path: Path, picture: np.ndarray) -> None:
    see_through = np.dstack([picture, np.full(picture.shape[:2], 255, np.uint8)])
    see_through[:10] = 0
    Image.fromarray(see_through).save(tmp_path / "a.png", dpi=(50800, 50800))
    Image.fromarray(picture).save(tmp_path / "b.jpg", dpi=(72, 72))
    with Slide.open(tmp_path / "a.png") as slide:
        assert slide.info.reader == "image"
        assert slide.info.mpp == pytest.approx(0.5, rel=1e-3)
        region = slide.read_region(0, 0, 100, 100, 100, 100)
        assert (region[:10] == 255).all()
        np.testing.assert_array_equal(region[10:], picture[10:100, :100])
    with Slide.open(tmp_path / "b.jpg", assume_mpp=0.25) as slide:
        assert (slide.info.mpp, slide.info.mpp_source) == (0.25, "--assume-mpp")


def test_tiffslide_reads_what_openslide_does_not(tmp_path: Path, picture: np.ndarray) -> None:
    import tifffile

    path = tmp_path / "scan.ome.tif"
    tifffile.imwrite(path, picture, ome=True, metadata={"PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "µm"}, photometric="rgb")
    with Slide.open(path) as slide:
        assert slide.info.slide_id == "scan"
        assert slide.info.reader == "tiffslide"
        np.testing.assert_array_equal(slide.read_region(300, 200, 64, 64, 64, 64), picture[200:264, 300:364])


def test_what_nobody_reads_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken.svs").write_bytes(b"IJrE" * 100)
    for name, says in (("broken.svs", "not a readable slide"), ("gone.svs", "no such slide")):
        with pytest.raises(UserError, match=says) as error:
            Slide.open(tmp_path / name)
        assert name in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("properties", "tags_only", "value", "source"),
    [
        ({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.25"}, False, 0.25, "openslide.mpp-x"),
        ({"aperio.MPP": "0,4990"}, False, 0.499, "aperio.MPP"),
        ({"tiff.XResolution": "40000", "tiff.ResolutionUnit": "centimeter"}, True, 0.25, "TIFF XResolution"),
        ({"tiff.XResolution": "40000", "tiff.ResolutionUnit": "none"}, True, None, ""),
        ({"tiff.XResolution": 72.0, "tiff.YResolution": 72.0, "tiff.ResolutionUnit": "INCH"}, True, None, ""),
        ({"openslide.mpp-x": "352.8", "openslide.mpp-y": "352.8"}, True, None, ""),
        ({"openslide.mpp-x": "28.97", "openslide.mpp-y": "28.97"}, False, 28.97, "openslide.mpp-x"),
        ({"tiff.ImageDescription": 'a PhysicalSizeX="250" PhysicalSizeXUnit="nm"'}, True, 0.25, "OME PhysicalSizeX"),
        ({"dicom.X.PixelSpacing[0]": "0.0005", "dicom.X.PixelSpacing[1]": "0.0005"}, False, 0.5, "DICOM PixelSpacing"),
        ({"openslide.mpp-x": "nan"}, False, None, ""),
        ({}, False, None, ""),
        ({"openslide.mpp-x": "0.5", "openslide.mpp-y": "0.505"}, False, 0.5025, "openslide.mpp-x"),
        ({"openslide.mpp-x": "0.5", "openslide.mpp-y": "0.25", "aperio.MPP": "0.5"}, False, None, ""),
        ({"tiff.XResolution": 20000, "tiff.YResolution": 40000, "tiff.ResolutionUnit": "centimeter"}, True, None, ""),
        ({"tiff.ImageDescription": 'a PhysicalSizeX="0.5" PhysicalSizeY="0.25"'}, True, None, ""),
        ({"tiff.ImageDescription": 'a PhysicalSizeX="0.5" PhysicalSizeY="0.501"'}, True, 0.5, "OME PhysicalSizeX"),
        ({"dicom.X.PixelSpacing[0]": "0.0005", "dicom.X.PixelSpacing[1]": "0.00025"}, False, None, ""),
    ],
)
def test_where_mpp_is_found(properties: dict, tags_only: bool, value: float | None, source: str) -> None:
    stated = mpp_of(properties, tags_only=tags_only)
    assert stated.value == (None if value is None else pytest.approx(value))
    assert stated.source == source


def test_mpp_of_the_manifest_goes_first_and_the_assumed_one_last() -> None:
    stated, silent = mpp_of({"aperio.MPP": "0.5"}), mpp_of({})
    assert settle_mpp("a.svs", stated, manifest_mpp=0.4, assume_mpp=0.3).value == 0.4
    assert settle_mpp("a.svs", stated, assume_mpp=0.3).value == 0.5
    assert settle_mpp("a.svs", silent, assume_mpp=0.3).source == "--assume-mpp"
    with pytest.raises(UserError, match=r"a\.svs: no mpp.*aperio\.MPP.*manifest column mpp.*--assume-mpp.*resolution tags"):
        settle_mpp("a.svs", silent)


def test_pixels_that_are_not_square_are_told_and_an_mpp_is_asked_for() -> None:
    stated = mpp_of({"openslide.mpp-x": "0.5", "openslide.mpp-y": "0.25"})
    with pytest.raises(UserError, match=r"a\.svs: no mpp.*pixels are not square, one side is 2 times the other.*--assume-mpp"):
        settle_mpp("a.svs", stated)
    assert settle_mpp("a.svs", stated, assume_mpp=0.5).value == 0.5


def test_an_overview_of_which_nothing_can_be_decoded_is_no_black_picture(
    slide_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def torn(*where: object) -> np.ndarray:
        raise ValueError("torn")

    with Slide.open(slide_path) as slide:
        monkeypatch.setattr(slide.reader, "read", torn)
        with pytest.raises(UserError, match=r"painted\.svs: cannot decode pixels at level .*: torn"):
            slide.thumbnail(64)


def test_tissue_is_the_painted_disc(picture: np.ndarray) -> None:
    mask = tissue_mask(picture[::2, ::2])
    y, x = np.mgrid[: picture.shape[0] : 2, : picture.shape[1] : 2]
    disc = ((x - 512) / (0.4 * 1024)) ** 2 + ((y - 384) / (0.4 * 768)) ** 2 < 1
    assert (mask & disc).sum() / (mask | disc).sum() > 0.97


def test_glass_and_darkness_hold_no_tissue_and_bright_spots_do() -> None:
    random = np.random.default_rng(0)
    glass = random.normal(232, 4, (300, 400, 3)).clip(0, 255).astype(np.uint8)
    assert not tissue_mask(glass).any()
    dark = random.normal(4, 2, (300, 400, 3)).clip(0, 255).astype(np.uint8)
    assert not tissue_mask(dark).any()
    dark[100:200, 100:200, 2] = 180
    mask = tissue_mask(dark)
    assert mask[110:190, 110:190].all()
    assert mask.sum() < 1.15 * 100 * 100


def test_outlines_and_masks_turn_into_each_other() -> None:
    random = np.random.default_rng(3)
    mask = np.kron(random.random((12, 15)) < 0.5, np.ones((5, 5), bool))
    outlines = tissue_outlines(mask, 7.5)
    assert sum(outline.area for outline in outlines) == pytest.approx(mask.sum() * 7.5**2)
    np.testing.assert_array_equal(rasterise(np.array(outlines, dtype=object), mask.shape, 7.5), mask)
    assert tissue_outlines(np.zeros((3, 3), bool), 2.0) == []


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("TCGA-CR-7395-01A-01-TS1.svs", 0.5, 0.75), ("test3-DAPI.ndpi", 0.2, 0.5), ("CMU-1-Small-Region.svs", 0.3, 0.5)],
)
def test_tissue_of_real_slides(test_data: Path, name: str, low: float, high: float) -> None:
    with Slide.open(test_data / "slides" / name) as slide:
        thumb = slide.thumbnail(512)
        mask = tissue_mask(thumb)
    assert low < mask.mean() < high
    if name.endswith("ndpi"):
        assert thumb[mask].mean() > 2 * thumb[~mask].mean()


def test_a_level_of_2_0005_serves_a_downsample_of_2(test_data: Path) -> None:
    with Slide.open(test_data / "slides" / "TCGA-CR-7395-01A-01-TS1.svs") as slide:
        assert slide.best_level(2.0) == 1
        assert slide.best_level(1.9) == 0


@pytest.mark.parametrize("target_mpp", [0.5, 0.7, 1.0, 1.37, 2.0, 4.0])
@pytest.mark.parametrize(
    ("name", "mpp"), [("CMU-1-Small-Region.svs", 0.499), ("TCGA-CR-7395-01A-01-TS1.svs", 0.2431), ("test3-DAPI.ndpi", 0.228)]
)
def test_fast_tiles_of_real_slides_stay_within_2_grey_levels_of_exact_ones(
    test_data: Path, name: str, mpp: float, target_mpp: float
) -> None:
    path, size = test_data / "slides" / name, 96 * target_mpp / mpp
    with Slide.open(path) as fast, Slide.open(path, resample="exact") as exact:
        free = np.array([fast.info.width_l0, fast.info.height_l0]) - size
        corners = (np.random.default_rng(1).uniform(0, 1, (8, 2)) * free).astype(np.int64)
        corners = corners[np.lexsort((corners[:, 0], corners[:, 1]))]
        pairs = zip(read_tiles(fast, corners, size, 96), read_tiles(exact, corners, size, 96), strict=True)
        assert max(np.abs(one.astype(int) - other).mean() for one, other in pairs) <= 2


@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "TCGA-CR-7395-01A-01-TS1.svs"])
def test_real_pixels_are_area_averages_of_level_0(test_data: Path, name: str) -> None:
    with Slide.open(test_data / "slides" / name) as slide:
        level0 = slide.read_region(600, 1200, 900, 900, 900, 900)
        for size, out in ((448.9, 224), (300.0, 224), (800.0, 200)):
            pixels = slide.read_region(640, 1231, size, size, out, out)
            away = {
                shift: np.abs(pixels - area_reference(level0, 40 + shift[0], 31 + shift[1], size, size, out, out)).mean()
                for shift in ((0, 0), (2, 0), (-2, 0), (0, 2), (0, -2))
            }
            assert min(away, key=lambda shift: away[shift]) == (0, 0)
            assert away[0, 0] <= 2


def test_every_slide_maker_shares_one_pyramid(make_slide: Callable[..., Path], tmp_path: Path, picture: np.ndarray) -> None:
    with Slide.open(make_slide(tmp_path / "flat.svs", picture, mpp=None, levels=1)) as slide:
        assert slide.info.mpp is None
        assert slide.info.level_downsamples == (1.0,)
