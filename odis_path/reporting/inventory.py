"""List the contents of a folder: slide files, run folders, evaluations, feature files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from annotations.errors import UserError
from tiling.storage.checked_file import CheckedFile


@dataclass(frozen=True)
class RunFolder:
    """A run folder: its resolved configuration, the rows of train.jsonl, the software it ran on, its newest checkpoint."""

    name: str
    folder: Path
    config: dict[str, Any]
    config_text: str
    rows: list[dict[str, Any]]
    versions: dict[str, Any]
    checkpoint: Path | None

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Epochs and values of the rows that have `key` as a number."""
        rows = [r for r in self.rows if isinstance(r.get(key), int | float)]
        return [float(r.get("epoch", r.get("step", 0))) for r in rows], [float(r[key]) for r in rows]

    def last(self, key: str) -> float | None:
        values = self.series(key)[1]
        return values[-1] if values else None


@dataclass(frozen=True)
class EvaluationFolder:
    """A results.json that `evaluate` wrote."""

    name: str
    folder: Path
    results: dict[str, Any]


@dataclass(frozen=True)
class FeatureFolder:
    """A folder of feature files."""

    name: str
    folder: Path
    paths: list[Path]


@dataclass
class Inventory:
    """Everything a report can tell about, in the order of names; `problems` are files that could not be read."""

    root: Path
    slides: list[Path] = field(default_factory=list)
    runs: list[RunFolder] = field(default_factory=list)
    evaluations: list[EvaluationFolder] = field(default_factory=list)
    features: list[FeatureFolder] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def find_outputs(root: Path, leave_out: Path | None = None) -> Inventory:
    """Look through `root` and all folders below it (hidden ones and `leave_out` excepted).

    Raises UserError where there is no such folder or nothing in it to report on.
    """
    from odis_path.features.write import FORMAT as FEATURES_FORMAT
    from tiling.slide_file.write import FORMAT

    if not root.is_dir():
        raise UserError(f"{root}: no such folder: give the folder that the other odis-path commands wrote into")
    inventory = Inventory(root)
    features: dict[Path, list[Path]] = {}
    for path in _files(root, leave_out):
        if path.suffix == ".h5":
            kind = _h5_format(path, inventory.problems)
            if kind == FORMAT:
                inventory.slides.append(path)
            elif kind == FEATURES_FORMAT:
                features.setdefault(path.parent, []).append(path)
        elif path.name == "results.json":
            _add_evaluation(inventory, path)
        elif path.name == "train.jsonl" and (path.parent / "config.yaml").is_file():
            _add_run(inventory, path.parent)
    inventory.features = [FeatureFolder(_name(root, f), f, sorted(paths)) for f, paths in sorted(features.items())]
    inventory.runs, inventory.evaluations, inventory.features = (
        _short(inventory.runs),
        _short(inventory.evaluations),
        _short(inventory.features),
    )
    if not (inventory.slides or inventory.runs or inventory.evaluations or inventory.features):
        raise UserError(
            f"{root}: holds no slide files, runs, features or evaluations: "
            "give the folder that the other odis-path commands wrote into"
        )
    return inventory


def _files(root: Path, leave_out: Path | None) -> Iterator[Path]:
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        hidden = any(part.startswith(".") for part in parts)
        if not hidden and path.is_file() and not (leave_out and path.is_relative_to(leave_out)):
            yield path


def _name(root: Path, folder: Path) -> str:
    relative = folder.relative_to(root).as_posix()
    return folder.resolve().name if relative == "." else relative


def _short(things: list[Any]) -> list[Any]:
    """The same things, named by the last part of their folder where that tells them apart."""
    last = Counter(thing.name.rsplit("/", 1)[-1] for thing in things)
    return [replace(thing, name=short) if last[short := thing.name.rsplit("/", 1)[-1]] == 1 else thing for thing in things]


def _h5_format(path: Path, problems: list[str]) -> str:
    try:
        with CheckedFile(path, lambda _: "") as file:
            return str(file.h5.attrs.get("format", ""))
    except Exception:  # HDF5 has many for a damaged file
        problems.append(f"{path.name}: not a readable HDF5 file")
        return ""


def _add_evaluation(inventory: Inventory, path: Path) -> None:
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        inventory.problems.append(f"{_name(inventory.root, path.parent)}/results.json: not readable as JSON")
        return
    if isinstance(results, dict) and ("headline" in results or "probe" in results):
        inventory.evaluations.append(EvaluationFolder(_name(inventory.root, path.parent), path.parent, results))


def _add_run(inventory: Inventory, folder: Path) -> None:
    import yaml

    from odis_path.training.log.rows import read_rows

    name = _name(inventory.root, folder)
    try:
        text = (folder / "config.yaml").read_text(encoding="utf-8")
        config = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        config = None
    if not isinstance(config, dict):
        inventory.problems.append(f"{name}/config.yaml: not readable as YAML")
        return
    try:
        rows, wrong = read_rows(folder / "train.jsonl")
    except OSError as error:
        inventory.problems.append(f"{name}/train.jsonl: cannot be read: {error.strerror}")
        return
    for number in wrong:
        inventory.problems.append(f"{name}/train.jsonl: line {number} is not JSON (a run that was cut off, or a damaged file)")
    versions: Any = {}
    if (folder / "versions.json").is_file():
        try:
            versions = json.loads((folder / "versions.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            inventory.problems.append(f"{name}/versions.json: not readable as JSON")
    checkpoint = max(folder.glob("checkpoint-*.pt"), default=None)
    versions = versions if isinstance(versions, dict) else {}
    inventory.runs.append(RunFolder(name, folder, config, text, rows, versions, checkpoint))
