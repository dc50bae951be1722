"""Schedules that do not fit the length of a run are told, with keys and values that do."""

from __future__ import annotations

import re
from math import prod

import pytest

from odis_path.config import PretrainConfig
from odis_path.training.optim import start_left, step_values
from odis_path.training.shortcut.schedule import schedule_warnings

PUBLISHED = (0.996, 1.0)


def config(**optim: object) -> PretrainConfig:
    return PretrainConfig.model_validate({"optim": {"warmup_epochs": 0, **optim}})


@pytest.mark.parametrize("steps", [1, 40, 400, 1000, 1777, 20_000])
@pytest.mark.parametrize("ema", [(0.9, 0.99), (0.996, 1.0), (0.9995, 0.9995)])
def test_the_share_of_the_start_is_the_product_of_all_momenta(steps: int, ema: tuple[float, float]) -> None:
    settings = config(ema=ema)
    every = prod(step_values(settings, step, 10, steps).ema for step in range(steps))
    assert start_left(ema, steps) == pytest.approx(every, rel=1e-9)


def test_a_momentum_of_zero_leaves_nothing() -> None:
    assert start_left((0.0, 0.0), 40) == 0.0


def test_the_measured_case_is_told_and_what_is_proposed_cures_it() -> None:
    """0.996 to 1 over 400 steps leaves 45 % of the random start in the teacher."""
    (warning,) = schedule_warnings(config(ema=PUBLISHED), 40, 400)
    assert "45%" in warning
    for steps in (5, 12, 40, 400, 1400):
        (warning,) = schedule_warnings(config(ema=PUBLISHED), 40, steps)
        pair = re.search(r"optim\.ema=\[([\d.]+),([\d.]+)\]", warning)
        assert pair, warning
        cured = float(pair[1]), float(pair[2])
        assert start_left(cured, steps) < 0.05
        assert not schedule_warnings(config(ema=cured), 40, steps)


def test_a_momentum_that_follows_the_run_is_never_warned_of() -> None:
    for steps in (1, 5, 40, 400, 5000):
        assert not schedule_warnings(config(ema="auto"), 40, steps)


def test_a_run_long_enough_for_its_momentum_is_not_warned_of() -> None:
    assert start_left(PUBLISHED, 2000) < 0.05
    assert not schedule_warnings(config(ema=PUBLISHED), 1000, 2000)


@pytest.mark.parametrize(
    ("epochs", "warns", "cut"), [(3.3, False, False), (3.5, True, False), (9.5, True, False), (12.0, True, True)]
)
def test_a_warm_up_longer_than_a_third_of_the_run_is_told(epochs: float, warns: bool, cut: bool) -> None:
    settings = config(warmup_epochs=epochs, ema=(0.5, 0.9))
    warnings = schedule_warnings(settings, 10, 100)
    assert bool(warnings) == warns
    assert any("cut to 99" in warning for warning in warnings) == cut
    assert all("optim.warmup_epochs" in warning for warning in warnings)
