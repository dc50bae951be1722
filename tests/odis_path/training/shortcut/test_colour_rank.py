"""Colour finds the other view of a tile exactly as often as it gives it away."""

from __future__ import annotations

import numpy as np
import pytest

from odis_path.training.shortcut.colour_rank import colour_statistics, equal_columns, rank_views


def painted(colours: np.ndarray, spread: float, seed: int) -> np.ndarray:
    """Views of one mean colour each, float (n, 3) -> (n, 3, 16, 16), grained by chess fields of height `spread`."""
    chess = np.where(np.indices((16, 16)).sum(0) % 2, spread, -spread)
    flips = np.random.default_rng(seed).choice([-1, 1], len(colours))
    return np.asarray(colours[:, :, None, None] + flips[:, None, None, None] * chess)


def test_views_without_a_colour_change_are_found_at_rank_one() -> None:
    colours = np.random.default_rng(0).uniform(0.2, 0.8, (200, 3))
    first, second = (colour_statistics(painted(colours, 0.1, seed))[:, :3] for seed in (1, 2))
    rank = rank_views(first, second)
    assert (rank.median, rank.best, rank.count) == (1.0, 1.0, 200)


def test_views_of_independent_colours_are_found_as_often_as_chance() -> None:
    rng = np.random.default_rng(3)
    first, second = (colour_statistics(painted(rng.uniform(0.2, 0.8, (200, 3)), 0.1, 0))[:, :3] for _ in range(2))
    rank = rank_views(first, second)
    assert rank.median == pytest.approx(100.5, abs=15)  # of 400 ranks: sd of a median about 5, for uniform ones
    assert rank.best == pytest.approx(0.05, abs=0.04)


def test_views_of_one_colour_are_at_chance_and_not_first() -> None:
    rank = rank_views(np.ones((40, 3)), np.ones((40, 3)))
    assert rank.median == rank.chance == 20.5
    assert rank.best == 0.0


def test_a_known_order_has_known_ranks() -> None:
    """Tiles on a line at 0, 1, 2, ...; each second view is two places further: one of them lies nearer, or as near."""
    at = np.arange(20.0)[:, None]
    rank = rank_views(at, at + 2.0)
    by_hand = []
    for a, b in ((at[:, 0], at[:, 0] + 2), (at[:, 0] + 2, at[:, 0])):
        for i in range(20):
            d = np.abs(b - a[i])
            by_hand.append(1 + sum(d < d[i]) + (sum(d == d[i]) - 1) / 2)
    assert rank.median == float(np.median(by_hand))
    assert rank.best == np.mean(np.array(by_hand) <= 1.0)


def test_the_spread_of_colour_gives_away_what_its_mean_does_not() -> None:
    rng = np.random.default_rng(5)
    spreads = rng.uniform(0.01, 0.2, 200)
    views = [
        colour_statistics(np.concatenate([painted(rng.uniform(0.4, 0.6, (1, 3)), s, 0) for s in spreads])) for _ in range(2)
    ]
    mean = rank_views(views[0][:, :3], views[1][:, :3])
    assert mean.median > 70
    both = rank_views(*equal_columns(*views))
    assert both.median < mean.median / 2
    assert rank_views(views[0][:, 3:], views[1][:, 3:]).median == 1.0


def test_statistics_are_those_of_each_channel() -> None:
    images = np.random.default_rng(1).uniform(0, 1, (3, 3, 5, 4)).astype(np.float32)
    expected = [[*(image[c].mean() for c in range(3)), *(image[c].std() for c in range(3))] for image in images]
    np.testing.assert_allclose(colour_statistics(images), expected, rtol=1e-5)
