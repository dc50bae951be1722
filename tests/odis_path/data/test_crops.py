"""Geometry of crops and masks, checked by painting."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from odis_path.data.crops import (
    Crop,
    CropRule,
    contains,
    crop_matrices,
    draw_sizes,
    patch_mask,
    sample_crop,
    sample_crops,
    shows,
    turn_grid,
)
from odis_path.data.views import cut_views

SIDE = 64
PATCH = 8


@st.composite
def integer_boxes(draw: st.DrawFn) -> np.ndarray:
    x0, y0 = draw(st.integers(0, SIDE - 2)), draw(st.integers(0, SIDE - 2))
    return np.array([x0, y0, draw(st.integers(x0 + 1, SIDE)), draw(st.integers(y0 + 1, SIDE))], dtype=float)


@st.composite
def random_crops(draw: st.DrawFn) -> Crop:
    w, h = draw(st.integers(8, SIDE)), draw(st.integers(8, SIDE))
    x, y = draw(st.integers(0, SIDE - w)), draw(st.integers(0, SIDE - h))
    return Crop(x, y, w, h, draw(st.integers(0, 7)), draw(st.sampled_from([32, 48, 64])))


def painted_mask(crop: Crop, box: np.ndarray) -> np.ndarray:
    """Patches that hold box paint: crop, blow up without interpolation, turn, and look at every patch."""
    x0, y0, x1, y1 = box.astype(int)
    tile = np.zeros((SIDE, SIDE), bool)
    tile[y0:y1, x0:x1] = True
    pixels = tile[crop.y : crop.y + crop.h, crop.x : crop.x + crop.w]
    grid = crop.size_px // PATCH
    fine = np.kron(pixels, np.ones((grid, grid), bool))  # every crop px is grid x grid sub-px: patches have integer borders
    fine = turn_grid(fine.repeat(1, 0), crop.turn)
    rows, columns = fine.shape[0] // grid, fine.shape[1] // grid
    return fine.reshape(grid, rows, grid, columns).any((1, 3))


@settings(max_examples=1000, deadline=None)
@given(random_crops(), integer_boxes())
def test_the_patch_mask_is_where_the_painted_box_shows(crop: Crop, box: np.ndarray) -> None:
    assert np.array_equal(patch_mask(crop, box, crop.size_px // PATCH), painted_mask(crop, box))


def test_the_sampling_map_is_crop_then_turn_exactly() -> None:
    """Where a crop keeps its size, sampling equals slicing and turning, to the pixel."""
    rng = np.random.default_rng(0)
    tile = rng.random((3, SIDE, SIDE)).astype(np.float32)
    for turn in range(8):
        crop = Crop(5, 11, 32, 32, turn, 32)
        theta = torch.from_numpy(crop_matrices([crop], SIDE))[None]
        image = cut_views(torch.from_numpy(tile)[None], theta, 32)[0].numpy()
        plain = tile[:, 11:43, 5:37].transpose(1, 2, 0)
        assert np.allclose(image.transpose(1, 2, 0), turn_grid(plain, turn), atol=2e-5)


@settings(max_examples=1000, deadline=None)
@given(integer_boxes(), st.integers(0, 2**32 - 1), st.sampled_from(["construct", "reject"]))
def test_a_crop_contains_the_box_whenever_it_fits(box: np.ndarray, seed: int, sampler: str) -> None:
    rule = CropRule(scale=(0.25, 1.0), size_px=32, sampler=sampler)  # type: ignore[arg-type]
    crop = sample_crop(np.random.default_rng(seed), SIDE, box, rule)
    assert 0 <= crop.x <= crop.x + crop.w <= SIDE
    assert 0 <= crop.y <= crop.y + crop.h <= SIDE
    assert contains(crop, box)  # scale reaches 1: every box fits


SCALES = [(0.25, 1.0), (0.4, 1.0), (0.05, 0.25), (0.1, 0.3), (0.3, 0.3), (1.0, 1.0)]
RATIOS = [(3 / 4, 4 / 3), (1.0, 1.0), (0.4, 0.5), (0.2, 5.0)]


@st.composite
def rules(draw: st.DrawFn) -> CropRule:
    ratio = draw(st.sampled_from(RATIOS))
    scale = draw(st.sampled_from([scale for scale in SCALES if scale[0] <= min(1, ratio[1], 1 / ratio[0])]))
    return CropRule(
        scale=scale,
        ratio=ratio,
        size_px=32,
        containment=draw(st.sampled_from(["full", "fraction", "any"])),
        sampler=draw(st.sampled_from(["construct", "reject"])),
        fraction=draw(st.sampled_from([0.2, 0.5, 1.0])),
        tries=draw(st.sampled_from([1, 5, 20])),
    )


@st.composite
def boxes_of_any_shape(draw: st.DrawFn, side: int) -> np.ndarray:
    """Thin either way, tiny, at a border, nearly the tile; on whole px or not."""
    low, high = [], []
    for _ in range(2):
        length = draw(st.sampled_from([0.3, 1.0, 2.0, side / 9, side / 2, side - 1.5, float(side)]) | st.floats(0.1, side))
        start = draw(st.sampled_from([0.0, side - length]) | st.floats(0, side - length))
        if draw(st.booleans()):
            start, length = float(np.floor(start)), float(np.ceil(length))
        low.append(start)
        high.append(min(start + length, float(side)))
    return np.array(low + high)


def sizes_of(rule: CropRule, side: int) -> np.ndarray:
    """Sizes of a crop of the rule inside the tile, by its definition on a fine mesh, sides rounded to px: (n, 2)."""
    area = side * side * np.linspace(*rule.scale, 300)[:, None]
    ratio = np.exp(np.linspace(np.log(rule.ratio[0]), np.log(rule.ratio[1]), 301))[None]
    sizes = np.rint(np.stack([np.sqrt(area * ratio), np.sqrt(area / ratio)], axis=2)).reshape(-1, 2)
    return sizes[(sizes <= side).all(1)]


def obeys(crop: Crop, rule: CropRule, side: int) -> bool:
    """Whether some size that rounds to the crop's has area and aspect of the rule."""
    w, h = crop.w, crop.h
    inside = 0 <= crop.x <= crop.x + w <= side and 0 <= crop.y <= crop.y + h <= side
    area = (
        (w - 0.5) * (h - 0.5) <= rule.scale[1] * side * side + 1e-6,
        (w + 0.5) * (h + 0.5) >= rule.scale[0] * side * side - 1e-6,
    )
    aspect = (w - 0.5) / (h + 0.5) <= rule.ratio[1] + 1e-9, (w + 0.5) / (h - 0.5) >= rule.ratio[0] - 1e-9
    return inside and all(area) and all(aspect)


