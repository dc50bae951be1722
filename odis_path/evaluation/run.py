"""Evaluate embeddings with one probe: the model and its baselines on the same rows, folds and samples of patients."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

import numpy as np

from annotations.errors import UserError
from odis_path.evaluation.baselines import baselines, check_names
from odis_path.evaluation.bootstrap import Estimate, Predictions, estimate_classes, estimate_mean
from odis_path.evaluation.metrics import confusion_matrix, f1_scores, precisions, recalls
from odis_path.evaluation.probes.classifiers import (
    C_GRID,
    MAX_ITER,
    SHOTS,
    ProbeResult,
    knn_probe,
    linear_probe,
    majority_probe,
    prototype_probe,
)
from odis_path.evaluation.probes.knn import TEMPERATURE, Weights
from odis_path.evaluation.probes.retrieval import Rule, measures, predict_by_vote, retrieval_table, search
from odis_path.evaluation.probes.standardise import AUTO, CHOSEN_FROM, FITTED, STANDARDISE, Features, Metric, Standardise
from odis_path.evaluation.results import EvaluationResult, refuse_other_results, write_all
from odis_path.evaluation.task import EvaluationTask, prepare
from tiling.storage.locks import sweep

FORMAT = "odis-path-results"
PROBES = ("knn", "linear", "prototype", "retrieval")
KS = (1, 5, 10, 20, 50)
HEADLINE_K = 10  # of retrieval, fixed before any result is seen
EPISODES = 200


@dataclass(frozen=True)
class Settings:
    """Settings of an evaluation; see the command's help."""

    probe: str
    ks: tuple[int, ...] = KS
    weights: Weights = "temperature"
    seed: int = 0
    episodes: int = EPISODES
    standardise: str = AUTO

    @property
    def hows(self) -> tuple[Standardise, ...]:
        """The ways to standardise features of the model and of every baseline: one, or those to choose from.

        Logistic regression standardises in any case, and retrieval has no training rows to choose by: auto is zscore there.
        """
        fixed = {AUTO: "zscore", "none": "zscore"} if self.probe == "linear" else {AUTO: "zscore"}
        if self.probe in ("linear", "retrieval"):
            return (fixed.get(self.standardise, self.standardise),)  # type: ignore[return-value]
        return CHOSEN_FROM if self.standardise == AUTO else (self.standardise,)  # type: ignore[return-value]

    @property
    def headline_k(self) -> int:
        return min(self.ks, key=lambda k: (abs(k - HEADLINE_K), k))


@dataclass(frozen=True)
class ProbeReport:
    """Estimates by measure, the predictions they rest on, and what the probe has to tell beside."""

    estimates: dict[str, Estimate]
    predictions: Predictions
    extra: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    hows: tuple[Standardise, ...] = ()  # of each outer fold
    per_how: dict[str, float] = field(default_factory=dict)

    @property
    def how(self) -> str | None:
        """The standardising of most rounds, of equals the first; None where there are none."""
        return Counter(self.hows).most_common(1)[0][0] if self.hows else None


