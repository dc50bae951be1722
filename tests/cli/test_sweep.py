"""Every command removes what killed writers left where it writes, and nothing that a live process holds."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.cli.conftest import Run
from tests.png import encode_png
from tiling.slide_file.read import SlideFile, list_slide_files

WRITER = """
import contextlib, pathlib, sys, time
from tiling.storage.atomic import atomic_path
with contextlib.ExitStack() as stack:
    for name in sys.argv[1:]:
        temporary = stack.enter_context(atomic_path(pathlib.Path(name)))
        temporary.write_bytes(b"half")
    print("ready", flush=True)
    time.sleep(600)
"""


def writer(paths: list[Path]) -> subprocess.Popen[str]:
    """A process in the middle of writing some files."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, *map(str, paths)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.fixture
def writers() -> Iterator[Callable[[list[Path]], None]]:
    """Leaves `.<name>.*.tmp` of a killed and of a live writer beside each of some files."""
    live: list[subprocess.Popen[str]] = []

    def plant(paths: list[Path]) -> None:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        killed = writer([path.with_name(f"killed-{path.name}") for path in paths])
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        live.append(writer([path.with_name(f"live-{path.name}") for path in paths]))

    yield plant
    for process in live:
        process.kill()
        process.wait()


def left(folder: Path) -> list[str]:
    return sorted(path.name.split("-")[0] for path in folder.glob(".*.tmp"))


def features(tiles: Path, out: Path) -> Path:
    from odis_path.features.write import write_features

    rng = np.random.default_rng(0)
    for path in list_slide_files(tiles):
        with SlideFile(path) as file:
            x = rng.normal(size=(len(file), 8))
            write_features(out / path.name, level="tile", features=x, slide_file=file, encoder="e", mode="full")
    return out


def scan(run: Run, cohort: Path, tiles: Path, out: Path) -> tuple[list[str | Path], list[Path]]:
    return ["scan", cohort / "slides", "--out", out / "manifest.csv"], [out / "manifest.csv"]


def import_(run: Run, cohort: Path, tiles: Path, out: Path) -> tuple[list[str | Path], list[Path]]:
    for label in ("x", "y"):
        folder = out.parent / "images" / label
        folder.mkdir(parents=True)
        (folder / f"{label}.png").write_bytes(encode_png(np.full((64, 64, 3), 90, np.uint8)))
    command: list[str | Path] = ["import", out.parent / "images", "--out", out, "--mpp", "0.5", "--size", "64"]
    return command, [out / "x.h5", out / "labels.csv"]


def annotate(run: Run, cohort: Path, tiles: Path, out: Path) -> tuple[list[str | Path], list[Path]]:
    return ["annotate", tiles, "--annotations", cohort / "annotations", "--workers", "1"], [list_slide_files(tiles)[0]]


def export(run: Run, cohort: Path, tiles: Path, out: Path) -> tuple[list[str | Path], list[Path]]:
    return ["export", tiles, "--to", "geojson", "--out", out, "--workers", "1"], [out / "a.geojson"]


def export_features(run: Run, cohort: Path, tiles: Path, out: Path) -> tuple[list[str | Path], list[Path]]:
    feats = features(tiles, out.parent / "feats")
    paths = [out / "features" / "a.npy", out / ".odis-export" / "a.json"]
    return ["export", feats, "--to", "torchmil", "--out", out, "--workers", "1"], paths


def evaluate(run: Run, cohort: Path, tiles: Path, out: Path) -> tuple[list[str | Path], list[Path]]:
    feats = features(tiles, out.parent / "feats")
    options: list[str | Path] = ["--labels", "annotations", "--probe", "knn", "--folds", "2", "--k", "1", "--bootstrap", "20"]
    return ["evaluate", feats, *options, "--groups", "slide_id", "--out", out], [out / "results.json", out / "confusion.png"]


def report(run: Run, cohort: Path, tiles: Path, out: Path) -> tuple[list[str | Path], list[Path]]:
    return ["report", tiles, "--out", out / "r.html"], [out / "r.html", out / "r_files" / "report.json"]


def pretrain(run: Run, cohort: Path, tiles: Path, out: Path) -> tuple[list[str | Path], list[Path]]:
    values = {
        "data": {"tiles": str(tiles), "workers": 0, "holdout": 0.0},
        "views": {"global_size": 32, "local_count": 0},
        "model": {"name": "Ti/16", "kwargs": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}},
        "head": {"out_dim": 64, "hidden_dim": 32, "bottleneck_dim": 16},
        "optim": {"batch_size": 8, "epochs": 0.1, "warmup_epochs": 0.05},
        "eval": {"every_epochs": 0},
        "run": {"out": str(out), "device": "cpu"},
    }
    config = out.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(values))
    return ["pretrain", config], [out / "checkpoint-00000001.pt", out / "versions.json"]


def export_timm(run: Run, cohort: Path, tiles: Path, out: Path) -> tuple[list[str | Path], list[Path]]:
    command, _ = pretrain(run, cohort, tiles, out.with_name("run"))
    done = run(*command)
    assert done.returncode == 0, done.stderr
    weights = out / "w.safetensors"
    return ["export", out.with_name("run"), "--to", "timm", "--out", weights], [weights, out / "w.json"]


@pytest.mark.parametrize("prepare", [scan, import_, annotate, export, export_features, evaluate, report, pretrain, export_timm])
def test_a_command_sweeps_where_it_writes(
    prepare: Callable[[Run, Path, Path, Path], tuple[list[str | Path], list[Path]]],
    run: Run,
    cohort: Path,
    tiles: Path,
    tmp_path: Path,
    writers: Callable[[list[Path]], None],
) -> None:
    command, paths = prepare(run, cohort, tiles, tmp_path / "out")
    for _ in range(2):  # the second time much of it is done already
        writers(paths)
        folders = {path.parent for path in paths}
        before = {folder: left(folder).count(".live") for folder in folders}
        assert all(".killed" in left(folder) for folder in folders)
        done = run(*command)
        assert done.returncode == 0, done.stderr + done.stdout
        for folder in folders:
            assert left(folder) == [".live"] * before[folder], command[0]


def test_the_demo_sweeps_its_slides(tmp_path: Path, writers: Callable[[list[Path]], None]) -> None:
    from odis_path.synthetic.slides import write_cohort

    folders = [tmp_path / "slides", tmp_path / "annotations", tmp_path]
    writers([folder / "x" for folder in folders])
    write_cohort(tmp_path, patients=1, slides_per_patient=1, side_px=512, workers=1)
    assert [left(folder) for folder in folders] == [[".live"]] * 3
