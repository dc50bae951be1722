"""Scaling on paper: the arithmetic by hand, terms that stand where they are said to, pages that show what is printed."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
import scaling
from scaling import BASE, LARGE, SMALL, Terms, duration, epoch_hours, gradients_ms, loader_us, memory_gb, short, step

ROOT = Path(__file__).parents[2]
RESULTS = (ROOT / "experiments" / "RESULTS.md").read_text(encoding="utf-8")
PAGES = {"scaling": "docs/scaling.md", "hours": "docs/guide.md", "paper": "experiments/paper_in1k.md"}
ROUND = Terms(
    full_step_ms=100,
    full_step_tiles=100,
    least_step_ms=60,
    workers_per_gpu=10,
    loader_us=1000,
    opening_us=8000,
    files_open=500,
    gradient_mb=100,
    inside_gb_s=100,
    between_gb_s=10,
    gpus_a_machine=8,
)


def stored(name: str) -> dict[str, float]:
    figures: dict[str, float] = json.loads((ROOT / "experiments" / "results" / name).read_text(encoding="utf-8"))
    return figures


def test_a_step_is_the_slowest_of_what_runs_side_by_side_and_then_the_gradients() -> None:
    one = step(ROUND, gpus=1, batch=100, slides=100)
    assert (one.gpu_ms, one.python_ms, one.loader_ms, one.gradients_ms) == (100, 60, 10, 0)
    assert (one.ms, one.first_limit) == (100, "GPU")
    eight = step(ROUND, gpus=8, batch=400, slides=100)  # 50 tiles a GPU: 50 ms of work in a step of 60
    assert (eight.gpu_ms, eight.python_ms, eight.first_limit) == (50, 60, "Python")
    assert eight.ms == pytest.approx(60 + 2 * 7 / 8 * 100 / 100)


def test_more_tiles_than_a_pass_holds_are_several_passes() -> None:
    four = step(ROUND, gpus=1, batch=400, slides=100)
    assert (four.gpu_ms, four.python_ms, four.loader_ms) == (400, 240, 40)


def test_a_tile_of_more_slides_than_are_kept_open_pays_for_opening_its_file() -> None:
    assert loader_us(ROUND, 500) == 1000
    assert loader_us(ROUND, 100) == 1000
    assert loader_us(ROUND, 2000) == pytest.approx(1000 + 0.75 * 8000)
    busy = step(ROUND, gpus=1, batch=200, slides=2000)
    assert busy.loader_ms == pytest.approx(200 * 7 / 10)
    assert busy.first_limit == "GPU"
    assert step(replace(ROUND, workers_per_gpu=5), gpus=1, batch=200, slides=2000).first_limit == "loader"


def test_the_slowest_link_carries_the_gradients() -> None:
    assert gradients_ms(ROUND, 1) == 0
    assert gradients_ms(ROUND, 8) == pytest.approx(1.75)
    assert gradients_ms(ROUND, 16) == pytest.approx(2 * 15 / 16 * 10)


def test_an_epoch_is_its_whole_batches() -> None:
    assert epoch_hours(ROUND, 36_000 * 100 + 99, gpus=1, batch=100, slides=1) == pytest.approx(1.0)


def test_memory_is_that_of_each_rank_with_its_workers() -> None:
    terms = replace(ROUND, order_bytes=16, held_mb=2, tiles_a_slide=1000)
    assert memory_gb(terms, 1e6, ranks=2) == pytest.approx(2 * (0.016 + 10 * 500 * 0.002))
    assert memory_gb(terms, 1e5, ranks=1) == pytest.approx(0.0016 + 10 * 100 * 0.002)  # 100 slides: no more can be open


def test_a_larger_model_costs_what_its_multiply_adds_say() -> None:
    assert SMALL.macs(224) == 12 * (12 * 384**2 * 197 + 2 * 384 * 197**2)
    assert 4.2e9 < SMALL.macs(224) < 4.7e9
    assert 3.5 < BASE.step_macs / SMALL.step_macs < 4.0
    large = step(ROUND, gpus=1, batch=100, slides=1, model=LARGE)
    assert large.gpu_ms == pytest.approx(100 * LARGE.step_macs / SMALL.step_macs)
    assert large.python_ms == 120  # twice the layers


def test_figures_have_three_digits() -> None:
    assert [short(x) for x in (0, 0.00261, 0.1234, 9.876, 98.76, 1234, 271_095)] == [
        "0",
        "0.00261",
        "0.123",
        "9.88",
        "98.8",
        "1,230",
        "271,000",
    ]


def test_measured_terms_are_those_of_the_results() -> None:
    terms, stored_pixels = Terms(), json.loads((ROOT / "experiments/results/loader.json").read_text())["stored pixels"]
    assert terms.loader_us == pytest.approx(1e6 / stored_pixels["loader_per_s"], abs=0.5)
    assert terms.decode_us == pytest.approx(stored_pixels["tile_us"], abs=0.5)
    opened = stored("open.json")
    assert terms.opening_us == pytest.approx(opened["opening_us"], abs=5)
    assert terms.opening_mb == pytest.approx(opened["opening_mb"], abs=0.005)
    tiling = json.loads((ROOT / "experiments/results/tiling.json").read_text())
    tiles = tiling["megapixels"] * 1e6 / 512**2
    seconds = tiling["seconds"]
    assert terms.encode_us == pytest.approx((seconds["tile"] - seconds["read"]) * 2 / tiles * 1e6, abs=1)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("full_step_ms", 153, "(153 ms / 136 ms)"),
        ("full_step_tiles", 256, "256 tiles a step"),
        ("least_step_ms", 94, "(a step of 94 ms holds 76 ms of work"),
        ("full_step_gib", 33, "1,671; 33 GiB"),
        ("workers_per_gpu", 12, "twelve loader workers"),
        ("jpeg_mpx_s", 100, "| 512 to 256 px, JPEG | 96 to 102 |"),
        ("fractional_mpx_s", 56, "| 526.5 to 256 px (0.2431 to 0.5 µm), JPEG | 56 |"),
        ("jp2_mpx_s", 14, "| JPEG 2000, native and half | 14 |"),
        ("annotate_us", 10.7, "10.7 s against 37.5 s"),
        ("propose_us", 80_600, "80.6 ms a tile"),
        ("embed_us", 132_000, "132 ms a tile"),
        ("tile_kb", 30.1, "30.1 kB a tile"),
    ],
)
def test_a_term_stands_in_the_results(name: str, value: float, words: str) -> None:
    assert getattr(Terms(), name) == value
    assert words in " ".join(RESULTS.split())


def test_terms_of_the_code_are_those_of_the_code() -> None:
    from odis_path.config import load_config
    from odis_path.data.tile_index import _MOST_OPEN, TileIndex
    from odis_path.model.network import build_network

    terms = Terms()
    assert terms.files_open == _MOST_OPEN
    index = TileIndex([Path("a.h5")], np.zeros(1, np.int32), np.zeros(1, np.int32), ["a"], ["a"], 256, 0.5)
    order = np.random.default_rng(0).permutation(len(index))
    assert terms.order_bytes == index.slide.itemsize + index.row.itemsize + order.itemsize
    student = build_network(load_config("odis_wsi"), student=True)
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    assert terms.gradient_mb == pytest.approx(trained * 4 / 1e6, abs=0.05)
    boxes, offsets, crc32 = terms.objects_a_tile * 4 * 4, 8 + 8, 4
    assert terms.held_mb == pytest.approx((boxes + offsets + crc32) * terms.tiles_a_slide / 1e6, abs=0.01)


@pytest.mark.parametrize("part", PAGES)
def test_the_page_shows_what_the_script_prints(part: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "experiments" / "scaling.py"), part], capture_output=True, text=True, check=True
    )
    page = (ROOT / PAGES[part]).read_text(encoding="utf-8")
    for table in done.stdout.strip().split("\n\n"):
        assert table in page, f"python experiments/scaling.py {part}: put what it prints into {PAGES[part]}"


def test_a_lab_puts_in_its_own_terms() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "experiments" / "scaling.py"), "hours", "--full-step-ms", "306"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"an epoch | 1 GPU | {duration(1e6 * 306e-3 / 256 / 3600)} |" in done.stdout
    assert scaling.of_hours(Terms()) not in done.stdout


def test_a_row_of_hours_is_tiles_times_the_time_of_one() -> None:
    terms = replace(ROUND, tiles_a_slide=1000, propose_us=36_000, cores_a_machine=10)
    rows = {row.split(" | ")[0].strip("| "): row for row in scaling.of_hours(terms).splitlines()}
    assert rows["`propose`"] == "| `propose` | 10 cores | 6.0 min | 1.0 h | 10 h |"  # 100,000 tiles x 36 ms / 10
    assert rows["`pretrain`, an epoch"] == "| `pretrain`, an epoch | 1 GPU | 1.7 min | 17 min | 2.8 h |"


def test_durations_are_in_the_unit_that_reads_best() -> None:
    assert [duration(h) for h in (0.001, 0.5, 1, 33.1, 47.9, 48, 229)] == [
        "3.6 s",
        "30 min",
        "1.0 h",
        "33 h",
        "48 h",
        "2.0 days",
        "9.5 days",
    ]


@pytest.mark.parametrize("figures", ["0.529 0.581", "0.832 0.648", "0.023 0.040", "-0.017 0.002", "347.9"])
def test_figures_that_the_guide_takes_from_the_results_stand_there(figures: str) -> None:
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    for figure in figures.split():
        assert figure in guide
        assert figure in RESULTS, f"docs/guide.md says {figure}, which stands no longer in experiments/RESULTS.md"