def evaluate(
    feats: Path | str,
    labels: Path | str,
    *,
    probe: str,
    out: Path | str,
    groups: str = "patient_id",
    level: str = "auto",
    split: Path | str | None = None,
    k: Sequence[int] = KS,
    weights: str = "temperature",
    standardise: str = AUTO,
    folds: int = 5,
    seed: int = 0,
    bootstrap: int = 1000,
    max_rows: int = 20000,
    baseline: Mapping[str, Path | str] | None = None,
    overwrite: bool = False,
    tell: Callable[[str], None] = lambda message: None,
) -> EvaluationResult:
    """Judge the embeddings of a folder; write results.json, predictions.csv, table.csv and figures into out.

    labels: a CSV, or "annotations" for the labels stored with the embeddings. split: a CSV, or "auto" for that of the run that
    made the encoder. baseline: name -> another feature folder. overwrite: a result of another encoder in out is replaced.
    tell is called with a word on what is being done. Returns the content of results.json. Raises UserError where the
    result would be void: unknown patients, one class, a patient on two sides, broken embeddings.
    """
    settings = _settings(probe, k, weights, seed, max_rows, standardise)
    folders = {name: Path(folder) for name, folder in (baseline or {}).items()}
    check_names(folders)
    sweep(Path(out))
    tell("reading embeddings")
    task = prepare(
        Path(feats), labels, probe=probe, groups=groups, level=level, split=split, folds=folds, seed=seed,
        bootstrap=bootstrap, max_rows=max_rows,
    )  # fmt: skip
    if not overwrite:
        refuse_other_results(Path(out), task.features.encoder)
    tell(f"{probe} probe of the model")
    model = run_probe(task, task.features.x, "cosine", settings, full=True)
    warnings = [*task.warnings, *standardise_warnings(task, settings), *model.warnings]
    beside = {"majority": compare(model, majority(task, settings))}
    for one in baselines(task, folders, warnings, tell):
        tell(f"{probe} probe of {one.name}")
        report = run_probe(task, one.x, one.metric, settings)
        warnings += [f"{one.name}: {text}" for text in report.warnings]
        beside[one.name] = compare(model, report) | ({"pretraining": one.seen.results()} if one.seen else {})
    results = describe(task, settings, model)
    results["baselines"] = beside
    results["warnings"] = list(dict.fromkeys(warnings))
    results["settings"] |= {
        "features": str(feats), "labels": str(labels), "folds": folds, "bootstrap": bootstrap, "max_rows": max_rows,
        "split": None if split is None else str(split), "baselines": {name: str(folder) for name, folder in folders.items()},
    }  # fmt: skip
    write_all(Path(out), results, task, model.predictions)
    return EvaluationResult(results, Path(out))


def _settings(probe: str, k: Sequence[int], weights: str, seed: int, max_rows: int, standardise: str) -> Settings:
    if probe not in PROBES:
        raise UserError(f"--probe {probe}: no such probe; take one of {', '.join(PROBES)}")
    ks = tuple(sorted({int(one) for one in k}))
    if not ks or ks[0] < 1:
        raise UserError(f"--k {','.join(map(str, k))}: whole numbers from 1 up, at least one")
    if weights not in get_args(Weights):
        raise UserError(f"--weights {weights}: take temperature or majority")
    if max_rows < 2:
        raise UserError(f"--max-rows {max_rows}: two rows at least")
    if standardise not in (AUTO, *STANDARDISE):
        raise UserError(f"--standardise {standardise}: take one of {', '.join((AUTO, *STANDARDISE))}")
    return Settings(probe, ks, weights, seed, standardise=standardise)  # type: ignore[arg-type]


def standardise_warnings(task: EvaluationTask, settings: Settings) -> list[str]:
    """Warnings about the standardising of features. Raises UserError where nothing would be left of them."""
    (how, *others), told = settings.hows, []
    if how == "centre-slide":
        counts = np.bincount(task.slide)
        single = int((counts == 1).sum())
        if single == len(counts):
            raise UserError("--standardise centre-slide: every slide has one judged row, of which nothing would be left")
        told.append(
            "centre-slide: the mean of a judged slide's own rows was taken from them: a single new tile cannot be judged so"
        )
        if single:
            told.append(f"centre-slide: nothing is left of the only judged row of {single} slides")
    if settings.probe == "linear" and settings.standardise == "none":
        told.append("--standardise none: the linear probe standardises its features all the same, in every training fold")
    if settings.probe == "retrieval" and how in FITTED and task.cv.n_folds == 1 and not others:
        told.append(f"{how}: fitted on all judged rows, without their labels")
    return told


