"""Schedules that follow the number of steps: how fast the teacher forgets its start, how long the rate rises."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from annotations.errors import UserError
from odis_path.checkpoint import load_checkpoint
from odis_path.config import PretrainConfig, load_config
from odis_path.training import loop
from odis_path.training.optim import ema_ends, schedules_line, start_left, step_values, warmup_epochs, with_schedules
from odis_path.training.setup import prepare
from tests.odis_path.conftest import take_steps, tiny_config
from tests.odis_path.training.test_loop import CPU, assert_equal_states

AUTO: dict[str, Any] = {"warmup_epochs": "auto", "ema": "auto"}
PAPER = ["odis", "ibot", "dino", "odis_in1k", "ibot_in1k", "dino_in1k", "odis_crop_only", "odis_mask_only", "odis_polygon",
         "odis_readonly", "odis_multi_obj", "linear_pool"]  # fmt: skip
SLIDES = [f"{method}_{kind}" for method in ("odis", "ibot", "dino") for kind in ("wsi", "continue")]


def automatic(epochs: float = 100) -> PretrainConfig:
    return PretrainConfig.model_validate({"optim": {**AUTO, "epochs": epochs, "batch_size": 32}})


def product_of_momenta(config: PretrainConfig, steps: int) -> float:
    """The share of the start weights in the teacher, multiplied up step by step as the update does."""
    left = 1.0
    for step in range(steps):
        left *= step_values(config, step, max(1, steps // 10), steps).ema
    return left


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 7, 10, 37, 100, 400, 700, 1496, 1497, 1498, 5000, 20_000])
def test_a_teacher_keeps_at_most_a_twentieth_of_its_start(steps: int) -> None:
    config = automatic()
    left = product_of_momenta(config, steps)
    assert left <= 0.05
    assert start_left(ema_ends(config.optim, steps), steps) == pytest.approx(left, rel=1e-9)


def test_a_short_run_keeps_no_less_than_it_has_to() -> None:
    """The bound is met nearly exactly: the teacher is as slow as it may be."""
    assert [product_of_momenta(automatic(), steps) for steps in (100, 400, 1400)] == pytest.approx([0.05] * 3, abs=0.006)


def test_the_published_momentum_would_keep_nearly_half_of_a_short_run() -> None:
    published = PretrainConfig.model_validate({"optim": {"ema": [0.996, 1.0]}})
    assert product_of_momenta(published, 400) == pytest.approx(0.447, abs=0.001)


@pytest.mark.parametrize("steps", [1, 5, 6, 400, 1496])
def test_the_first_momentum_is_that_of_the_formula(steps: int) -> None:
    start, end = ema_ends(automatic().optim, steps)
    assert start == pytest.approx(max(0.0, 1 - 2 * math.log(20) / (steps + 1)), abs=1e-15)
    assert end == 1.0


def test_the_momentum_rises_with_the_length_and_is_the_published_one_from_1497_steps_on() -> None:
    starts = [ema_ends(automatic().optim, steps)[0] for steps in range(1, 3000)]
    assert all(a <= b for a, b in pairwise(starts))
    assert 0 <= starts[0] < starts[1495] < 0.996
    assert set(starts[1496:]) == {0.996}


@pytest.mark.parametrize("total", [6, 120, 1496, 4000])
def test_momenta_follow_half_a_cosine(total: int) -> None:
    start = max(0.0, min(0.996, 1 - 2 * math.log(20) / (total + 1)))
    here = np.array([step_values(automatic(), step, 10, total).ema for step in range(total)])
    expected = 1 - (1 - start) * np.cos(np.pi * np.arange(total) / (2 * total)) ** 2
    np.testing.assert_allclose(here, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("epochs", "rising"), [(0.5, 0.05), (5, 0.5), (30, 3), (100, 10), (800, 10)])
def test_the_rate_rises_for_a_tenth_of_the_run_and_at_most_ten_epochs(epochs: float, rising: float) -> None:
    config = automatic(epochs)
    assert warmup_epochs(config.optim) == pytest.approx(rising, rel=1e-12)
    rates = [step_values(config, step, 100, round(epochs * 100)).lr for step in range(round(epochs * 100))]
    assert int(np.argmax(rates)) in (round(rising * 100) - 1, round(rising * 100))


def test_what_is_given_is_taken_as_it_is() -> None:
    config = PretrainConfig.model_validate({"optim": {"warmup_epochs": 7, "ema": [0.9, 0.95], "epochs": 10}})
    assert (warmup_epochs(config.optim), ema_ends(config.optim, 5)) == (7, (0.9, 0.95))
    assert schedules_line(config, 10, 100) == ""
    assert with_schedules(config, 100) == config


@pytest.mark.parametrize("name", PAPER)
def test_published_recipes_keep_the_published_numbers(name: str) -> None:
    optim = load_config(name).optim
    assert (optim.ema, optim.warmup_epochs) == ((0.996, 1.0), 10)


@pytest.mark.parametrize("name", SLIDES)
def test_recipes_for_slides_follow_the_length_of_the_run(name: str) -> None:
    for epochs in (2, 100):
        optim = load_config(name, [f"optim.epochs={epochs}"]).optim
        assert optim.ema == "auto"
        assert warmup_epochs(optim) == pytest.approx(epochs / 10)


@pytest.mark.parametrize("value", ["fast", "true", "[1.5,2]", "0.9", "[0.9]"])
def test_an_error_names_the_key_once(value: str) -> None:
    with pytest.raises(UserError, match=r"optim\.ema(\[[01]\])? is ") as caught:
        load_config("odis_wsi", [f"optim.ema={value}"])
    assert "given" not in str(caught.value)


def test_a_run_says_once_what_was_derived_and_keeps_the_numbers(
    tiny_tiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tiny_tiles, tmp_path / "run", optim=AUTO)
    checkpoint = loop.pretrain(config)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("schedules of")]
    start = 1 - 2 * math.log(20) / 13
    assert len(lines) == 1
    assert lines[0].startswith("schedules of 12 steps: warm-up of 1 steps (optim.warmup_epochs=0.2); ")
    assert f"momentum from {start:.4g} to 1 (optim.ema)" in lines[0]
    for stored in (load_checkpoint(checkpoint).config, load_config(tmp_path / "run" / "config.yaml")):
        assert stored.optim.ema == pytest.approx((start, 1.0), abs=1e-15)
        assert stored.optim.warmup_epochs == pytest.approx(0.2)
    loop.pretrain(config)
    assert "schedules of" not in capsys.readouterr().err


def test_a_derived_run_goes_on_bit_for_bit(tiny_tiles: Path, tmp_path: Path) -> None:
    """One run in one go; one that stops and goes on; one whose numbers are those that were derived."""
    straight = loop.pretrain(tiny_config(tiny_tiles, tmp_path / "whole", optim=AUTO))
    halves = tiny_config(tiny_tiles, tmp_path / "halves", optim=AUTO)
    run = prepare(halves, CPU)
    list(take_steps(run, 5))
    loop.save(run)
    assert_equal_states(straight, loop.pretrain(halves))
    numbers = {key: getattr(run.config.optim, key) for key in AUTO}
    given = loop.pretrain(tiny_config(tiny_tiles, tmp_path / "given", optim=numbers))
    assert_equal_states(straight, given)


def test_a_run_begun_with_other_numbers_goes_on_with_them(tiny_tiles: Path, tmp_path: Path) -> None:
    """As one that an older version began, when the default was the published momentum."""
    older = tiny_config(tiny_tiles, tmp_path / "run", optim={"warmup_epochs": 0.5, "ema": [0.996, 1.0]})
    begun = prepare(older, CPU)
    list(take_steps(begun, 5))
    loop.save(begun)
    resumed = loop.pretrain(tiny_config(tiny_tiles, tmp_path / "run", optim=AUTO))
    straight = loop.pretrain(tiny_config(tiny_tiles, tmp_path / "whole", optim=dict(older.optim)))
    assert_equal_states(straight, resumed)
    assert load_checkpoint(resumed).config.optim.ema == (0.996, 1.0)
