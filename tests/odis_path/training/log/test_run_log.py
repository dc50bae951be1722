"""What the user sees of a run: the rows, the lines, the live table, the collapse warning, the facts of a start."""

from __future__ import annotations

import io
import json
import math
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from odis_path import __version__
from odis_path.training import loop
from odis_path.training.collapse import CollapseWatch
from odis_path.training.log import run_log as runlog
from odis_path.training.log.live_table import Progress, Trend
from odis_path.training.log.run_log import RunLog, record_start
from odis_path.versions import git_commit, provenance
from tests.odis_path.conftest import tiny_config


def row(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": step / 10,
        "loss": 8.0 - step / 100,
        "loss_obj": 4.5,
        "loss_patch": 3.5,
        "loss_koleo": 1.25,
        "teacher_entropy": 3.0,
        "token_spread": 0.8,
        "lr": 5e-4,
        "images_per_s": 1234.0,
        "data_wait_share": 0.02,
        **more,
    }


def open_log(folder: Path, **more: Any) -> RunLog:
    return RunLog(folder, 100, **{"active": True, "first_step": 0, "title": "pretraining odis", "prototypes": 64, **more})


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(patch: pytest.MonkeyPatch) -> Screen:
    """A terminal of 80 x 24 in place of stderr, from here on."""
    screen = Screen()
    patch.setattr(sys, "stderr", screen)
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}.items():
        patch.setenv(name, value)
    return screen


def test_the_table_shows_every_figure_within_80_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    log = open_log(tmp_path)
    log.write(row(10))
    log.write({"step": 20, "epoch": 2.0, "knn_balanced_accuracy": 0.7, "embedding_spread": 0.5})
    log.write({"step": 40, "epoch": 4.0, "knn_balanced_accuracy": 0.6, "embedding_spread": 0.5})
    log.write(row(40, token_spread=0.1, data_wait_share=0.4))
    log.close()
    last = screen.getvalue().split("pretraining odis")[-1]
    from rich.text import Text

    lines = [Text.from_ansi(line).plain.rstrip() for line in last.split("\n")]
    table = {line[:22].strip(): line[22:] for line in lines[1:] if line}
    assert "40/100" in lines[0]
    assert "ETA" in lines[0]
    assert list(table)[:5] == ["loss", "obj", "patch", "koleo", "k-NN balanced accuracy"]
    assert "7.600" in table["loss"]
    assert "0.600" in table["k-NN balanced accuracy"]
    assert "best 0.700 at epoch 2.0" in table["k-NN balanced accuracy"]
    assert f"log K = {math.log(64):.2f}" in table["teacher entropy"]
    assert "LOW: below 0.2" in table["token spread"]
    assert "5.00e-04" in table["learning rate"]
    assert "40%" in table["waiting for data"]
    assert "MUCH: see data.workers" in table["waiting for data"]
    assert "…" not in "".join(lines)
    assert max(map(len, lines)) <= 80
    assert len(lines) < 20
    assert screen.getvalue().rstrip().endswith("\x1b[?25h"), "the cursor comes back"


def test_the_table_is_drawn_at_most_four_times_a_second_and_not_by_the_log_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = terminal(monkeypatch)
    log = open_log(tmp_path)
    log.write(row(1))  # imports rich
    before = screen.getvalue().count("pretraining odis")
    drawn_by: set[int] = set()
    assert log._table is not None
    render = log._table._progress.eta
    log._table._progress.eta = lambda: drawn_by.add(threading.get_ident()) or render()  # type: ignore[method-assign,func-returns-value]
    begin, costs = time.perf_counter(), []
    while (elapsed := time.perf_counter() - begin) < 1.5:
        tick = time.perf_counter()
        log.write(row(2 + int(10 * elapsed)))
        costs.append(time.perf_counter() - tick)
        time.sleep(0.002)
    frames = screen.getvalue().count("pretraining odis") - before
    assert threading.get_ident() not in drawn_by
    log.close()
    assert 1 <= frames <= 4 * elapsed + 1
    assert sorted(costs)[len(costs) // 2] < 0.005


def test_a_warning_stands_above_the_table_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    log = open_log(tmp_path)
    log.write(row(1))
    log.warn("[OBJ] tokens [bold]collapse[/bold]: " + "a long line " * 10)
    log.close()
    assert "[OBJ] tokens [bold]collapse[/bold]: " + "a long line " * 10 in screen.getvalue()


def test_a_run_that_fails_before_its_first_row_leaves_the_terminal_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = terminal(monkeypatch)
    log = open_log(tmp_path)
    log.warn("k-NN while training: off")
    log.close()
    assert screen.getvalue() == "k-NN while training: off\n"


def test_without_a_terminal_the_first_line_one_in_30_seconds_and_the_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(runlog.time, "monotonic", lambda: clock[0])
    log = open_log(tmp_path)
    for step in range(10, 101, 10):  # 12 s a row
        clock[0] += 12
        log.write(row(step))
    log.write({"step": 100, "epoch": 10.0, "knn_balanced_accuracy": 0.75})
    log.close()
    log.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"pretraining odis: step {step}/100" for step in (10, 40, 70, 100, 100)]
    assert lines[0].endswith("ETA ?")
    assert lines[1].endswith("ETA 0:01:12")  # 60 steps to go at 1.2 s
    assert "loss 7.000 (obj 4.500, patch 3.500, koleo 1.250)" in lines[-1]
    assert "k-NN 0.750 (best 0.750 at epoch 10.0), entropy 3.00 of 4.16, spread 0.80" in lines[-1]
    assert lines[-1].endswith("ETA 0:00:00")


