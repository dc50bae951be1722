"""An export of a cohort goes on after anything: killed, changed, damaged, asked for what cannot be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import h5py
import numpy as np
import pytest

from annotations.errors import UserError
from odis_path.exporters import cohort
from odis_path.exporters.cohort import export_features
from odis_path.exporters.targets import targets_of
from odis_path.features.write import write_features, write_slides_parquet
from tests.odis_path.exporters.conftest import WriteSlide
from tiling.slide_file.read import SlideFile

TARGETS = [name for name in targets_of("tile features") if name != "spatialdata" or find_spec("spatialdata")]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and ".zarr" not in str(path))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if ".odis-export" not in str(path)}


def temporaries(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith((".tmp", ".odis-lock"))]


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_done_is_skipped_until_it_changes(target: str, write_slide: WriteSlide, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in ("a", "b"):
        write_slide(name)
    export_features(tmp_path / "features", target, out, workers=1)
    first = contents(out)
    outcomes = export_features(tmp_path / "features", target, out, workers=1)
    assert (outcomes.counts()["skipped"], contents(out)) == (2, first)
    write_slide("b", seed=5)
    outcomes = export_features(tmp_path / "features", target, out, workers=1)
    assert [outcome.redone for outcome in outcomes] == ["", "its features changed"]
    record = next((out / ".odis-export").glob("a.json"))
    output = out / next(iter(cohort._read_json(record)["outputs"]))  # type: ignore[index]
    output.rename(output.with_name("elsewhere"))
    outcomes = export_features(tmp_path / "features", target, out, workers=1)
    assert [outcome.redone for outcome in outcomes] == ["what was written is gone or changed", ""]
    assert output.exists()
    assert temporaries(out) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from odis_path.exporters.cohort import export_features
import tiling.storage.atomic as atomic
left = int(sys.argv[4])
real = os.replace
def replace(*names):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    real(*names)
os.replace = replace
export_features(sys.argv[1], sys.argv[2], sys.argv[3], workers=1)
"""


