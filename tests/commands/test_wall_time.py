"""The column `seconds` of every command's summary is the time its user waited, whatever its workers took together."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

from odis_path.cli.commands import app
from tiling.cohort import Outcome

COMMANDS = {
    "tiling.scan.scan_slides": ["scan", "x"],
    "tiling.tile.tile_cohort": ["tile", "x", "--out", "o", "--mpp", "1"],
    "tiling.importer.import_images": ["import", "x", "--out", "o"],
    "tiling.annotate.annotate_cohort": ["annotate", "x", "--annotations", "y"],
    "tiling.propose.propose_cohort": ["propose", "x"],
    "odis_path.embed.embed_cohort": ["embed", "x", "--checkpoint", "c", "--out", "o"],
    "odis_path.export_geojson.export_geojson": ["export", "x", "--to", "geojson", "--out", "o"],
}


@pytest.mark.parametrize("function", COMMANDS, ids=lambda name: COMMANDS[name][0])
def test_seconds_are_by_the_clock_on_the_wall(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: Any, **__: Any) -> list[Outcome]:
        return [Outcome(f"S{i}", ok=True, seconds=1000.0) for i in range(8)]

    monkeypatch.setattr(function, work)
    done = CliRunner().invoke(app, COMMANDS[function], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    table = [[cell.strip() for cell in line.replace("│", "┃").split("┃")] for line in done.stdout.splitlines()]
    heads = next(i for i, row in enumerate(table) if "worker seconds" in row)
    value = dict(zip(table[heads], table[heads + 2], strict=True))
    assert value["worker seconds"] == "8,000.0"
    assert float(value["seconds"]) < 60
