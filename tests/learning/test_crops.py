"""Geometry of crops and masks, checked by painting."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from odis_path.data.crops import CropRule, View, contains, draw_sizes, fits, patch_mask, sample_view, turn_grid, view_matrices
from odis_path.data.views import cut_views

SIDE = 64
PATCH = 8


@st.composite
def integer_boxes(draw: st.DrawFn) -> np.ndarray:
    x0, y0 = draw(st.integers(0, SIDE - 2)), draw(st.integers(0, SIDE - 2))
    return np.array([x0, y0, draw(st.integers(x0 + 1, SIDE)), draw(st.integers(y0 + 1, SIDE))], dtype=float)


@st.composite
def views(draw: st.DrawFn) -> View:
    w, h = draw(st.integers(8, SIDE)), draw(st.integers(8, SIDE))
    x, y = draw(st.integers(0, SIDE - w)), draw(st.integers(0, SIDE - h))
    return View(x, y, w, h, draw(st.integers(0, 7)), draw(st.sampled_from([32, 48, 64])))


def painted_mask(view: View, box: np.ndarray) -> np.ndarray:
    """Patches that hold box paint: crop, blow up without interpolation, turn, and look at every patch."""
    x0, y0, x1, y1 = box.astype(int)
    tile = np.zeros((SIDE, SIDE), bool)
    tile[y0:y1, x0:x1] = True
    crop = tile[view.y : view.y + view.h, view.x : view.x + view.w]
    grid = view.size_px // PATCH
    fine = np.kron(crop, np.ones((grid, grid), bool))  # every crop px is grid x grid sub-px: patches have integer borders
    fine = turn_grid(fine.repeat(1, 0), view.turn)
    rows, columns = fine.shape[0] // grid, fine.shape[1] // grid
    return fine.reshape(grid, rows, grid, columns).any((1, 3))


@settings(max_examples=1000, deadline=None)
@given(views(), integer_boxes())
def test_the_patch_mask_is_where_the_painted_box_shows(view: View, box: np.ndarray) -> None:
    assert np.array_equal(patch_mask(view, box, view.size_px // PATCH), painted_mask(view, box))


def test_the_sampling_map_is_crop_then_turn_exactly() -> None:
    """Where a crop keeps its size, sampling equals slicing and turning, to the pixel."""
    rng = np.random.default_rng(0)
    tile = rng.random((3, SIDE, SIDE)).astype(np.float32)
    for turn in range(8):
        view = View(5, 11, 32, 32, turn, 32)
        theta = torch.from_numpy(view_matrices([view], SIDE))[None]
        image = cut_views(torch.from_numpy(tile)[None], theta, 32)[0].numpy()
        plain = tile[:, 11:43, 5:37].transpose(1, 2, 0)
        assert np.allclose(image.transpose(1, 2, 0), turn_grid(plain, turn), atol=2e-5)


@settings(max_examples=1000, deadline=None)
@given(integer_boxes(), st.integers(0, 2**32 - 1), st.sampled_from(["construct", "reject"]))
def test_a_view_contains_the_box_whenever_it_fits(box: np.ndarray, seed: int, sampler: str) -> None:
    rule = CropRule(scale=(0.25, 1.0), size_px=32, sampler=sampler)  # type: ignore[arg-type]
    view = sample_view(np.random.default_rng(seed), SIDE, box, rule)
    assert 0 <= view.x <= view.x + view.w <= SIDE
    assert 0 <= view.y <= view.y + view.h <= SIDE
    assert contains(view, box)  # scale reaches 1: every box fits


@settings(max_examples=300, deadline=None)
@given(integer_boxes(), st.integers(0, 2**32 - 1))
def test_a_box_too_large_for_the_crop_is_overlapped_by_half(box: np.ndarray, seed: int) -> None:
    rule = CropRule(scale=(0.05, 0.25), size_px=32)
    view = sample_view(np.random.default_rng(seed), SIDE, box, rule)
    wide = min(view.x + view.w, box[2]) - max(view.x, box[0])
    high = min(view.y + view.h, box[3]) - max(view.y, box[1])
    smaller = min(view.w, box[2] - box[0]) * min(view.h, box[3] - box[1])
    assert wide * high >= 0.5 * smaller - 2 * (view.w + view.h)  # integer offsets: a pixel on each side
    if (box[2] - box[0]) * (box[3] - box[1]) <= 0.25 * SIDE * SIDE:
        assert contains(view, box)


def test_fractional_boxes_are_contained_too() -> None:
    rng = np.random.default_rng(1)
    rule = CropRule(scale=(0.1, 0.5), size_px=32)
    for _ in range(2000):
        corner = rng.uniform(0, SIDE - 14, 2)
        box = np.concatenate([corner, corner + rng.uniform(0.5, 13.5, 2)])
        assert contains(sample_view(rng, SIDE, box, rule), box)


def test_both_samplers_agree_where_rejection_succeeds() -> None:
    """Given its size, a crop's offset is uniform over the offsets that contain the box, however it was found."""
    box = np.array([20.0, 24.0, 40.0, 38.0])
    rng = np.random.default_rng(2)
    offsets: dict[str, list[float]] = {"construct": [], "reject": []}
    for sampler in ("construct", "reject"):
        rule = CropRule(scale=(0.3, 0.3), ratio=(1.0, 1.0), size_px=32, sampler=sampler, tries=10_000)  # type: ignore[arg-type]
        for _ in range(2000):
            offsets[sampler].append(sample_view(rng, SIDE, box, rule).x)
    side = int(draw_sizes(rng, SIDE, CropRule(scale=(0.3, 0.3), ratio=(1.0, 1.0), size_px=32), 1)[0][0])
    legal = np.arange(max(0, 40 - side), min(SIDE - side, 20) + 1)
    for values in offsets.values():
        counts = np.array([np.sum(np.array(values) == x) for x in legal])
        assert counts.sum() == 2000
        expected = 2000 / len(legal)
        assert ((counts - expected) ** 2 / expected).sum() < 3 * len(legal)  # chi squared, far above its 99.9% quantile


def test_fits_speaks_of_integer_crops() -> None:
    assert fits(np.array([0.5, 0.0, 10.5, 10.0]), 11, 10)
    assert not fits(np.array([0.5, 0.0, 10.5, 10.0]), 10, 10)


def test_mask_rules_differ_as_named() -> None:
    view = View(0, 0, 64, 64, 0, 64)
    box = np.array([0.0, 0.0, 12.0, 8.0])  # patch 0 whole, half of patch 1
    first = patch_mask(view, box, 8)[0]
    assert first[:3].tolist() == [True, True, False]
    assert patch_mask(view, box, 8, rule="fraction", fraction=0.6)[0, :3].tolist() == [True, False, False]
    assert patch_mask(view, np.array([0.0, 0.0, 11.0, 8.0]), 8, rule="centre")[0, :3].tolist() == [True, False, False]
    assert patch_mask(view, box, 8, margin=1)[:3, :4].astype(int).tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