def run_probe(task: EvaluationTask, x: np.ndarray, metric: Metric, settings: Settings, *, full: bool = False) -> ProbeReport:
    """Judge one set of features. full: with everything that is told of the model only."""
    if settings.probe == "retrieval":
        return _retrieve(task, x, metric, settings, full=full)
    y, cv, n, features = task.y, task.cv, task.n_classes, Features(x, metric, task.slide)
    if settings.probe == "knn":
        found = knn_probe(features, y, cv, n, ks=settings.ks, weights=settings.weights, hows=settings.hows)
        extra = {"per_k": {str(int(k)): score for k, score in found.per_setting.items()}, **_chosen(found, "chosen_k")}
    elif settings.probe == "linear":
        found = linear_probe(features, y, cv, n, how=settings.hows[0])
        extra = {"per_C": {f"{c:g}": score for c, score in found.per_setting.items()}, **_chosen(found, "chosen_C")}
    else:
        found = prototype_probe(features, y, cv, n, episodes=settings.episodes, seed=settings.seed, hows=settings.hows)
        extra = {"per_shots": {str(s): _spread(values) for s, values in found.per_shots.items()}}
    estimates = _estimate(task, found.predictions, with_auroc=full)
    return ProbeReport(estimates, found.predictions, extra, found.warnings, found.hows, found.per_how)


def _chosen(found: ProbeResult, name: str) -> dict[str, Any]:
    """The value that most rounds took, and that of each."""
    number: Callable[[float], float] = int if name == "chosen_k" else float
    most = found.chosen_most
    return {name: None if most is None else number(most), f"{name}_per_round": [number(value) for value in found.chosen]}


def _spread(values: np.ndarray) -> dict[str, float]:
    """Balanced accuracy over episodes: mean, standard deviation, and the ends of the middle nine in ten."""
    low, high = np.percentile(values, [5, 95])
    spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(values.mean()), "sd": spread, "p5": float(low), "p95": float(high), "episodes": len(values)}


def _estimate(task: EvaluationTask, predictions: Predictions, *, with_auroc: bool) -> dict[str, Estimate]:
    return estimate_classes(task.y[task.tested], predictions, task.resamples, task.n_classes, task.names, with_auroc=with_auroc)


def _retrieve(task: EvaluationTask, x: np.ndarray, metric: Metric, settings: Settings, *, full: bool) -> ProbeReport:
    """Every tested row asks the rows of other groups (with a split: those on the other sides)."""
    y, n, queries, ks = task.y, task.n_classes, task.tested, settings.ks
    gallery = queries if len(task.cv.outer_folds[0].inner) == 0 and task.cv.n_folds == 1 else _others(task)
    how = settings.hows[0]
    space = Features(x, metric, task.slide).space(how, gallery)
    rules = {"other groups": (Rule("other groups", (task.group,)), gallery)}
    if full:
        rules["same slide"] = (Rule("same slide", (), within=task.slide), queries)
        if task.site is not None:
            rules["other sites"] = (Rule("other sites", (task.group, task.site)), gallery)
    tables = {}
    for name, (rule, there) in rules.items():
        hits = search(space, y, queries, there, max(ks), rule)
        tables[name] = retrieval_table(hits, y, task.names, ks, task.resamples) if full else {}
        if name == "other groups":
            main = hits
    k = settings.headline_k
    predictions = predict_by_vote(main, y, n, k)
    estimates = _estimate(task, predictions, with_auroc=False)
    for name, values in measures(main, y, k).items():
        estimates[f"{name}@{k}"] = estimate_mean(values, task.resamples)
    told: tuple[str, ...] = ()
    bare = int((main.relevant == 0).sum())
    if bare:
        told = (
            f"{bare} of {len(queries)} queries have no row of their class in another group: precision, hit, map leave them out",
        )
    return ProbeReport(estimates, predictions, {"retrieval": tables, "headline_k": k}, told, (how,))


def _others(task: EvaluationTask) -> np.ndarray:
    """Rows that are not tested, of a given split."""
    used = np.flatnonzero(task.cv.fold >= 0)
    return np.setdiff1d(used, task.tested)


