"""Checkpoints on a full disk and damaged ones: the older is kept, what can be done is said, and training goes on from it."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from annotations.errors import UserError
from odis_path.checkpoint import TrainedState, load_checkpoint, save_checkpoint
from odis_path.config import PretrainConfig
from odis_path.distributed import start_ranks
from odis_path.training import loop
from odis_path.training.setup import prepare
from tests.odis_path.conftest import tiny_config, tiny_values
from tiling.storage.atomic import DiskFullError
from tiling.storage.checksums import DamagedError

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
STATE = TrainedState(student={f"{i}": torch.arange(20_000.0) + i for i in range(4)})  # 320 kB


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def file_limit() -> Iterator[None]:
    """No file of this process may grow beyond 128 kB; the kernel refuses as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (128 << 10, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 192 kB, where one may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=192k", "none", str(folder)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("no file system may be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


# --- a full disk


def test_a_checkpoint_without_room_is_one_line_and_the_older_stays(tmp_path: Path, file_limit: None) -> None:
    config = tiny_config("x", tmp_path)
    small = save_checkpoint(tmp_path, 1, 0.1, config, TrainedState(), keep=1)
    with pytest.raises(DiskFullError, match=r"checkpoint-00000002\.pt: cannot be written: File too large: make room"):
        save_checkpoint(tmp_path, 2, 0.2, config, STATE, keep=1)
    assert names(tmp_path) == [small.name]
    assert load_checkpoint(tmp_path).step == 1


def test_a_disk_that_is_full_in_earnest_is_the_same_line(tiny_disk: Path) -> None:
    config = tiny_config("x", tiny_disk)
    small = save_checkpoint(tiny_disk, 1, 0.1, config, TrainedState(), keep=1)
    with pytest.raises(DiskFullError, match=r"cannot be written: No space left on device: make room, then run"):
        save_checkpoint(tiny_disk, 2, 0.2, config, STATE, keep=1)
    assert names(tiny_disk) == [small.name]


@pytest.mark.parametrize("at", range(0, 40, 3))
def test_whichever_write_fails_it_is_that_file_that_is_named(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from odis_path import checkpoint

    real, writes = checkpoint._Sink.write, [0]

    def write(self: Any, data: Any) -> int:
        writes[0] += 1
        if writes[0] > at:
            self._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
        return real(self, data)

    monkeypatch.setattr(checkpoint._Sink, "write", write)
    with pytest.raises(DiskFullError, match=r"checkpoint-00000002\.pt: cannot be written: No space left"):
        save_checkpoint(tmp_path, 2, 0.2, tiny_config("x", tmp_path), STATE, keep=1)
    assert names(tmp_path) == []


def test_a_disk_that_fails_otherwise_is_one_line_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from odis_path import checkpoint

    def broken(self: Any, data: Any) -> int:
        self.error = OSError(errno.EIO, "Input/output error")
        raise self.error

    monkeypatch.setattr(checkpoint._Sink, "write", broken)
    with pytest.raises(UserError, match=r"checkpoint-00000002\.pt: cannot be written: Input/output error: check the folder"):
        save_checkpoint(tmp_path, 2, 0.2, tiny_config("x", tmp_path), STATE, keep=1)


def configured(tiles: Path, out: Path, **sections: Any) -> Path:
    values = tiny_values(tiles, out, **{"eval": {"every_epochs": 0}, **sections})
    path = out.with_name(f"{out.name}.yaml")
    path.write_text(yaml.safe_dump(values))
    return path


def limited(kilobytes: int, *command: str) -> subprocess.CompletedProcess[str]:
    """A command under a limit on the size of files, as the shell sets it."""
    return subprocess.run(
        ["bash", "-c", f'ulimit -f {kilobytes}; exec "$@"', "-", *command],
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
        timeout=240,
    )


def test_pretrain_on_a_full_disk_ends_in_one_line(tiny_tiles: Path, tmp_path: Path) -> None:
    config = configured(tiny_tiles, tmp_path / "run")
    done = limited(64, sys.executable, "-m", "odis_path", "pretrain", str(config))
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'run'}/checkpoint-")
    assert done.stderr.splitlines()[-1].endswith("make room, then run the same command again (what is done is kept)")
    assert not [name for name in names(tmp_path / "run") if name.startswith(("checkpoint", "."))]
    loop.pretrain(tiny_config(tiny_tiles, tmp_path / "run", eval={"every_epochs": 0}))  # with room it is as if nothing was


def test_on_a_full_disk_all_ranks_end(tiny_tiles: Path, tmp_path: Path) -> None:
    config = configured(tiny_tiles, tmp_path / "run")
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "odis_path"]
    done = limited(64, *ranks, "pretrain", str(config))
    assert done.returncode != 0
    assert "cannot be written: File too large: make room" in done.stderr
    assert "not saved at step" in done.stderr
    assert "see what rank 0 says" in done.stderr
    assert not [name for name in names(tmp_path / "run") if name.startswith(("checkpoint", "."))]


# --- a damaged newest checkpoint


