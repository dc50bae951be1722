"""Killed, out of space, or two at once: no run leaves a torn file, and the same command again ends as if undisturbed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from annotations.errors import UserError
from tiling.boxes.run import annotate
from tiling.jobs.outcome import Outcome
from tiling.jobs.summary import NOT_TRIED, Outcomes
from tiling.proposals.run import propose
from tiling.slide_file.read import SlideFile
from tiling.slide_file.write import SlideMeta, replace_groups, write_slide_file
from tiling.storage.atomic import DiskFullError, atomic_path, machine, sweep_temporaries
from tiling.storage.checked_file import HEAPS_ATTR
from tiling.storage.checksums import value_crc32
from tiling.storage.locks import FileLockedError, is_locked, lock_file, lock_path, lock_settings, sweep
from tiling.tiles.run import tile

MakeSlide = Callable[..., Path]
KILLED = -signal.SIGKILL

KILLS = int(os.environ.get("ODIS_TEST_KILLS", "6"))  # moments tried of each command; some hundred for a study
few = settings(max_examples=KILLS, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


ROOT = Path(__file__).parents[3]


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not come about in time"
        time.sleep(0.005)


def contents(path: Path) -> dict[str, Any]:
    """Every dataset (type, shape and bytes) and every attribute of an HDF5 file.

    Without the checksum of where HDF5 keeps texts: the texts themselves are compared, and in a feature file the path of the
    slide file, which is another in every folder, is one of them.
    """
    values: dict[str, Any] = {}

    def visit(name: str, node: Any) -> None:
        for key, value in node.attrs.items():
            values[f"{name}@{key}"] = np.asarray(value).tolist()
        if isinstance(node, h5py.Dataset):
            value = node[...]
            values[name] = (str(node.dtype), node.shape, value.tolist() if node.dtype == object else value.tobytes())

    with h5py.File(path, "r", locking=False) as file:
        visit("/", file)
        file.visititems(visit)
    del values[f"/@{HEAPS_ATTR}"]
    return values


def folder_contents(folder: Path) -> dict[str, Any]:
    """All files of a folder, hidden ones too; of HDF5 files what is in them."""
    return {path.name: contents(path) if path.suffix == ".h5" else path.read_bytes() for path in sorted(folder.iterdir())}


def feature(x: int, y: int, size: int) -> dict[str, Any]:
    ring = [[x, y], [x + size, y], [x + size, y + size], [x, y + size], [x, y]]
    geometry = {"type": "Polygon", "coordinates": [ring]}
    return {"type": "Feature", "geometry": geometry, "properties": {"classification": {"name": "Tumor"}}}


class Stage:
    """Three small slides with annotations, and the commands on them."""

    def __init__(self, base: Path, make_slide: MakeSlide, picture: np.ndarray) -> None:
        self.slides, self.outlines = base / "slides", base / "outlines"
        self.tiles = base / "tiles"
        self.outlines.mkdir(parents=True)
        for i in range(3):
            make_slide(self.slides / f"S{i}.svs", picture[200 : 584 + 32 * i, 256:768], levels=1)
            collection = {"type": "FeatureCollection", "features": [feature(100 + 9 * i, 100, 150), feature(150, 160, 60)]}
            (self.outlines / f"S{i}.geojson").write_text(json.dumps(collection))

    def tile(self, out: Path, **options: Any) -> Outcomes:
        return tile([self.slides], out, **({"mpp": 1.0, "size": 96, "workers": 1} | options))

    def annotate(self, out: Path, **options: Any) -> Outcomes:
        return annotate(out, self.outlines, workers=1, polygons=True, **options)

    def propose(self, out: Path, **options: Any) -> Outcomes:
        return propose(out, workers=1, **options)

    def embed(self, out: Path, **options: Any) -> list[Outcome]:
        from odis_path.embedding.run import embed

        return embed(out.parent / "tiles", "stub", out, level="slide", **options)


class StubEncoder:
    """Means over the colours, so that what is embedded is known and no model is needed."""

    name, dim, pool, trained_px = "stub", 3, "cls", None

    def about(self, tile_px: int, what: str = "tiles") -> str:
        return f"stub: {what} of {tile_px} px"

    def size_px(self, tile_px: int) -> int:
        return tile_px

    def encode(self, tiles: np.ndarray, _boxes: object, _mode: str) -> np.ndarray:
        return tiles.mean(axis=(1, 2)).astype(np.float32)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, make_slide: MakeSlide, picture: np.ndarray) -> Stage:
    return Stage(tmp_path_factory.mktemp("stage"), make_slide, picture)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    import odis_path.embedding.run as module

    monkeypatch.setattr(module, "shared_encoder", lambda *args: StubEncoder())


COMMANDS = ("tile", "annotate", "propose", "embed")
OPERATIONS = {"tile": 630, "annotate": 800, "propose": 680, "embed": 340}  # about how many file operations each makes here
BYTES = {"tile": 36_000, "annotate": 42_000, "propose": 41_000, "embed": 7600}  # about how large its files get


def prepared(stage: Stage, command: str, base: Path) -> Path:
    """A folder with what `command` needs; returns the one it writes to."""
    shutil.rmtree(base, ignore_errors=True)
    if command != "tile":
        if not stage.tiles.exists():
            assert all(outcome.ok for outcome in stage.tile(stage.tiles))
        shutil.copytree(stage.tiles, base / "tiles")
    return base / ("features" if command == "embed" else "tiles")


# --- kill -9


def after_operations(count: int) -> Iterator[None]:
    """In a child: end at once, as kill -9 does, at the count-th operation on files (opened, renamed, removed, locked,
    flushed, a group or dataset written)."""
    remaining = [count]

    def tick(*_: object) -> None:
        remaining[0] -= 1
        if remaining[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, args: tuple) -> None:
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate", "fcntl.flock") and remaining[0] >= 0:
            tick()

    def counted(function: Callable) -> Callable:
        def around(*args: Any, **named: Any) -> Any:
            tick()
            value = function(*args, **named)
            tick()
            return value

        return around

    os.fsync = counted(os.fsync)
    os.pwrite = counted(os.pwrite)
    os.close = counted(os.close)
    h5py.Group.create_dataset = counted(h5py.Group.create_dataset)
    h5py.AttributeManager.__setitem__ = counted(h5py.AttributeManager.__setitem__)
    sys.addaudithook(hook)
    yield


def at_file_size(limit: int) -> Iterator[None]:
    """In a child: end within the write that takes a file past `limit` bytes, some of which have arrived."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    yield


