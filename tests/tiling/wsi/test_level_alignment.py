"""A level is used only where it shows what level 0 shows there, whatever its size says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiling.cohort.manifest import SlideItem
from tiling.cohort.scan import header_row
from tiling.tiles.run import tile
from tiling.wsi.level_alignment import Alignment, describe_placements
from tiling.wsi.level_view import SlideInfo
from tiling.wsi.slide import Slide

WIDTH, HEIGHT = 2100, 1600
TILE = 256


@lru_cache(maxsize=4)
def drawn(width: int = WIDTH, height: int = HEIGHT, seed: int = 3) -> np.ndarray:
    """uint8 (height, width, 3): glass with three pieces of tissue near the borders, with nuclei."""
    random = np.random.default_rng(seed)
    rgb = np.full((height, width, 3), 240, np.uint8)
    y, x = np.mgrid[:height, :width]
    for middle_x, middle_y, radius in ((0.19, 0.25, 0.16), (0.88, 0.84, 0.14), (0.81, 0.19, 0.09)):
        u, v, r = middle_x * width, middle_y * height, radius * height
        rgb[np.hypot(x - u, y - v) < r] = (190, 110, 170)
        for _ in range(150):
            angle, far = random.uniform(0, 2 * np.pi), r * random.uniform() ** 0.5
            left, top = int(u + far * np.cos(angle)), int(v + far * np.sin(angle))
            rgb[max(0, top - 5) : top + 6, max(0, left - 5) : left + 6] = (90, 40, 130)
    rgb.flags.writeable = False
    return rgb


def shrunk(rgb: np.ndarray, scale: int, up: bool = False) -> np.ndarray:
    """Means of scale x scale pixels; up: the last ones that are no whole block count too."""
    if up:
        rgb = np.pad(rgb, ((0, -rgb.shape[0] % scale), (0, -rgb.shape[1] % scale), (0, 0)), mode="edge")
    height, width = rgb.shape[0] // scale, rgb.shape[1] // scale
    blocks = rgb[: height * scale, : width * scale].reshape(height, scale, width, scale, 3)
    return blocks.mean((1, 3)).round().astype(np.uint8)


def padded(rgb: np.ndarray, more_x: int, more_y: int, colour: int = 255) -> np.ndarray:
    return np.pad(rgb, ((0, more_y), (0, more_x), (0, 0)), constant_values=colour)


def to_tiles(rgb: np.ndarray, side: int = TILE) -> np.ndarray:
    return padded(rgb, -rgb.shape[1] % side, -rgb.shape[0] % side)


class InMemory:
    """A reader of levels that are arrays. read_px: pixels read of each."""

    name, vendor, note = "memory", "", ""
    scales: tuple[int, ...] = (1,)
    threadsafe, tags_only = True, False

    def __init__(self, levels: Sequence[np.ndarray]) -> None:
        self.levels = levels
        self.properties: dict[str, Any] = {}
        self.level_dimensions = tuple((level.shape[1], level.shape[0]) for level in levels)
        width, height = self.level_dimensions[0]
        self.level_downsamples = tuple((width / w + height / h) / 2 for w, h in self.level_dimensions)
        self.read_px = [0] * len(levels)

    def read(self, level: int, x: int, y: int, w: int, h: int, scale: int = 1) -> np.ndarray:
        width, height = self.level_dimensions[level]
        assert min(x, y, width - x - w, height - y - h) >= 0
        self.read_px[level] += w * h
        return self.levels[level][y : y + h, x : x + w]

    def sparse_tiles(self, level: int) -> None:
        return None

    def expect_strips(self) -> None:
        pass

    def close(self) -> None:
        pass


def slide_of(*levels: np.ndarray, resample: str = "pyramid") -> Slide:
    reader = InMemory(levels)
    sizes = (*reader.level_dimensions[0], reader.level_downsamples, reader.level_dimensions)
    return Slide(SlideInfo(Path("memory"), "memory", *sizes, 0.5, "", "", "memory"), reader, resample)


def downsamples(slide: Slide) -> list[float | None]:
    return [slide.downsample(level) for level in range(1, len(slide.info.level_dimensions))]


def write(path: Path, levels: Sequence[np.ndarray], compression: str = "jpeg") -> Path:
    """A tiled pyramid of no scanner's, 0.5 um a pixel; of an OME file the coarser levels lie beneath the first."""
    import tifffile

    is_ome = path.suffixes[:1] == [".ome"]
    options: dict[str, Any] = {"compressionargs": {"level": 92}} if compression == "jpeg" else {}
    options |= {"tile": (TILE, TILE), "photometric": "rgb", "compression": compression}
    options |= {"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER"} | ({} if is_ome else {"metadata": None})
    with tifffile.TiffWriter(path, ome=is_ome) as file:
        for number, level in enumerate(levels):
            beneath = {"subifds": len(levels) - 1} if is_ome and not number else {}
            file.write(level, subfiletype=int(number > 0), **options, **beneath)
    return path


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return drawn()


