"""Box noise: the boxes of a poor detector, for the study of robustness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from annotations.errors import UserError
from odis_path.config import parse_config
from odis_path.data.dataset import TileSamples
from odis_path.data.targets import noisy_boxes
from odis_path.data.tile_index import index_tiles
from tests.odis_path.conftest import SIDE, assert_same_sample, tiny_config

QUIET = {"jitter": 0.0, "drop": 0.0, "false": 0.0, "side_px": 100}


def many_boxes(count: int = 4000) -> np.ndarray:
    rng = np.random.default_rng(1)
    corner = rng.uniform(0, 60, (count, 2))
    return np.concatenate([corner, corner + rng.uniform(5, 40, (count, 2))], axis=1)


def samples_of(tiles: Path, **target: Any) -> TileSamples:
    return TileSamples(index_tiles(tiles), tiny_config(tiles, "unused", target={"min_patches": 1, **target}), 8)


def test_without_noise_the_boxes_are_the_same() -> None:
    boxes = many_boxes()
    noisy, source = noisy_boxes(np.random.default_rng(0), boxes, **QUIET)
    assert np.array_equal(noisy, boxes)
    assert np.array_equal(source, np.arange(len(boxes)))


def test_every_edge_moves_by_at_most_the_share_of_its_side_and_on_average_by_half_of_it() -> None:
    boxes = many_boxes()
    noisy, source = noisy_boxes(np.random.default_rng(0), boxes, **{**QUIET, "jitter": 0.2})
    assert np.array_equal(source, np.arange(len(boxes)))
    share = np.abs(noisy - boxes) / np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    assert share.max() <= 0.2 + 1e-12
    inside = (boxes > 10).all(1) & (boxes < 90).all(1)
    assert share[inside].mean() == pytest.approx(0.1, rel=0.05)
    assert noisy.min() >= 0
    assert noisy.max() <= 100


def test_jitter_never_turns_a_box_inside_out() -> None:
    boxes = np.concatenate([many_boxes(), [[5.0, 5.0, 5.4, 5.2], [0.0, 0.0, 100.0, 100.0]]])
    noisy, _ = noisy_boxes(np.random.default_rng(0), boxes, **{**QUIET, "jitter": 0.5})
    assert (noisy[:, 2:] > noisy[:, :2]).all()


def test_boxes_are_dropped_and_false_ones_added_at_their_rates() -> None:
    boxes = many_boxes()
    noisy, source = noisy_boxes(np.random.default_rng(0), boxes, **{**QUIET, "drop": 0.3, "false": 0.2})
    assert (source >= 0).sum() / len(boxes) == pytest.approx(0.7, abs=0.03)
    assert (source < 0).sum() / len(boxes) == pytest.approx(0.2, abs=0.03)
    assert np.array_equal(noisy[source >= 0], boxes[source[source >= 0]])
    made = noisy[source < 0]
    assert made.min() >= 0
    assert made.max() <= 100
    sizes = {tuple(size) for size in (boxes[:, 2:] - boxes[:, :2]).round(6)}
    assert all(tuple(size) in sizes for size in (made[:, 2:] - made[:, :2]).round(6))
    everything, _ = noisy_boxes(np.random.default_rng(0), boxes, **{**QUIET, "drop": 1.0})
    assert len(everything) == 0


def test_zero_noise_leaves_every_draw_of_a_sample_as_it_was(tiny_tiles: Path) -> None:
    """The generator is not touched: a sample equals one drawn by a dataset that never heard of noise."""
    plain, quiet = samples_of(tiny_tiles), samples_of(tiny_tiles, noise_jitter=0.0, noise_drop=0.0, noise_false=0.0)
    quiet._noisy = None  # type: ignore[method-assign,assignment]  # would fail if called
    for i in range(4):
        a, b = plain[(0, i)], quiet[(0, i)]
        assert_same_sample(a, b)


def test_a_noisy_sample_is_a_function_of_seed_epoch_and_index(tiny_tiles: Path) -> None:
    noise = {"noise_jitter": 0.2, "noise_drop": 0.3, "noise_false": 0.5}
    first, second, plain = samples_of(tiny_tiles, **noise), samples_of(tiny_tiles, **noise), samples_of(tiny_tiles)
    differs = 0
    for i in reversed(range(len(first))):
        a = first[(3, i)]
        differs += not np.array_equal(a.target, plain[(3, i)].target)
    for i in range(len(first)):
        a, b = first[(3, i)], second[(3, i)]
        assert_same_sample(a, b)
        assert (a.target >= 0).all()
        assert (a.target <= SIDE).all()
    assert differs > len(first) / 2


def test_a_tile_whose_boxes_are_all_missing_is_trained_whole(tiny_tiles: Path) -> None:
    sample = samples_of(tiny_tiles, noise_drop=1.0)[(0, 1)]
    assert sample.target.tolist() == [0, 0, SIDE, SIDE]
    assert sample.views.object_masks_global.all()


@pytest.mark.parametrize("extra", [{"choice": "label"}, {"objects": 3}, {"order": "crop_first"}])
def test_noise_goes_with_the_other_choices(tiny_tiles: Path, extra: dict[str, Any]) -> None:
    samples = samples_of(tiny_tiles, noise_jitter=0.3, noise_drop=0.5, noise_false=0.5, **extra)
    for i in range(len(samples)):
        assert samples[(0, i)].views.object_masks_global.any(axis=2).all()


def test_noise_on_outlines_is_refused() -> None:
    with pytest.raises(UserError, match=r"not outlines: set target\.geometry=box"):
        parse_config({"target": {"geometry": "polygon", "noise_false": 0.1}}, "x.yaml")
    with pytest.raises(UserError, match=r"target.noise_jitter is 0.7"):
        parse_config({"target": {"noise_jitter": 0.7}}, "x.yaml")
