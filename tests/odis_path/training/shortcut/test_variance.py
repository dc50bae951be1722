"""The share of variance that a grouping explains, against regression and against variances that were put in."""

from __future__ import annotations

import numpy as np
import pytest

from odis_path.training.shortcut.variance import variance_share


def by_regression(x: np.ndarray, groups: np.ndarray) -> float:
    """Adjusted R squared of a least-squares fit to indicators of the groups, all columns together, in float64."""
    indicators = (groups[:, None] == np.unique(groups)[None]).astype(np.float64)
    fit = indicators @ np.linalg.lstsq(indicators, x, rcond=None)[0]
    r2 = 1 - ((x - fit) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    n, m = indicators.shape
    return float(1 - (1 - r2) * (n - 1) / (n - m))


@pytest.mark.parametrize("seed", range(5))
def test_the_share_is_the_adjusted_r_squared_of_a_regression_on_the_groups(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, 7, 60) * 3 - 1  # uneven, with gaps, one negative
    x = rng.normal(size=(9, 5))[np.unique(groups, return_inverse=True)[1]] * 0.8 + rng.normal(size=(60, 5)) + 100
    share = variance_share(x, groups)
    assert share == pytest.approx(by_regression(x, groups), abs=1e-12)
    assert 0.1 < by_regression(x, groups) < 0.9


def test_the_share_is_what_was_put_in() -> None:
    """Patients, slides in them and tiles in those add variances 4, 2 and 1 to 3 of noise; an independent class adds none."""
    rng = np.random.default_rng(0)
    shape = (40, 5, 5, 4)
    patient, slide, tile, noise = (
        np.broadcast_to(rng.normal(scale=sd, size=(*shape[:k], *(1,) * (4 - k), 16)), (*shape, 16))
        for k, sd in ((1, 2.0), (2, np.sqrt(2)), (3, 1.0), (4, np.sqrt(3)))
    )
    x = (patient + slide + tile + noise).reshape(-1, 16)
    row = np.arange(len(x))
    shares = [variance_share(x, row // rows) for rows in (100, 20, 4)]
    assert shares == pytest.approx([0.4, 0.6, 0.7], abs=0.05)
    assert variance_share(x, rng.integers(0, 5, len(x))) == pytest.approx(0.0, abs=0.005)


def test_many_small_groups_explain_nothing_by_chance() -> None:
    """Four rows a tile: eta squared would be a quarter, whatever the rows are."""
    x = np.random.default_rng(1).normal(size=(800, 32))
    assert variance_share(x, np.arange(800) // 4) == pytest.approx(0.0, abs=0.02)


def test_equal_rows_of_a_group_are_explained_in_full_and_shift_and_scale_do_not_matter() -> None:
    rng = np.random.default_rng(2)
    groups = np.arange(60) // 4
    x = rng.normal(size=(15, 6))[groups]
    assert variance_share(x, groups) == pytest.approx(1.0, abs=1e-12)
    noisy = x + rng.normal(size=x.shape)
    share = variance_share(noisy, groups)
    assert variance_share(7.0 * noisy - 3.0, groups) == pytest.approx(share, abs=1e-12)
    assert variance_share(noisy.astype(np.float32), groups) == pytest.approx(share, abs=1e-5)


@pytest.mark.parametrize(
    ("x", "groups"),
    [
        (np.random.default_rng(0).normal(size=(6, 3)), np.zeros(6)),
        (np.random.default_rng(0).normal(size=(6, 3)), np.arange(6)),
        (np.ones((6, 3)), np.arange(6) // 2),
        (np.zeros((0, 3)), np.zeros(0)),
    ],
    ids=["one group", "a group a row", "collapsed", "no rows"],
)
def test_nothing_is_said_where_nothing_can_be(x: np.ndarray, groups: np.ndarray) -> None:
    assert variance_share(x, groups) is None
