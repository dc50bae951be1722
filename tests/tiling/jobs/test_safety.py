"""What a run never does: replace what is not its own, mix two runs, pass old or torn pixels for good ones."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image

import tiling.boxes.run
import tiling.jobs.run
import tiling.jobs.summary
import tiling.tiles.run
from annotations.errors import UserError
from tiling.boxes.run import annotate
from tiling.images.run import import_images
from tiling.jobs.dask import SharedStorageCheck
from tiling.jobs.outcome import ItemResult, Outcome
from tiling.jobs.run import run_cohort
from tiling.slide_file.read import SlideFile
from tiling.storage.locks import FileLockedError, lock_file, lock_path, lock_settings
from tiling.tiles.run import tile

MakeSlide = Callable[..., Path]


def tiled(slide: Path, out: Path, **options: Any) -> Outcome:
    (outcome,) = tile([slide], out, **({"mpp": 1.0, "size": 96, "workers": 1} | options))
    return outcome


# --- files of other programs


def clam(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["features"], file["coords"] = np.zeros((3, 8), np.float32), np.zeros((3, 2), np.int64)


def own_features(path: Path) -> None:
    clam(path)
    with h5py.File(path, "a") as file:
        file.attrs.update({"format": "odis-path-features", "format_version": 1})


def of_a_newer_version(path: Path) -> None:
    clam(path)
    with h5py.File(path, "a") as file:
        file.attrs.update({"format": "odis-path", "format_version": 99})


@pytest.mark.parametrize("make", [clam, own_features, of_a_newer_version])
def test_what_tile_did_not_make_it_does_not_replace(make: Callable, slide_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "out" / "painted.h5"
    make(path)
    before = path.read_bytes()
    outcome = tiled(slide_path, path.parent)
    assert not outcome.ok
    assert re.search(r"painted\.h5: (not made by odis-path tile|made by a newer .*): give another --out", outcome.message)
    assert path.read_bytes() == before
    path.write_bytes(before[:100])  # damaged: HDF5 does not open it
    assert tiled(slide_path, path.parent).ok


@pytest.mark.parametrize("fit", ["tiles", "crop"])
def test_what_import_did_not_make_it_does_not_replace(fit: str, tmp_path: Path, picture: np.ndarray) -> None:
    (tmp_path / "images" / "one").mkdir(parents=True)
    Image.fromarray(picture[:224, :224]).save(tmp_path / "images" / "one" / "a.png")
    options: dict[str, Any] = {"mpp": 0.5, "fit": fit}
    assert import_images(tmp_path / "images", tmp_path / "names", **options)[0].ok
    (name,) = (path.name for path in (tmp_path / "names").glob("*.h5"))
    clam(tmp_path / "out" / name)
    before = (tmp_path / "out" / name).read_bytes()
    outcome = import_images(tmp_path / "images", tmp_path / "out", **options)[0]
    assert "not made by odis-path tile: give another --out" in outcome.message
    assert not outcome.ok
    assert (tmp_path / "out" / name).read_bytes() == before


# --- another slide of the same name


def equal_slides(base: Path, make_slide: MakeSlide, picture: np.ndarray) -> tuple[Path, Path]:
    """Two slides that differ, of equal name, size and time."""
    paths = base / "a" / "S.svs", base / "b" / "S.svs"
    for path, part in zip(paths, (picture, picture[::-1]), strict=True):
        make_slide(path, part, levels=1)
    size = max(path.stat().st_size for path in paths)
    for path in paths:
        with path.open("ab") as file:
            file.write(bytes(size - path.stat().st_size))
        os.utime(path, ns=(10**18, 10**18))
    return paths


@pytest.mark.parametrize("same_time", [True, False])
def test_another_slide_of_equal_name_and_size_is_refused(
    same_time: bool, make_slide: MakeSlide, picture: np.ndarray, tmp_path: Path
) -> None:
    first, second = equal_slides(tmp_path, make_slide, picture)
    if not same_time:
        os.utime(second)
    out = tmp_path / "out"
    assert tiled(first, out).ok
    before = (out / "S.h5").read_bytes()
    outcome = tiled(second, out)
    assert not outcome.ok
    assert f"{second}: {out / 'S.h5'} holds the tiles of another slide of this name, {first}:" in outcome.message
    assert (out / "S.h5").read_bytes() == before


def test_a_slide_that_was_moved_linked_or_copied_is_done(make_slide: MakeSlide, picture: np.ndarray, tmp_path: Path) -> None:
    first, _ = equal_slides(tmp_path, make_slide, picture)
    out, moved, link = tmp_path / "out", tmp_path / "c" / "S.svs", tmp_path / "d" / "S.svs"
    for path in (moved, link):
        path.parent.mkdir()
    assert tiled(first, out).ok
    link.symlink_to(first)
    assert tiled(link, out).skipped
    copy = tmp_path / "e" / "S.svs"
    copy.parent.mkdir()
    shutil.copy2(first, copy)
    assert tiled(copy, out).skipped
    os.utime(copy)  # as a copy that has a time of its own
    assert tiled(copy, out).redone == "the slide file changed"
    assert tiled(first, out).redone == "the slide file changed"
    shutil.move(first, moved)
    assert tiled(moved, out).skipped
    first.touch()  # as archives leave stubs behind
    assert tiled(moved, out).skipped


# --- two runs


def write_outline(path: Path, side: int) -> None:
    path.parent.mkdir(exist_ok=True)
    ring = [[300, 300], [300 + side, 300], [300 + side, 300 + side], [300, 300 + side], [300, 300]]
    feature = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": {}}
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))


def test_two_runs_of_annotate_with_other_files_do_not_mix(
    slide_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    tiled(slide_path, out)
    for name, side in (("one", 100), ("two", 120)):
        write_outline(tmp_path / name / "painted.geojson", side)
    messages: list[str] = []
    run = tiling.boxes.run.run_cohort

    def meanwhile(*args: Any, **named: Any) -> list[Outcome]:
        monkeypatch.setattr(tiling.boxes.run, "run_cohort", run)
        for name in ("one", "two"):
            try:
                messages.append(annotate(out, tmp_path / name, workers=1)[0].message)
            except UserError as error:
                messages.append(str(error))
        return run(*args, **named)

    monkeypatch.setattr(tiling.boxes.run, "run_cohort", meanwhile)
    annotate(out, tmp_path / "one", workers=1)
    assert "another run" not in messages[0]
    assert re.search(
        r"another run of odis-path annotate is at work here with other settings \(annotations \w+ \(1 files, .*now", messages[1]
    )


def test_locks_are_for_all_users_of_a_folder(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        with lock_file(tmp_path / "a.h5"):
            assert lock_path(tmp_path / "a.h5").stat().st_mode & 0o777 == 0o666
    finally:
        os.umask(before)


def test_a_lock_of_another_user_keeps_runs_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign_files: set[str] = set()
    real = os.open

    def foreign(path: Any, flags: int, *args: Any, **keywords: Any) -> int:
        """`foreign_files` are to be read, not written, as those of another user under umask 022."""
        if str(path) in foreign_files and flags & (os.O_RDWR | os.O_WRONLY) and os.path.exists(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, flags, *args, **keywords)

    monkeypatch.setattr(os, "open", foreign)
    path, lock = tmp_path / "a.h5", tmp_path / ".tile.odis-lock"
    with lock_file(path), lock_settings(tmp_path, "tile", {"mpp": 1}):
        foreign_files |= {str(lock_path(path)), str(lock)}
        with pytest.raises(FileLockedError), lock_file(path):
            pass
        with lock_settings(tmp_path, "tile", {"mpp": 1}):
            pass
        with pytest.raises(UserError, match="mpp 1, now 2"), lock_settings(tmp_path, "tile", {"mpp": 2}):
            pass
    lock_path(path).touch()  # left by a killed run
    lock.touch()
    with (
        lock_file(path),
        lock_settings(tmp_path, "tile", {"mpp": 2}),
        pytest.raises(UserError, match="mpp 2, now 1"),
        lock_settings(tmp_path, "tile", {"mpp": 1}),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


# --- clusters


def test_a_file_that_only_the_worker_sees_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiling.jobs.dask.PATIENCE_S", 0.5)
    (tmp_path / "old.h5").touch()
    now = (tmp_path / "old.h5").stat().st_mtime_ns
    shared_storage = SharedStorageCheck()

    def check(name: str, mtime_ns: int) -> Outcome:
        return shared_storage.check(Outcome(name, ok=True, written=(tmp_path / name, mtime_ns)))

    assert check("old.h5", now) == Outcome("old.h5", ok=True)
    begin = time.monotonic()
    for name, mtime_ns in (("no.h5", now), ("no.h5", -1), ("old.h5", now + 60 * 10**9)):
        outcome = check(name, mtime_ns)
        assert not outcome.ok
        assert "the worker wrote it where this machine does not see it: is --out on a shared disk?" in outcome.message
    assert 0.4 < time.monotonic() - begin < 1.4  # only the first is waited for


def test_each_file_that_comes_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def passes(seconds: float) -> None:
        clock[0] += seconds
        if clock[0] % 10 > 8:
            (tmp_path / f"{int(clock[0] // 10)}.h5").touch()

    monkeypatch.setattr("tiling.jobs.dask.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("tiling.jobs.dask.time.sleep", passes)
    shared_storage = SharedStorageCheck()
    for i in range(3):
        clock[0] = 10.0 * i
        assert shared_storage.check(Outcome("a", ok=True, written=(tmp_path / f"{i}.h5", 0))).ok


# --- slides that change, and torn ones


def test_a_slide_replaced_while_it_is_read_fails(
    make_slide: MakeSlide, picture: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, new = make_slide(tmp_path / "S.svs", picture), make_slide(tmp_path / "new" / "S.svs", picture[::-1])
    look = tiling.tiles.run.read_overview

    def slow(*args: Any, **named: Any) -> Any:
        overview = look(*args, **named)
        os.replace(new, path)
        return overview

    with monkeypatch.context() as patched:
        patched.setattr(tiling.tiles.run, "read_overview", slow)
        outcome = tiled(path, tmp_path / "out")
    assert not outcome.ok
    assert "S.svs: changed while it was read" in outcome.message
    assert list((tmp_path / "out").iterdir()) == []
    outcome = tiled(path, tmp_path / "out")
    assert (outcome.ok, outcome.skipped) == (True, False)


def torn_slide(path: Path, number: int) -> Path:
    with tifffile.TiffFile(path) as file:
        offset, count = file.pages[0].dataoffsets[number], file.pages[0].databytecounts[number]
    with path.open("r+b") as raw:
        raw.seek(offset)
        raw.write(bytes(count))
    return path


@pytest.mark.parametrize("reader", ["direct", "openslide"])
def test_a_torn_tile_in_tissue_is_marked_and_counted_each_time(
    reader: str, make_slide: MakeSlide, picture: np.ndarray, tmp_path: Path
) -> None:
    whole = make_slide(tmp_path / "whole" / "S.svs", picture, levels=1)
    path = torn_slide(make_slide(tmp_path / "torn" / "S.svs", picture, levels=1), 5)  # x, y 256..512
    options: dict[str, Any] = {"reader": reader, "size": 64}
    assert tiled(whole, tmp_path / "a", **options).info["bad_tiles"] == 0
    outcome = tiled(path, tmp_path / "b", **options)
    assert outcome.ok
    assert outcome.info["bad_tiles"] == 4
    with SlideFile(tmp_path / "a" / "S.h5") as before, SlideFile(tmp_path / "b" / "S.h5") as after:
        places = after.coords[after.bad_tiles].tolist()
        assert places == [[256, 256], [384, 256], [256, 384], [384, 384]]
        assert {tuple(xy) for xy in before.coords.tolist()} == {tuple(xy) for xy in after.coords.tolist()}
    again = tiled(path, tmp_path / "b", **options)
    assert (again.skipped, again.info["bad_tiles"], again.info["tiles"]) == (True, 4, outcome.info["tiles"])
    assert "of the overview cannot be decoded" in again.message


def test_a_torn_tile_on_glass_and_black_padding_hold_no_tissue(
    make_slide: MakeSlide, picture: np.ndarray, tmp_path: Path
) -> None:
    glass = np.full((picture.shape[0], 256, 3), 245, np.uint8)
    padded = np.concatenate([glass, picture], axis=1)
    padded = np.concatenate([padded, np.zeros((64, padded.shape[1], 3), np.uint8)])
    clean = make_slide(tmp_path / "clean" / "S.svs", padded, levels=1)
    corner = torn_slide(make_slide(tmp_path / "torn" / "S.svs", padded, levels=1), 0)
    coords = []
    for path in (clean, corner):
        outcome = tiled(path, path.parent / "out", size=64)
        assert (outcome.ok, outcome.info["bad_tiles"]) == (True, 0)
        with SlideFile(path.parent / "out" / "S.h5") as file:
            coords.append(file.coords.tolist())
    assert coords[0] == coords[1]


# --- how long it takes


def test_the_time_left_is_told_by_what_was_not_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tiling.jobs.summary, "PLAIN_LINE_EVERY_S", 0.15)

    def work(i: int) -> ItemResult:
        if i >= 300:
            time.sleep(0.2)
        return ItemResult(skipped=i < 300)

    run_cohort(range(310), work, title="t", workers=1)
    lines = re.findall(r"t: (\d+)/310 .*?(?:ETA (\d+) s)?\n", capsys.readouterr().err)
    assert lines
    for count, eta_s in lines:
        if eta_s:
            assert int(eta_s) + 0.51 >= 0.2 * (310 - int(count))
            assert int(eta_s) < 2 * (310 - int(count)) + 1
    assert int(lines[-1][0]) > 300