def in_child(prepare: Iterator[None], run: Callable[[], object]) -> int:
    """Run in a forked child; its exit status, negative for a signal."""
    pid = os.fork()
    if not pid:
        code = 1
        signal.alarm(120)  # a child that waits for a lock some thread of the parent held is no reason to wait for ever
        try:
            next(prepare)
            run()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def check_kill(stage: Stage, command: str, base: Path, prepare: Iterator[None], undisturbed: dict[str, Any]) -> int:
    """Kill a run, look at what it left, run it again: as undisturbed, and nothing that was done is done again."""
    out = prepared(stage, command, base)
    run = getattr(stage, command)
    fresh = {path.name: contents(path) for path in out.glob("*.h5")} if out.is_dir() else {}
    code = in_child(prepare, lambda: run(out))
    contents_after = {path.name: contents(path) for path in out.glob("*.h5")} if out.is_dir() else {}
    for name, content in contents_after.items():
        assert content in (undisturbed[name], fresh.get(name)), f"{name} is torn"
    whole = [name for name, content in contents_after.items() if content == undisturbed[name] and content != fresh.get(name)]
    stamps = {name: (out / name).stat() for name in whole}
    outcomes = run(out)
    assert all(outcome.ok for outcome in outcomes), outcomes
    assert sorted(f"{outcome.item}.h5" for outcome in outcomes if outcome.skipped) == sorted(whole)
    for name, stamp in stamps.items():
        again = (out / name).stat()
        assert (again.st_ino, again.st_mtime_ns) == (stamp.st_ino, stamp.st_mtime_ns), f"{name} was made again"
    assert folder_contents(out) == undisturbed
    return code


