"""Where the tissue is, on slides that are pale, grey, dark, padded or full; and what is said where it is lost."""

from __future__ import annotations

import json
import re
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from annotations.errors import UserError
from tiling.jobs.outcome import Outcome
from tiling.slide_file.read import SlideFile
from tiling.tiles.run import tile
from tiling.tissue.drawn_regions import outlines_geojson, read_mask, read_outlines
from tiling.tissue.mask import check_brightness, is_dark, tissue_mask, tissue_outlines
from tiling.tissue.overview import read_overview
from tiling.wsi.level_view import SlideInfo
from tiling.wsi.slide import Slide


def slide(glass: float, fall: tuple, noise: float = 2.0, share: float = 0.3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """An overview of glass with two pieces of tissue that fall by `fall` grey levels (r, g, b) below it, and the pieces."""
    rng = np.random.default_rng(seed)
    height, width = 500, 700
    y, x = np.mgrid[:height, :width]
    radius = np.sqrt(share * height * width / 2 / np.pi)
    truth = (np.hypot(x - 190, y - 240) < radius) | (np.hypot(x - 520, y - 260) < radius)
    texture = 1 + 0.25 * np.sin(x / 5) * np.cos(y / 7)
    picture = glass - truth[..., None] * np.array(fall) * texture[..., None]
    return (picture + rng.normal(0, noise, picture.shape)).clip(0, 255).astype(np.uint8), truth


def agreement(mask: np.ndarray, truth: np.ndarray) -> float:
    return float((mask & truth).sum() / (mask | truth).sum())


PINK, PURPLE, BROWN = np.array([0.25, 1.0, 0.5]), np.array([0.7, 1.0, 0.35]), np.array([0.5, 0.8, 1.0])


@pytest.mark.parametrize("glass", [250, 235, 190, 160])
@pytest.mark.parametrize("stain", [PINK, PURPLE, BROWN], ids=["pink", "purple", "brown"])
@pytest.mark.parametrize("depth", [18, 45, 120])
def test_pale_and_deep_stains_on_any_glass(glass: float, stain: np.ndarray, depth: float) -> None:
    picture, truth = slide(glass, tuple(stain * depth))
    assert agreement(tissue_mask(picture), truth) > 0.9


@pytest.mark.parametrize("share", [0.02, 0.6])
def test_little_and_much_tissue(share: float) -> None:
    picture, truth = slide(240, tuple(PINK * 60), share=share)
    assert agreement(tissue_mask(picture), truth) > 0.85


def test_dark_tissue_does_not_hide_pale_tissue() -> None:
    picture, truth = slide(240, tuple(PINK * 20))
    dark = truth.copy()
    dark[:, 350:] = False
    picture[dark] = (90, 50, 110)
    assert agreement(tissue_mask(picture), truth) > 0.9


def test_a_slide_full_of_tissue_is_all_tissue() -> None:
    rng = np.random.default_rng(0)
    picture = (np.array([200, 120, 170]) + rng.normal(0, 25, (300, 400, 1)) + rng.normal(0, 5, (300, 400, 3))).clip(0, 255)
    assert tissue_mask(picture.astype(np.uint8)).mean() > 0.99


@pytest.mark.parametrize("glass", [255, 245, 180])
def test_glass_with_dust_and_a_grey_shadow_is_no_tissue(glass: int) -> None:
    picture, _ = slide(glass, (0, 0, 0))
    picture[100:103, 100:103] = 60
    picture[200:400] = (picture[200:400].astype(int) - 14).clip(0, 255)
    assert tissue_mask(picture).mean() < 0.005


def test_black_padding_and_white_beside_the_scan_are_neither_tissue_nor_glass() -> None:
    for colour in (0, 255):
        picture, truth = slide(225, tuple(PINK * 40))
        wide = np.full((500, 2000, 3), colour, np.uint8)
        wide[:, 600:1300] = picture
        where = np.zeros((500, 2000), bool)
        where[:, 600:1300] = truth
        assert not is_dark(wide)
        assert agreement(tissue_mask(wide), where) > 0.9


@pytest.mark.parametrize("light", [25, 80, 250])
def test_light_on_a_dark_ground_is_tissue(light: int) -> None:
    rng = np.random.default_rng(0)
    picture = rng.normal(3, 1.5, (500, 700, 3)).clip(0, 255)
    y, x = np.mgrid[:500, :700]
    truth = np.hypot(x - 300, y - 250) < 150
    picture[..., 2] += light * truth * (0.6 + 0.4 * np.sin(x / 3) * np.sin(y / 3))
    picture = picture.clip(0, 255).astype(np.uint8)
    assert is_dark(picture)
    assert agreement(tissue_mask(picture, 4.0), truth) > 0.85


def test_a_picture_of_few_grey_levels_is_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(UserError, match=r"brighter than 16 of 255.*16-bit.*8 bits a channel.*--tissue none"):
        check_brightness(rng.integers(0, 4096 >> 8, (50, 60, 3), dtype=np.uint8))
    check_brightness(slide(3, (-60, 0, 0))[0])


# --- in `tile`


def geojson(path: Path, *rings: list) -> None:
    features = [
        {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": {"objectType": "annotation"}}
        for ring in rings
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))


def box(x0: float, y0: float, x1: float, y1: float) -> list:
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]


