"""One table of targets: the command, the function, the page of the docs and the modules have the same ones."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from annotations.errors import UserError
from odis_path.exporters.run import export
from odis_path.exporters.targets import NAMES, TARGETS, describe_targets, targets_of
from odis_path.exporters.tile_features import Format

ROOT = Path(__file__).resolve().parents[3]


def test_the_page_shows_the_table() -> None:
    lines = (ROOT / "docs" / "exports.md").read_text(encoding="utf-8").splitlines()
    shown = [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    assert shown[1:] == [[target.name, target.source, target.writes, target.readers] for target in TARGETS]


def test_every_target_of_tile_features_is_a_module_of_its_name() -> None:
    modules = {path.stem for path in (ROOT / "odis_path" / "exporters" / "formats").glob("*.py")} - {"__init__"}
    assert modules == set(targets_of("tile features"))
    for name in modules:
        assert isinstance(importlib.import_module(f"odis_path.exporters.formats.{name}").FORMAT, Format)


def test_the_help_and_the_error_name_every_target(tmp_path: Path) -> None:
    assert all(f"{name}: " in describe_targets() for name in NAMES)
    with pytest.raises(UserError) as raised:
        export(tmp_path, "xml", tmp_path / "out")
    assert str(raised.value) == f"--to xml: no such export; there is: {', '.join(NAMES)}"


@pytest.mark.parametrize("target", ["timm", *targets_of("tile features")])
def test_options_of_geojson_are_refused_elsewhere(target: str, tmp_path: Path) -> None:
    for options in ({"what": ["tiles"]}, {"predictions": "p.csv"}, {"origin": "level0"}):
        with pytest.raises(UserError, match=f"--to {target}: takes no --what"):
            export(tmp_path, target, tmp_path / "out", **options)
