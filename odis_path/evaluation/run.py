"""Evaluate embeddings with one probe: the model and its baselines on the same rows, folds and samples of patients."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import cast, get_args

import numpy as np

from annotations.errors import UserError
from odis_path.evaluation.baselines import Baseline, baselines, check_names
from odis_path.evaluation.bootstrap import Estimate, Predictions, estimate_classes, estimate_mean
from odis_path.evaluation.metrics import confusion_matrix, f1_scores, precisions, recalls
from odis_path.evaluation.probes.classifiers import (
    C_GRID,
    MAX_ITER,
    SHOTS,
    knn_probe,
    linear_probe,
    majority_probe,
    prototype_probe,
)
from odis_path.evaluation.probes.knn import TEMPERATURE, Weights
from odis_path.evaluation.probes.retrieval import Rule, measures, predict_by_vote, retrieval_table, search
from odis_path.evaluation.probes.standardise import AUTO, CHOSEN_FROM, FITTED, STANDARDISE, Features, Standardise
from odis_path.evaluation.results import (
    BaselineScores,
    ClassScores,
    EvaluationResult,
    KnnDetails,
    LinearDetails,
    ProbeDetails,
    PrototypeDetails,
    RecordedSettings,
    Results,
    RetrievalDetails,
    ShotScores,
    Standardising,
    refuse_other_results,
)
from odis_path.evaluation.task import EvaluationTask, TaskOptions, prepare
from odis_path.evaluation.write import write_all
from tiling.storage.locks import sweep

PROBES = ("knn", "linear", "prototype", "retrieval")
KS = (1, 5, 10, 20, 50)
HEADLINE_K = 10  # of retrieval, fixed before any result is seen
EPISODES = 200


@dataclass(frozen=True)
class ProbeSettings:
    """Settings of a probe, the same for the model and every baseline; see the command's help."""

    probe: str
    ks: tuple[int, ...] = KS
    weights: Weights = "temperature"
    seed: int = 0
    episodes: int = EPISODES
    standardise: str = AUTO

    @property
    def methods(self) -> tuple[Standardise, ...]:
        """The ways to standardise features: one, or those to choose from.

        Logistic regression standardises in any case, and retrieval has no training rows to choose by: auto is zscore there.
        """
        chosen_from_folds = self.probe not in ("linear", "retrieval")
        if self.standardise == AUTO:
            return CHOSEN_FROM if chosen_from_folds else ("zscore",)
        if self.standardise == "none" and self.probe == "linear":
            return ("zscore",)
        return (cast(Standardise, self.standardise),)

    @property
    def headline_k(self) -> int:
        return min(self.ks, key=lambda k: (abs(k - HEADLINE_K), k))


@dataclass(frozen=True)
class ProbeReport:
    """Estimates by measure, the predictions they rest on, and what else a probe reports.

    methods: the standardising of each outer fold. inner_scores: balanced accuracy of each on the inner folds.
    """

    estimates: dict[str, Estimate]
    predictions: Predictions
    details: ProbeDetails | None = None
    warnings: tuple[str, ...] = ()
    methods: tuple[Standardise, ...] = ()
    inner_scores: dict[str, float] = field(default_factory=dict)

    @property
    def method(self) -> Standardise | None:
        """The standardising of most outer folds, of equals the first; None where there are none."""
        return Counter(self.methods).most_common(1)[0][0] if self.methods else None


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
    settings = probe_settings(probe, k, weights, seed, standardise)
    options = TaskOptions(labels, probe, groups, level, split, folds, seed, bootstrap, max_rows)
    folders = {name: Path(folder) for name, folder in (baseline or {}).items()}
    check_names(folders)
    out = Path(out)
    sweep(out)
    tell("reading embeddings")
    task = prepare(Path(feats), options)
    if not overwrite:
        refuse_other_results(out, task.features.encoder)
    tell(f"{probe} probe of the model")
    model = run_probe(task, Baseline("model", task.features.x, "cosine"), settings, full=True)
    warnings = [*task.warnings, *standardise_warnings(task, settings), *model.warnings]
    scores = {"majority": compare(model, majority(task, settings))}
    for candidate in baselines(task, folders, warnings, tell):
        tell(f"{probe} probe of {candidate.name}")
        report = run_probe(task, candidate, settings)
        warnings += [f"{candidate.name}: {text}" for text in report.warnings]
        scores[candidate.name] = replace(compare(model, report), pretraining=candidate.overlap)
    recorded = record_settings(task, settings, model, options, str(feats), folders)
    results = describe(task, settings, model, recorded, scores, warnings)
    write_all(out, results, task, model.predictions)
    return EvaluationResult(results, out)