@pytest.mark.parametrize("renames", [1, 2, 3, 4])
def test_a_killed_export_run_again_gives_the_same_files(renames: int, write_slide: WriteSlide, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_slide(name)
    features = tmp_path / "features"
    export_features(features, "torchmil", tmp_path / "whole", workers=1)
    arguments = [str(features), "torchmil", str(tmp_path / "out"), str(renames)]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert temporaries(tmp_path / "out")
    whole = contents(tmp_path / "whole")
    half = {name: data for name, data in contents(tmp_path / "out").items() if not name.endswith((".tmp", ".odis-lock"))}
    assert half.items() <= whole.items()
    assert not export_features(features, "torchmil", tmp_path / "out", workers=1).failed
    assert contents(tmp_path / "out") == whole
    assert temporaries(tmp_path / "out") == []


def test_a_damaged_slide_fails_alone(write_slide: WriteSlide, tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        write_slide(name)
    features = tmp_path / "features"
    (features / "a.h5").write_bytes((features / "a.h5").read_bytes()[:700])
    with h5py.File(features / "b.h5", "r+") as file:
        del file["coords"]
    with h5py.File(features / "c.h5", "r+") as file:
        del file["coords"].attrs["mpp_level0"]
    outcomes = export_features(features, "stamp", tmp_path / "out", workers=1)
    assert [outcome.ok for outcome in outcomes] == [False, False, False, True]
    for outcome, words in zip(outcomes, ("a.h5: not a readable", "coords", "attribute mpp_level0 of /coords"), strict=False):
        assert words in outcome.error
        assert "\n" not in outcome.error
    assert [path.name for path in (tmp_path / "out").glob("*.h5")] == ["d.h5"]
    assert (tmp_path / "out" / "slides.csv").read_text().splitlines()[1:] == ["P1,d.h5"]


def test_nan_and_tiles_off_the_grid_fail(write_slide: WriteSlide, tmp_path: Path) -> None:
    path = write_slide("a", dtype="float32")
    with h5py.File(path, "r+") as file:
        coords = file["coords"][...]
        coords[2] += 20
        del file["coords"].attrs["crc32"]
        file["coords"][...] = coords
    (outcome,) = export_features(path, "torchmil", tmp_path / "out", workers=1)
    assert "on no grid with steps of 64 level-0 pixels" in outcome.error
    with h5py.File(path, "r+") as file:
        del file["features"].attrs["crc32"]
        file["features"][1] = np.nan
    (outcome,) = export_features(path, "clam", tmp_path / "clam", workers=1)
    assert "1 embeddings hold NaN" in outcome.error
    assert contents(tmp_path / "clam") == {}


def refused(source: Path, target: str, out: Path, *words: str) -> None:
    with pytest.raises(UserError) as raised:
        export_features(source, target, out, workers=1)
    assert all(word in str(raised.value) for word in words), raised.value
    assert "\n" not in str(raised.value)


def test_what_is_no_folder_of_tile_features_is_told(write_slide: WriteSlide, tmp_path: Path) -> None:
    path, out = write_slide("a"), tmp_path / "out"
    (tmp_path / "nothing").mkdir()
    refused(tmp_path / "nothing", "clam", out, "holds no feature file")
    refused(tmp_path / "missing", "clam", out, "no such folder")
    refused(tmp_path / "tiles", "clam", out, "holds slide files, not features: run odis-path embed")
    row = {"slide_id": "a", "patient_id": "", "n_tiles": 1, "encoder": "e", "mode": "full", "features": np.ones(3)}
    write_slides_parquet(tmp_path / "slide" / "slides.parquet", [row])
    level = "holds slide embeddings alone, and --to stamp takes those of tiles: run odis-path embed --level tile"
    refused(tmp_path / "slide", "stamp", out, level)
    refused(tmp_path / "slide" / "slides.parquet", "stamp", out, level)
    write_slide("b", labelled=True)
    with SlideFile(tmp_path / "tiles" / "b.h5") as file:
        x = np.random.default_rng(0).normal(size=(17, 4))
        write_features(tmp_path / "objects" / "b.h5", level="object", features=x, slide_file=file, encoder="e", mode="full")
    refused(tmp_path / "objects", "torchmil", out, "holds object embeddings alone")
    path.write_bytes(b"nothing")
    refused(path, "arrow", out, "a.h5: not a readable feature file")
    assert not out.exists()


def test_one_folder_holds_one_export_of_one_encoder(write_slide: WriteSlide, tmp_path: Path) -> None:
    write_slide("a")
    other = write_slide("b", encoder="another", folder="other").parent
    write_slide("c", encoder="another")
    refused(tmp_path / "features", "clam", tmp_path / "out", "c.h5: encoder is another, but vit_tiny (step 10) in a.h5")
    (tmp_path / "features" / "c.h5").unlink()
    export_features(tmp_path / "features", "clam", tmp_path / "out", workers=1)
    before = contents(tmp_path / "out")
    refused(other, "clam", tmp_path / "out", "holds another export (encoder vit_tiny (step 10), now another)")
    refused(tmp_path / "features", "arrow", tmp_path / "out", "to clam, now arrow")
    assert contents(tmp_path / "out") == before


def test_ids_that_become_one_name_are_refused(write_slide: WriteSlide, tmp_path: Path) -> None:
    write_slide("a.svs")
    write_slide("a.tiff", seed=1)
    refused(tmp_path / "features", "clam", tmp_path / "out", "a.tiff.h5: would be written as a, as a.svs.h5 is")
    assert not export_features(tmp_path / "features", "arrow", tmp_path / "arrow", workers=1).failed


@pytest.mark.skipif(find_spec("spatialdata") is not None, reason="spatialdata is installed")
def test_without_its_library_spatialdata_is_refused_in_one_line(write_slide: WriteSlide, tmp_path: Path) -> None:
    write_slide("a")
    refused(tmp_path / "features", "spatialdata", tmp_path / "out", "pip install 'odis-path[spatialdata]'")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(find_spec("spatialdata") is None, reason="the extra spatialdata is not installed")
def test_a_store_of_another_program_is_never_replaced(write_slide: WriteSlide, tmp_path: Path) -> None:
    path = write_slide("a")
    (tmp_path / "out" / "a.zarr").mkdir(parents=True)
    (tmp_path / "out" / "a.zarr" / "zarr.json").write_text("{}")
    (outcome,) = export_features(path, "spatialdata", tmp_path / "out", workers=1)
    assert "exists and is not of odis-path export" in outcome.error
    assert os.listdir(tmp_path / "out" / "a.zarr") == ["zarr.json"]


def test_the_command_exports_in_processes(write_slide: WriteSlide, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_slide(name)
    arguments = ["export", tmp_path / "features", "--to", "arrow", "--out", tmp_path / "out", "--workers", "2"]
    command = [sys.executable, "-m", "odis_path", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").glob("*.parquet")) == ["a.parquet", "b.parquet", "c.parquet"]
    assert f"output: {tmp_path / 'out'}" in done.stdout
