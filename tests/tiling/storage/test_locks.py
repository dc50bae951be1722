"""A lock is a plain file that we made: nothing else of that name is followed, written to or changed."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from annotations.errors import UserError
from tiling.storage.locks import is_locked, lock_file, lock_path, lock_settings, sweep

Plant = Callable[[Path, Path], None]


def linked(lock: Path, victim: Path) -> None:
    lock.symlink_to(victim)


def dangling(lock: Path, victim: Path) -> None:
    lock.symlink_to(victim.with_name("not there"))


def to_a_folder(lock: Path, victim: Path) -> None:
    lock.symlink_to(victim.parent)


def hard_linked(lock: Path, victim: Path) -> None:
    lock.hardlink_to(victim)


def a_folder(lock: Path, victim: Path) -> None:
    lock.mkdir()


def a_pipe(lock: Path, victim: Path) -> None:
    os.mkfifo(lock)


KINDS = {
    linked: "is a symbolic link",
    dangling: "is a symbolic link",
    to_a_folder: "is a symbolic link",
    hard_linked: "is a second name of another file",
    a_folder: "is a folder",
    a_pipe: "is no plain file",
}


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "elsewhere" / "precious.txt"
    path.parent.mkdir()
    path.write_text("precious")
    path.chmod(0o600)
    return path


def untouched(victim: Path) -> None:
    assert victim.read_text() == "precious"
    assert stat.S_IMODE(victim.stat().st_mode) == 0o600
    assert [path.name for path in victim.parent.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize("plant", KINDS, ids=lambda plant: plant.__name__)
def test_what_has_the_name_of_a_lock_is_left_alone_and_named(plant: Plant, victim: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    of_run, of_file = out / ".tile.odis-lock", lock_path(out / "a.h5")
    for lock in (of_run, of_file):
        plant(lock, victim)
    with pytest.raises(UserError) as raised, lock_settings(out, "tile", {"mpp": 1}):
        pass
    assert str(raised.value).startswith(f"{of_run}: {KINDS[plant]}")
    with pytest.raises(UserError) as raised, lock_file(out / "a.h5"):
        pass
    assert str(raised.value).startswith(f"{of_file}: {KINDS[plant]}")
    assert not is_locked(of_file)
    sweep(out)
    assert os.path.lexists(of_run)
    untouched(victim)
    if victim.parent.exists() and plant is hard_linked:
        assert victim.stat().st_nlink == 3


@pytest.mark.parametrize("plant", KINDS, ids=lambda plant: plant.__name__)
def test_a_cohort_goes_on_past_a_slide_whose_lock_is_something_else(plant: Plant, victim: Path, tmp_path: Path) -> None:
    from tiling.jobs.run import run_cohort

    def work(name: str) -> None:
        with lock_file(tmp_path / "out" / name):
            pass

    (tmp_path / "out").mkdir()
    plant(lock_path(tmp_path / "out" / "b.h5"), victim)
    outcomes = run_cohort(["a.h5", "b.h5", "c.h5"], work, title="test", workers=1, folder=tmp_path / "out")
    assert [outcome.ok for outcome in outcomes] == [True, False, True]
    assert KINDS[plant] in outcomes[1].message
    untouched(victim)


def test_a_lock_that_is_there_keeps_its_mode(tmp_path: Path) -> None:
    lock = lock_path(tmp_path / "a.h5")
    lock.touch()
    lock.chmod(0o640)
    with lock_file(tmp_path / "a.h5"):
        assert stat.S_IMODE(lock.stat().st_mode) == 0o640
    assert not lock.exists()


def test_settings_are_still_told_to_those_who_join(tmp_path: Path) -> None:
    with lock_settings(tmp_path, "tile", {"mpp": 1}):
        assert json.loads((tmp_path / ".tile.odis-lock").read_text()) == {"mpp": 1}
    assert list(tmp_path.iterdir()) == []