@settings(max_examples=1500, deadline=None)
@given(st.data(), st.sampled_from([37, 64, 256]), rules(), st.integers(0, 2**32 - 1))
def test_a_crop_obeys_its_rule_and_contains_the_box_or_overlaps_it_as_documented(
    data: st.DataObject, side: int, rule: CropRule, seed: int
) -> None:
    box = data.draw(boxes_of_any_shape(side))
    sizes = sizes_of(rule, side)
    need = np.ceil(box[2:]) - np.floor(box[:2])
    holdable = (sizes >= need).all(1).any()
    for crop in sample_crops(np.random.default_rng(seed), side, box, rule, 3):
        assert obeys(crop, rule, side)
        assert shows(crop, box, side, rule)
        if rule.containment == "full" and holdable:
            assert contains(crop, box)
            continue
        for low, high, start, length in ((box[0], box[2], crop.x, crop.w), (box[1], box[3], crop.y, crop.h)):
            overlap, span = min(high, start + length) - max(low, start), high - low
            asked = {"any": 1.0, "fraction": np.sqrt(rule.fraction) * min(span, length)}.get(rule.containment)
            if asked is None:
                asked = span if span <= length else np.sqrt(0.5) * length
            assert overlap >= min(asked, span) - 1.0  # to the pixel


@settings(max_examples=300, deadline=None)
@given(rules(), st.sampled_from([37, 64, 256]), st.integers(0, 2**32 - 1))
def test_a_free_crop_obeys_its_rule(rule: CropRule, side: int, seed: int) -> None:
    assert all(obeys(crop, rule, side) for crop in sample_crops(np.random.default_rng(seed), side, None, rule, 5))


def test_a_thin_box_does_not_stretch_small_crops() -> None:
    """A strip across the tile: no small crop holds it, so each shows its full height and most of its own width of it."""
    rule = CropRule(scale=(0.05, 0.25), size_px=96)
    for box in (np.array([0.0, 100, 256, 120]), np.array([100.0, 0, 120, 256])):
        crops = sample_crops(np.random.default_rng(0), 256, box, rule, 500)
        assert max(max(v.w / v.h, v.h / v.w) for v in crops) < 1.36
        assert max(v.w * v.h for v in crops) < 0.26 * 256 * 256
        across, along = (1, 0) if box[2] == 256 else (0, 1)
        for v in crops:
            start, length = (v.x, v.y), (v.w, v.h)
            assert start[across] <= 100 < 120 <= start[across] + length[across]
            assert 0 <= start[along] <= 256 - length[along]
        assert len({(v.x, v.y, v.w, v.h) for v in crops}) > 400