@pytest.fixture(scope="module")
def whole(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What each command leaves when nothing disturbs it."""
    known: dict[str, dict[str, Any]] = {}

    def of(command: str) -> dict[str, Any]:
        if command not in known:
            out = prepared(stage, command, tmp_path_factory.mktemp(command))
            assert all(outcome.ok for outcome in getattr(stage, command)(out))
            known[command] = folder_contents(out)
        return known[command]

    return of


def same_source(undisturbed: dict[str, Any], base: Path) -> dict[str, Any]:
    """Feature files name the slide file they are of: put the folder of this run in, and its checksum."""
    moved = {}
    for name, content in undisturbed.items():
        moved[name] = content
        if name.endswith(".h5") and "features" in content:
            source, sums = str(base / "tiles" / name), list(content["/@attrs_crc32"])
            sums[[key for key in content if key.startswith("/@")].index("/@source")] = value_crc32(source)
            moved[name] = {**content, "/@source": source, "/@attrs_crc32": sums}
    return moved


@pytest.mark.parametrize("command", COMMANDS)
def test_killed_at_any_file_operation(command: str, stage: Stage, stub: None, whole: Callable, tmp_path: Path) -> None:
    undisturbed = same_source(whole(command), tmp_path / "x")
    codes = []

    @few
    @given(st.integers(0, OPERATIONS[command]))
    def kill_at(count: int) -> None:
        codes.append(check_kill(stage, command, tmp_path / "x", after_operations(count), undisturbed))

    kill_at()
    assert KILLED in codes


@pytest.mark.parametrize("command", COMMANDS)
def test_killed_within_a_write(command: str, stage: Stage, stub: None, whole: Callable, tmp_path: Path) -> None:
    undisturbed = same_source(whole(command), tmp_path / "x")
    codes = []

    @few
    @given(st.integers(1, BYTES[command]))
    def kill_at(size: int) -> None:
        codes.append(check_kill(stage, command, tmp_path / "x", at_file_size(size), undisturbed))

    kill_at()
    assert -signal.SIGXFSZ in codes


def test_a_run_killed_with_its_workers_goes_on_from_there(stage: Stage, whole: Callable, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["tile", str(stage.slides), "--out", str(out), "--mpp", "1.0", "--size", "96", "--workers", "2"]
    run = subprocess.Popen([sys.executable, "-m", "odis_path", *words], stdout=subprocess.DEVNULL, cwd=ROOT)
    wait_for(lambda: out.is_dir() and any(path.name.endswith((".tmp", ".h5")) for path in out.iterdir()))
    run.kill()
    run.wait()
    wait_for(lambda: not any(is_locked(path) for path in out.glob(".*.odis-lock")))  # its workers end with it
    assert not any(Path(str(path)).suffix == ".h5" and not h5py.is_hdf5(path) for path in out.iterdir())
    assert all(outcome.ok for outcome in stage.tile(out))
    assert folder_contents(out) == whole("tile")


# --- errors at a write, and full disks


class FailingWrites:
    """Every `os` function named fails with `code` from the count-th call on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, names: list[str], code: int, count: int) -> None:
        self.remaining = count
        for name in names:
            monkeypatch.setattr(os, name, self.failing(getattr(os, name), code))

    def failing(self, function: Callable, code: int) -> Callable:
        def around(*args: Any, **named: Any) -> Any:
            self.remaining -= 1
            if self.remaining < 0:
                raise OSError(code, os.strerror(code))
            return function(*args, **named)

        return around