def test_the_time_to_go_counts_down_between_rows_and_not_below_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(runlog.time, "monotonic", lambda: clock[0])
    progress = Progress(100, 0, "x", 0.0)
    progress.take(row(0), old=True)
    assert progress.eta() == "?"
    for step in (10, 20):
        clock[0] += 30
        progress.take(row(step))
    assert progress.eta() == "0:04:00"
    clock[0] += 60
    assert progress.eta() == "0:03:00"
    clock[0] += 1000
    assert progress.eta() == "0:00:00"


def test_a_trend_holds_the_whole_run_in_a_few_cells() -> None:
    trend = Trend(cells=4)
    for value in range(10):
        trend.add(float(value))
    # 0..3 fold to (0,1)(2,3); then (4,5)(6,7); fold to (0..3)(4..7); then (8,9)
    assert trend.means() == [1.5, 5.5, 8.5]
    assert trend.line() == "▁▅█"
    assert trend.line(ascii_only=True) == "_=#"
    flat = Trend(cells=4)
    for _ in range(3):
        flat.add(2.0)
    assert flat.line() == "▄▄▄"
    assert Trend().line() == ""
    strange = Trend(cells=4)
    for value in (1.0, math.nan, 2.0):
        strange.add(value)
    assert strange.line() == "▁!█"  # a figure that is not finite does not stop the table


def test_resume_keeps_rows_up_to_the_checkpoint_and_their_trend(tmp_path: Path) -> None:
    knn = {"step": 20, "epoch": 2.0, "knn_balanced_accuracy": 0.5}
    text = [json.dumps(row(10)), json.dumps(knn), json.dumps(row(30)), '{"st']
    (tmp_path / "train.jsonl").write_text("\n".join(text))
    log = open_log(tmp_path, first_step=20)
    assert log.progress.best == (0.5, 2.0)
    assert log.progress.eta() == "?"  # rows of an earlier start say nothing about the speed of this one
    log.write(row(25))
    log.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "train.jsonl").read_text().splitlines()] == [10, 20, 25]


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = open_log(tmp_path / "run", active=False)
    log.at(3)
    log.write(row(10))
    log.warn("nothing")
    log.close()
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "run").exists()


def see_all(watch: CollapseWatch, values: list[float], key: str = "token_spread", every: int = 10) -> list[tuple[int, str]]:
    """(step, line) of what the watch says about a course of one figure."""
    warnings = [(every * n, watch.see({"step": every * n, "epoch": 0.0, key: value})) for n, value in enumerate(values, 1)]
    return [(step, line) for step, line in warnings if line]


def test_a_dip_that_recovers_is_no_collapse() -> None:
    """The demo's course: k-NN spread 0.13 at step 140 of 700, 0.29 at 280; token spread 0.23 at the least."""
    watch = CollapseWatch(700, warmup_steps=35, prototypes=256)
    assert see_all(watch, [0.13, 0.29, 0.49, 0.52, 0.55], "embedding_spread", every=140) == []
    assert see_all(CollapseWatch(700, warmup_steps=35), [0.4, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.4] + [0.5] * 62) == []


