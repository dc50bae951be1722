"""The same commands on a real Dask cluster: a scheduler and worker processes, some of which are killed in mid-run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from annotations.errors import UserError
from tiling.boxes.run import annotate
from tiling.jobs.outcome import DIED, Outcome
from tiling.jobs.run import run_cohort
from tiling.jobs.summary import NOT_TRIED
from tiling.tiles.run import tile

pytest.importorskip("distributed")

ROOT = Path(__file__).parents[3]
SLIDES = 6


class Cluster:
    """A scheduler and workers, each a process of its own."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.file = base / "scheduler.json"
        self.processes: list[subprocess.Popen] = []
        self.scheduler = self._start("dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
        wait_for(lambda: self.file.is_file() and self.file.read_text().rstrip().endswith("}"))
        self.address = json.loads(self.file.read_text())["address"]

    def worker(self, *words: str) -> subprocess.Popen:
        return self._start("dask_worker", "--nthreads", "1", "--no-dashboard", "--local-directory", str(self.base), *words)

    def _start(self, module: str, *words: str) -> subprocess.Popen:
        folders = os.pathsep.join([str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        failures = {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "1", "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "10s"}
        with (self.base / f"{module}-{len(self.processes)}.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", f"distributed.cli.{module}", "--scheduler-file", str(self.file), *words],
                cwd=self.base,
                env=os.environ | failures | {"PYTHONPATH": folders},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def close(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what a nanny started, too
            process.wait()


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.close()


def wait_for(condition: Callable[[], object], seconds: float = 40.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not come about in time"
        time.sleep(0.001)


def contents(path: Path) -> dict[str, Any]:
    """Every dataset and attribute of an HDF5 file."""
    values: dict[str, Any] = {}

    def visit(name: str, node: Any) -> None:
        values.update({f"{name}@{key}": np.asarray(value).tolist() for key, value in node.attrs.items()})
        if isinstance(node, h5py.Dataset):
            value = node[...]
            values[name] = (str(node.dtype), node.shape, value.tolist() if node.dtype == object else value.tobytes())

    with h5py.File(path, "r", locking=False) as file:
        visit("/", file)
        file.visititems(visit)
    return values


def kill_while_writing(worker: subprocess.Popen, folder: Path, running: Future) -> None:
    """SIGKILL a worker that has a slide file half written: it is stopped first, so that it is still at it when it is killed."""

    def at_it() -> bool:
        return folder.is_dir() and any(f"-{worker.pid}-" in name for name in os.listdir(folder))

    def stopped_while_writing() -> bool:
        assert not running.done(), "the run ended before the worker wrote anything"
        if not at_it():
            return False
        worker.send_signal(signal.SIGSTOP)
        os.waitpid(worker.pid, os.WUNTRACED)
        if at_it():
            return True
        worker.send_signal(signal.SIGCONT)  # it had just ended: at the next slide, then
        return False

    wait_for(stopped_while_writing)
    worker.kill()
    worker.wait()


def check_once(outcomes: list[Outcome], folder: Path, undisturbed: Path) -> None:
    """Every slide is done, once, as in an undisturbed run; nothing else lies about."""
    names = [f"S{i}" for i in range(SLIDES)]
    assert [(outcome.item, outcome.ok, outcome.skipped, outcome.message) for outcome in outcomes] == [
        (name, True, False, "") for name in names
    ]
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.h5" for name in names]
    for name in names:
        assert contents(folder / f"{name}.h5") == contents(undisturbed / f"{name}.h5"), name


def test_a_worker_killed_in_mid_run_costs_nothing(
    cluster: Cluster, make_slide: Callable[..., Path], picture: np.ndarray, tmp_path: Path
) -> None:
    workers = [cluster.worker("--no-nanny") for _ in range(2)]
    slides, outlines, out, local = (tmp_path / name for name in ("slides", "outlines", "out", "local"))
    outlines.mkdir()
    for i in range(SLIDES):
        make_slide(slides / f"S{i}.svs", picture[: 640 + 16 * i], levels=1)
        ring = [[200, 200], [500 + i, 200], [500 + i, 500], [200, 500], [200, 200]]
        shapes = [{"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": {}}]
        (outlines / f"S{i}.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": shapes}))
    tile([slides], local, 0.5, 64, workers=1)

    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(tile, [slides], out, 0.5, 64, scheduler=cluster.address)
        kill_while_writing(workers[0], out, run)
        check_once(run.result(60), out, local)
        annotate(local, outlines, workers=1)
        workers.append(cluster.worker("--no-nanny"))
        run = pool.submit(annotate, out, outlines, scheduler=str(cluster.file))
        kill_while_writing(workers[1], out, run)
        check_once(run.result(60), out, local)

    words = ["tile", str(slides), "--out", str(out), "--mpp", "0.5", "--size", "64", "--scheduler", cluster.address]
    done = subprocess.run([sys.executable, "-m", "odis_path", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [outcome.skipped for outcome in tile([slides], out, 0.5, 64, scheduler=cluster.address)] == [True] * SLIDES


def test_relative_paths_are_those_of_the_command_not_of_the_worker(
    cluster: Cluster, make_slide: Callable[..., Path], picture: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.worker("--no-nanny")  # in a folder of its own
    make_slide(tmp_path / "slides" / "S.svs", picture, levels=1)
    (tmp_path / "exclude").mkdir()
    ring = [[0, 0], [600, 0], [600, 768], [0, 768], [0, 0]]
    shape = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": {}}
    (tmp_path / "exclude" / "S.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [shape]}))
    monkeypatch.chdir(tmp_path)
    for out, options in (("here", {"workers": 1}), ("there", {"scheduler": cluster.address})):
        (outcome,) = tile(["slides/S.svs"], out, 0.5, 64, exclude="exclude", **options)
        assert outcome.ok, outcome.message
        assert "nothing of it in --exclude" not in outcome.message
    assert contents(tmp_path / "here" / "S.h5") == contents(tmp_path / "there" / "S.h5")


def work(item: str) -> None:
    """What the item's name asks for (runs in workers)."""
    if item == "hangs":
        time.sleep(600)
    if item == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if item.startswith("slow"):
        time.sleep(0.5)


def test_what_hangs_or_kills_on_a_cluster_is_named_and_the_rest_goes_on(cluster: Cluster) -> None:
    cluster.worker()
    items = ["one", "hangs", "two", "dies", "three"]
    outcomes = run_cohort(items, work, title="t", scheduler=cluster.address, timeout=2)
    assert {outcome.item: outcome.message for outcome in outcomes if not outcome.ok} == {
        "hangs": "no result after 2 s (--timeout): its reader hangs, or it needs more time",
        "dies": DIED,
    }


def test_a_scheduler_that_goes_away_ends_the_run_with_a_line(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.worker("--no-nanny", "--death-timeout", "5")
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(run_cohort, [f"slow{i}" for i in range(200)], work, title="t", scheduler=cluster.address)
        time.sleep(3)
        cluster.scheduler.kill()
        outcomes = run.result(60)
    failed = [outcome.message for outcome in outcomes if not outcome.ok]
    assert len(outcomes) == 200
    (error,) = (message for message in failed if message != NOT_TRIED)
    assert "the scheduler went away" in error
    monkeypatch.setattr("tiling.jobs.dask.ANSWER_S", 1.0)
    with pytest.raises(UserError, match="no Dask scheduler answers there"):
        run_cohort(["one"], work, title="t", scheduler=cluster.address)
