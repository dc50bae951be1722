"""Prepare the results of `evaluate` for the report: scores with intervals, baselines, tables, sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
MODEL = "this model"
BASELINES = {
    "majority": "commonest class",
    "random_encoder": "same network, untrained",
    "random": "same network, untrained",
    "random_weights": "same network, untrained",
    "random weights": "same network, untrained",
    "rgb": "mean colour",
    "rgb_mean": "mean colour",
    "texture": "grey texture",
    "box_size": "box size alone",
}


@dataclass(frozen=True)
class Evaluation:
    """One evaluation in words and numbers. `scores`: metric -> Score; `baselines`: (name, score, difference or None).
    `standardised`: what was done to the features, of "this model" and of baselines by name. `seen`: which tested patients the
    encoder was pretrained on, in words."""

    name: str
    probe: str
    level: str
    labels: list[str]
    n: int
    n_patients: int
    groups: str
    mode: str
    scores: dict[str, Score]
    baselines: list[tuple[str, Score, Score | None]]
    confusion: np.ndarray | None
    per_k: list[tuple[int, float]]
    k: int | None
    settings: dict[str, Any]
    data_sha256: str
    split: str
    warnings: list[str]
    retrieval: dict[str, dict[str, dict[str, Score]]]  # who may answer -> k -> measure
    standardised: dict[str, str]
    seen: str

    @property
    def things(self) -> str:
        return f"{self.level}s"

    @property
    def title(self) -> str:
        mode = f", embedded in mode {self.mode}" if self.mode and self.mode != "full" else ""
        return f"{self.name}: {PROBES.get(self.probe, self.probe)}, {self.things}{mode}"

    @property
    def how_many(self) -> str:
        patients = f" of {self.n_patients} patients" if self.n_patients else ""
        apart = {"slide_id": ", kept apart by slide only", "none": ", not kept apart at all"}.get(self.groups, "")
        rest = "".join(f"; {text}" for text in (self.split, self.seen) if text)
        return f"{self.n:,} {self.things}{patients}{apart}{rest}"

    @property
    def main(self) -> Score | None:
        return self.scores.get("balanced_accuracy")

    @property
    def chance(self) -> float | None:
        return 1 / len(self.labels) if self.labels else None

    def bars(self) -> list[Bar]:
        """The model first, then what it is compared with, best first."""
        if self.main is None:
            return []
        model = Bar(MODEL, self.main, True)
        others = sorted(self.baselines, key=lambda b: -b[1].point)
        return [model, *(Bar(name, score, False) for name, score, _ in others)]


def read_score(value: Any) -> Score | None:
    """A number, or a mapping with point, low and high; None where it is neither or not finite."""
    if isinstance(value, Mapping):
        point = _number(value.get("point"))
        return None if point is None else Score(point, _number(value.get("low")), _number(value.get("high")))
    point = _number(value)
    return None if point is None else Score(point)


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and np.isfinite(value) else None


def read_evaluation(found: EvaluationFolder) -> Evaluation:
    """Take from a results.json what it has; what it lacks stays empty."""
    r = found.results
    scores = {key: read_score(value) for key, value in (r.get("headline") or {}).items()}
    baselines = []
    standardised = {MODEL: _text_in(r.get("standardise"), "chosen")}
    for name, values in (r.get("baselines") or {}).items():
        values = values if isinstance(values, Mapping) else {"balanced_accuracy": values}
        score = read_score(values.get("balanced_accuracy"))
        if score is not None:
            shown = BASELINES.get(name, name.replace("_", " "))
            baselines.append((shown, score, read_score(values.get("difference"))))
            standardised[shown] = _text_in(values, "standardise")
    labels = [str(label) for label in r.get("labels") or []]
    confusion = np.asarray(r.get("confusion") or [], dtype=float)
    settings = r.get("settings") or {}
    per_k = _per_k(r.get("per_k"))
    k = _number(r.get("k", settings.get("k")))
    return Evaluation(
        name=found.name,
        probe=str(r.get("probe", "")),
        level=str(r.get("level", "tile")),
        labels=labels,
        n=int(r.get("n") or 0),
        n_patients=int(r.get("n_patients") or 0),
        groups=str(r.get("groups", "")),
        mode=str(r.get("mode", "")),
        scores={key: score for key, score in scores.items() if score is not None},
        baselines=baselines,
        confusion=confusion if confusion.shape == (len(labels),) * 2 and len(labels) else None,
        per_k=per_k,
        k=None if k is None else int(k),
        settings=settings,
        data_sha256=str(r.get("data_sha256", "")),
        split=str(r.get("split") or ""),
        warnings=[str(w).rstrip(".") for w in r.get("warnings") or []],
        retrieval=_retrieval(r.get("retrieval")),
        standardised=standardised,
        seen=_text_in(r.get("pretraining"), "in_words"),
    )


def _text_in(value: Any, key: str) -> str:
    """The text under a key of a mapping; empty where there is none."""
    return str(value.get(key) or "") if isinstance(value, Mapping) else ""


def _retrieval(value: Any) -> dict[str, dict[str, dict[str, Score]]]:
    if not isinstance(value, Mapping):
        return {}
    return {
        str(rule): {
            str(k): {name: score for name, number in row.items() if (score := read_score(number)) is not None}
            for k, row in (table.get("per_k") or {}).items()
        }
        for rule, table in value.items()
    }


def _per_k(value: Any) -> list[tuple[int, float]]:
    """{"20": 0.9} or {"20": {"balanced_accuracy": ...}} or [{"k": 20, "balanced_accuracy": ...}] -> sorted pairs."""
    if isinstance(value, Mapping):
        value = [{"k": k, "balanced_accuracy": v} for k, v in value.items()]
    pairs = []
    for row in value if isinstance(value, Sequence) and not isinstance(value, str) else []:
        inner = row.get("balanced_accuracy") if isinstance(row, Mapping) else None
        inner = inner.get("balanced_accuracy", inner) if isinstance(inner, Mapping) else inner
        score = read_score(inner)
        if score is not None and str(row.get("k", "")).isdigit():
            pairs.append((int(row["k"]), score.point))
    return sorted(pairs)


def sentence(e: Evaluation) -> str:
    """The result in a sentence for a reader who has never heard of balanced accuracy."""
    if e.main is None:
        return ""
    how = {
        "knn": "by a vote of their nearest neighbours in the embedding",
        "linear": "by a linear classifier on the frozen embedding",
        "prototype": "by the nearest class average of a few examples",
        "retrieval": "by a vote of the retrieved examples",
    }.get(e.probe, f"by {e.probe}")
    who = f" of {e.n_patients} patients" if e.n_patients else ""
    who += ", always judged by other patients' examples" if e.groups == "patient_id" else ""
    right = f"right {e.main.point:.0%} of the time, averaged over the {len(e.labels)} classes"
    text = f"{e.n:,} {e.things}{who}, named {how}: {right}"
    if e.main.low is not None and e.main.high is not None:
        text += f" (95% interval {e.main.low:.0%} to {e.main.high:.0%})"
    elif e.n_patients > 1:
        text += " (no interval: see the remarks)"
    rest = [f"{name} {score.point:.0%}" for name, score, _ in sorted(e.baselines, key=lambda b: -b[1].point)]
    if e.chance is not None:
        rest.append(f"guessing {e.chance:.0%}")
    seen = f" {e.seen[0].upper()}{e.seen[1:]}." if e.seen else ""
    return text + (f"; {', '.join(rest)}." if rest else ".") + seen