def test_crops_around_a_strip_across_the_tile_differ_in_what_is_left_free() -> None:
    """Width is the tile's; height is uniform from three quarters of it on, and crops are rarely the same."""
    rule = CropRule(scale=(0.25, 1.0), size_px=224)
    crops = sample_crops(np.random.default_rng(1), 256, np.array([0.0, 100, 256, 120]), rule, 4000)
    assert {v.w for v in crops} == {256}
    heights = np.array([v.h for v in crops])
    assert heights.min() == 192
    assert abs(heights.mean() - 224) < 1.5
    same = np.mean([(a.x, a.y, a.w, a.h) == (b.x, b.y, b.w, b.h) for a, b in zip(crops[::2], crops[1::2], strict=True)])
    assert same < 0.02


def test_sizes_around_a_large_box_have_the_law_that_rejection_leaves() -> None:
    """Given width and height of the box, area and log aspect are uniform on what holds it: against plain rejection."""
    rule = CropRule(scale=(0.25, 1.0), size_px=224)
    rng = np.random.default_rng(2)
    direct = np.stack(draw_sizes(rng, 256, CropRule(scale=(0.25, 1.0), size_px=224, tries=1), 40_000, (215, 226)), axis=1)
    area, ratio = 256**2 * rng.uniform(*rule.scale, 4_000_000), np.exp(rng.uniform(*np.log(rule.ratio), 4_000_000))
    drawn = np.rint(np.stack([np.sqrt(area * ratio), np.sqrt(area / ratio)], axis=1))
    rejected = drawn[((drawn >= (215, 226)) & (drawn <= 256)).all(1)]
    assert len(rejected) > 40_000
    for of in (lambda s: s[:, 0], lambda s: s[:, 1], lambda s: s.prod(1), lambda s: s[:, 0] / s[:, 1]):
        a, b = of(direct), of(rejected)
        assert abs(a.mean() - b.mean()) < 0.05 * b.std()
        assert abs(a.std() - b.std()) < 0.05 * b.std()


def test_fractional_boxes_are_contained_too() -> None:
    rng = np.random.default_rng(1)
    rule = CropRule(scale=(0.1, 0.5), size_px=32)
    for _ in range(2000):
        corner = rng.uniform(0, SIDE - 14, 2)
        box = np.concatenate([corner, corner + rng.uniform(0.5, 13.5, 2)])
        assert contains(sample_crop(rng, SIDE, box, rule), box)


def test_both_samplers_agree_where_rejection_succeeds() -> None:
    """Given its size, a crop's offset is uniform over the offsets that contain the box, however it was found."""
    box = np.array([20.0, 24.0, 40.0, 38.0])
    rng = np.random.default_rng(2)
    offsets: dict[str, list[float]] = {"construct": [], "reject": []}
    for sampler in ("construct", "reject"):
        rule = CropRule(scale=(0.3, 0.3), ratio=(1.0, 1.0), size_px=32, sampler=sampler, tries=10_000)  # type: ignore[arg-type]
        for _ in range(2000):
            offsets[sampler].append(sample_crop(rng, SIDE, box, rule).x)
    side = int(draw_sizes(rng, SIDE, CropRule(scale=(0.3, 0.3), ratio=(1.0, 1.0), size_px=32), 1)[0][0])
    legal = np.arange(max(0, 40 - side), min(SIDE - side, 20) + 1)
    for values in offsets.values():
        counts = np.array([np.sum(np.array(values) == x) for x in legal])
        assert counts.sum() == 2000
        expected = 2000 / len(legal)
        assert ((counts - expected) ** 2 / expected).sum() < 3 * len(legal)  # chi squared, far above its 99.9% quantile


def test_mask_rules_differ_as_named() -> None:
    crop = Crop(0, 0, 64, 64, 0, 64)
    box = np.array([0.0, 0.0, 12.0, 8.0])  # patch 0 whole, half of patch 1
    first = patch_mask(crop, box, 8)[0]
    assert first[:3].tolist() == [True, True, False]
    assert patch_mask(crop, box, 8, rule="fraction", fraction=0.6)[0, :3].tolist() == [True, False, False]
    assert patch_mask(crop, np.array([0.0, 0.0, 11.0, 8.0]), 8, rule="centre")[0, :3].tolist() == [True, False, False]
    assert patch_mask(crop, box, 8, margin=1)[:3, :4].astype(int).tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
