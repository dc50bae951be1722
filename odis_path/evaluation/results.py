"""The files of an evaluation: results.json, predictions.csv, table.csv and the figures."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from annotations.errors import UserError
from odis_path.evaluation.bootstrap import Predictions
from odis_path.evaluation.task import EvaluationTask
from tiling.jobs.summary import Result, show_lines
from tiling.storage.atomic import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

FIGURES = ("confusion", "roc", "k_curve", "c_curve", "shots")
_PARTS = ("point", "low", "high")


def refuse_other_results(out: Path, encoder: str) -> None:
    """UserError where `out` holds the result of another encoder."""
    path = out / "results.json"
    try:
        there = json.loads(path.read_text(encoding="utf-8")).get("encoder")
    except (OSError, ValueError, AttributeError):
        return
    if there is not None and there != encoder:
        raise UserError(
            f"{path}: is of another encoder, {there}, not {encoder}: give another --out, or --overwrite to replace it"
        )


class EvaluationResult(Result, Mapping[str, Any]):
    """The content of results.json, and the folder it lies in."""

    def __init__(self, results: Mapping[str, Any], folder: Path) -> None:
        self._results, self.folder = dict(results), folder

    def __getitem__(self, key: str) -> Any:
        return self._results[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._results)

    def __len__(self) -> int:
        return len(self._results)

    def __repr__(self) -> str:
        return f"EvaluationResult({self.folder}: {self['probe']} probe of {self['encoder']})"

    def show(self, console: Console) -> None:
        """Headline and baselines as a table, warnings below it, and where the files are."""
        from rich.table import Table

        headline = self["headline"]
        rest = [name for name in headline if name not in ("balanced_accuracy", "macro_f1")]
        title = (
            f"{self['probe']} probe of {self['encoder']}: {self['n']} {self['level']}s, "
            f"{len(self['labels'])} classes, {self['n_groups']} groups, {self['split']}"
        )
        table = Table(title=title)
        table.add_column("")
        table.add_column("standardised")
        for name in ("balanced accuracy", "model minus it", "macro F1", *rest):
            table.add_column(name, justify="right")
        for name, standardised, values in self._rows():
            shown = (values["balanced_accuracy"], values.get("difference"), values["macro_f1"], *map(values.get, rest))
            table.add_row(name, standardised or "", *map(estimate_text, shown))
        console.print(table)
        console.print(f"intervals: {self['settings']['interval']}", style="dim", markup=False, highlight=False)
        console.print(self["pretraining"]["in_words"], markup=False, highlight=False)
        for warning in self["warnings"]:
            console.print(f"note: {warning}", markup=False, highlight=False)
        show_lines(console, [f"results in {self.folder}: results.json, table.csv, predictions.csv and figures"])

    def _rows(self) -> Iterator[tuple[str, str | None, Mapping[str, Any]]]:
        """Name, what was done to the features, and the measures: of the model, then of each baseline."""
        from rich.markup import escape

        yield "[bold]this model", self["standardise"]["chosen"], self["headline"]
        for name, values in self["baselines"].items():
            yield escape(name), values["standardise"], values


def estimate_text(value: Mapping[str, Any] | None) -> str:
    """0.812 (0.77 to 0.85), or 0.812 (no interval); empty where there is no estimate."""
    if value is None or value["point"] is None:
        return ""
    if value["low"] is None:
        return f"{value['point']:.3f}{' (no interval)' if value.get('why') else ''}"
    return f"{value['point']:.3f} ({value['low']:.2f} to {value['high']:.2f})"


def write_all(out: Path, results: dict[str, Any], task: EvaluationTask, predictions: Predictions) -> None:
    """Write everything into out; results.json last, so that a folder that holds it holds all. What an earlier evaluation
    left there goes first."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("results.json", *(f"{figure}.png" for figure in FIGURES)):
        (out / name).unlink(missing_ok=True)
    scores = class_scores(predictions, task.n_classes)
    write_csv(out / "predictions.csv", prediction_lines(task, predictions, scores))
    write_csv(out / "table.csv", table_lines(results))
    draw_figures(out, results, task.y[task.tested], scores)
    with atomic_path(out / "results.json") as path:
        path.write_text(json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def write_csv(path: Path, lines: Iterable[list[Any]]) -> None:
    """A CSV that is there when it is complete."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)


def class_scores(predictions: Predictions, n_classes: int) -> np.ndarray:
    """Scores (t, C) of the judged rows: those of the only episode, or the share of episodes that said the class."""
    if len(predictions.pred) == 1:
        return predictions.scores[0]
    return np.stack([(predictions.pred == c).mean(axis=0) for c in range(n_classes)], axis=1)


def prediction_lines(task: EvaluationTask, predictions: Predictions, scores: np.ndarray) -> Iterator[list[Any]]:
    """Each judged row: where it is, truth, prediction (of several episodes the commonest), fold, score of each class."""
    rows, names = task.tested, task.names
    features = task.features.take(rows)
    truth, fold = task.y[rows], task.cv.fold[rows]
    predicted = predictions.pred[0] if len(predictions.pred) == 1 else scores.argmax(axis=1)
    yield ["slide_id", "patient_id", "x", "y", "object", "label", "predicted", "fold", *(f"score {name}" for name in names)]
    for i in range(len(rows)):
        yield [
            features.slide_id[i],
            features.patient_id[i],
            *features.coords[i].tolist(),
            int(features.object[i]),
            names[truth[i]],
            names[predicted[i]],
            int(fold[i]),
            *(f"{score:.6g}" for score in scores[i].tolist()),
        ]


def table_lines(results: dict[str, Any]) -> Iterator[list[Any]]:
    """Model and baselines, one measure a line; difference: model minus baseline. no_interval: why there is none."""
    how = results["standardise"]["chosen"]
    yield ["what", "measure", *_PARTS, *(f"difference_{part}" for part in _PARTS), "standardise", "no_interval"]
    for name, value in results["headline"].items():
        yield ["model", name, *_cells(value), "", "", "", how, value.get("why", "")]
    for row in results["per_class"]:
        yield [f"model, class {row['label']}", "recall", *_cells(row["recall_interval"]), "", "", "", how, row["no_interval"]]
    for baseline, values in results["baselines"].items():
        for name in results["headline"]:
            if name in values:
                difference = _cells(values["difference"]) if name == "balanced_accuracy" else ["", "", ""]
                why = values[name].get("why", "")
                yield [baseline, name, *_cells(values[name]), *difference, values["standardise"] or "", why]
    for rule, table in results.get("retrieval", {}).items():
        for k, row in table["per_k"].items():
            for name, value in row.items():
                yield [f"model, {rule}", f"{name}@{k}", *_cells(value), "", "", "", how, value.get("why", "")]
    for shots, row in results.get("per_shots", {}).items():
        yield [
            f"model, {shots} shots",
            "balanced_accuracy, episodes' mean and 5 to 95 %",
            row["mean"],
            row["p5"],
            row["p95"],
            *[""] * 3,
            how,
            "",
        ]


def _cells(value: dict[str, float | None]) -> list[Any]:
    return ["" if value[part] is None else value[part] for part in _PARTS]


def draw_figures(out: Path, results: dict[str, Any], y: np.ndarray, scores: np.ndarray) -> None:
    """The figures this probe has, as PNG. y int (t,), scores (t, C)."""
    from odis_path.figures import scores as figures
    from odis_path.figures import style

    labels = results["labels"]
    drawn: dict[str, Figure | None] = {
        "confusion": figures.draw_confusion(np.array(results["confusion"]), labels),
        "roc": figures.draw_roc(y, scores, labels),
    }
    if results.get("per_k"):
        points = {float(k): score for k, score in results["per_k"].items()}
        chosen = results["chosen_k"]
        drawn["k_curve"] = figures.draw_curve(points, chosen, "neighbours asked (k)", "balanced accuracy, validation folds")
    if results.get("per_C"):
        points = {float(c): score for c, score in results["per_C"].items()}
        label = "C (weaker regularisation to the right)"
        drawn["c_curve"] = figures.draw_curve(points, results["chosen_C"], label, "balanced accuracy, validation folds")
    if results.get("per_shots"):
        drawn["shots"] = figures.draw_shots(results["per_shots"])
    for name, figure in drawn.items():
        if figure is not None:
            with atomic_path(out / f"{name}.png") as path:
                style.save_png(figure, path)
