"""The grid is arithmetic: properties that hold for any slide."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from annotations.errors import UserError
from tiling.grid import plan_grid, side_l0, tissue_fractions

SLIDES = st.fixed_dictionaries(
    {
        "width_l0": st.integers(1, 5000),
        "height_l0": st.integers(1, 5000),
        "mpp_l0": st.floats(0.1, 2.0),
        "mpp": st.floats(0.1, 4.0),
        "size_px": st.integers(16, 512),
        "overlap_px": st.integers(0, 15),
    }
).filter(lambda slide: slide["mpp"] >= 0.9 * slide["mpp_l0"])


@settings(max_examples=80, deadline=None)
@given(slide=SLIDES)
def test_tiles_lie_inside_the_slide_in_row_major_order_and_none_is_missing(slide: dict) -> None:
    plan = plan_grid(**slide)
    assert plan.coords.dtype == np.int64
    assert plan.coords.shape == (len(plan.tissue_fraction), 2)
    assert plan.size_l0 == pytest.approx(slide["size_px"] * slide["mpp"] / slide["mpp_l0"])
    stride = plan.size_l0 * (1 - slide["overlap_px"] / slide["size_px"])
    sides = (slide["width_l0"], slide["height_l0"])
    if any(side < plan.size_l0 - 1e-6 for side in sides):
        assert len(plan.coords) == 0
        return
    counts = [int(np.floor((side - plan.size_l0) / stride + 1e-9)) + 1 for side in sides]
    assert len(plan.coords) == counts[0] * counts[1]
    assert (plan.coords >= 0).all()
    assert (plan.coords + plan.size_l0 <= np.array(sides) + 1e-3).all()
    assert (np.lexsort((plan.coords[:, 0], plan.coords[:, 1])) == np.arange(len(plan.coords))).all()
    ideal = np.arange(counts[0]) * stride
    assert np.abs(plan.coords[: counts[0], 0] - ideal).max() < 1 + 1e-6


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), downsample=st.floats(1, 20), size_l0=st.floats(5, 20))
def test_tissue_fraction_is_the_covered_area(seed: int, downsample: float, size_l0: float) -> None:
    random = np.random.default_rng(seed)
    mask = random.random((23, 31)) < 0.5
    height, width = (side * downsample for side in mask.shape)
    coords = np.stack([random.uniform(0, width - size_l0, 5), random.uniform(0, height - size_l0, 5)], axis=1)
    coords = np.maximum(coords, 0).astype(np.int64)
    fractions = tissue_fractions(coords, size_l0, mask, downsample)
    for (x, y), fraction in zip(coords, fractions, strict=True):
        edges_x, edges_y = np.arange(mask.shape[1] + 1) * downsample, np.arange(mask.shape[0] + 1) * downsample
        cover_x = np.clip(np.minimum(edges_x[1:], x + size_l0) - np.maximum(edges_x[:-1], x), 0, None)
        cover_y = np.clip(np.minimum(edges_y[1:], y + size_l0) - np.maximum(edges_y[:-1], y), 0, None)
        share = (cover_y[:, None] * cover_x * mask).sum() / max(cover_x.sum() * cover_y.sum(), 1e-12)
        assert fraction == pytest.approx(share, abs=1e-4)


@pytest.mark.parametrize(("side_px", "mpp", "mpp_l0", "expected"), [(224, 0.4942, 0.2471, 448), (240, 0.4415, 0.4415, 240)])
def test_a_whole_number_of_level_0_pixels_is_one(side_px: int, mpp: float, mpp_l0: float, expected: int) -> None:
    assert side_px * mpp / mpp_l0 != expected
    assert side_l0(side_px, mpp, mpp_l0) == plan_grid(5000, 5000, mpp_l0, mpp, side_px).size_l0 == expected


def test_min_tissue_drops_tiles_and_keeps_the_order() -> None:
    mask = np.zeros((10, 10), bool)
    mask[:, 5:] = True
    plan = plan_grid(1000, 1000, 0.5, 0.5, 100, mask=mask, mask_downsample=100, min_tissue=0.5)
    assert len(plan.coords) == 50
    assert plan.coords[:, 0].min() == 500
    assert (plan.tissue_fraction == 1).all()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"mpp": 0.25}, "finer than the slide's 0.5"),
        ({"overlap_px": 100}, "--overlap 100"),
        ({"overlap_px": -1}, "--overlap -1"),
        ({"size_px": 0}, "--size 0"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(arguments: dict, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        plan_grid(**{"width_l0": 1000, "height_l0": 1000, "mpp_l0": 0.5, "mpp": 0.5, "size_px": 100} | arguments)
    assert "\n" not in str(error.value)
