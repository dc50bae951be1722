"""List the contents of a folder: slide files, run folders, evaluations, feature files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from annotations.errors import UserError
from tiling.storage.checked_file import CheckedFile


@dataclass(frozen=True)
class OutputFolder:
    """A folder that a command wrote, and its name in the report."""

    name: str
    folder: Path


@dataclass(frozen=True)
class RunFolder(OutputFolder):
    """A run: its resolved configuration, the rows of train.jsonl, the software it ran on, its newest checkpoint."""

    config: dict[str, Any]
    config_text: str
    rows: list[dict[str, Any]]
    versions: dict[str, Any]
    checkpoint: Path | None

    def section(self, name: str) -> dict[str, Any]:
        """Return a section of the configuration, such as `model`; {} where it has none."""
        return self.config.get(name) or {}

    @property
    def network(self) -> str:
        """The name of the network; empty where the configuration lacks it."""
        return str(self.section("model").get("name") or "")

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Return epochs and values of the rows that have `key` as a number."""
        rows = [row for row in self.rows if isinstance(row.get(key), int | float)]
        return [float(row.get("epoch", row.get("step", 0))) for row in rows], [float(row[key]) for row in rows]

    def last(self, key: str) -> float | None:
        """Return the last value of `key`, if any."""
        values = self.series(key)[1]
        return values[-1] if values else None


@dataclass(frozen=True)
class EvaluationFolder(OutputFolder):
    """An evaluation: the results.json that `evaluate` wrote."""

    results: dict[str, Any]


@dataclass(frozen=True)
class FeatureFolder(OutputFolder):
    """A folder of feature files."""


@dataclass
class Inventory:
    """Everything a report can show, in the order of names; `problems` are files that could not be read."""

    root: Path
    slides: list[Path] = field(default_factory=list)
    runs: list[RunFolder] = field(default_factory=list)
    evaluations: list[EvaluationFolder] = field(default_factory=list)
    features: list[FeatureFolder] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def name(self, folder: Path) -> str:
        """Return the path of a folder below the root; of the root itself its name."""
        relative = folder.relative_to(self.root).as_posix()
        return folder.resolve().name if relative == "." else relative


def find_outputs(root: Path, leave_out: Path | None = None) -> Inventory:
    """Look through `root` and all folders below it (hidden ones and `leave_out` excepted).

    Raises UserError where there is no such folder or nothing in it to report on.
    """
    from odis_path.features.write import FORMAT as FEATURES_FORMAT
    from tiling.slide_file.write import FORMAT

    if not root.is_dir():
        raise UserError(f"{root}: no such folder: give the folder that the other odis-path commands wrote into")
    inventory = Inventory(root)
    feature_folders = set()
    for path in _files(root, leave_out):
        if path.suffix == ".h5":
            kind = _h5_format(path, inventory.problems)
            if kind == FORMAT:
                inventory.slides.append(path)
            elif kind == FEATURES_FORMAT:
                feature_folders.add(path.parent)
        elif path.name == "results.json":
            _add_evaluation(inventory, path)
        elif path.name == "train.jsonl" and (path.parent / "config.yaml").is_file():
            _add_run(inventory, path.parent)
    inventory.features = _short([FeatureFolder(inventory.name(folder), folder) for folder in sorted(feature_folders)])
    inventory.runs, inventory.evaluations = _short(inventory.runs), _short(inventory.evaluations)
    if not (inventory.slides or inventory.runs or inventory.evaluations or inventory.features):
        raise UserError(
            f"{root}: holds no slide files, runs, features or evaluations: "
            "give the folder that the other odis-path commands wrote into"
        )
    return inventory


def _files(root: Path, leave_out: Path | None) -> Iterator[Path]:
    for path in sorted(root.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if not hidden and path.is_file() and not (leave_out and path.is_relative_to(leave_out)):
            yield path


Folder = TypeVar("Folder", bound=OutputFolder)


def _short(folders: list[Folder]) -> list[Folder]:
    """Name folders by the last part of their path where that tells them apart."""
    last_parts = [folder.name.rsplit("/", 1)[-1] for folder in folders]
    counts = Counter(last_parts)
    return [
        replace(folder, name=last) if counts[last] == 1 else folder for folder, last in zip(folders, last_parts, strict=True)
    ]


def _h5_format(path: Path, problems: list[str]) -> str:
    try:
        with CheckedFile(path, lambda _: "") as file:
            return str(file.h5.attrs.get("format", ""))
    except Exception:  # HDF5 has many for a damaged file
        problems.append(f"{path.name}: not a readable HDF5 file")
        return ""


def _read_json(inventory: Inventory, path: Path) -> Any:
    """Read a JSON file; None, and a problem, where that cannot be done."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        inventory.problems.append(f"{inventory.name(path.parent)}/{path.name}: not readable as JSON")
        return None


def _add_evaluation(inventory: Inventory, path: Path) -> None:
    results = _read_json(inventory, path)
    if isinstance(results, dict) and ("headline" in results or "probe" in results):
        inventory.evaluations.append(EvaluationFolder(inventory.name(path.parent), path.parent, results))


def _add_run(inventory: Inventory, folder: Path) -> None:
    import yaml

    from odis_path.training.log.rows import read_rows

    name, problems = inventory.name(folder), inventory.problems
    try:
        text = (folder / "config.yaml").read_text(encoding="utf-8")
        config = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        config = None
    if not isinstance(config, dict):
        problems.append(f"{name}/config.yaml: not readable as YAML")
        return
    try:
        rows, bad_lines = read_rows(folder / "train.jsonl")
    except OSError as error:
        problems.append(f"{name}/train.jsonl: cannot be read: {error.strerror}")
        return
    for number in bad_lines:
        problems.append(f"{name}/train.jsonl: line {number} is not JSON (a run that was cut off, or a damaged file)")
    path = folder / "versions.json"
    versions = _read_json(inventory, path) if path.is_file() else None
    checkpoint = max(folder.glob("checkpoint-*.pt"), default=None)
    versions = versions if isinstance(versions, dict) else {}
    inventory.runs.append(RunFolder(name, folder, config, text, rows, versions, checkpoint))