def probe_settings(probe: str, k: Sequence[int], weights: str, seed: int, standardise: str) -> ProbeSettings:
    """Check the options of a probe. Raises UserError."""
    if probe not in PROBES:
        raise UserError(f"--probe {probe}: no such probe; take one of {', '.join(PROBES)}")
    ks = tuple(sorted({int(number) for number in k}))
    if not ks or ks[0] < 1:
        raise UserError(f"--k {','.join(map(str, k))}: whole numbers from 1 up, at least one")
    if weights not in get_args(Weights):
        raise UserError(f"--weights {weights}: take temperature or majority")
    if standardise not in (AUTO, *STANDARDISE):
        raise UserError(f"--standardise {standardise}: take one of {', '.join((AUTO, *STANDARDISE))}")
    return ProbeSettings(probe, ks, cast(Weights, weights), seed, standardise=standardise)


def standardise_warnings(task: EvaluationTask, settings: ProbeSettings) -> list[str]:
    """Warnings about the standardising of features. Raises UserError where nothing would be left of them."""
    (method, *further), warnings = settings.methods, []
    if method == "centre-slide":
        counts = np.bincount(task.slide)
        single = int((counts == 1).sum())
        if single == len(counts):
            raise UserError("--standardise centre-slide: every slide has one judged row, of which nothing would be left")
        warnings.append(
            "centre-slide: the mean of a judged slide's own rows was taken from them: a single new tile cannot be judged so"
        )
        if single:
            warnings.append(f"centre-slide: nothing is left of the only judged row of {single} slides")
    if settings.probe == "linear" and settings.standardise == "none":
        warnings.append("--standardise none: the linear probe standardises its features all the same, in every training fold")
    if settings.probe == "retrieval" and method in FITTED and task.cv.n_folds == 1 and not further:
        warnings.append(f"{method}: fitted on all judged rows, without their labels")
    return warnings


def run_probe(task: EvaluationTask, candidate: Baseline, settings: ProbeSettings, *, full: bool = False) -> ProbeReport:
    """Judge one set of features. full: with everything that is reported of the model only."""
    features = Features(candidate.x, candidate.metric, task.slide)
    if settings.probe == "retrieval":
        return _retrieve(task, features, settings, full=full)
    y, cv, n, methods = task.y, task.cv, task.n_classes, settings.methods
    details: ProbeDetails
    if settings.probe == "knn":
        result = knn_probe(features, y, cv, n, ks=settings.ks, weights=settings.weights, methods=methods)
        per_k = {str(int(k)): score for k, score in result.per_setting.items()}
        k = result.chosen_most
        details = KnnDetails(per_k, None if k is None else int(k), [int(chosen) for chosen in result.chosen])
    elif settings.probe == "linear":
        result = linear_probe(features, y, cv, n, method=methods[0])
        per_c = {f"{c:g}": score for c, score in result.per_setting.items()}
        details = LinearDetails(per_c, result.chosen_most, list(result.chosen))
    else:
        result = prototype_probe(features, y, cv, n, episodes=settings.episodes, seed=settings.seed, methods=methods)
        details = PrototypeDetails({str(shots): ShotScores.of(scores) for shots, scores in result.per_shots.items()})
    estimates = _estimate(task, result.predictions, with_auroc=full)
    return ProbeReport(estimates, result.predictions, details, result.warnings, result.methods, result.inner_scores)


def _estimate(task: EvaluationTask, predictions: Predictions, *, with_auroc: bool = False) -> dict[str, Estimate]:
    return estimate_classes(task.y[task.tested], predictions, task.resamples, task.n_classes, task.names, with_auroc=with_auroc)


def _retrieve(task: EvaluationTask, features: Features, settings: ProbeSettings, *, full: bool) -> ProbeReport:
    """Let every tested row ask the rows of other groups (with a split: those on the other sides)."""
    y, queries, k = task.y, task.tested, settings.headline_k
    without_split = len(task.cv.outer_folds[0].inner) == 0 and task.cv.n_folds == 1
    gallery = queries if without_split else np.setdiff1d(np.flatnonzero(task.cv.fold >= 0), queries)
    method = settings.methods[0]
    space = features.space(method, gallery)
    main = search(space, y, queries, gallery, max(settings.ks), Rule("other groups", (task.group,)))
    hits = {"other groups": main}
    if full:
        hits["same slide"] = search(space, y, queries, queries, max(settings.ks), Rule("same slide", (), within=task.slide))
        if task.site is not None:
            apart = Rule("other sites", (task.group, task.site))
            hits["other sites"] = search(space, y, queries, gallery, max(settings.ks), apart)
    tables = {rule: retrieval_table(h, y, task.names, settings.ks, task.resamples) for rule, h in hits.items() if full}
    predictions = predict_by_vote(main, y, task.n_classes, k)
    estimates = _estimate(task, predictions)
    for name, values in measures(main, y, k).items():
        estimates[f"{name}@{k}"] = estimate_mean(values, task.resamples)
    bare = int((main.relevant == 0).sum())
    warning = (
        f"{bare} of {len(queries)} queries have no row of their class in another group: precision, hit, map leave them out"
    )
    return ProbeReport(estimates, predictions, RetrievalDetails(tables, k), (warning,) if bare else (), (method,))