def test_a_lasting_collapse_is_told_once_with_what_to_do_and_its_end_too() -> None:
    watch = CollapseWatch(1000, warmup_steps=50)
    warnings = see_all(watch, [0.1] * 30 + [0.22] * 5 + [0.1] * 5 + [0.6] * 10 + [0.1] * 30)
    assert [step for step, _ in warnings] == [160, 410, 610]  # counted from step 60, the first after the warm-up
    assert "since step 60 (token spread 0.10 of 1)" in warnings[0][1]
    assert "optim.lr" in warnings[0][1]
    assert "recovered: token spread 0.60" in warnings[1][1]
    assert all("\n" not in line for _, line in warnings)


def test_two_low_knn_spreads_in_a_row_are_a_collapse() -> None:
    warnings = see_all(CollapseWatch(700, warmup_steps=35), [0.13, 0.12, 0.11], "embedding_spread", every=140)
    assert [step for step, _ in warnings] == [280]


@pytest.mark.parametrize(("share", "words"), [(0.995, "lower loss.teacher_temperature"), (0.005, "higher loss.teacher_temp")])
def test_an_entropy_near_its_ends_is_told(share: float, words: str) -> None:
    course = [share * math.log(256)] * 30
    warnings = see_all(CollapseWatch(300, prototypes=256), course, "teacher_entropy")
    assert [step for step, _ in warnings] == [40]
    assert words in warnings[0][1]
    assert see_all(CollapseWatch(300, prototypes=256), [0.925 * math.log(256)] * 30, "teacher_entropy") == []
    assert see_all(CollapseWatch(300), course, "teacher_entropy") == []


def test_a_long_run_does_not_wait_a_tenth_of_itself() -> None:
    warnings = see_all(CollapseWatch(1_000_000), [0.1] * 30, every=100)
    assert [step for step, _ in warnings] == [2100]


def test_a_collapse_told_before_a_stop_is_not_told_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = open_log(tmp_path)
    for step in range(1, 31):
        log.write(row(step, token_spread=0.05))
    log.close()
    assert capsys.readouterr().err.count("collapse?") == 1
    again = open_log(tmp_path, first_step=30)
    for step in range(31, 50):
        again.write(row(step, token_spread=0.05))
    again.close()
    assert "collapse?" not in capsys.readouterr().err


def test_a_run_folder_says_what_it_was_made_with(tiny_tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["odis-path", "pretrain", "a config.yaml"])
    values = {"eval": {"every_epochs": 0}, "optim": {"epochs": 1}}
    folder = loop.pretrain(tiny_config(tiny_tiles, tmp_path / "run", **values)).parent
    facts = json.loads((folder / "versions.json").read_text())
    assert facts["odis-path"] == __version__
    assert facts["torch_build"] == torch.__version__
    assert facts["command"] == "odis-path pretrain 'a config.yaml'"
    assert facts["ranks"] == 1
    assert facts["device"].startswith("CPU")
    assert facts["git_commit"] == git_commit()
    assert {"timm", "numpy", "python", "platform", "started"} <= set(facts)
    assert "resumed" not in facts


def test_a_later_start_adds_what_was_different(tmp_path: Path) -> None:
    record_start(tmp_path, 0, {"torch": "2.6", "ranks": 1})
    record_start(tmp_path, 30, {"torch": "2.6", "ranks": 8})
    record_start(tmp_path, 50, {"torch": "2.7", "ranks": 1})
    assert json.loads((tmp_path / "versions.json").read_text()) == {
        "torch": "2.6",
        "ranks": 1,
        "resumed": [{"step": 30, "ranks": 8}, {"step": 50, "torch": "2.7"}],
    }
    (tmp_path / "versions.json").write_text("{torn")
    record_start(tmp_path, 60, {"torch": "2.7"})
    assert json.loads((tmp_path / "versions.json").read_text()) == {"torch": "2.7"}
    record_start(tmp_path, 0, {"torch": "2.8"})
    assert json.loads((tmp_path / "versions.json").read_text()) == {"torch": "2.8"}


def test_the_commit_is_that_of_this_checkout_or_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import odis_path.versions as versions

    if (Path(versions.__file__).parent.parent / ".git").exists() and git_commit():
        assert len(git_commit().split()[0]) == 40
    monkeypatch.setattr(versions, "__file__", str(tmp_path / "odis_path" / "versions.py"))
    assert git_commit() == ""
    assert provenance("cpu", 4)["git_commit"] == ""
