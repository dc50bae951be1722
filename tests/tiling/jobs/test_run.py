"""A cohort goes on past bad items and dying workers, and says what failed."""

from __future__ import annotations

import csv
import ctypes
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from annotations.errors import UserError
from tiling.cohort.manifest import read_manifest
from tiling.cohort.scan import scan
from tiling.jobs.outcome import DIED, ItemResult, Note, Outcome, notes_of
from tiling.jobs.run import run_cohort
from tiling.jobs.summary import NOT_TRIED, Outcomes, summarise
from tiling.storage.atomic import DiskFullError
from tiling.storage.locks import is_locked, lock_file, lock_path

ROOT = Path(__file__).parents[3]


def work(item: str) -> ItemResult:
    """Do what the item's name asks for (runs in workers)."""
    if item == "bad":
        raise UserError("bad.svs: broken: copy it again")
    if item == "bug":
        raise ZeroDivisionError("by\nzero")
    if item == "dies":
        os._exit(7)
    if item == "crashes":
        ctypes.string_at(0)
    if item == "hangs":
        ctypes.PyDLL(None).sleep(600)  # within C, and without letting go of the interpreter
    if item == "full":
        raise DiskFullError("full.h5: cannot be written: No space left on device: make room")
    if item == "slow":
        time.sleep(1)
    return ItemResult({"tiles": len(item)}, [Note("noted")] if item == "odd" else [], skipped=item == "old")


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
        ("one", True),
        ("dies", False),
        ("two", True),
        ("three", True),
        ("four", True),
    ]
    assert outcomes[1].message == DIED


def test_a_crash_in_a_library_takes_only_its_item_with_it() -> None:
    outcomes = run_cohort(["one", "crashes", "slow", "two", "dies", "three"], work, title="t", workers=2)
    assert {outcome.item: outcome.message for outcome in outcomes if not outcome.ok} == {"crashes": DIED, "dies": DIED}
    assert [outcome.item for outcome in outcomes if outcome.ok] == ["one", "slow", "two", "three"]


class DiesWhenTaken(str):
    """An item at which a worker dies before its work begins, as when what it needs cannot be loaded."""

    def __reduce__(self) -> tuple:
        return die, ()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_as_it_takes_its_item_takes_only_that_with_it() -> None:
    outcomes = run_cohort(["slow", "one", DiesWhenTaken("taken"), "two", "three"], work, title="t", workers=2)
    assert [outcome.item for outcome in outcomes if outcome.ok] == ["slow", "one", "two", "three"]
    assert outcomes[2].message == DIED


@pytest.mark.parametrize("workers", [1, 2])
def test_a_reader_that_hangs_is_given_up_and_the_run_goes_on(workers: int, tmp_path: Path) -> None:
    begin = time.monotonic()
    outcomes = run_cohort(["one", "hangs", "two", "hangs", "three"], work, title="t", workers=workers, timeout=8)
    assert time.monotonic() - begin < 120  # not 600 s twice
    assert [outcome.ok for outcome in outcomes] == [True, False, True, False, True]
    assert "no result after 8 s (--timeout)" in outcomes[1].message
    with pytest.raises(UserError, match="--timeout 0"):
        run_cohort(["one"], work, title="t", timeout=0)


def hold_and_hang(path: Path) -> None:
    with lock_file(path):
        if path.name == "b":
            time.sleep(600)
        path.touch()


