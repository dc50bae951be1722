"""The result of an evaluation: the content of results.json, whose keys are the fields of these dataclasses."""
# ruff: noqa: N815  C is the field's capital

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from annotations.errors import UserError
from odis_path.evaluation.bootstrap import Interval
from odis_path.evaluation.probes.retrieval import RetrievalTable
from odis_path.evaluation.seen_patients import PretrainingOverlap
from tiling.jobs.summary import Result, show_lines

if TYPE_CHECKING:
    from rich.console import Console

FORMAT = "odis-path-results"


@dataclass(frozen=True)
class KnnDetails:
    """per_k: balanced accuracy on the inner folds. chosen_k: by most outer folds."""

    per_k: dict[str, float]
    chosen_k: int | None
    chosen_k_per_round: list[int]


@dataclass(frozen=True)
class LinearDetails:
    """per_C: balanced accuracy on the inner folds. chosen_C: by most outer folds."""

    per_C: dict[str, float]
    chosen_C: float | None
    chosen_C_per_round: list[float]


@dataclass(frozen=True)
class ShotScores:
    """Balanced accuracy over episodes: mean, standard deviation, and the ends of the middle nine in ten."""

    mean: float
    sd: float
    p5: float
    p95: float
    episodes: int

    @staticmethod
    def of(scores: np.ndarray) -> ShotScores:
        """Summarise the scores of the episodes, float (e,)."""
        low, high = np.percentile(scores, [5, 95])
        spread = float(scores.std(ddof=1)) if len(scores) > 1 else 0.0
        return ShotScores(float(scores.mean()), spread, float(low), float(high), len(scores))


@dataclass(frozen=True)
class PrototypeDetails:
    """per_shots: of each number of support rows per class."""

    per_shots: dict[str, ShotScores]


@dataclass(frozen=True)
class RetrievalDetails:
    """retrieval: by rule of which rows may answer. headline_k: of the headline."""

    retrieval: dict[str, RetrievalTable]
    headline_k: int


ProbeDetails = KnnDetails | LinearDetails | PrototypeDetails | RetrievalDetails


@dataclass(frozen=True)
class ClassScores:
    """Scores of one class; groups: with rows of it; no_interval: why the recall has none."""

    label: str
    n: int
    groups: int
    recall_interval: Interval
    no_interval: str
    recall: float | None
    precision: float | None
    f1: float | None


@dataclass(frozen=True)
class BaselineScores:
    """Scores of a baseline, and the paired difference of balanced accuracy, model minus baseline."""

    estimates: dict[str, Interval]
    standardise: str | None
    difference: Interval
    pretraining: PretrainingOverlap | None = None

    def as_json(self) -> dict[str, Any]:
        """The estimates stand beside the other fields; pretraining only where there is an encoder."""
        content = {**self.estimates, "standardise": self.standardise, "difference": self.difference}
        encoder = {"pretraining": self.pretraining} if self.pretraining else {}
        return {name: as_json(value) for name, value in (content | encoder).items()}


@dataclass(frozen=True)
class Standardising:
    """asked: the option. chosen: by most outer folds. inner_scores: balanced accuracy of each choice on the inner folds."""

    asked: str
    chosen: str | None
    per_round: tuple[str, ...]
    inner_scores: dict[str, float]


@dataclass(frozen=True)
class RecordedSettings:
    """Options and constants that the numbers depend on, and what resampling came to."""

    k: int | None
    ks: tuple[int, ...]
    weights: str
    temperature: float
    C_grid: tuple[float, ...]
    max_iter: int
    shots: tuple[int, ...]
    episodes: int
    seed: int
    rows_used: int
    interval: str
    samples: int
    samples_lacking_a_class: int
    features: str
    labels: str
    folds: int
    bootstrap: int
    max_rows: int
    split: str | None
    baselines: dict[str, str]


