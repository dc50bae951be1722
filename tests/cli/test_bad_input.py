"""A user's mistakes: one clear line, a non-zero exit, no traceback, the rest of the cohort goes on, nothing half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Run

PRETRAIN = ["pretrain", "demo", "optim.epochs=0.1", "eval.every_epochs=0", "data.workers=0"]


def refused(done: object, *words: str) -> str:
    """The command failed, told every word in one line, and showed no traceback."""
    text = done.stderr + done.stdout  # type: ignore[attr-defined]
    assert done.returncode != 0, text  # type: ignore[attr-defined]
    assert "Traceback" not in text, text
    lines = [line for line in text.splitlines() if all(word in line for word in words)]
    assert lines, f"no line with {words} in:\n{text}"
    return text


def leftovers(folder: Path) -> list[Path]:
    """Temporary files that a command forgot."""
    return [path for path in folder.rglob("*") if ".tmp" in path.name]


@pytest.mark.parametrize(
    "arguments",
    [
        ["scan", "MISSING", "--out", "OUT/manifest.csv"],
        ["tile", "MISSING", "--out", "OUT", "--mpp", "0.5"],
        ["import", "MISSING", "--out", "OUT", "--mpp", "0.5"],
        ["annotate", "MISSING", "--annotations", "MISSING"],
        ["propose", "MISSING"],
        [*PRETRAIN, "data.tiles=MISSING", "run.out=OUT"],
        ["embed", "MISSING", "--checkpoint", "vit_tiny_patch16_224", "--out", "OUT"],
        ["evaluate", "MISSING", "--labels", "annotations", "--probe", "knn", "--out", "OUT"],
        ["export", "MISSING", "--to", "clam", "--out", "OUT"],
        ["report", "MISSING"],
        ["demo", "--slides", "MISSING", "--out", "OUT"],
    ],
    ids=lambda arguments: arguments[0],
)
@pytest.mark.parametrize("what", ["missing", "empty"])
def test_a_missing_or_empty_folder_is_told_by_name(run: Run, arguments: list[str], what: str, tmp_path: Path) -> None:
    folder = tmp_path / "nothing-here"
    if what == "empty":
        folder.mkdir()
    named = [a.replace("MISSING", str(folder)).replace("OUT", str(tmp_path / "out")) for a in arguments]
    refused(run(*named), "nothing-here")
    assert not list(tmp_path.rglob("*.h5"))
    assert leftovers(tmp_path) == []


def test_an_unreadable_slide_among_good_ones(run: Run, cohort: Path, tmp_path: Path) -> None:
    slides = Path(shutil.copytree(cohort / "slides", tmp_path / "slides"))
    good = sorted(slides.iterdir())
    broken = good[0].with_name("broken" + good[0].suffix)
    broken.write_bytes(good[0].read_bytes()[:900])
    text = refused(run("scan", slides, "--out", tmp_path / "manifest.csv"), "broken")
    assert "readable" in (tmp_path / "manifest.csv").read_text().splitlines()[0]
    assert len((tmp_path / "manifest.csv").read_text().splitlines()) == 1 + 5, text
    refused(run("tile", slides, "--out", tmp_path / "out", "--mpp", "0.5", "--size", "64", "--workers", "1"), "broken")
    assert sorted(p.stem for p in (tmp_path / "out").glob("*.h5")) == [p.stem for p in good]
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("text", ["this is not json", '{"type": "FeatureCollection", "features": [', ""])
def test_a_geojson_that_is_not_json(run: Run, cohort: Path, tiles: Path, tmp_path: Path, text: str) -> None:
    files = Path(shutil.copytree(cohort / "annotations", tmp_path / "annotations"))
    bad = sorted(files.glob("*.geojson"))[0]
    bad.write_text(text)
    before = {path.name: path.read_bytes() for path in tiles.glob("*.h5")}
    refused(run("annotate", tiles, "--annotations", files, "--workers", "1", "--point-size", "10um"), bad.stem)
    assert (tiles / f"{bad.stem}.h5").read_bytes() == before[f"{bad.stem}.h5"]
    others = [name for name in before if name != f"{bad.stem}.h5"]
    assert all((tiles / name).read_bytes() != before[name] for name in others)  # the rest went on, with the new setting
    assert leftovers(tmp_path) == []


def polygon(points: list[list[float]]) -> dict[str, object]:
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [[*points, points[0]]]},
        "properties": {"objectType": "annotation", "classification": {"name": "odd", "color": [0, 0, 0]}},
    }


def test_invalid_polygons_are_repaired_and_those_outside_are_told(run: Run, tiles: Path, tmp_path: Path) -> None:
    files = tmp_path / "annotations"
    files.mkdir()
    first, second, *_ = sorted(path.stem for path in tiles.glob("*.h5"))
    bow_tie = polygon([[100, 100], [400, 400], [400, 100], [100, 400]])
    far = polygon([[1e6, 1e6], [1e6 + 50, 1e6], [1e6 + 50, 1e6 + 50]])
    (files / f"{first}.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [bow_tie]}))
    (files / f"{second}.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [far]}))
    text = refused(run("annotate", tiles, "--annotations", files, "--workers", "1"), second)
    assert "repaired" in text
    assert "outside" in text


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("optim.epoch=3", "optim.epochs"),
        ("optim.epochs=three", "three"),
        ("model.name=vit_none", "vit_none"),
        ("data", "key.sub=value"),
    ],
)
def test_a_config_with_a_wrong_key_or_value(run: Run, tiled: Path, tmp_path: Path, override: str, word: str) -> None:
    refused(run(*PRETRAIN, f"data.tiles={tiled}", f"run.out={tmp_path / 'run'}", override), word)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_is_none(run: Run, tiled: Path, tmp_path: Path) -> None:
    (tmp_path / "fake.pt").write_bytes(b"not a checkpoint")
    refused(run("embed", tiled, "--checkpoint", tmp_path / "fake.pt", "--out", tmp_path / "out"), "fake.pt")
    assert not (tmp_path / "out").exists()


def test_a_run_of_another_shape_is_not_continued(run: Run, tiled: Path, tmp_path: Path) -> None:
    small = [*PRETRAIN, f"data.tiles={tiled}", f"run.out={tmp_path / 'run'}", "optim.batch_size=8"]
    assert run(*small, "model.kwargs.depth=1").returncode == 0
    refused(run(*small, "model.kwargs.depth=2"), "checkpoint-", "model.kwargs")


def test_a_slide_file_that_is_torn(run: Run, tiles: Path, tmp_path: Path) -> None:
    torn = sorted(tiles.glob("*.h5"))[0]
    torn.write_bytes(torn.read_bytes()[:2000])
    done = run("embed", tiles, "--checkpoint", "vit_tiny_patch16_224", "--random-weights", "--out", tmp_path / "out")
    assert "Traceback" not in done.stderr
    assert len(list((tmp_path / "out").glob("*.h5"))) == 3
    refused(done, torn.stem)


@pytest.mark.parametrize(
    "command", ["scan", "tile", "import", "annotate", "propose", "pretrain", "embed", "evaluate", "report", "demo"]
)
def test_a_wrong_flag_is_told(run: Run, command: str) -> None:
    refused(run(command, "--no-such-flag"), "--no-such-flag")
