"""A tiny generated cohort, tiled and annotated once, and a helper that runs commands as a user does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiling.conftest import make_slide, picture, slide_path  # noqa: F401  fixtures

Run = Callable[..., subprocess.CompletedProcess[str]]


def odis_path(*arguments: str | Path, timeout: float = 900) -> subprocess.CompletedProcess[str]:
    """Run one command in a process of its own; stdout and stderr as text."""
    return subprocess.run(
        [sys.executable, "-m", "odis_path", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
    )


@pytest.fixture(scope="session")
def run() -> Run:
    return odis_path


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two patients, two slides each, 640 px, with GeoJSON and manifest."""
    from odis_path.synthetic.slides import write_cohort

    folder = tmp_path_factory.mktemp("cohort")
    write_cohort(folder, patients=2, slides_per_patient=2, side_px=640, seed=3, workers=1)
    return folder


@pytest.fixture(scope="session")
def tiled(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cohort's slide files with boxes, 64-px tiles."""
    folder = tmp_path_factory.mktemp("tiled")
    tile = odis_path("tile", cohort / "manifest.csv", "--out", folder, "--mpp", "0.5", "--size", "64", "--workers", "1")
    assert tile.returncode == 0, tile.stderr + tile.stdout
    annotate = odis_path("annotate", folder, "--annotations", cohort / "annotations", "--workers", "1")
    assert annotate.returncode == 0, annotate.stderr + annotate.stdout
    return folder


@pytest.fixture
def tiles(tiled: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiled, tmp_path / "tiles"))
