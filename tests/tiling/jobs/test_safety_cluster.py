"""Clusters whose workers see other folders than the command, or run out of space."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiling.jobs.test_dask import ROOT, Cluster
from tiling.jobs.dask import UNSEEN
from tiling.jobs.run import run_cohort
from tiling.jobs.summary import NOT_TRIED
from tiling.storage.atomic import DiskFullError
from tiling.tiles.run import tile


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.close()


@pytest.fixture
def blind(cluster: Cluster, tmp_path: Path) -> Iterator[Path]:
    """A folder that a cluster's only worker does not see: something empty is mounted over it there."""
    folder = tmp_path / "out"
    folder.mkdir()
    tried = ["unshare", "-m", "mount", "-t", "tmpfs", "none", str(folder)]
    if shutil.which("unshare") is None or subprocess.run(tried, check=False, capture_output=True).returncode:
        pytest.skip("nothing may be mounted here")
    words = ["--nthreads", "1", "--no-dashboard", "--no-nanny", "--scheduler-file", str(cluster.file)]
    mounted = 'mount -t tmpfs none "$0" && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", mounted, str(folder), sys.executable, "-m", "distributed.cli.dask_worker", *words]
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    with (cluster.base / "blind.log").open("w") as log:
        worker = subprocess.Popen(command, cwd=cluster.base, env=os.environ | {"PYTHONPATH": paths}, stdout=log, stderr=log)
    yield folder
    worker.kill()
    worker.wait()


def test_a_worker_that_does_not_see_the_folder(
    blind: Path, cluster: Cluster, slide_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiling.jobs.dask.PATIENCE_S", 0.5)
    (outcome,) = tile([slide_path], blind, 1.0, 96, scheduler=cluster.address)
    assert not outcome.ok
    assert outcome.message == f"{blind / 'painted.h5'}: {UNSEEN}"
    assert list(blind.iterdir()) == []


def fills_the_disk(item: int) -> None:
    """Runs in workers."""
    time.sleep(0.05)
    raise DiskFullError("full.h5: cannot be written: No space left on device: make room")


def test_a_full_disk_ends_a_run_on_a_cluster(cluster: Cluster) -> None:
    cluster.worker("--no-nanny")
    outcomes = run_cohort(range(200), fills_the_disk, title="t", scheduler=cluster.address)
    tried = [outcome for outcome in outcomes if outcome.message != NOT_TRIED]
    assert 2 <= len(tried) < 10
    assert all("No space left" in outcome.message for outcome in tried)
