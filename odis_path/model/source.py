"""Resolve the name of a model or checkpoint, and check that it can be loaded, without torch.

A source is a checkpoint or run folder of `odis-path pretrain`, a name of timm, `hf-hub:owner/name`, or a folder in the form of
the hub (`local-dir:folder`, or its bare path): `config.json` as timm writes it, and one file of weights.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from annotations.errors import UserError
from odis_path.model.architectures import TimmArguments, is_model_name
from odis_path.model.published import POOLS, published

LOCAL = "local-dir:"
CONFIG = "config.json"
# As timm looks for them; where none of the names is there, one file with the first of the suffixes that there is.
WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pth.tar", ".bin")


@dataclass(frozen=True)
class HubFolder:
    """A folder in the form of the hub.

    arguments: of timm.create_model, from `model_args`. global_pool: how the model was pooled, as
    its config says it ("token", "avg", ...), None where it does not. states_norm: its config gives mean and std of pixels.
    """

    path: Path
    architecture: str
    arguments: TimmArguments
    global_pool: str | None
    states_norm: bool

    @property
    def weights(self) -> Path:
        """Its file of weights. Raises UserError where there is none, or no telling which of several."""
        return _weights_in(self.path)


def settled_source(source: str) -> str:
    """Make the path of a folder in the form of the hub absolute, and mark it as `local-dir:`; leave other sources alone."""
    if source.startswith(LOCAL):
        return LOCAL + str(Path(source.removeprefix(LOCAL)).absolute())
    path = Path(source)
    if path.is_dir() and (path / CONFIG).is_file() and not any(path.glob("checkpoint-*.pt")):
        return LOCAL + str(path.absolute())
    return source


def is_checkpoint(source: str) -> bool:
    """Tell whether a source is a checkpoint file or run folder of odis-path, and no model of timm or the hub."""
    if settled_source(source).startswith(LOCAL):
        return False
    path = Path(source)
    return path.exists() or (not is_model_name(source) and (path.suffix in (".pt", ".pth") or len(path.parts) > 1))


def hub_folder(source: str) -> HubFolder | None:
    """Open the folder of a `local-dir:` source; None for any other source. UserError where the folder cannot be used."""
    source = settled_source(source)
    if not source.startswith(LOCAL):
        return None
    path = Path(source.removeprefix(LOCAL))
    file = path / CONFIG
    if not path.is_dir():
        raise UserError(f"{source}: no such folder")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: not there: give a folder with timm's config.json and a file of weights") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        kind = (
            f" (it describes {config['model_type']} of transformers)"
            if isinstance(config, dict) and config.get("model_type")
            else ""
        )
        raise UserError(
            f'{file}: names no architecture of timm{kind}: write {{"architecture": "vit_base_patch16_224", "model_args": '
            "{...}} there"
        )
    arguments, stated = config.get("model_args") or {}, config.get("pretrained_cfg", config)
    for key, value in (("model_args", arguments), ("pretrained_cfg", stated)):
        if not isinstance(value, dict):
            raise UserError(f"{file}: {key} is {type(value).__name__}, not an object")
    for key in ("mean", "std"):
        values = stated.get(key, [1, 1, 1])
        if not (isinstance(values, list) and len(values) == 3 and all(isinstance(value, int | float) for value in values)):
            raise UserError(f"{file}: {key} is {values!r}, not three numbers")
    pool = arguments.get("global_pool", config.get("global_pool"))
    return HubFolder(path, config["architecture"], arguments, pool, {"mean", "std"} <= stated.keys())


def _weights_in(folder: Path) -> Path:
    for name in WEIGHT_NAMES:
        if (folder / name).is_file():
            return folder / name
    for suffix in WEIGHT_SUFFIXES:
        files = sorted(path for path in folder.glob(f"*{suffix}") if path.is_file())
        if len(files) > 1:
            names = ", ".join(path.name for path in files[:3])
            raise UserError(f"{folder}: {len(files)} files of weights ({names}): leave one, or name it {WEIGHT_NAMES[0]}")
        if files:
            return files[0]
    raise UserError(f"{folder}: no file of weights beside {CONFIG}: it needs {WEIGHT_NAMES[0]} or {WEIGHT_NAMES[1]}")


def files_of(source: str) -> list[Path]:
    """List the files that decide what a source is: a checkpoint, or config and weights of a folder; none for other names."""
    folder = hub_folder(source)
    if folder is not None:
        return [folder.path / CONFIG, folder.weights]
    return [Path(source)] if Path(source).is_file() else []


def fingerprint(source: str) -> str:
    """Join size and time of the files of a source; empty where it has none here."""
    states = [path.stat() for path in files_of(source)]
    return ":".join(f"{state.st_size}:{state.st_mtime_ns}" for state in states)


def no_file(path: Path) -> str:
    """Say why model.weights cannot be this path, which is no file."""
    if not path.is_dir():
        return f"{path}: no such file; model.weights takes a local .safetensors, .pth, .pt or .bin file, or 'timm'"
    if (path / CONFIG).is_file():
        return f"{path}: a folder; to start from it set model.name={LOCAL}{path} model.weights=timm"
    return (
        f"{path}: a folder; model.weights takes one file of it, or 'timm' with model.name={LOCAL}FOLDER where it has {CONFIG}"
    )


def check_start(name: str, weights: str | None) -> None:
    """Raise UserError for what shows of model.name and model.weights without loading anything."""
    published(name)
    folder = hub_folder(name)
    if folder is not None and weights == "timm":
        files_of(name)
    if weights is not None and weights != "timm" and not Path(weights).is_file():
        raise UserError(no_file(Path(weights)))


def check_source(source: str, pool: str | None) -> None:
    """Raise UserError for what shows of a source, and of --pool for it, without loading the model."""
    if pool is not None and pool not in POOLS:
        raise UserError(f"--pool {pool}: no such pooling; take one of {', '.join(POOLS)}")
    settled = settled_source(source)
    published(settled)
    folder = hub_folder(settled)
    if folder is not None:
        without = folder.arguments.get("class_token") is False
        if without and pool in ("cls", "cls+mean"):
            raise UserError(
                f"--pool {pool}: {source} has no class token (its {CONFIG} says class_token=false): take --pool mean"
            )
        files_of(settled)
        return
    path = Path(source)
    if path.is_dir() and not any(path.glob("checkpoint-*.pt")):
        raise UserError(
            f"{path}: no checkpoint-*.pt in this folder, and no {CONFIG}: give a run folder of `odis-path pretrain`, or a "
            f"folder with timm's {CONFIG} and weights"
        )
    if is_checkpoint(source) and not path.exists():
        raise UserError(f"{path}: no such checkpoint; give a file or a run folder of `odis-path pretrain`")
    if path.is_file() and re.search(r"\.(safetensors|bin)$", path.name):
        raise UserError(
            f"{path}: weights alone do not say what model they are of: lay them into a folder with timm's {CONFIG} "
            f'(such as {{"architecture": "vit_base_patch16_224"}}) and give the folder'
        )