def majority(task: EvaluationTask, settings: ProbeSettings) -> ProbeReport:
    """Predict the commonest class: of the training rows, or in retrieval of the rows that may answer."""
    if settings.probe != "retrieval" or task.cv.n_folds > 1:
        predictions = majority_probe(task.y, task.cv, task.n_classes).predictions
    else:
        codes = np.unique(task.group, return_inverse=True)[1]
        per_group = np.zeros((codes.max() + 1, task.n_classes))
        np.add.at(per_group, (codes, task.y), 1)
        rest = per_group.sum(axis=0) - per_group[codes]
        predictions = Predictions(rest.argmax(axis=1)[None], rest[None])
    return ProbeReport(_estimate(task, predictions), predictions)


def compare(model: ProbeReport, baseline: ProbeReport) -> BaselineScores:
    """A baseline's scores, and the paired difference model - baseline of balanced accuracy."""
    estimates = {name: estimate.interval() for name, estimate in baseline.estimates.items()}
    difference = model.estimates["balanced_accuracy"].minus(baseline.estimates["balanced_accuracy"])
    return BaselineScores(estimates, baseline.method, difference.interval())


def record_settings(
    task: EvaluationTask,
    settings: ProbeSettings,
    model: ProbeReport,
    options: TaskOptions,
    features: str,
    folders: Mapping[str, Path],
) -> RecordedSettings:
    """Record the options as given, and what the numbers depend on beside them."""
    details = model.details
    chosen = details.chosen_k if isinstance(details, KnnDetails) else None
    return RecordedSettings(
        k=details.headline_k if isinstance(details, RetrievalDetails) else chosen,
        ks=settings.ks,
        weights=settings.weights,
        temperature=TEMPERATURE,
        C_grid=C_GRID,
        max_iter=MAX_ITER,
        shots=SHOTS,
        episodes=settings.episodes,
        seed=settings.seed,
        rows_used=int((task.cv.fold >= 0).sum()),
        interval=task.resamples.method,
        samples=len(task.resamples.weights),
        samples_lacking_a_class=int(task.resamples.lacking.sum()),
        features=features,
        labels=str(options.labels),
        folds=options.folds,
        bootstrap=options.bootstrap,
        max_rows=options.max_rows,
        split=None if options.split is None else str(options.split),
        baselines={name: str(folder) for name, folder in folders.items()},
    )


def describe(
    task: EvaluationTask,
    settings: ProbeSettings,
    model: ProbeReport,
    recorded: RecordedSettings,
    scores: dict[str, BaselineScores],
    warnings: Sequence[str],
) -> Results:
    """Put together the content of results.json. scores: of the baselines."""
    features, tested, episodes = task.features, task.tested, len(model.predictions.pred)
    counts = sum(confusion_matrix(task.y[tested], pred, task.n_classes) for pred in model.predictions.pred)
    confusion = np.asarray(counts) / episodes
    assert model.details is not None
    return Results(
        probe=settings.probe,
        level=features.level,
        mode=features.mode,
        encoder=features.encoder,
        mpp=features.mpp if np.isfinite(features.mpp) else None,
        labels=task.names,
        n=len(tested),
        n_patients=task.n_patients,
        n_groups=task.resamples.n_clusters,
        groups=task.groups,
        split=task.cv.name,
        headline={name: estimate.interval() for name, estimate in model.estimates.items()},
        confusion=(confusion.astype(int) if episodes == 1 else confusion.round(2)).tolist(),
        per_class=_per_class(confusion, task, model.predictions),
        details=model.details,
        standardise=Standardising(settings.standardise, model.method, model.methods, model.inner_scores),
        pretraining=task.overlap,
        settings=recorded,
        data_sha256=task.sha256(),
        software=software(),
        baselines=scores,
        warnings=list(dict.fromkeys(warnings)),
    )


def _per_class(confusion: np.ndarray, task: EvaluationTask, predictions: Predictions) -> list[ClassScores]:
    """Rows and groups of each class, and its scores; no_interval flags a class that one group alone has."""
    y, cluster = task.y[task.tested], task.resamples.cluster
    right = (predictions.pred == y).mean(axis=0)
    rates = np.stack([recalls(confusion), precisions(confusion), f1_scores(confusion)], axis=1)  # (C, 3)
    rows = []
    for c, name in enumerate(task.names):
        interval = estimate_mean(np.where(y == c, right, np.nan), task.resamples).interval()
        recall, precision, f1 = (None if np.isnan(rate) else float(rate) for rate in rates[c])
        n, groups = round(float(confusion[c].sum())), len(np.unique(cluster[y == c]))
        rows.append(ClassScores(name, n, groups, replace(interval, why=""), interval.why, recall, precision, f1))
    return rows


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
