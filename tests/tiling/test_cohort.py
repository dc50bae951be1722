"""A cohort goes on past bad items and dying workers, and says what failed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from annotations.errors import UserError
from tiling.cohort import DIED, Outcome, finish, run_cohort


def work(item: str) -> dict:
    """What the item's name asks for (runs in workers)."""
    if item == "bad":
        raise UserError("bad.svs: broken: copy it again")
    if item == "bug":
        raise ZeroDivisionError("by\nzero")
    if item == "dies":
        os._exit(7)
    return {"skipped": item == "old", "tiles": len(item), "message": "noted" if item == "odd" else ""}


def summary(outcomes: list[Outcome]) -> list[tuple[str, bool, bool, str]]:
    return [(outcome.item, outcome.ok, outcome.skipped, outcome.message) for outcome in outcomes]


EXPECTED = [
    ("one", True, False, ""),
    ("bad", False, False, "bad.svs: broken: copy it again"),
    ("old", True, True, ""),
    ("bug", False, False, "ZeroDivisionError: by zero"),
    ("odd", True, False, "noted"),
]


@pytest.mark.parametrize("workers", [1, 2])
def test_outcomes_come_in_order_and_failures_stop_nobody(workers: int) -> None:
    outcomes = run_cohort([row[0] for row in EXPECTED], work, title="t", workers=workers)
    assert summary(outcomes) == EXPECTED
    assert outcomes[0].info == {"tiles": 3}


def test_a_worker_that_dies_takes_only_its_item_with_it() -> None:
    outcomes = run_cohort(["one", "dies", "two", "three", "four"], work, title="t", workers=2)
    assert [(outcome.item, outcome.ok) for outcome in outcomes] == [
        ("one", True), ("dies", False), ("two", True), ("three", True), ("four", True),
    ]  # fmt: skip
    assert outcomes[1].message == DIED


def test_the_same_work_runs_on_a_dask_cluster() -> None:
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        processes=True, n_workers=1, threads_per_worker=1, dashboard_address=None, host="127.0.0.1"
    ) as cluster:
        outcomes = run_cohort([row[0] for row in EXPECTED], work, title="t", scheduler=cluster.scheduler_address)
    assert summary(outcomes) == EXPECTED


def test_finish_sums_columns_lists_failures_and_gives_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = run_cohort([row[0] for row in EXPECTED], work, title="t", workers=1)
    assert finish(outcomes, "tile", Path("some/out"), ("tiles",)) == 1
    printed = capsys.readouterr().out
    assert "bad.svs: broken: copy it again" in printed
    assert "ZeroDivisionError: by zero" in printed
    assert "note: odd: noted" in printed
    assert printed.rstrip().endswith("output: some/out")
    assert "9" in printed  # tiles of one, old and odd
    assert finish([outcome for outcome in outcomes if outcome.ok], "tile", Path("out")) == 0


def test_an_empty_cohort_is_no_failure() -> None:
    assert run_cohort([], work, title="t") == []


def test_importing_the_rooms_stays_quick_and_brings_no_torch() -> None:
    heavy = "torch", "geopandas", "skimage", "matplotlib", "scipy", "sklearn"
    code = "import sys, annotations, tiling, tiling.tile, tiling.propose, tiling.scan, tiling.slidefile; "
    code += f"print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True
    )
    assert done.stdout.strip() == "[]"