def tiled(slide: Path, out: Path, **options: Any) -> Outcome:
    (outcome,) = tile([slide], out, **({"mpp": 1.0, "size": 64, "workers": 1} | options))
    assert outcome.ok, outcome.message
    return outcome


def test_outlines_are_what_qupath_reads_and_give_the_same_tiles_back(slide_path: Path, tmp_path: Path) -> None:
    tiled(slide_path, tmp_path / "a", tissue_out=tmp_path / "outlines")
    collection = json.loads((tmp_path / "outlines" / "painted.geojson").read_text())
    assert collection["type"] == "FeatureCollection"
    (feature,) = collection["features"]
    assert feature["properties"]["objectType"] == "annotation"
    assert feature["properties"]["classification"]["name"] == "Tissue"
    assert feature["geometry"]["type"] == "Polygon"
    ring = np.array(feature["geometry"]["coordinates"][0])
    assert (ring[0] == ring[-1]).all()
    # The disc that was painted: 0.4 of the slide's width and height around its middle.
    np.testing.assert_allclose([*ring.min(axis=0), *ring.max(axis=0)], [102, 77, 922, 691], atol=8)
    assert tiled(slide_path, tmp_path / "b", tissue=tmp_path / "outlines").info["tiles"] > 20
    with SlideFile(tmp_path / "a" / "painted.h5") as one, SlideFile(tmp_path / "b" / "painted.h5") as other:
        np.testing.assert_array_equal(one.coords, other.coords)
        np.testing.assert_array_equal(one.tissue_mask(), other.tissue_mask())


def test_outlines_of_a_slide_that_is_done_are_written_when_they_are_missing(slide_path: Path, tmp_path: Path) -> None:
    tiled(slide_path, tmp_path / "a")
    again = tiled(slide_path, tmp_path / "a", tissue_out=tmp_path / "outlines")
    assert again.skipped
    assert (tmp_path / "outlines" / "painted.geojson").exists()
    (tmp_path / "outlines" / "painted.geojson").write_text("mine now")
    assert tiled(slide_path, tmp_path / "a", tissue_out=tmp_path / "outlines").skipped
    assert (tmp_path / "outlines" / "painted.geojson").read_text() == "mine now"


def test_outlines_count_from_the_corner_of_the_scanned_area(tmp_path: Path) -> None:
    mask = np.zeros((10, 20), bool)
    mask[2:5, 4:8] = True
    (tmp_path / "a.geojson").write_bytes(outlines_geojson(mask, 32.5, (100, 40)))
    info = SlideInfo(tmp_path / "a.svs", "a", 650, 325, (1.0,), ((650, 325),), 0.5, "", "", "", bounds_xy=(100, 40))
    (feature,) = json.loads((tmp_path / "a.geojson").read_text())["features"]
    assert np.min(feature["geometry"]["coordinates"][0], axis=0).tolist() == [4 * 32.5 - 100, 2 * 32.5 - 40]
    np.testing.assert_array_equal(read_outlines(tmp_path / "a.geojson", info, mask.shape, 32.5), mask)


