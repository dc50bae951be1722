"""Checkpoints: complete or absent, the newest n kept, loaded only where they are whole and fit."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, Any, NotRequired, TypedDict, cast

import torch
from torch import Tensor, nn

from annotations.errors import UserError
from odis_path import __version__
from odis_path.config import PretrainConfig, parse_config
from odis_path.tensor_file import check_zip
from tiling.storage.atomic import atomic_path
from tiling.storage.checksums import DamagedError

FORMAT = "odis-path-checkpoint"
COPY_AGAIN = "copy it again"


class DataFacts(TypedDict):
    """Facts about the tiles of a run: counts of all slides and tiles, the held-out patients, a hash of all that matters.

    pretrained_on: the slides of the run and of what it started from, see `odis_path.features.pretraining`.
    """

    slides: int
    tiles: int
    held_out: list[str]
    sha256: str
    pretrained_on: NotRequired[dict[str, Any]]


@dataclass(frozen=True)
class TrainedState:
    """State dicts of what training moves, on the CPU when loaded; data: None in checkpoints of older versions."""

    student: dict[str, Tensor] = field(default_factory=dict)
    teacher: dict[str, Tensor] = field(default_factory=dict)
    criterion: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    data: DataFacts | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint. config: what it was trained with; stored_config: the same as it was written, keys may lack."""

    path: Path
    step: int
    epoch: float
    config: PretrainConfig
    stored_config: dict[str, Any]
    state: TrainedState


class _Sink(io.RawIOBase):
    """The file object that torch writes to. A failed write is kept: torch makes another error of it, of no use to anybody."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.error: OSError | None = None
        self._file = path.open("wb", buffering=0)

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(view):
                done += self._file.write(view[done:]) or 0
        except OSError as error:
            self.error = self.error or error
            raise
        return len(view)

    def writable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


def save_checkpoint(
    folder: Path,
    step: int,
    epoch: float,
    config: PretrainConfig,
    state: TrainedState,
    keep: int,
    damaged: Sequence[Path] = (),
) -> Path:
    """Write `<folder>/checkpoint-<step>.pt` whole or not at all, then drop all but the newest `keep`.

    damaged: later ones that the run did not go on from, dropped too. Raises DiskFullError where there is no space, UserError
    where it cannot be written for another reason; the others are all there then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"checkpoint-{step:08d}.pt"
    content = {
        "format": FORMAT,
        "software_version": __version__,
        "step": step,
        "epoch": epoch,
        "config": config.model_dump(mode="json"),
        **vars(state),
    }
    with atomic_path(final) as temporary:
        _write(content, temporary)
    for path in damaged:
        if path != final:
            path.unlink(missing_ok=True)
    for old in sorted(folder.glob("checkpoint-*.pt"))[:-keep]:
        old.unlink(missing_ok=True)
    return final


def _write(content: dict[str, Any], path: Path) -> None:
    """Call torch.save through a Python file, so that a write that fails is an OSError of that file."""
    sink = _Sink(path)
    try:
        torch.save(content, cast(IO[bytes], sink))
    except Exception:
        if sink.error is not None:
            raise OSError(sink.error.errno, sink.error.strerror, str(path)) from None
        raise
    finally:
        sink.close()


