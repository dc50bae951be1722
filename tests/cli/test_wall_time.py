"""The column `seconds` of every command's summary is the time its user waited, whatever its workers took together."""

from __future__ import annotations

import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from odis_path.cli.app import app
from tiling.jobs.outcome import Outcome

COMMANDS = {
    "tiling.cohort.scan": ["scan", "SLIDES", "--out", "OUT/m.csv"],
    "tiling.tiles.run": ["tile", "SLIDES", "--out", "OUT", "--mpp", "1"],
    "tiling.images.run": ["import", "IMAGES", "--out", "OUT", "--no-mpp"],
    "tiling.boxes.run": ["annotate", "TILES", "--annotations", "DRAWN"],
    "tiling.proposals.run": ["propose", "TILES"],
    "odis_path.embedding.run": [
        "embed",
        "TILES",
        "--checkpoint",
        "vit_tiny_patch16_224",
        "--out",
        "OUT",
        "--scheduler",
        "none:1",
    ],
    "odis_path.exporters.geojson": ["export", "TILES", "--to", "geojson", "--out", "OUT"],
}
TOOK_S = 0.3


@pytest.mark.parametrize("module", COMMANDS, ids=lambda module: COMMANDS[module][0])
def test_seconds_are_by_the_clock_on_the_wall(
    module: str, cohort: Path, tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cohort_of_slow_workers(items: Any, *_: Any, **__: Any) -> list[Outcome]:
        time.sleep(TOOK_S)
        return [Outcome(f"S{i}", ok=True, seconds=1000.0) for i, _ in enumerate(items)]

    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "images" / "a.png")
    places = {"SLIDES": cohort / "slides", "IMAGES": tmp_path / "images", "TILES": tiles, "DRAWN": cohort / "annotations"}
    words = [str(places.get(word, word.replace("OUT", str(tmp_path / "out")))) for word in COMMANDS[module]]
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(import_module(module), "run_cohort", cohort_of_slow_workers)
    done = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    table = [[cell.strip() for cell in line.replace("│", "┃").split("┃")] for line in done.stdout.splitlines()]
    heads = next(i for i, row in enumerate(table) if "worker seconds" in row)
    value = dict(zip(table[heads], table[heads + 2], strict=True))
    assert value["worker seconds"] in ("1,000.0", "4,000.0")
    assert TOOK_S <= float(value["seconds"]) < 60
