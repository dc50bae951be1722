"""The whole chain as a user runs it, on a tiny generated cohort; and on real slides where there are any."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.cli.conftest import Run


@pytest.fixture(scope="module")
def demo(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One small demo: four patients, two epochs."""
    out = tmp_path_factory.mktemp("demo") / "out"
    done = run("demo", "--out", out, "--patients", "4", "--slide-px", "640", "--epochs", "2", "--workers", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


def test_the_demo_leaves_every_stage_and_says_where_to_look(demo: tuple[Path, str]) -> None:
    out, text = demo
    stages = ["slides", "tile", "annotate", "pretrain", "embed", "evaluate", "report"]
    assert list(json.loads((out / "timings.json").read_text())) == stages
    assert all(stage in text for stage in stages)
    assert str(out / "report.html") in text
    assert len(list((out / "tiles").glob("*.h5"))) == 8
    assert (out / "features" / "odis-tile" / "slides.parquet").exists()
    page = (out / "report.html").read_text()
    assert "synthetic" in page.lower()
    assert 'src="http' not in page


def test_the_demo_names_its_baselines_and_intervals(demo: tuple[Path, str]) -> None:
    out, text = demo
    for name in ("tile-knn", "tile-linear", "object-knn"):
        results = json.loads((out / "evaluation" / name / "results.json").read_text())
        assert {"random weights", "rgb_mean"} <= set(results["baselines"])
        score = results["headline"]["balanced_accuracy"]
        assert score["low"] <= score["point"] <= score["high"]
        assert set(results["baselines"]["random weights"]["difference"]) >= {"point", "low", "high"}
        seen = results["pretraining"]
        assert (seen["known"], seen["tested"], seen["seen"]) == (True, 2, 0), "the run held them out"
        assert results["baselines"]["random weights"]["pretraining"]["kind"] == "none"
    assert "tile knn: balanced accuracy" in text


def test_held_out_patients_were_never_trained_on(demo: tuple[Path, str]) -> None:
    out, _ = demo
    rows = [line.split(",") for line in (out / "run" / "split.csv").read_text().splitlines()[1:]]
    test = {patient for _, patient, split in rows if split == "test"}
    assert len(test) == 2
    assert test.isdisjoint({patient for _, patient, split in rows if split == "train"})


def test_the_demo_again_skips_what_is_done(run: Run, demo: tuple[Path, str]) -> None:
    out, _ = demo
    before = {p: p.stat().st_mtime_ns for folder in ("tiles", "run", "features") for p in (out / folder).rglob("*.h5")}
    checkpoint = next((out / "run").glob("*.pt"))
    stamp = checkpoint.stat().st_mtime_ns
    done = run("demo", "--out", out, "--patients", "4", "--slide-px", "640", "--epochs", "2", "--workers", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert checkpoint.stat().st_mtime_ns == stamp


def test_a_real_slide_goes_through_with_proposals(run: Run, test_data: Path, tmp_path: Path) -> None:
    slide = test_data / "slides" / "CMU-1-Small-Region.svs"
    done = run("demo", "--slides", slide, "--out", tmp_path / "out", "--epochs", "0.2", "--workers", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not evaluated" in done.stdout  # one slide without labels: said, not hidden
    with h5py.File(tmp_path / "out" / "tiles" / "CMU-1-Small-Region.h5") as file:
        assert set(np.unique(file["objects/kind"][:])) == {2}
        assert len(file["boxes/xyxy"]) > 1000
    assert (tmp_path / "out" / "report.html").stat().st_size > 100_000


def test_a_slide_without_mpp_is_an_error_first(run: Run, test_data: Path, tmp_path: Path) -> None:
    slide = test_data / "slides" / "TCGA-CR-7395-01A-01-TS1.svs"
    refused = run("tile", slide, "--out", tmp_path, "--mpp", "2", "--size", "64", "--workers", "1")
    assert refused.returncode != 0
    for way_out in ("manifest column mpp", "--assume-mpp", "TIFF resolution tags"):
        assert way_out in refused.stdout + refused.stderr
    assert not list(tmp_path.glob("*.h5"))
    done = run("tile", slide, "--out", tmp_path, "--mpp", "2", "--size", "64", "--workers", "1", "--assume-mpp", "0.5")
    assert done.returncode == 0, done.stdout + done.stderr


def test_points_become_cells_of_known_patients(run: Run, test_data: Path, tmp_path: Path) -> None:
    """BRCA-M2C: images at 0.5 mpp, classed points with an extent of 12 um, patients from the manifest."""
    source = test_data / "brca_m2c"
    images = sorted((source / "images").glob("*.png"))[:4]
    (tmp_path / "images").mkdir()
    for image in images:
        (tmp_path / "images" / image.name).symlink_to(image)
    tiles = tmp_path / "tiles"
    manifest = source / "manifest.csv"
    first = run("import", tmp_path / "images", "--out", tiles, "--mpp", "0.5", "--size", "112", "--manifest", manifest)
    assert first.returncode == 0, first.stdout + first.stderr
    second = run("annotate", tiles, "--annotations", source / "geojson", "--point-size", "12um", "--workers", "1")
    assert second.returncode == 0, second.stdout + second.stderr
    with h5py.File(tiles / f"{images[0].stem}.h5") as file:
        assert file.attrs["patient_id"] == "TCGA-A7-A0D9"
        assert set(file["objects"].attrs["labels"]) <= {"Lymphocyte", "Tumor or epithelial", "Stromal"}
        inside = file["boxes/visible"][:] == 1
        sides = file["boxes/xyxy"][:][inside]
        assert np.allclose(sides[:, 2:] - sides[:, :2], 24.0, atol=1e-3)


@pytest.mark.parametrize("command", ["--help", "--version"])
def test_the_command_line_imports_no_heavy_library(run: Run, command: str) -> None:
    import subprocess
    import sys

    code = (
        "import sys; sys.argv=['odis-path', '" + command + "']\n"
        "from odis_path.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'timm', 'numpy', 'sklearn', 'shapely', 'h5py', 'matplotlib'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
