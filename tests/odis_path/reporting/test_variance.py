"""The chart of what the embedding knows shows what a run logged before and after training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from odis_path.reporting.build import report
from odis_path.reporting.figures.variance import draw_shares, read_shares
from odis_path.reporting.inventory import RunFolder

BEFORE = {"variance_class": 0.1, "variance_patient": 0.5, "variance_slide": 0.6, "variance_tile": 0.7}
AFTER = {"variance_class": 0.4, "variance_patient": 0.3, "variance_slide": 0.35, "variance_tile": 0.9}


def run_of(*rows: dict[str, Any]) -> RunFolder:
    return RunFolder("a run", Path(), {}, "", list(rows), {}, None)


def test_the_first_and_the_last_score_are_before_and_after() -> None:
    middle = dict.fromkeys(AFTER, 0.2)
    run = run_of({"step": 0, **BEFORE}, {"step": 5, "loss": 1.0}, {"step": 6, **middle}, {"step": 12, **AFTER}, {"step": 13})
    shares = read_shares(run)
    assert shares is not None
    assert (shares.before_step, shares.after_step) == (0, 12)
    assert shares.before == {"class": 0.1, "patient": 0.5, "slide": 0.6, "tile": 0.7}
    assert shares.after == {"class": 0.4, "patient": 0.3, "slide": 0.35, "tile": 0.9}


def test_bars_are_as_long_as_the_shares_are_large() -> None:
    shares = read_shares(run_of({"step": 0, **BEFORE}, {"step": 12, **AFTER}))
    assert shares is not None
    (axes,) = draw_shares([shares]).axes
    widths = [[bar.get_width() for bar in container] for container in axes.containers]
    assert widths == [[0.1, 0.5, 0.6, 0.7], [0.4, 0.3, 0.35, 0.9]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["class", "patient", "slide", "tile"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["step 0", "step 12"]


def test_a_share_that_is_missing_has_no_bar_and_a_run_without_any_no_panel() -> None:
    without = {key: value for key, value in BEFORE.items() if key != "variance_class"}
    shares = read_shares(run_of({"step": 3, **without}))
    assert shares is not None
    assert not shares.before
    (axes,) = draw_shares([shares]).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["patient", "slide", "tile"]
    assert read_shares(run_of({"step": 3, "loss": 1.0}, {"step": 4, "variance_tile": "high"})) is None


def test_the_report_holds_the_chart_and_its_numbers(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("model: {name: S/16}\n")
    rows = [{"step": 0, "epoch": 0.0, **BEFORE}, {"step": 9, "epoch": 1.0, "loss": 2.0}, {"step": 9, "epoch": 1.0, **AFTER}]
    (run / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    written = report(tmp_path)
    assert not written.problems
    assert (written.files / "embedding-knows.png").is_file()
    assert "What the embedding knows" in written.page.read_text()
    numbers = json.loads((written.files / "report.json").read_text())["embedding_variance"]["a"]
    assert (numbers["before"]["class"], numbers["after"]["class"]) == (0.1, 0.4)
