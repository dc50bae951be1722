"""Polygon masks, checked by painting, by shapely one patch at a time, and from an annotation file to the mask."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import shapely
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_dilation
from skimage.draw import polygon as paint
from typer.testing import CliRunner

from odis_path.cli.slides import register
from odis_path.data.crops import Crop, patch_mask, turn_grid
from odis_path.data.polygon_mask import NOTHING, polygon_cover, polygon_mask
from tiling import SlideFile, SlideMeta, write_slide_file

SIDE = 64
SEEDS = st.integers(0, 2**32 - 1)
RULES = ("any", "fraction", "centre")


@st.composite
def crops(draw: st.DrawFn) -> Crop:
    w, h = draw(st.integers(8, SIDE)), draw(st.integers(8, SIDE))
    x, y = draw(st.integers(0, SIDE - w)), draw(st.integers(0, SIDE - h))
    return Crop(x, y, w, h, draw(st.integers(0, 7)), 64)


def star(rng: np.random.Generator, x: float, y: float, size: float) -> shapely.Geometry:
    angle = np.linspace(0, 2 * np.pi, int(rng.integers(3, 30)), endpoint=False) + rng.uniform(0, 6)
    radius = size * rng.uniform(0.3, 1, len(angle))
    return shapely.Polygon(np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], 1))


def shape(seed: int) -> shapely.Geometry:
    """Stars: one, several apart or merged, with holes and islands in the holes; now and then cut by a tile's border."""
    rng = np.random.default_rng(seed)
    polygon = shapely.Polygon()
    for _ in range(int(rng.integers(1, 4))):
        x, y = rng.uniform(-5, SIDE + 5, 2)
        size = rng.uniform(1, 40)
        polygon |= star(rng, x, y, size)
        if rng.random() < 0.5:
            polygon -= star(rng, x, y, size * 0.6)
            polygon |= star(rng, x, y, size * 0.15)
    if rng.random() < 0.5:
        polygon &= shapely.box(0, 0, SIDE, SIDE)
    return polygon


def rings_of(geometry: shapely.Geometry, seed: int = 0) -> list[np.ndarray]:
    """Its rings in any order and direction, open or closed: the even-odd rule asks for no more."""
    rng = np.random.default_rng(seed)
    rings = [shapely.get_coordinates(ring) for ring in shapely.get_rings(shapely.get_parts(geometry))]
    rng.shuffle(rings)
    rings = [ring[::-1] if rng.random() < 0.5 else ring for ring in rings]
    return [ring[:-1] if rng.random() < 0.5 else ring for ring in rings]


