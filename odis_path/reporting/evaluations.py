"""Prepare the results of `evaluate` for the report: scores with intervals, baselines, tables, sentences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from odis_path.figures.scores import Bar, Score
from odis_path.reporting.inventory import EvaluationFolder

PROBES = {
    "knn": "k nearest neighbours",
    "linear": "linear probe",
    "prototype": "class prototypes (few examples)",
    "retrieval": "retrieval",
}
METHODS = {
    "knn": "by a vote of their nearest neighbours in the embedding",
    "linear": "by a linear classifier on the frozen embedding",
    "prototype": "by the nearest class average of a few examples",
    "retrieval": "by a vote of the retrieved examples",
}
MODEL = "this model"
BASELINES = {
    "majority": "commonest class",
    "random": "same network, untrained",
    "random weights": "same network, untrained",
    "rgb mean": "mean colour",
    "texture": "grey texture",
    "box size": "box size alone",
}


@dataclass(frozen=True)
class Baseline:
    """Balanced accuracy of a baseline, the model's minus it, and what was done to its features."""

    name: str
    score: Score
    difference: Score | None
    standardised: str


@dataclass(frozen=True)
class Evaluation:
    """One evaluation in words and numbers.

    scores: metric -> Score. confusion: (C, C) counts, rows the truth. per_k: k -> balanced accuracy, and `chosen_k`.
    retrieval: who may answer -> k -> measure -> Score. standardised: what was done to the model's features. pretrained_on:
    which tested patients the encoder was pretrained on, in words.
    """

    name: str
    probe: str
    level: str
    labels: list[str]
    n: int
    n_patients: int
    groups: str
    mode: str
    scores: dict[str, Score]
    baselines: list[Baseline]
    confusion: np.ndarray | None
    per_k: dict[int, float]
    chosen_k: int | None
    settings: dict[str, Any]
    data_sha256: str
    split: str
    warnings: list[str]
    retrieval: dict[str, dict[str, dict[str, Score]]]
    standardised: str
    pretrained_on: str

    @property
    def units(self) -> str:
        """Name of what was judged: tiles, objects or slides."""
        return f"{self.level}s"

    @property
    def title(self) -> str:
        mode = f", embedded in mode {self.mode}" if self.mode and self.mode != "full" else ""
        return f"{self.name}: {PROBES.get(self.probe, self.probe)}, {self.units}{mode}"

    @property
    def scope(self) -> str:
        """Number of rows and patients, the split, and what the encoder was pretrained on."""
        patients = f" of {self.n_patients} patients" if self.n_patients else ""
        grouping = {"slide_id": ", kept apart by slide only", "none": ", not kept apart at all"}.get(self.groups, "")
        remarks = "".join(f"; {text}" for text in (self.split, self.pretrained_on) if text)
        return f"{self.n:,} {self.units}{patients}{grouping}{remarks}"

    @property
    def balanced_accuracy(self) -> Score | None:
        return self.scores.get("balanced_accuracy")

    @property
    def chance(self) -> float | None:
        return 1 / len(self.labels) if self.labels else None

    @property
    def ranked_baselines(self) -> list[Baseline]:
        """The baselines, best first."""
        return sorted(self.baselines, key=lambda baseline: -baseline.score.point)

    def bars(self) -> list[Bar]:
        """Return the bar of the model, then those of the baselines, best first."""
        if self.balanced_accuracy is None:
            return []
        bars = [Bar(baseline.name, baseline.score, False) for baseline in self.ranked_baselines]
        return [Bar(MODEL, self.balanced_accuracy, True), *bars]


def read_score(value: Any) -> Score | None:
    """Read a number, or a mapping with point, low and high; None where it is neither or not finite."""
    if isinstance(value, Mapping):
        point = _number(value.get("point"))
        return None if point is None else Score(point, _number(value.get("low")), _number(value.get("high")))
    point = _number(value)
    return None if point is None else Score(point)


def read_evaluation(folder: EvaluationFolder) -> Evaluation:
    """Read what a results.json has; what it lacks stays empty."""
    results = folder.results
    labels = [str(label) for label in results.get("labels") or []]
    confusion = np.asarray(results.get("confusion") or [], dtype=float)
    per_k = {int(k): _number(score) for k, score in _mapping(results.get("per_k")).items() if str(k).isdecimal()}
    chosen_k = _number(results.get("chosen_k"))
    return Evaluation(
        name=folder.name,
        probe=str(results.get("probe", "")),
        level=str(results.get("level", "tile")),
        labels=labels,
        n=int(results.get("n") or 0),
        n_patients=int(results.get("n_patients") or 0),
        groups=str(results.get("groups", "")),
        mode=str(results.get("mode", "")),
        scores=_scores(results.get("headline")),
        baselines=_baselines(results.get("baselines")),
        confusion=confusion if confusion.shape == (len(labels),) * 2 and len(labels) else None,
        per_k={k: score for k, score in sorted(per_k.items()) if score is not None},
        chosen_k=None if chosen_k is None else int(chosen_k),
        settings=results.get("settings") or {},
        data_sha256=str(results.get("data_sha256", "")),
        split=str(results.get("split") or ""),
        warnings=[str(warning).rstrip(".") for warning in results.get("warnings") or []],
        retrieval={
            str(rule): {str(k): _scores(row) for k, row in _mapping(_mapping(table).get("per_k")).items()}
            for rule, table in _mapping(results.get("retrieval")).items()
        },
        standardised=_text(results.get("standardise"), "chosen"),
        pretrained_on=_text(results.get("pretraining"), "in_words"),
    )


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and np.isfinite(value) else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _text(value: Any, key: str) -> str:
    """Return the text under a key of a mapping; empty where there is none."""
    return str(_mapping(value).get(key) or "")


def _scores(values: Any) -> dict[str, Score]:
    """Read the scores of a mapping by metric; a metric without one is left out."""
    return {name: score for name, value in _mapping(values).items() if (score := read_score(value)) is not None}


def _baselines(values: Any) -> list[Baseline]:
    baselines = []
    for key, value in _mapping(values).items():
        score = read_score(_mapping(value).get("balanced_accuracy"))
        if score is not None:
            name = key.replace("_", " ")
            difference = read_score(value.get("difference"))
            baselines.append(Baseline(BASELINES.get(name, name), score, difference, _text(value, "standardise")))
    return baselines


def sentence(evaluation: Evaluation) -> str:
    """Say the result in a sentence for a reader who has never heard of balanced accuracy."""
    score, chance = evaluation.balanced_accuracy, evaluation.chance
    if score is None:
        return ""
    patients = f" of {evaluation.n_patients} patients" if evaluation.n_patients else ""
    patients += ", always judged by other patients' examples" if evaluation.groups == "patient_id" else ""
    method = METHODS.get(evaluation.probe, f"by {evaluation.probe}")
    accuracy = f"right {score.point:.0%} of the time, averaged over the {len(evaluation.labels)} classes"
    text = f"{evaluation.n:,} {evaluation.units}{patients}, named {method}: {accuracy}"
    if score.low is not None and score.high is not None:
        text += f" (95% interval {score.low:.0%} to {score.high:.0%})"
    elif evaluation.n_patients > 1:
        text += " (no interval: see the remarks)"
    comparisons = [f"{baseline.name} {baseline.score.point:.0%}" for baseline in evaluation.ranked_baselines]
    comparisons += [] if chance is None else [f"guessing {chance:.0%}"]
    text += f"; {', '.join(comparisons)}." if comparisons else "."
    pretrained_on = evaluation.pretrained_on
    return text + (f" {pretrained_on[0].upper()}{pretrained_on[1:]}." if pretrained_on else "")