@pytest.mark.parametrize("kind", ["geojson", "mask"])
def test_what_is_excluded_gets_no_tile(slide_path: Path, tmp_path: Path, kind: str) -> None:
    everything = tiled(slide_path, tmp_path / "a").info["tiles"]
    if kind == "geojson":
        geojson(tmp_path / "qc" / "painted.geojson", box(0, 0, 512, 768))
    else:
        (tmp_path / "qc").mkdir()
        half = np.zeros((48, 64), np.uint8)
        half[:, :32] = 3
        Image.fromarray(half).save(tmp_path / "qc" / "painted.png")
    outcome = tiled(slide_path, tmp_path / "b", exclude=tmp_path / "qc", pixels="none")
    assert 0 < outcome.info["tiles"] < 0.6 * everything
    with SlideFile(tmp_path / "b" / "painted.h5") as file:
        assert file.coords[:, 0].min() >= 512 - 13
    assert tiled(slide_path, tmp_path / "b", exclude=tmp_path / "qc", pixels="none").skipped
    for old in (tmp_path / "qc").iterdir():
        old.unlink()
    geojson(tmp_path / "qc" / "painted.geojson", box(0, 0, 100, 100))
    assert not tiled(slide_path, tmp_path / "b", exclude=tmp_path / "qc", pixels="none").skipped
    geojson(tmp_path / "other" / "else.geojson", box(0, 0, 100, 100))
    assert "nothing of it in --exclude" in tiled(slide_path, tmp_path / "c", exclude=tmp_path / "other").message


def test_masks_that_cannot_belong_to_the_slide_are_told(slide_path: Path, tmp_path: Path) -> None:
    (tmp_path / "qc").mkdir()
    for content, says in (
        (np.ones((50, 50), np.uint8), "50 x 50 pixels are not in proportion to the slide's 1024 x 768"),
        (None, "not a readable mask"),
    ):
        if content is None:
            (tmp_path / "qc" / "painted.png").write_bytes(b"no picture")
        else:
            Image.fromarray(content).save(tmp_path / "qc" / "painted.png")
        (outcome,) = tile([slide_path], tmp_path / "out", 1.0, 64, exclude=tmp_path / "qc", workers=1)
        assert not outcome.ok
        assert says in outcome.message
    for options, says in (({"exclude": "gone"}, "--exclude gone"), ({"pen": "red"}, "--pen red")):
        with pytest.raises(UserError, match=says):
            tile([slide_path], tmp_path / "out", 1.0, 64, **options)