def painted(crop: Crop, rings: list[np.ndarray], grid: int, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """The crop as a picture of grid * samples px a side, before its turn: what is surely polygon, and what may be."""
    fine = grid * samples
    scaled = [(ring - [crop.x, crop.y]) * fine / np.array([crop.w, crop.h]) for ring in rings]
    picture = np.zeros((fine, fine), bool)
    for ring in scaled:
        one = np.zeros_like(picture)
        one[paint(ring[:, 1] - 0.5, ring[:, 0] - 0.5, one.shape)] = True
        picture ^= one
    outline = shapely.MultiLineString([np.concatenate([ring, ring[:1]]) for ring in scaled])
    y, x = np.mgrid[:fine, :fine] + 0.5
    shapely.prepare(outline)
    near = shapely.dwithin(outline, shapely.points(x, y), 0.5**0.5 + 1e-6)  # px that an edge may run through
    return picture & ~near, picture | near


def by_patch(picture: np.ndarray, grid: int) -> np.ndarray:
    samples = len(picture) // grid
    return picture.reshape(grid, samples, grid, samples).swapaxes(1, 2)


@settings(max_examples=150, deadline=None)
@given(crops(), SEEDS, st.integers(2, 8), st.sampled_from([0.1, 0.5, 0.9]), st.integers(0, 2))
def test_the_mask_is_where_the_painted_polygon_shows(crop: Crop, seed: int, grid: int, fraction: float, margin: int) -> None:
    rings = rings_of(shape(seed), seed)
    surely, maybe = (by_patch(turn_grid(painting, crop.turn), grid) for painting in painted(crop, rings, grid, 9))
    square = np.ones((2 * margin + 1, 2 * margin + 1), bool)
    for rule, low, high in (
        ("any", surely.any((2, 3)), maybe.any((2, 3))),
        ("fraction", surely.mean((2, 3)) >= fraction, maybe.mean((2, 3)) >= fraction),
        ("centre", surely[:, :, 4, 4], maybe[:, :, 4, 4]),
    ):
        mask = polygon_mask(crop, rings, grid, rule=rule, fraction=fraction, margin=margin)
        assert (mask.shape, mask.dtype) == ((grid, grid), bool)
        assert not (binary_dilation(low, square) & ~mask).any(), rule
        assert not (mask & ~binary_dilation(high, square)).any(), rule


@settings(max_examples=150, deadline=None)
@given(crops(), SEEDS, st.integers(1, 16))
def test_the_cover_is_the_area_shared_with_each_patch(crop: Crop, seed: int, grid: int) -> None:
    geometry = shape(seed)
    j, i = np.meshgrid(np.arange(grid), np.arange(grid))
    wide, high = crop.w / grid, crop.h / grid
    x, y = crop.x + j * wide, crop.y + i * high
    shared = shapely.area(shapely.intersection(geometry, shapely.box(x, y, x + wide, y + high))) / (wide * high)
    cover = polygon_cover(crop, rings_of(geometry, seed), grid)
    assert np.abs(cover - shared).max() < NOTHING
    assert ((cover > NOTHING) == (shared > NOTHING)).all()


@settings(max_examples=200, deadline=None)
@given(crops(), SEEDS, st.integers(2, 14))
def test_a_polygon_shows_in_no_patch_that_its_box_misses(crop: Crop, seed: int, grid: int) -> None:
    geometry = shape(seed)
    if geometry.is_empty:
        return
    mask = polygon_mask(crop, rings_of(geometry, seed), grid)
    assert not (mask & ~patch_mask(crop, np.array(geometry.bounds), grid)).any()


@settings(max_examples=120, deadline=None)
@given(crops(), st.lists(st.integers(0, SIDE), min_size=4, max_size=4), st.integers(2, 14), st.integers(0, 2), st.booleans())
def test_a_rectangle_has_the_mask_of_its_box(crop: Crop, sides: list[int], grid: int, margin: int, plain: bool) -> None:
    """Four corners, and the same with more positions along its edges, which takes the general way."""
    (x0, x1), (y0, y1) = sorted(sides[:2]), sorted(sides[2:])
    if x0 == x1 or y0 == y1:
        return
    box = np.array([x0, y0, x1, y1], dtype=float)
    ring = np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], dtype=float)
    if not plain:
        ring = np.stack([ring, (ring + np.roll(ring, -1, axis=0)) / 2], 1).reshape(-1, 2)
    for turn in range(8):
        turned = Crop(crop.x, crop.y, crop.w, crop.h, turn, crop.size_px)
        for rule in RULES:
            # 0.3719 is no share that integers below 65 make: what ties do with round-off is no matter here.
            options = {"rule": rule, "fraction": 0.3719}
            wanted = patch_mask(turned, box, grid, **options, margin=margin)
            if not plain:  # by its share of patches a box may lose a corner, and patch_mask's margin fills it again
                wanted = binary_dilation(patch_mask(turned, box, grid, **options), np.ones((2 * margin + 1, 2 * margin + 1)))
            assert np.array_equal(polygon_mask(turned, [ring], grid, **options, margin=margin), wanted), (rule, turn)


def test_a_plain_rectangle_ties_like_its_box() -> None:
    crop = Crop(3, 5, 49, 56, 2, 64)
    box = np.array([3.5, 5.0, 37.7, 33.0])
    ring = box[[0, 1, 2, 1, 2, 3, 0, 3, 0, 1]].reshape(5, 2)  # closed
    for fraction in (0.25, 0.5, 1.0):
        options = {"rule": "fraction", "fraction": fraction}
        assert np.array_equal(polygon_mask(crop, [ring], 14, **options), patch_mask(crop, box, 14, **options))


def test_holes_are_out_and_islands_in() -> None:
    crop = Crop(0, 0, 64, 64, 0, 64)
    geometry = shapely.box(0, 0, 64, 64) - shapely.box(8, 8, 56, 56) | shapely.box(24, 24, 40, 40)
    wanted = np.ones((8, 8), int)
    wanted[1:7, 1:7] = 0
    wanted[3:5, 3:5] = 1
    for seed in range(10):
        for rule in RULES:
            assert polygon_mask(crop, rings_of(geometry, seed), 8, rule=rule).astype(int).tolist() == wanted.tolist()


