"""The study: runs resume, rows are whole, what is packed is enough, intervals are what they say."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "experiments" / "study.py"


def study(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(STUDY), *map(str, arguments)], capture_output=True, text=True, check=False, env=environment
    )


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder in which one seed has run."""
    work = tmp_path_factory.mktemp("study")
    done = study("run", "--size", "smoke", "--seeds", "0", "--work", work, "--rows", work / "rows.jsonl")
    assert done.returncode == 0, done.stderr
    return work


def rows_of(work: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work / "rows.jsonl").read_text().splitlines()]


def test_a_run_writes_a_row_a_finished_arm_and_goes_on_where_it_stopped(first: Path) -> None:
    before = (first / "rows.jsonl").read_text()
    keys = {(row["corpus"], row["arm"], row["seed"]) for row in rows_of(first)}
    assert keys == {(corpus, arm, 0) for corpus in ("cells", "mosaic-1") for arm in ("untrained", "odis")}
    done = study(
        "run", "--size", "smoke", "--seeds", "0,1", "--corpora", "cells", "--work", first, "--rows", first / "rows.jsonl"
    )
    assert done.returncode == 0, done.stderr
    after = (first / "rows.jsonl").read_text()
    assert after.startswith(before)
    assert [row["seed"] for row in rows_of(first)[4:]] == [1, 1]
    for row in rows_of(first):
        for scores in row["scores"].values():
            for probe in scores.values():
                assert 0 <= probe["balanced_accuracy"] <= 1
                assert len(probe["by_patient"]) > 1
    told = study("table", "--rows", first / "rows.jsonl")
    assert "| odis - untrained | masked, knn | 2 |" in told.stdout


def test_what_is_packed_is_enough_to_run(first: Path, tmp_path: Path) -> None:
    packed = study("pack", tmp_path / "study.tar", "--size", "smoke", "--seeds", "0", "--work", first)
    assert packed.returncode == 0, packed.stderr
    arguments = ("--size", "smoke", "--seeds", "0", "--corpora", "mosaic-1", "--arms", "untrained")
    done = study("run", *arguments, "--packed", tmp_path / "study.tar", "--work", tmp_path, "--rows", tmp_path / "rows.jsonl")
    assert done.returncode == 0, done.stderr
    there = [row for row in rows_of(first) if (row["corpus"], row["arm"]) == ("mosaic-1", "untrained")]
    assert rows_of(tmp_path)[0]["scores"] == there[0]["scores"]


def test_an_arm_that_is_none_is_told_in_one_line(tmp_path: Path) -> None:
    done = study("run", "--size", "smoke", "--arms", "odiss", "--work", tmp_path)
    assert done.returncode != 0
    assert done.stderr.startswith("--arms: no such arm odiss; there are untrained")


@pytest.fixture(scope="module")
def tables() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "experiments" / "study_table.py"))


def test_the_interval_over_seeds_is_that_of_student(tables: dict[str, Any]) -> None:
    low, high = tables["t_interval"](np.array([0.01, 0.03, 0.02]))
    assert (low, high) == pytest.approx((0.02 - 4.3027 * 0.01 / 3**0.5, 0.02 + 4.3027 * 0.01 / 3**0.5), abs=1e-5)


def test_the_interval_over_patients_is_paired(tables: dict[str, Any]) -> None:
    """Two equal arms differ by nothing in every draw; one that is better in every patient is so in every draw."""
    rng = np.random.default_rng(0)
    right = rng.integers(20, 40, (12, 2))

    def arm(lift: int) -> dict[str, Any]:
        return {
            "by_patient": {str(i): [int(a) + lift, 40 - int(a), 40 - int(b), int(b) + lift] for i, (a, b) in enumerate(right)}
        }

    assert tables["patient_interval"]([(arm(0), arm(0))] * 3) == (0.0, 0.0)
    low, high = tables["patient_interval"]([(arm(10), arm(0))] * 3)
    assert 0 < low < high < 0.2
