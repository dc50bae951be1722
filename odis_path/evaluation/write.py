"""Write the files of an evaluation: results.json, predictions.csv, table.csv and the figures."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from odis_path.evaluation.bootstrap import Interval, Predictions
from odis_path.evaluation.results import KnnDetails, LinearDetails, PrototypeDetails, Results, RetrievalDetails, as_json
from odis_path.evaluation.task import EvaluationTask
from tiling.storage.atomic import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES = ("confusion", "roc", "k_curve", "c_curve", "shots")
_ENDS = ("point", "low", "high")
Cell = str | int | float | None  # None: an empty cell


def write_all(out: Path, results: Results, task: EvaluationTask, predictions: Predictions) -> None:
    """Write everything into out, results.json last: a folder that holds it holds all. Files of an earlier result go first."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("results.json", *(f"{figure}.png" for figure in FIGURES)):
        (out / name).unlink(missing_ok=True)
    scores = class_scores(predictions, task.n_classes)
    write_csv(out / "predictions.csv", prediction_lines(task, predictions, scores))
    write_csv(out / "table.csv", table_lines(results))
    draw_figures(out, results, task.y[task.tested], scores)
    with atomic_path(out / "results.json") as path:
        path.write_text(json.dumps(as_json(results), indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def write_csv(path: Path, lines: Iterable[list[Cell]]) -> None:
    """Write a CSV, whole or not at all."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)


def class_scores(predictions: Predictions, n_classes: int) -> np.ndarray:
    """Scores (t, C) of the judged rows: those of the only episode, or the share of episodes that predicted the class."""
    if len(predictions.pred) == 1:
        return np.asarray(predictions.scores[0])
    return np.stack([(predictions.pred == c).mean(axis=0) for c in range(n_classes)], axis=1)


def prediction_lines(task: EvaluationTask, predictions: Predictions, scores: np.ndarray) -> Iterator[list[Cell]]:
    """Each judged row: where it is, truth, prediction (of several episodes the commonest), fold, score of each class."""
    rows, names = task.tested, task.names
    features = task.features.take(rows)
    truth, fold = task.y[rows], task.cv.fold[rows]
    predicted = predictions.pred[0] if len(predictions.pred) == 1 else scores.argmax(axis=1)
    yield ["slide_id", "patient_id", "x", "y", "object", "label", "predicted", "fold", *(f"score {name}" for name in names)]
    for i in range(len(rows)):
        place = [features.slide_id[i], features.patient_id[i], *features.coords[i].tolist(), int(features.object[i])]
        yield [*place, names[truth[i]], names[predicted[i]], int(fold[i]), *(f"{score:.6g}" for score in scores[i].tolist())]


def table_lines(results: Results) -> Iterator[list[Cell]]:
    """Model and baselines, one measure a line; difference: model minus baseline. no_interval: why there is none."""
    chosen = results.standardise.chosen
    yield ["what", "measure", *_ENDS, *(f"difference_{end}" for end in _ENDS), "standardise", "no_interval"]

    def line(who: str, measure: str, value: Interval, why: str | None = None) -> list[Cell]:
        return [who, measure, value.point, value.low, value.high, None, None, None, chosen, value.why if why is None else why]

    for name, value in results.headline.items():
        yield line("model", name, value)
    for row in results.per_class:
        yield line(f"model, class {row.label}", "recall", row.recall_interval, row.no_interval)
    for baseline, scores in results.baselines.items():
        for name, value in scores.estimates.items():
            if name in results.headline:
                d = scores.difference
                difference = [d.point, d.low, d.high] if name == "balanced_accuracy" else [None] * 3
                yield [baseline, name, value.point, value.low, value.high, *difference, scores.standardise, value.why]
    if isinstance(results.details, RetrievalDetails):
        for rule, table in results.details.retrieval.items():
            for k, measures in table.per_k.items():
                for name, value in measures.items():
                    yield line(f"model, {rule}", f"{name}@{k}", value)
    if isinstance(results.details, PrototypeDetails):
        for shots, spread in results.details.per_shots.items():
            middle = Interval(spread.mean, spread.p5, spread.p95)
            yield line(f"model, {shots} shots", "balanced_accuracy, episodes' mean and 5 to 95 %", middle)


def draw_figures(out: Path, results: Results, y: np.ndarray, scores: np.ndarray) -> None:
    """Draw the figures of this probe as PNG. y int (t,), scores (t, C)."""
    from odis_path.figures import scores as figures
    from odis_path.figures import style

    labels, details, where = list(results.labels), results.details, "balanced accuracy, validation folds"
    drawn: dict[str, Figure | None] = {
        "confusion": figures.draw_confusion(np.array(results.confusion), labels),
        "roc": figures.draw_roc(y, scores, labels),
    }
    if isinstance(details, KnnDetails) and details.per_k and details.chosen_k is not None:
        points = {float(k): score for k, score in details.per_k.items()}
        drawn["k_curve"] = figures.draw_curve(points, details.chosen_k, "neighbours asked (k)", where)
    if isinstance(details, LinearDetails) and details.per_C and details.chosen_C is not None:
        points = {float(c): score for c, score in details.per_C.items()}
        drawn["c_curve"] = figures.draw_curve(points, details.chosen_C, "C (weaker regularisation to the right)", where)
    if isinstance(details, PrototypeDetails):
        drawn["shots"] = figures.draw_shots(as_json(details.per_shots))
    for name, figure in drawn.items():
        if figure is not None:
            with atomic_path(out / f"{name}.png") as path:
                style.save_png(figure, path)