@dataclass(frozen=True)
class Results:
    """Everything results.json says, in its order. confusion: rows the truth, averaged over episodes where there are several."""

    probe: str
    level: str
    mode: str
    encoder: str
    mpp: float | None
    labels: tuple[str, ...]
    n: int
    n_patients: int
    n_groups: int
    groups: str
    split: str
    headline: dict[str, Interval]
    confusion: list[list[float]]
    per_class: list[ClassScores]
    details: ProbeDetails
    standardise: Standardising
    pretraining: PretrainingOverlap
    settings: RecordedSettings
    data_sha256: str
    software: dict[str, str]
    baselines: dict[str, BaselineScores]
    warnings: list[str]

    def as_json(self) -> dict[str, Any]:
        """The details of the probe stand beside the other fields."""
        content: dict[str, Any] = {"format": FORMAT, "format_version": 1}
        for name, value in _fields(self).items():
            content |= value if name == "details" else {name: value}
        return content


def as_json(value: Any) -> Any:
    """Turn dataclasses, mappings and sequences into what JSON holds; a dataclass may say by `as_json` how."""
    if hasattr(value, "as_json"):
        return value.as_json()
    if is_dataclass(value):
        return _fields(value)
    if isinstance(value, Mapping):
        return {name: as_json(item) for name, item in value.items()}
    return [as_json(item) for item in value] if isinstance(value, list | tuple) else value


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: as_json(getattr(value, field.name)) for field in fields(value)}


class EvaluationResult(Result, Mapping[str, Any]):
    """The content of results.json by its keys, the same as dataclasses (`results`), and the folder it lies in."""

    def __init__(self, results: Results, folder: Path) -> None:
        self.results, self.folder = results, folder
        self._content: dict[str, Any] = as_json(results)

    def __getitem__(self, key: str) -> Any:
        return self._content[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)

    def __repr__(self) -> str:
        return f"EvaluationResult({self.folder}: {self.results.probe} probe of {self.results.encoder})"

    def show(self, console: Console) -> None:
        """Headline and baselines as a table, warnings below it, and where the files are."""
        from rich.markup import escape
        from rich.table import Table

        results = self.results
        measures = [name for name in results.headline if name not in ("balanced_accuracy", "macro_f1")]
        table = Table(
            title=f"{results.probe} probe of {results.encoder}: {results.n} {results.level}s, "
            f"{len(results.labels)} classes, {results.n_groups} groups, {results.split}"
        )
        table.add_column("")
        table.add_column("standardised")
        for name in ("balanced accuracy", "model minus it", "macro F1", *measures):
            table.add_column(name, justify="right")

        def add(name: str, standardised: str | None, estimates: Mapping[str, Interval], difference: Interval | None) -> None:
            shown = (estimates["balanced_accuracy"], difference, estimates["macro_f1"], *map(estimates.get, measures))
            table.add_row(name, standardised or "", *map(estimate_text, shown))

        add("[bold]this model", results.standardise.chosen, results.headline, None)
        for name, scores in results.baselines.items():
            add(escape(name), scores.standardise, scores.estimates, scores.difference)
        console.print(table)
        console.print(f"intervals: {results.settings.interval}", style="dim", markup=False, highlight=False)
        console.print(results.pretraining.words(), markup=False, highlight=False)
        for warning in results.warnings:
            console.print(f"note: {warning}", markup=False, highlight=False)
        show_lines(console, [f"results in {self.folder}: results.json, table.csv, predictions.csv and figures"])


def estimate_text(value: Interval | None) -> str:
    """Write 0.812 (0.77 to 0.85), or 0.812 (no interval); empty where there is no estimate."""
    if value is None or value.point is None:
        return ""
    if value.low is None or value.high is None:
        return f"{value.point:.3f}{' (no interval)' if value.why else ''}"
    return f"{value.point:.3f} ({value.low:.2f} to {value.high:.2f})"


def refuse_other_results(out: Path, encoder: str) -> None:
    """Raise UserError where `out` holds the result of another encoder."""
    path = out / "results.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8")).get("encoder")
    except (OSError, ValueError, AttributeError):
        return
    if stored is not None and stored != encoder:
        raise UserError(
            f"{path}: is of another encoder, {stored}, not {encoder}: give another --out, or --overwrite to replace it"
        )