def latest_checkpoint(folder: Path) -> Path | None:
    """Find the newest checkpoint of a run folder, None where there is none."""
    return max(folder.glob("checkpoint-*.pt"), default=None)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint file, or the newest of a run folder.

    Every member of the file is compared with its checksum first. Raises DamagedError, which names an older one that is whole,
    where one does not match or the file is torn, UserError where it is missing or another program's.
    """
    if path.is_dir():
        newest = latest_checkpoint(path)
        if newest is None:
            raise UserError(f"{path}: no checkpoint-*.pt in this folder: give a run folder of `odis-path pretrain`")
        path = newest
    try:
        return _read(path)
    except DamagedError as error:
        older, _ = sound_before(path)
        raise DamagedError(f"{error}, or take an older checkpoint{f': {older} is whole' if older else ''}") from None


def newest_checkpoint(folder: Path, *, from_previous: bool) -> tuple[Checkpoint | None, list[Path]]:
    """Load the checkpoint a run in this folder goes on from, None where it begins, and the damaged ones that are newer.

    Raises DamagedError, which says what can be done, where the newest is damaged; from_previous: where all are.
    """
    newest = latest_checkpoint(folder)
    if newest is None:
        return None, []
    try:
        return _read(newest), []
    except DamagedError as error:
        older, damaged = sound_before(newest)
        if older is None:
            raise DamagedError(
                f"{error}, or remove it: {folder} has no older checkpoint that is whole (run.keep says how many are kept), so "
                "the run begins anew then"
            ) from None
        if not from_previous:
            raise DamagedError(f"{error}, or give --from-previous to go on from {older}, which is whole") from None
    return _read(older), [newest, *damaged]


def sound_before(path: Path) -> tuple[Path | None, list[Path]]:
    """Find the newest older checkpoint beside one that matches its checksums (None: none does), and the damaged between."""
    damaged: list[Path] = []
    for older in sorted((p for p in path.parent.glob("checkpoint-*.pt") if p < path), reverse=True):
        try:
            if check_zip(older, "a readable checkpoint", COPY_AGAIN):
                return older, damaged
        except DamagedError:
            damaged.append(older)
        except OSError:  # it cannot be read now, which does not make it damaged
            continue
    return None, damaged


def _read(path: Path) -> Checkpoint:
    is_whole = False
    try:
        is_whole = check_zip(path, "a readable checkpoint", COPY_AGAIN)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except DamagedError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; give a file or a run folder of `odis-path pretrain`") from None
    except Exception as error:  # torch raises many kinds for a torn or foreign file
        line = f"{path}: not a readable checkpoint ({' '.join(str(error).split())[:120]})"
        if is_whole or isinstance(error, PermissionError | MemoryError):
            raise UserError(line) from None
        raise DamagedError(f"{line}: {COPY_AGAIN}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: not an odis-path checkpoint; to start from other weights set model.weights={path}")
    config = parse_config(with_old_values(content["config"]), f"{path} (stored config)")
    state = TrainedState(**{part.name: content[part.name] for part in fields(TrainedState) if part.name in content})
    return Checkpoint(path, int(content["step"]), float(content["epoch"]), config, content["config"], state)


def read_data_facts(path: Path) -> dict[str, Any] | None:
    """Read the facts a checkpoint keeps about its tiles, without reading its tensors; empty for an older one.

    None for any other file.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # torch raises many kinds for a torn or foreign file; loading its weights says what is wrong
        return None
    return (content.get("data") or {}) if isinstance(content, dict) and content.get("format") == FORMAT else None


def load_into(module: nn.Module, state: Mapping[str, Tensor], path: Path, what: str) -> None:
    """Load with strict keys and shapes; what does not fit is one UserError naming the first difference."""
    own = module.state_dict()
    missing, extra = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    unequal = [key for key in own if key in state and state[key].shape != own[key].shape]
    shapes = [f"{key}: {tuple(state[key].shape)} there, {tuple(own[key].shape)} here" for key in unequal]
    if missing or extra or shapes:
        first = shapes[0] if shapes else f"missing {missing[0]}" if missing else f"unexpected {extra[0]}"
        count = len(missing) + len(extra) + len(shapes)
        raise UserError(
            f"{path}: the {what} does not fit the configuration ({count} differences, first: {first}); "
            "use the configuration it was trained with, or another run.out"
        )
    module.load_state_dict(state)


# Keys whose default is not what runs did before there were such keys; those runs keep to the old way.
CAME_LATER: dict[str, dict[str, Any]] = {"target": {"whole_share": 1.0}}


def with_old_values(stored: dict[str, Any]) -> dict[str, Any]:
    """Complete a stored configuration with what its run did in the place of keys that it lacks."""
    filled = {section: {**keys, **_section(stored, section)} for section, keys in CAME_LATER.items()}
    return {**stored, **filled}


def _section(stored: dict[str, Any], name: str) -> dict[str, Any]:
    part = stored.get(name)
    return part if isinstance(part, dict) else {}


def as_begun(config: PretrainConfig, stored: dict[str, Any]) -> tuple[PretrainConfig, list[str]]:
    """Set the keys that a stored configuration lacks to what its run did; also what was changed, as key=value."""
    changed = []
    for section, keys in CAME_LATER.items():
        part = getattr(config, section)
        old = {k: v for k, v in keys.items() if k not in _section(stored, section) and getattr(part, k) != v}
        changed += [f"{section}.{key}={value:g}" for key, value in old.items()]
        config = config.model_copy(update={section: part.model_copy(update=old)})
    return config, changed