@pytest.mark.parametrize("name", ["pwrite", "fsync", "replace", "ftruncate"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_write_that_fails_is_told_and_tears_nothing(
    command: str, name: str, stage: Stage, stub: None, whole: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = prepared(stage, command, tmp_path / "x")
    fresh = folder_contents(out) if out.is_dir() else {}
    undisturbed = same_source(whole(command), tmp_path / "x")
    settings_lock = int(name in ("pwrite", "ftruncate") and command in ("tile", "annotate"))
    with monkeypatch.context() as patched:
        FailingWrites(patched, [name], errno.EIO, settings_lock + int(name == "fsync"))
        try:
            failed = [outcome for outcome in getattr(stage, command)(out) if not outcome.ok]
        except UserError as error:  # slides.parquet without one slide
            failed = [Outcome("", ok=False, error=str(error))]
    assert failed
    assert all("Input/output error" in outcome.message or command == "embed" for outcome in failed)
    for path in out.iterdir():
        assert contents(path) in (fresh.get(path.name), undisturbed[path.name])
    assert all(outcome.ok for outcome in getattr(stage, command)(out))
    assert folder_contents(out) == undisturbed


WRITES = {"tile": 40, "annotate": 60, "propose": 60, "embed": 30}  # about how many calls of the busiest function there are


@pytest.mark.parametrize("command", COMMANDS)
def test_any_write_may_fail(command: str, stage: Stage, stub: None, whole: Callable, tmp_path: Path) -> None:
    undisturbed = same_source(whole(command), tmp_path / "x")

    @few
    @given(
        st.sampled_from(["pwrite", "fsync", "replace", "ftruncate", "open", "close"]),
        st.sampled_from([errno.EIO, errno.ENOSPC, errno.EDQUOT]),
        st.integers(0, WRITES[command]),
    )
    def fail_at(name: str, code: int, count: int) -> None:
        out = prepared(stage, command, tmp_path / "x")
        fresh = folder_contents(out) if out.is_dir() else {}
        with pytest.MonkeyPatch.context() as patched, contextlib.suppress(UserError):
            FailingWrites(patched, [name], code, count)
            for outcome in getattr(stage, command)(out):
                assert outcome.ok or outcome.message
        for path in out.glob("*.h5"):
            assert contents(path) in (fresh.get(path.name), undisturbed[path.name]), f"{path.name} is torn"
        assert all(outcome.ok for outcome in getattr(stage, command)(out))
        assert folder_contents(out) == undisturbed

    fail_at()


def disk_full_run(stage: Stage, out: Path) -> Outcomes:
    """Tile into a folder that is too small; what is said, and that nothing torn is left."""
    outcomes = stage.tile(out)
    failed = [outcome for outcome in outcomes if not outcome.ok]
    assert failed
    assert "cannot be written" in failed[0].message
    assert "make room" in failed[0].message
    assert {path.name for path in out.iterdir()} == {f"{outcome.item}.h5" for outcome in outcomes if outcome.ok}
    return outcomes


def test_a_full_disk_stops_the_run_with_a_line(
    stage: Stage, whole: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    free = tmp_path / "free"
    stage.tile(free)
    smallest = min(path.stat().st_size for path in free.glob("*.h5"))
    assert smallest > 20_000
    for size in range(1000, smallest, 3000):
        out = tmp_path / str(size)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            outcomes = disk_full_run(stage, out)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [outcome.message == NOT_TRIED for outcome in outcomes] == [False, False, True]
    outcomes.print()
    assert outcomes.failed
    printed = capsys.readouterr().out
    assert "File too large" in printed
    assert "not tried: 1, from S2 on" in printed
    stage.tile(out)
    assert folder_contents(out) == whole("tile")


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB, where one may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("no file system may be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_full_in_earnest(stage: Stage, tiny_disk: Path) -> None:
    outcomes = disk_full_run(stage, tiny_disk / "out")
    assert [outcome.ok for outcome in outcomes] == [True, False, False]
    assert "No space left on device" in outcomes[1].message
    with SlideFile(tiny_disk / "out" / "S0.h5") as file:  # whole, and the process goes on writing elsewhere
        assert file.tile(len(file) - 1).shape == (96, 96, 3)
    assert all(outcome.ok for outcome in stage.tile(tiny_disk.parent / "elsewhere"))


def test_a_lost_write_ends_the_work_for_its_file_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def pixels() -> Iterator[bytes]:
        for i in range(100):
            read.append(i)
            yield bytes(1 << 19)

    FailingWrites(monkeypatch, ["pwrite"], errno.ENOSPC, 3)
    meta = SlideMeta("a", tmp_path / "a.svs", 100, 100, 1.0, 1.0, 1)
    with pytest.raises(DiskFullError, match=r"a\.h5: cannot be written: No space left"):
        write_slide_file(tmp_path / "a.h5", meta=meta, coords=np.stack([np.arange(100), np.zeros(100)], 1), pixels=pixels())
    assert len(read) < 40
    assert list(tmp_path.iterdir()) == []


# --- two runs at once

TWO = """
import json, pathlib, sys, time
from tiling.tiles.run import tile
slides, out, go = map(pathlib.Path, sys.argv[1:])
print("ready", flush=True)
while not go.exists(): time.sleep(0.001)
outcomes = tile([slides], out, mpp=1.0, size=96, workers=1)
print(json.dumps([[o.item, o.ok, o.skipped, o.message] for o in outcomes]))
"""


def test_two_runs_share_the_work(stage: Stage, whole: Callable, tmp_path: Path) -> None:
    out, go = tmp_path / "out", tmp_path / "go"
    command = [sys.executable, "-c", TWO, str(stage.slides), str(out), str(go)]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)]
    for run in runs:
        assert run.stdout is not None
        assert run.stdout.readline() == "ready\n"
    go.touch()
    first, second = (json.loads(run.communicate(timeout=60)[0]) for run in runs)
    for (name, ok, skipped, message), (_, ok_too, skipped_too, message_too) in zip(first, second, strict=True):
        assert (ok, ok_too, message, message_too) == (True, True, "", ""), name
        assert skipped != skipped_too, f"{name} was done {2 - skipped - skipped_too} times"
    assert folder_contents(out) == whole("tile")


def test_a_slide_another_run_is_at_is_waited_for(
    stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    out = tmp_path / "out"
    let_go, holds = threading.Event(), threading.Event()

    def other_run() -> None:
        with lock_file(out / "S1.h5"):
            holds.set()
            let_go.wait(120)

    other = threading.Thread(target=other_run, daemon=True)
    other.start()
    assert holds.wait(30)
    looks: list[Path] = []

    def looked_at(lock: Path) -> bool:
        """Once the rest is done the lock is looked at; the other run ends between the first look and the second."""
        looks.append(lock)
        if len(looks) == 2:
            let_go.set()
            other.join(30)
        return is_locked(lock)

    monkeypatch.setattr("tiling.jobs.run.is_locked", looked_at)
    monkeypatch.setattr("tiling.jobs.run.POLL_S", 0.05)
    try:
        outcomes = stage.tile(out)
    finally:
        let_go.set()
    assert [(outcome.item, outcome.ok) for outcome in outcomes] == [("S0", True), ("S1", True), ("S2", True)]
    assert (out / "S1.h5").stat().st_ctime_ns > (out / "S2.h5").stat().st_ctime_ns
    assert "waiting for another run that works on the last 1 here" in capsys.readouterr().err
    assert len(looks) == 2


def test_another_run_with_other_settings_is_refused(stage: Stage, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with lock_settings(out, "tile", {"mpp": 0.5, "size": 96}):
        with lock_settings(out, "tile", {"size": 96, "mpp": 0.5}):
            pass
        with pytest.raises(UserError, match=r"another run of odis-path tile is at work here .*mpp 0\.5, now 1\.0"):
            stage.tile(out)
        with lock_settings(out, "annotate", {"kind": "cell"}):
            pass
    assert list(out.iterdir()) == []
    assert all(outcome.ok for outcome in stage.tile(out))


def test_a_lock_ends_with_its_process_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with lock_file(path), pytest.raises(FileLockedError), lock_file(path):
        pass
    assert not lock_path(path).exists()

    def hold() -> Iterator[None]:
        with lock_file(path):
            os.kill(os.getpid(), signal.SIGKILL)
        yield

    assert in_child(hold(), lambda: None) == KILLED
    assert lock_path(path).exists()
    assert not is_locked(lock_path(path))
    with lock_file(path):
        pass
    assert list(tmp_path.iterdir()) == []


# --- what killed runs leave


def test_the_next_run_sweeps_up_but_never_after_a_live_one(stage: Stage, tmp_path: Path) -> None:
    tile([stage.slides], tmp_path, mpp=1.0, size=96, workers=1)
    dead = subprocess.Popen(["true"])
    dead.wait()
    own, gone = tmp_path / f".S0.h5.{machine()}-{os.getppid()}-0.tmp", tmp_path / f".S0.h5.{machine()}-{dead.pid}-7.tmp"
    foreign, old = tmp_path / ".S0.h5.00000000-1-0.tmp", tmp_path / ".S1.h5.00000000-1-0.tmp"
    strange, lock = tmp_path / ".S0.h5.tmp", tmp_path / ".S0.h5.odis-lock"
    for path in (own, gone, foreign, old, strange, lock):
        path.touch()
    os.utime(old, (time.time() - 8 * 24 * 3600,) * 2)
    with lock_file(tmp_path / "S2.h5"):
        sweep(tmp_path)
        assert lock_path(tmp_path / "S2.h5").exists()
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == {own.name, foreign.name, strange.name}


def test_a_live_writer_keeps_its_temporary_file(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("whole")
        assert sweep_temporaries(tmp_path) == 0
        with atomic_path(tmp_path / "a.txt") as other:  # another thread: another name
            other.write_text("first")
        assert (tmp_path / "a.txt").read_text() == "first"
    assert (tmp_path / "a.txt").read_text() == "whole"


# --- what is made anew, and why


def test_what_changed_is_said(stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slides, out = shutil.copytree(stage.slides, tmp_path / "slides"), tmp_path / "out"

    def redone_note(**options: Any) -> str:
        outcomes = tile([slides], out, **({"mpp": 1.0, "size": 96, "workers": 1} | options))
        outcomes.print()
        return "".join(line for line in capsys.readouterr().out.splitlines() if "made anew" in line)

    assert redone_note() == ""
    assert redone_note() == ""
    assert (
        redone_note(quality=70, min_tissue=0.2) == "note: made anew: S0 and 2 more: min_tissue 0.1, now 0.2; quality 90, now 70"
    )
    os.utime(slides / "S1.svs", ns=(1, 1))
    assert redone_note(quality=70, min_tissue=0.2) == "note: made anew: S1: the slide file changed"
    (out / "S2.h5").write_bytes(b"torn")
    assert redone_note(quality=70, min_tissue=0.2) == "note: made anew: S2: the file was damaged"


def test_a_slide_of_equal_name_does_not_take_the_place_of_another(stage: Stage, tmp_path: Path) -> None:
    first, second, out = tmp_path / "a" / "S.svs", tmp_path / "b" / "S.svs", tmp_path / "out"
    for path, name in ((first, "S0.svs"), (second, "S1.svs")):
        path.parent.mkdir()
        shutil.copy(stage.slides / name, path)
    (outcome,) = tile([first], out, 1.0, 96, workers=1)
    before = (out / "S.h5").read_bytes()
    (outcome,) = tile([second], out, 1.0, 96, workers=1)
    assert not outcome.ok
    for words in (str(first), str(second), "another slide of this name", "slide_id"):
        assert words in outcome.message
    assert (out / "S.h5").read_bytes() == before
    first.unlink()  # only where it came from is gone: the slide was replaced
    (outcome,) = tile([second], out, 1.0, 96, workers=1)
    assert outcome.ok


def test_replacing_groups_of_a_file_on_a_full_disk_keeps_the_old_one(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.tile(tmp_path)
    before = contents(tmp_path / "S0.h5")
    FailingWrites(monkeypatch, ["pwrite"], errno.ENOSPC, 4)
    with pytest.raises(DiskFullError, match=r"S0\.h5: cannot be written"):
        replace_groups(tmp_path / "S0.h5", {"boxes": {"xyxy": np.zeros((5000, 4), np.float32)}})
    assert contents(tmp_path / "S0.h5") == before