@pytest.fixture(scope="module")
def padded_levels(picture: np.ndarray) -> list[np.ndarray]:
    """Exact halves, each padded to whole stored tiles, level 0 too."""
    return [to_tiles(picture), *(to_tiles(shrunk(picture, scale)) for scale in (2, 4, 8))]


def test_levels_padded_to_whole_tiles_give_the_tiles_of_level_0_alone(padded_levels: list[np.ndarray], tmp_path: Path) -> None:
    write(tmp_path / "padded.tif", padded_levels)
    write(tmp_path / "single.tif", padded_levels[:1])
    outcomes = tile([tmp_path / "padded.tif", tmp_path / "single.tif"], tmp_path / "t", 0.5, 64, min_tissue=0.3, workers=1)
    with h5py.File(tmp_path / "t/padded.h5") as one, h5py.File(tmp_path / "t/single.h5") as other:
        assert len(one["coords"]) > 50
        np.testing.assert_array_equal(one["coords"][...], other["coords"][...])
        np.testing.assert_allclose(one["tissue_fraction"][...], other["tissue_fraction"][...], atol=0.1)
    assert "size and content of level 1 disagree" in outcomes[0].message
    assert outcomes[1].message == ""


@pytest.mark.parametrize(("compression", "reader"), [("jpeg", "direct"), ("zlib", "openslide"), ("zlib", "tiffslide")])
def test_whoever_reads_padded_levels_all_resolutions_show_the_same_place(
    padded_levels: list[np.ndarray], tmp_path: Path, compression: str, reader: str
) -> None:
    suffix = ".ome.tif" if reader == "tiffslide" else ".tif"
    path = write(tmp_path / f"padded{suffix}", padded_levels, compression)
    with (
        Slide.open(path, reader=reader, resample="pyramid") as slide,
        Slide.open(path, reader=reader, resample="exact") as exact,
    ):
        assert slide.info.reader == reader
        for out in (32, 64, 128, 200):
            box = (1500, 1100, 512, 400)
            levels, level0 = slide.read_region(*box, out, out), exact.read_region(*box, out, out)
            assert np.abs(levels.astype(int) - level0).mean() < 4
        assert downsamples(slide) == [2, 4, 8]
        assert {slide.best_level(wanted) for wanted in (2.0, 4.0, 8.0)} == {1, 2, 3}
        overview = slide.thumbnail(256)
    with Slide.open(write(tmp_path / "single.tif", padded_levels[:1], compression)) as single:
        assert np.abs(overview.astype(int) - single.thumbnail(256)).mean() < 2