def test_a_hole_that_rounding_pushed_across_the_outline_is_a_hole() -> None:
    outline = np.array([(0, 0), (64, 0.0), (0, 64)])
    corner = np.float32(64 / 3 + 1e-6)
    hole = np.array([(8, 8), (64 - corner, corner + 1e-5), (8, 24)])  # its tip is out by 1e-5 px
    cover = polygon_cover(Crop(0, 0, 64, 64, 0, 64), [hole, outline], 4)
    exact = shapely.Polygon(outline).area - shapely.Polygon(hole).area
    assert cover.sum() * 256 == pytest.approx(exact, abs=1e-3)


@pytest.mark.parametrize("rule", RULES)
def test_outside_of_the_view_nothing_shows(rule: str) -> None:
    crop = Crop(20, 20, 20, 20, 3, 64)
    away = [
        np.array([(0.0, 0), (19, 3), (5, 60)]),
        np.array([(41.0, 0), (60, 30), (44, 60)]),
        np.array([(0, 40.0), (64, 40), (30, 64)]),
    ]
    around = np.array([(0, 0), (64, 0), (64, 64), (0, 64), (0, 50), (50, 50), (50, 14), (14, 14), (14, 45), (0, 45.0)])
    for rings in (
        [],
        [away[0]],
        away,
        [around],
        [np.zeros((2, 2))],
        [np.full((4, 2), 30.0)],
        [np.array([(22, 22), (30.0, 30), (38, 38)])],
    ):
        assert not polygon_mask(crop, rings, 5, rule=rule, margin=2).any()


def feature(coordinates: list, name: str) -> dict:
    properties = {"objectType": "annotation", "classification": {"name": name}}
    return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": coordinates}, "properties": properties}


def test_from_an_annotation_file_to_masks(tmp_path: Path) -> None:
    """An L over two tiles and a ring with a hole, at level 0; tiles of 64 px at half that resolution."""
    ell = [[16, 16], [240, 16], [240, 48], [48, 48], [48, 112], [16, 112], [16, 16]]
    ring = [
        [[144, 64], [240, 64], [240, 128], [144, 128], [144, 64]],
        [[176, 80], [208, 80], [208, 112], [176, 112], [176, 80]],
    ]
    collection = {"type": "FeatureCollection", "features": [feature([ell], "L"), feature(ring, "ring")]}
    (tmp_path / "a.geojson").write_text(json.dumps(collection))
    meta = SlideMeta("a", tmp_path / "none.svs", 256, 128, 0.5, 0.25, SIDE)
    write_slide_file(tmp_path / "s" / "a.h5", meta=meta, coords=np.array([(0, 0), (128, 0)]))
    app = typer.Typer()
    register(app)
    words = ["annotate", str(tmp_path / "s"), "--annotations", str(tmp_path / "a.geojson"), "--polygons", "--workers", "1"]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output

    crop = Crop(0, 0, SIDE, SIDE, 0, 64)
    with SlideFile(tmp_path / "s" / "a.h5") as file:
        assert file.boxes_table()["object"].tolist() == [0, 0, 1]
        left, right, hollow = (polygon_mask(crop, file.polygon(row), 8).astype(int) for row in range(3))
        boxes = [patch_mask(crop, box, 8) for box in file.boxes_table()["xyxy"]]
        turned = polygon_mask(Crop(0, 0, SIDE, SIDE, 1, 64), file.polygon(0), 8)
        zoomed = polygon_mask(Crop(24, 40, 16, 16, 0, 64), file.polygon(2), 4)
    wanted = np.zeros((8, 8), int)
    wanted[1:3, 1:] = wanted[1:7, 1:3] = 1
    assert left.tolist() == wanted.tolist()
    assert boxes[0].sum() == 42 > left.sum()
    wanted[:] = 0
    wanted[1:3, :7] = 1
    assert right.tolist() == wanted.tolist() == boxes[1].astype(int).tolist()
    wanted[:] = 0
    wanted[4:, 1:7] = 1
    wanted[5:7, 3:5] = 0
    assert hollow.tolist() == wanted.tolist()
    assert turned.astype(int).tolist() == np.rot90(left).tolist()
    assert not zoomed.any()  # the crop lies in the hole