def majority(task: EvaluationTask, settings: Settings) -> ProbeReport:
    """Always the commonest class: of the training rows, or in retrieval of the rows that may answer."""
    if settings.probe != "retrieval" or task.cv.n_folds > 1:
        predictions = majority_probe(task.y, task.cv, task.n_classes).predictions
        return ProbeReport(_estimate(task, predictions, with_auroc=False), predictions)
    codes = np.unique(task.group, return_inverse=True)[1]
    per_group = np.zeros((codes.max() + 1, task.n_classes))
    np.add.at(per_group, (codes, task.y), 1)
    rest = per_group.sum(axis=0) - per_group[codes]
    predictions = Predictions(rest.argmax(axis=1)[None], rest[None])
    return ProbeReport(_estimate(task, predictions, with_auroc=False), predictions)


def compare(model: ProbeReport, other: ProbeReport) -> dict[str, Any]:
    """A baseline's scores, and the paired difference model - baseline of balanced accuracy."""
    found: dict[str, Any] = {name: estimate.interval() for name, estimate in other.estimates.items()}
    found["standardise"] = other.how
    found["difference"] = model.estimates["balanced_accuracy"].minus(other.estimates["balanced_accuracy"]).interval()
    return found


def describe(task: EvaluationTask, settings: Settings, model: ProbeReport) -> dict[str, Any]:
    """Everything results.json says of the model and the data."""
    features, tested = task.features, task.tested
    counts = sum(confusion_matrix(task.y[tested], pred, task.n_classes) for pred in model.predictions.pred)
    confusion = np.asarray(counts) / len(model.predictions.pred)
    chosen = model.extra.get("chosen_k", model.extra.get("headline_k"))
    trained = np.flatnonzero(task.cv.fold >= 0)
    return {
        "format": FORMAT, "format_version": 1, "probe": settings.probe, "level": features.level, "mode": features.mode,
        "encoder": features.encoder, "mpp": features.mpp if np.isfinite(features.mpp) else None,
        "labels": list(task.names), "n": len(tested), "n_patients": task.n_patients,
        "n_groups": task.resamples.n_clusters, "groups": task.groups, "split": task.cv.name,
        "headline": {name: estimate.interval() for name, estimate in model.estimates.items()},
        "confusion": (confusion.astype(int) if len(model.predictions.pred) == 1 else confusion.round(2)).tolist(),
        "per_class": _per_class(confusion, task, model.predictions), **model.extra,
        "standardise": {
            "asked": settings.standardise, "chosen": model.how, "per_round": list(model.hows), "inner_scores": model.per_how,
        },
        "pretraining": task.seen.results(),
        "settings": {
            "k": chosen, "ks": list(settings.ks), "weights": settings.weights, "temperature": TEMPERATURE,
            "C_grid": list(C_GRID), "max_iter": MAX_ITER, "shots": list(SHOTS), "episodes": settings.episodes,
            "seed": settings.seed, "rows_used": len(trained), "interval": task.resamples.method,
            "samples": len(task.resamples.weights), "samples_lacking_a_class": int(task.resamples.lacking.sum()),
        },
        "data_sha256": task.sha256(), "software": software(),
    }  # fmt: skip


def _per_class(confusion: np.ndarray, task: EvaluationTask, predictions: Predictions) -> list[dict[str, Any]]:
    """Rows and groups of each class, and its scores; no_interval flags a class that one group alone has."""
    y, cluster = task.y[task.tested], task.resamples.cluster
    groups = [len(np.unique(cluster[y == c])) for c in range(task.n_classes)]
    right = (predictions.pred == y).mean(axis=0)
    found = [estimate_mean(np.where(y == c, right, np.nan), task.resamples).interval() for c in range(task.n_classes)]
    columns = {"recall": recalls(confusion), "precision": precisions(confusion), "f1": f1_scores(confusion)}
    return [
        {
            "label": name,
            "n": round(float(confusion[i].sum())),
            "groups": groups[i],
            "recall_interval": {part: found[i][part] for part in ("point", "low", "high")},
            "no_interval": found[i].get("why", ""),
            **{key: None if np.isnan(values[i]) else float(values[i]) for key, values in columns.items()},
        }
        for i, name in enumerate(task.names)
    ]


def software() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    packages = ("odis-path", "numpy", "scipy", "scikit-learn", "scikit-image")
    versions = {"python": sys.version.split()[0]}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "unknown"
    return versions