def test_nothing_drawn_excludes_nothing_and_is_no_tissue(slide_path: Path, tmp_path: Path) -> None:
    everything = tiled(slide_path, tmp_path / "a").info["tiles"]
    geojson(tmp_path / "qc" / "painted.geojson")
    assert tiled(slide_path, tmp_path / "b", exclude=tmp_path / "qc").info["tiles"] == everything
    line = {"type": "Feature", "geometry": {"type": "LineString", "coordinates": [[0, 0], [9, 9]]}, "properties": {}}
    for option, features in (("tissue", []), ("exclude", [line])):
        (tmp_path / "qc" / "painted.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
        (outcome,) = tile([slide_path], tmp_path / option, 1.0, 64, workers=1, **{option: tmp_path / "qc"})
        assert not outcome.ok
        assert "painted.geojson: holds no polygon" in outcome.message


def test_a_large_mask_is_read_and_a_larger_one_is_one_line(
    slide_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # it is set where images are read: put back
    Image.new("1", (12_000, 9_000)).save(tmp_path / "m.png")
    with Slide.open(slide_path) as opened:
        info = opened.info
    Image.MAX_IMAGE_PIXELS = 89_478_485
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not read_mask(tmp_path / "m.png", info, (48, 64)).any()
    monkeypatch.setattr("tiling.tissue.drawn_regions.MAX_IMAGE_PIXELS", 40_000_000)
    with pytest.raises(UserError, match=r"m\.png: a mask of more than 80,000,000 pixels: save it smaller"):
        read_mask(tmp_path / "m.png", info, (48, 64))


def test_most_tissue_lost_is_a_warning_that_says_to_what(slide_path: Path, tmp_path: Path) -> None:
    assert "warning" not in tiled(slide_path, tmp_path / "a").message
    geojson(tmp_path / "qc" / "painted.geojson", box(0, 0, 820, 768))
    message = tiled(slide_path, tmp_path / "b", exclude=tmp_path / "qc").message
    share = int(re.search(r"(\d+)% is under --exclude", message).group(1))  # type: ignore[union-attr]
    assert share == pytest.approx(93, abs=3)
    assert "no tiles" in tiled(slide_path, tmp_path / "c", size=300, mpp=1.0, min_tissue=1.0).message
    assert "below --min-tissue or at the border" in tiled(slide_path, tmp_path / "d", size=200, min_tissue=0.95).message


def test_pen_and_blur_are_stored_beside_the_tissue(
    make_slide: Callable[..., Path], picture: np.ndarray, tmp_path: Path
) -> None:
    marked = Image.fromarray(picture)
    ImageDraw.Draw(marked).rectangle((0, 300, 1023, 400), fill=(20, 120, 60))
    blurred = np.asarray(marked).copy()
    blurred[:, 512:] = np.asarray(marked.filter(ImageFilter.GaussianBlur(6)))[:, 512:]
    noise = np.random.default_rng(0).normal(0, 30, picture.shape[:2])[..., None]
    rough = blurred.astype(float)
    rough[:, :512] += noise[:, :512]
    rough[:, 512:] += (
        np.asarray(Image.fromarray((noise[..., 0] + 128).clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(4)))[
            :, 512:, None
        ]
        * 2.0
        - 256
    )
    slide = make_slide(tmp_path / "s.svs", rough.clip(0, 255).astype(np.uint8), mpp=4.0)
    kept = tiled(slide, tmp_path / "keep", mpp=4.0, pen="keep").info["tiles"]
    assert tiled(slide, tmp_path / "drop", mpp=4.0).info["tiles"] < kept
    tiled(slide, tmp_path / "bare", mpp=4.0, pen="keep", pixels="none")
    with SlideFile(tmp_path / "keep" / "s.h5") as file, SlideFile(tmp_path / "bare" / "s.h5") as bare:
        pen, blur = file.pen_share, file.blur
        assert pen is not None
        assert blur is not None
        assert pen.dtype == blur.dtype == np.float32
        top, left = file.coords[:, 1], file.coords[:, 0]
        inside = np.clip(np.minimum(top + 64, 401) - np.maximum(top, 300), 0, None) / 64
        np.testing.assert_allclose(pen, inside, atol=0.1)
        clear = pen == 0
        assert np.nanmin(blur[clear & (left >= 512)]) > np.nanmax(blur[clear & (left + 64 <= 512)])
        np.testing.assert_array_equal(bare.pen_share, pen)
        assert bare.blur is None


def test_a_stain_in_the_colours_of_ink_is_a_warning(
    make_slide: Callable[..., Path], picture: np.ndarray, tmp_path: Path
) -> None:
    green = picture[..., [0, 2, 1]].copy()
    tissue = picture[..., 1] < 200
    green[tissue] = (60, 150, 90)
    slide = make_slide(tmp_path / "s.svs", green, mpp=4.0)
    outcome = tiled(slide, tmp_path / "a", mpp=4.0)
    assert "has the colours of pen ink and was left out: --pen keep takes it in" in outcome.message
    assert tiled(slide, tmp_path / "b", mpp=4.0, pen="keep").info["tiles"] > 20


def test_ink_that_was_not_left_out_is_no_warning(make_slide: Callable[..., Path], picture: np.ndarray, tmp_path: Path) -> None:
    """Of a slide stained in the colours of ink nothing is left out for it but where tissue is sought with --pen drop."""
    green = picture[..., [0, 2, 1]].copy()
    green[picture[..., 1] < 200] = (60, 150, 90)
    slide = make_slide(tmp_path / "s.svs", green, mpp=4.0)
    height, width = green.shape[:2]
    ring = [[0, 0], [width, 0], [width, height], [0, height], [0, 0]]
    glass = [[x * 0.05, y * 0.05] for x, y in ring]
    for name, outline in (("all", ring), ("corner", glass)):
        (tmp_path / name).mkdir()
        shape = {"type": "Polygon", "coordinates": [outline]}
        feature = {"type": "Feature", "properties": {}, "geometry": shape}
        (tmp_path / name / "s.geojson").write_text(json.dumps(feature))
    anywhere = {"pixels": "none", "mpp": 4.0, "min_tissue": 0.5}
    ways = {
        "keep": {"pen": "keep"},
        "drawn": {"tissue": str(tmp_path / "corner")},
        "drawn, keep": {"tissue": str(tmp_path / "corner"), "pen": "keep"},
        "none": {"tissue": "none"},
        "none, excluded": {"tissue": "none", "exclude": str(tmp_path / "all")},
        "all excluded": {"exclude": str(tmp_path / "all")},
    }
    for name, way in ways.items():
        assert "ink" not in tiled(slide, tmp_path / "out" / name, **(anywhere | way)).message, name
    assert (
        "of the slide is in tiles: 100% is under --exclude"
        in tiled(slide, tmp_path / "out" / "x", **(anywhere | ways["none, excluded"])).message
    )
    dropped = tiled(slide, tmp_path / "out" / "d", **anywhere, exclude=str(tmp_path / "corner"))
    assert "pen ink and was left out" in dropped.message


def test_too_few_grey_levels_are_one_line(make_slide: Callable[..., Path], picture: np.ndarray, tmp_path: Path) -> None:
    slide = make_slide(tmp_path / "s.svs", picture // 26)
    (outcome,) = tile([slide], tmp_path / "a", 1.0, 64, workers=1)
    assert not outcome.ok
    assert "s.svs: its overview is black, nothing in it brighter than 16 of 255: if it holds 16-bit pixels" in outcome.message
    untouched = tiled(slide, tmp_path / "a", tissue="none")
    assert untouched.info["tiles"] == 8 * 6
    assert "warning: its overview is black" in untouched.message


def test_a_slide_of_one_level_needs_no_more_memory_than_a_band(make_slide: Callable[..., Path], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    small = rng.integers(120, 250, (64, 64, 3), dtype=np.uint8)
    slide = make_slide(tmp_path / "s.svs", np.tile(small, (128, 64, 1)), levels=1)
    with Slide.open(slide) as opened:
        tracemalloc.start()
        thumb = opened.thumbnail(1024)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert thumb.shape == (1024, 512, 3)
    assert peak < 80e6 < 8192 * 4096 * 3


@pytest.mark.parametrize(("name", "pieces"), [("CMU-1-Small-Region.svs", 1), ("test3-DAPI.ndpi", 3), ("camelyon_jp2k.dcm", 2)])
def test_real_slides_have_no_ink_in_their_tissue(test_data: Path, name: str, pieces: int) -> None:
    with Slide.open(test_data / "slides" / name) as slide:
        overview = read_overview(slide, slide.info.mpp or 0.5, None, None, find=True, keep_pen=False)
    assert overview.tissue is not None
    assert overview.pen.mean() < 1e-3
    large = [piece for piece in tissue_outlines(overview.tissue, 1.0) if piece.area > 0.02 * overview.tissue.size]
    assert 1 <= len(large) <= pieces + 2
    assert 0.3 < overview.tissue.mean() < 0.7