def test_what_was_given_up_is_free_for_the_next_run(tmp_path: Path) -> None:
    items = [tmp_path / name for name in "abc"]
    outcomes = run_cohort(items, hold_and_hang, title="t", workers=2, timeout=10, name=lambda path: path.name)
    assert [outcome.ok for outcome in outcomes] == [True, False, True]
    run_cohort([], work, title="t", folder=tmp_path)
    end = time.monotonic() + 30
    while is_locked(lock_path(tmp_path / "b")):
        assert time.monotonic() < end
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_ends_the_run_and_says_what_was_not_tried(workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = run_cohort(["one", "full", "full", *["slow"] * 8], work, title="t", workers=workers)
    untried = [outcome.item for outcome in outcomes if outcome.message == NOT_TRIED]
    assert len(untried) >= 7
    assert outcomes[0].ok
    stopped = Outcomes(outcomes, "tile", Path("out"))
    stopped.print()
    assert stopped.failed
    printed = capsys.readouterr().out
    assert printed.count("No space left on device") == 2
    assert f"not tried: {len(untried)}, from slow on" in printed


def test_worker_processes_that_cannot_start_are_told_once(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("from tiling.jobs.run import run_cohort\nrun_cohort(range(4), str, title='t', workers=2)\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.count("UserError: worker processes die as they start") == 1


def test_ten_thousand_slides_start_at_once_and_stay_small(tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.csv"
    rows = [f"slide-{i},{tmp_path}/folder-{i % 100}/slide-{i}.svs,P{i // 3},0.25" for i in range(10_000)]
    manifest.write_text("\n".join(["slide_id,path,patient_id,mpp", *rows]))
    begin = time.monotonic()
    items = read_manifest(manifest)
    first: list[float] = []

    def stub(item: object) -> ItemResult:
        if not first:
            first.append(time.monotonic() - begin)
        return ItemResult({"tiles": 1000, "megapixels": 50.0})

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = run_cohort(items, stub, title="t", workers=1, name=str, folder=tmp_path)
    assert first[0] < 10
    assert time.monotonic() - begin < 10
    assert len(outcomes) == 10_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000  # kB


def test_ten_thousand_items_go_through_worker_processes(tmp_path: Path) -> None:
    begin = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = run_cohort((f"slide-{i}" for i in range(10_000)), work, title="t", workers=2)
    assert [outcome.item for outcome in outcomes[::2500]] == ["slide-0", "slide-2500", "slide-5000", "slide-7500"]
    assert all(outcome.ok for outcome in outcomes)
    assert time.monotonic() - begin < 120
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000  # kB


def test_the_same_work_runs_on_a_dask_cluster() -> None:
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        processes=True, n_workers=1, threads_per_worker=1, dashboard_address=None, host="127.0.0.1"
    ) as cluster:
        outcomes = run_cohort([row[0] for row in EXPECTED], work, title="t", scheduler=cluster.scheduler_address)
    assert summary(outcomes) == EXPECTED


def test_outcomes_sum_columns_and_list_failures(capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = run_cohort([row[0] for row in EXPECTED], work, title="t", workers=1)
    result = Outcomes(outcomes, "tile", Path("some/out"), ("tiles",))
    result.print()
    assert {outcome.item for outcome in result.failed} == {name for name, ok, *_ in EXPECTED if not ok}
    printed = capsys.readouterr().out
    assert "bad.svs: broken: copy it again" in printed
    assert "ZeroDivisionError: by zero" in printed
    assert "note: odd: noted" in printed
    assert printed.rstrip().endswith("output: some/out")
    assert "9" in printed  # tiles of one, old and odd
    assert not Outcomes([outcome for outcome in outcomes if outcome.ok], "tile", Path("out")).failed


def test_seconds_are_those_of_the_run_and_those_of_workers_are_summed_beside(capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = [Outcome(f"S{i}", ok=True, seconds=100.0) for i in range(40)]
    Outcomes(outcomes, "tile", Path("out"), wall_s=1012.34).print()
    lines = capsys.readouterr().out.splitlines()
    heads, cells = ([cell.strip() for cell in lines[i].replace("│", "┃").split("┃")] for i in (2, 4))
    row = dict(zip(heads, cells, strict=True))
    assert (row["seconds"], row["worker seconds"]) == ("1,012.3", "4,000.0")


def test_a_failure_stays_on_one_line_however_long(capsys: pytest.CaptureFixture[str]) -> None:
    long = [Outcome("a slide of a very long name" * 3, ok=False, error="short"), Outcome("b", ok=False, error="why " * 99)]
    Outcomes(long, "tile", Path("out")).print()
    assert sum("why" in line for line in capsys.readouterr().out.splitlines()) == 1


def test_a_remark_on_many_items_is_one_line_and_stands_before_the_sums(capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = [Outcome(f"S{i}", ok=True, notes=notes_of("no mpp" if i % 2 else ""), redone="it changed") for i in range(9)]
    Outcomes(outcomes, "tile", Path("out")).print()
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["note: made anew: S0 and 8 more: it changed", "note: S1 and 3 more: no mpp"]
    assert lines[2].strip() == "tile"


def test_a_note_on_many_items_is_one_line_with_its_numbers_summed_and_the_first_ids() -> None:
    lost = [Note("left out, no area", 2, (f"{i}a", f"{i}b")) for i in range(4)]
    outcomes = [
        Outcome(f"S{i}", ok=True, notes=[lost[i], Note("of its own; with 3 words") if i else Note("x", 1)]) for i in range(4)
    ]
    outcomes.append(Outcome("bad", ok=False, error="why", notes=[Note("left out, no area", 100)]))
    assert summarise(outcomes) == [
        "note: S0 and 3 more: 8 left out, no area (annotation 0a, 0b, 1a, 1b, 2a, ...)",
        "note: S0: 1 x",
        "note: S1 and 2 more: of its own; with 3 words",
    ]
    assert outcomes[0].message == "2 left out, no area (annotation 0a, 0b); 1 x", "what is shown does not change the outcomes"
    assert outcomes[-1].message == "why; 100 left out, no area"


def test_notes_on_few_items_stay_together() -> None:
    notes = [Note("tiles cannot be decoded", 3), Note("no mpp")]
    outcomes = [Outcome(name, ok=True, notes=list(notes)) for name in "abc"]
    assert summarise(outcomes) == ["note: a and 2 more: 3 tiles cannot be decoded; no mpp"]


def test_an_empty_cohort_is_no_failure() -> None:
    assert run_cohort([], work, title="t") == []


def test_importing_the_rooms_stays_quick_and_brings_no_torch() -> None:
    heavy = "torch", "geopandas", "skimage", "matplotlib", "scipy", "sklearn"
    code = (
        "import sys, annotations, tiling, tiling.tiles.run, tiling.proposals.run, tiling.cohort.scan, tiling.slide_file.read; "
    )
    code += f"print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[3], check=True
    )
    assert done.stdout.strip() == "[]"


def test_scan_says_which_slides_tile_will_refuse_and_why(tmp_path: Path, make_slide: Callable[..., Path]) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (512, 512, 3), dtype=np.uint8)
    make_slide(tmp_path / "good.svs", picture)
    make_slide(tmp_path / "coarse.svs", picture, mpp=1.0)
    make_slide(tmp_path / "silent.svs", picture, mpp=None)
    import tifffile

    options = {"tile": (256, 256), "compression": "jpeg", "resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(tmp_path / "cut.tif", picture, **options)
    whole = (tmp_path / "cut.tif").read_bytes()
    (tmp_path / "cut.tif").write_bytes(whole[: len(whole) * 2 // 3])
    begin = time.process_time()
    outcomes = {outcome.item: outcome for outcome in scan([tmp_path], tmp_path / "m.csv", mpp=0.5)}
    assert time.process_time() - begin < 2
    with (tmp_path / "m.csv").open() as file:
        rows = {row["slide_id"]: row for row in csv.DictReader(file)}
    assert {name: outcome.info.get("will_fail") for name, outcome in outcomes.items() if outcome.ok} == {
        "good": 0,
        "coarse": 1,
        "silent": 1,
    }
    assert "lie beyond its end" in rows["cut"]["problem"]
    assert "--mpp 0.5 is finer than the slide's 1" in rows["coarse"]["problem"]
    assert rows["silent"]["problem"].startswith("no mpp")
    assert rows["good"]["problem"] == ""
    assert rows["good"]["reader"]
    assert rows["good"]["why"]
    (outcome,) = scan([tmp_path / "silent.svs"], tmp_path / "m.csv", assume_mpp=0.25)
    assert (outcome.info["will_fail"], outcome.message) == (0, "")
