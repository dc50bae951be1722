"""Checkpoints: complete or absent, the newest n kept, loaded only where they fit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from annotations.errors import UserError
from odis_path import __version__
from odis_path.tensorfile import check_zip
from odis_path.train.checks import with_old_values
from odis_path.train.config import PretrainConfig, parse_config
from tiling.atomic import atomic_path
from tiling.checksums import DamagedError

FORMAT = "odis-path-checkpoint"


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: the configuration it was trained with and its tensors (on the CPU)."""

    path: Path
    step: int
    epoch: float
    config: PretrainConfig
    state: dict[str, Any]


def save_checkpoint(folder: Path, step: int, epoch: float, config: PretrainConfig, state: dict[str, Any], keep: int) -> Path:
    """Write `<folder>/checkpoint-<step>.pt` whole or not at all, then drop all but the newest `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"checkpoint-{step:08d}.pt"
    content = {
        "format": FORMAT, "software_version": __version__, "step": step, "epoch": epoch,
        "config": config.model_dump(mode="json"), **state,
    }  # fmt: skip
    with atomic_path(final) as temporary:
        torch.save(content, temporary)
    for old in sorted(folder.glob("checkpoint-*.pt"))[:-keep]:
        old.unlink(missing_ok=True)
    return final


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run folder, None where there is none."""
    return max(folder.glob("checkpoint-*.pt"), default=None)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint file, or the newest of a run folder.

    Every member of the file is compared with its checksum first. Raises DamagedError where one does not match, UserError
    where the file is missing or another program's.
    """
    if path.is_dir():
        found = latest_checkpoint(path)
        if found is None:
            raise UserError(f"{path}: no checkpoint-*.pt in this folder: give a run folder of `odis-path pretrain`")
        path = found
    try:
        check_zip(path, "a readable checkpoint", "copy it again, or take an older checkpoint")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except DamagedError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; give a file or a run folder of `odis-path pretrain`") from None
    except Exception as error:  # torch raises many kinds for a torn or foreign file
        raise UserError(f"{path}: not a readable checkpoint ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: not an odis-path checkpoint; to start from other weights set model.weights={path}")
    config = parse_config(with_old_values(content["config"]), f"{path} (stored config)")
    return Checkpoint(path, int(content["step"]), float(content["epoch"]), config, content)


def read_data_facts(path: Path) -> dict[str, Any] | None:
    """What a checkpoint keeps of the tiles it was trained on, without reading its tensors; empty for an older one.

    None for any other file.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # torch raises many kinds for a torn or foreign file; loading its weights says what is wrong
        return None
    return (content.get("data") or {}) if isinstance(content, dict) and content.get("format") == FORMAT else None


def load_into(module: nn.Module, state: dict[str, torch.Tensor], path: Path, what: str) -> None:
    """Load with strict keys and shapes; what does not fit is one UserError naming the first difference."""
    mine = module.state_dict()
    missing, extra = sorted(set(mine) - set(state)), sorted(set(state) - set(mine))
    unequal = [key for key in mine if key in state and state[key].shape != mine[key].shape]
    shapes = [f"{key}: {tuple(state[key].shape)} there, {tuple(mine[key].shape)} here" for key in unequal]
    if missing or extra or shapes:
        first = shapes[0] if shapes else f"missing {missing[0]}" if missing else f"unexpected {extra[0]}"
        count = len(missing) + len(extra) + len(shapes)
        raise UserError(
            f"{path}: the {what} does not fit the configuration ({count} differences, first: {first}); "
            "use the configuration it was trained with, or another run.out"
        )
    module.load_state_dict(state)