def test_stored_tiles_of_a_padded_level_are_copied_from_where_they_lie(padded_levels: list[np.ndarray], tmp_path: Path) -> None:
    from tiling.slide_file.read import SlideFile

    write(tmp_path / "padded.tif", padded_levels)
    options: dict[str, Any] = {"tissue": "none", "pixels": "copy", "resample": "pyramid", "workers": 1}
    (outcome,) = tile([tmp_path / "padded.tif"], tmp_path / "t", 1.0, TILE, **options)
    assert outcome.ok
    assert "recoded" not in outcome.message
    level = padded_levels[1]
    with SlideFile(tmp_path / "t/padded.h5") as file:
        for i, (x, y) in enumerate(file.coords.tolist()):
            expected = level[y // 2 : y // 2 + TILE, x // 2 : x // 2 + TILE].astype(int)
            assert np.abs(file.tile(i) - expected).mean() < 3


pads = st.tuples(st.integers(0, 400), st.integers(0, 400))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(level0=pads, levels=st.lists(pads, min_size=3, max_size=3), colour=st.sampled_from([255, 240, 0]))
def test_however_levels_are_padded_none_is_used_that_shows_another_place(
    picture: np.ndarray, level0: tuple[int, int], levels: list[tuple[int, int]], colour: int
) -> None:
    halves = [shrunk(picture, scale) for scale in (2, 4, 8)]
    slide = slide_of(
        padded(picture, *level0, colour), *(padded(half, *more, colour) for half, more in zip(halves, levels, strict=True))
    )
    for level, (own, half) in enumerate(zip(downsamples(slide), halves, strict=True), 1):
        # Where the far border of what was drawn lies in pixels of the level, and where it is taken to lie.
        away_px = 0.0 if own is None else max(abs(size * 2**level / own - size) for size in half.shape[:2])
        assert away_px <= 3
        assert (own == slide.info.level_downsamples[level]) == (slide.placements[level].alignment is Alignment.ALIGNED)


@pytest.mark.parametrize(("more_x", "more_y"), [(300, 0), (0, 300), (120, 240), (30, 0), (0, 20)])
@pytest.mark.parametrize("scale", [2, 4, 8])
def test_a_padded_level_gets_its_scale_from_what_it_shows(picture: np.ndarray, scale: int, more_x: int, more_y: int) -> None:
    slide = slide_of(picture, padded(shrunk(picture, scale), more_x, more_y))
    assert downsamples(slide) == [scale]
    assert (
        describe_placements(slide) == f"size and content of level 1 disagree, as of padded ones: read as 1/{scale} of level 0"
    )


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("scales", [(2, 4, 8, 16), (3, 9), (4, 16, 32), (5,), (64,)])
@pytest.mark.parametrize("size", [(2101, 1607), (1600, 1271)])
def test_levels_whose_size_is_rounded_either_way_are_used(size: tuple[int, int], scales: tuple[int, ...], up: bool) -> None:
    rgb = drawn(*size)
    slide = slide_of(rgb, *(shrunk(rgb, scale, up) for scale in scales))
    stated = slide.info.level_downsamples
    for level in range(1, len(stated)):
        if min(slide.info.level_dimensions[level]) >= 40:
            assert slide.downsample(level) == stated[level]
    assert slide.best_level(scales[0] * 1.2) == 1
    assert describe_placements(slide) == ""


@pytest.mark.parametrize("change", ["every other pixel", "sharpened", "darker", "noisy"])
@pytest.mark.parametrize("scale", [2, 4, 8])
def test_what_scanners_do_to_their_levels_does_not_move_them(picture: np.ndarray, scale: int, change: str) -> None:
    level = picture[::scale, ::scale] if change == "every other pixel" else shrunk(picture, scale)
    if change == "sharpened":
        blurred = np.stack([shrunk(np.roll(level, (i, j), (0, 1)), 1) for i in (-1, 0, 1) for j in (-1, 0, 1)]).mean(axis=0)
        level = (level + 1.5 * (level - blurred)).clip(0, 255).astype(np.uint8)
    if change == "darker":
        level = (255 * (level / 255) ** 1.1).astype(np.uint8)
    if change == "noisy":
        level = (level + np.random.default_rng(0).normal(0, 15, level.shape)).clip(0, 255).astype(np.uint8)
    slide = slide_of(picture, level)
    assert downsamples(slide) == [slide.info.level_downsamples[1]]


@pytest.mark.parametrize(
    "spoilt",
    [
        lambda level: np.roll(level, 4, axis=1),
        lambda level: np.roll(level, 4, axis=0),
        lambda level: np.roll(level, (-30, 50), axis=(0, 1)),
        lambda level: level[::-1],
        lambda level: level[:, ::-1],
        lambda level: np.full_like(level, 255),
        lambda level: np.zeros_like(level),
        lambda level: shrunk(np.roll(drawn(seed=8), (500, -600), axis=(0, 1)), WIDTH // level.shape[1]),
        lambda level: padded(level[::2], 0, level.shape[0] - len(level[::2])),
    ],
    ids=["right", "down", "both", "upside down", "mirrored", "white", "black", "another slide", "half as high"],
)
@pytest.mark.parametrize("scale", [2, 4])
def test_a_level_that_shows_something_else_is_not_used_and_said(
    picture: np.ndarray, scale: int, spoilt: Callable[[np.ndarray], np.ndarray]
) -> None:
    good = shrunk(picture, scale)
    slide = slide_of(picture, spoilt(good), shrunk(picture, 16))
    assert downsamples(slide) == [None, pytest.approx(16, rel=1e-3)]
    assert describe_placements(slide) == "size and content of level 1 disagree: not used"
    assert [slide.best_level(wanted) for wanted in (4.0, 15.0, 17.0)] == [0, 0, 2]
    away = np.abs(slide.read_region(1400, 1000, 640, 560, 80, 70).astype(int) - shrunk(picture[1000:1560, 1400:2040], 8))
    assert away.mean() < 1


@pytest.mark.parametrize(("width", "used"), [(1050, True), (1051, True), (1024, False), (1280, False)])
def test_where_nothing_is_to_be_seen_sizes_decide(width: int, used: bool) -> None:
    slide = slide_of(np.full((HEIGHT, WIDTH, 3), 243, np.uint8), np.full((HEIGHT // 2, width, 3), 243, np.uint8))
    assert (slide.downsample(1) is not None) == used
    assert describe_placements(slide) == ("" if used else "neither size nor content of level 1 tells the scale: not used")


@pytest.mark.parametrize("compression", ["", "zlib"])
def test_a_thin_piece_of_tissue_is_enough_to_tell(compression: str, tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    rgb = np.full((3000, 4200, 3), 243, np.uint8)
    rgb[1400:1520, 100:4100] = np.kron(random.integers(60, 200, (15, 500, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    levels = [rgb, *(to_tiles(shrunk(rgb, scale)) for scale in (2, 4))]
    if not compression:
        assert downsamples(slide_of(*levels)) == [2, 4]
        return
    with Slide.open(write(tmp_path / "thin.tif", levels, compression)) as slide:
        assert downsamples(slide) == [2, 4]


def test_places_that_cannot_be_decoded_tell_nothing(picture: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    slide = slide_of(picture, shrunk(picture, 2), padded(shrunk(picture, 4), 200, 0))
    whole = slide.reader.read

    def torn(level: int, x: int, y: int, w: int, h: int, scale: int = 1) -> np.ndarray:
        if level and x < slide.info.level_dimensions[level][0] // 3:
            raise ValueError("torn")
        return whole(level, x, y, w, h, scale)

    monkeypatch.setattr(slide.reader, "read", torn)
    monkeypatch.setattr(slide, "reopen", lambda: None)
    assert downsamples(slide) == [2, 4]


def test_the_look_at_a_level_costs_the_same_however_large_it_is() -> None:
    costs = []
    for size in ((1536, 1152), (3072, 2304)):
        rgb = drawn(*size)
        slide = slide_of(rgb, shrunk(rgb, 2), shrunk(rgb, 4))
        assert downsamples(slide) == [2, 4]
        assert isinstance(slide.reader, InMemory)
        costs.append(sum(slide.reader.read_px))
    assert costs[1] < 1.6 * costs[0] < 2e6


def test_levels_that_are_not_wanted_are_not_looked_at(picture: np.ndarray) -> None:
    slide = slide_of(picture, shrunk(picture, 2), resample="fast")
    slide.read_region(0, 0, 128, 128, 128, 128)
    assert isinstance(slide.reader, InMemory)
    assert slide.reader.read_px[1] == 0


def test_scan_tells_of_levels_that_are_padded_and_of_no_others(
    picture: np.ndarray, padded_levels: list[np.ndarray], tmp_path: Path
) -> None:
    write(tmp_path / "padded.tif", padded_levels)
    write(tmp_path / "plain.tif", [picture, shrunk(picture, 2), shrunk(picture, 4, up=True)])
    problems = [header_row(SlideItem(tmp_path / f"{name}.tif", name)).info["row"]["problem"] for name in ("padded", "plain")]
    assert problems == ["size and content of levels 1 to 3 disagree, as of padded ones: read as 1/2, 1/4, 1/8 of level 0", ""]