@pytest.fixture(scope="module")
def trained(tiny_tiles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is at 12 of 18 steps, with checkpoints after 6 and 12."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    values = tiny_values(tiny_tiles, folder, optim={"epochs": 3}, eval={"every_epochs": 0}, run={"save_every_epochs": 1})
    run = prepare(PretrainConfig.model_validate(values), start_ranks("cpu"))
    run.total_steps = 12
    loop.train(run)
    return folder


@pytest.fixture
def run_folder(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def three_epochs(tiles: Path, run: Path) -> Any:
    return tiny_config(tiles, run, optim={"epochs": 3}, eval={"every_epochs": 0}, run={"save_every_epochs": 1})


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip, cut, zeros, empty])
def test_a_damaged_newest_checkpoint_names_the_older_and_the_option(damage: Any, run_folder: Path, tiny_tiles: Path) -> None:
    newest, older = (run_folder / f"checkpoint-{step:08d}.pt" for step in (12, 6))
    damage(newest)
    with pytest.raises(DamagedError) as caught:
        loop.pretrain(three_epochs(tiny_tiles, run_folder))
    assert str(newest) in str(caught.value)
    assert f"give --from-previous to go on from {older}, which is whole" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(DamagedError, match=r"00000012\.pt.*take an older checkpoint: .*checkpoint-00000006\.pt is whole"):
        load_checkpoint(run_folder)  # who embeds or exports is told as well


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def test_from_previous_goes_on_bit_for_bit(run_folder: Path, trained: Path, tiny_tiles: Path, tmp_path: Path) -> None:
    straight = Path(shutil.copytree(trained, tmp_path / "straight"))
    straight.joinpath("checkpoint-00000012.pt").unlink()
    expected = load_checkpoint(loop.pretrain(three_epochs(tiny_tiles, straight)))
    cut(run_folder / "checkpoint-00000012.pt")
    values = tiny_values(tiny_tiles, run_folder, optim={"epochs": 3}, eval={"every_epochs": 0}, run={"save_every_epochs": 1})
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    done = subprocess.run(
        [sys.executable, "-m", "odis_path", "pretrain", str(tmp_path / "c.yaml"), "--from-previous"],
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "going on from step 6 of 18, not from checkpoint-00000012.pt: damaged" in done.stderr
    gone_on = load_checkpoint(run_folder)
    assert gone_on.step == expected.step == 18
    for key in ("student", "teacher", "criterion", "optimizer"):
        assert equal(getattr(gone_on.state, key), getattr(expected.state, key)), key
    steps = [json.loads(line)["step"] for line in (run_folder / "train.jsonl").read_text().splitlines()]
    assert steps == list(range(19))


def test_from_previous_is_harmless_where_nothing_is_damaged(run_folder: Path, tiny_tiles: Path) -> None:
    run = prepare(three_epochs(tiny_tiles, run_folder), start_ranks("cpu"), from_previous=True)
    assert (run.step, run.damaged) == (12, [])


def test_the_damaged_one_goes_when_the_next_is_written_and_never_that(run_folder: Path, tiny_tiles: Path) -> None:
    """With one checkpoint kept the one just written must not be taken for older than the damaged."""
    cut(run_folder / "checkpoint-00000012.pt")
    run = prepare(three_epochs(tiny_tiles, run_folder), start_ranks("cpu"), from_previous=True)
    assert (run_folder / "checkpoint-00000012.pt").exists()  # until there is another
    run.step = 7
    run.config.run.keep = 1
    loop.save(run)
    assert sorted(path.name for path in run_folder.glob("checkpoint-*")) == ["checkpoint-00000007.pt"]
    assert load_checkpoint(run_folder).step == 7


def test_several_damaged_ones_are_passed_over(run_folder: Path, tiny_tiles: Path) -> None:
    shutil.copy(run_folder / "checkpoint-00000006.pt", run_folder / "checkpoint-00000003.pt")
    flip(run_folder / "checkpoint-00000006.pt")
    cut(run_folder / "checkpoint-00000012.pt")
    run = prepare(three_epochs(tiny_tiles, run_folder), start_ranks("cpu"), from_previous=True)
    assert sorted(path.name for path in run.damaged) == ["checkpoint-00000006.pt", "checkpoint-00000012.pt"]


@pytest.mark.parametrize("from_previous", [False, True])
def test_where_no_other_is_whole_that_is_said(from_previous: bool, run_folder: Path, tiny_tiles: Path) -> None:
    cut(run_folder / "checkpoint-00000012.pt")
    cut(run_folder / "checkpoint-00000006.pt")
    with pytest.raises(DamagedError, match=r"checkpoint-00000012\.pt.*no older checkpoint that is whole.*run\.keep"):
        loop.pretrain(three_epochs(tiny_tiles, run_folder), from_previous=from_previous)
    assert len(list(run_folder.glob("checkpoint-*.pt"))) == 2


def test_a_log_without_room_ends_in_one_line_too(run_folder: Path, tiny_tiles: Path) -> None:
    log, row = run_folder / "train.jsonl", json.dumps({"step": 1, "epoch": 0.1, "loss": 1.0}) + "\n"
    log.write_text(row * (64 * 1024 // len(row)))
    config = configured(tiny_tiles, run_folder, optim={"epochs": 3}, run={"save_every_epochs": 1})
    done = limited(64, sys.executable, "-m", "odis_path", "pretrain", str(config))
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {log}: cannot be written: File too large: make room")
    assert sorted(path.name for path in run_folder.glob("*.pt")) == ["checkpoint-00000006.pt", "checkpoint-00000012.pt"]
