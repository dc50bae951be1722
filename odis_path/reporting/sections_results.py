"""Sections of results: the headline, each evaluation, the maps of embeddings."""

from __future__ import annotations

import shutil

import numpy as np

from annotations.errors import UserError
from odis_path.figures.scores import KCurve, draw_confusion, draw_per_k, draw_scores
from odis_path.reporting.cohort_table import Cohort
from odis_path.reporting.evaluations import MODEL, Evaluation, sentence
from odis_path.reporting.figures.embedding_map import Embeddings, draw_map, layout_2d, neighbourhood, read_embeddings
from odis_path.reporting.inventory import FeatureFolder
from odis_path.reporting.page import FigureItem, Report, Section, TableItem, TextItem
from tiling.storage.atomic import atomic_path

MAX_MAPS = 4
MIN_MAP_ROWS = 20
MAX_SENTENCES = 3
DRAWN = {
    "roc": "How many of a class are found against how many others are taken for it, as the threshold moves.",
    "c_curve": "Score against the strength of regularisation, on patients set aside for this choice.",
    "shots": "Score against the number of examples per class, over many draws of examples.",
}
RETRIEVAL = {"precision": "precision", "hit": "hit", "map": "mAP", "mmv_balanced_accuracy": "vote"}


def headline(report: Report) -> Section:
    """Section of the headline: methods and results in plain words; the scores as table and figure."""
    section = Section("headline", "In short")
    section.items += [TextItem(text, lead=i == 0) for i, text in enumerate(summary_sentences(report))]
    scored = [evaluation for evaluation in report.evaluations if evaluation.balanced_accuracy is not None]
    if not scored:
        return section
    section.items.append(score_table(scored))
    _keep_scores(report, scored)
    blocks = [(evaluation.title, evaluation.bars()) for evaluation in scored]
    figure = draw_scores(blocks, [evaluation.chance for evaluation in scored], "balanced accuracy")
    caption = (
        "Balanced accuracy is the share named rightly, averaged over classes, so that a rare class counts as much as a "
        "common one. Blue: the trained model. Grey: simple ways to the same answer. Lines: 95% intervals over patients."
    )
    section.items.append(report.figure("scores", figure, caption, "Balanced accuracy of model and baselines"))
    return section


def summary_sentences(report: Report) -> list[str]:
    """Describe slides, training and the first results, a sentence each."""
    cohort, texts = report.cohort, []
    if cohort.rows:
        verb = "was" if len(cohort.rows) == 1 else "were"
        sizes = sorted({f"{row.tile_px} px ({row.tile_um:.0f} µm)" for row in cohort.rows})
        kinds = {kind for kind, _ in cohort.objects()}
        origin = "proposed" if kinds == {"proposal"} else "annotated or proposed" if "proposal" in kinds else "annotated"
        boxes = f", with {cohort.boxes:,} boxes of {origin} objects in them." if cohort.boxes else ", without boxes."
        texts.append(f"{slides_of_patients(cohort)} {verb} cut into {cohort.tiles:,} tiles of {', '.join(sizes)}{boxes}")
    for run in report.inventory.runs:
        steps, epochs = run.last("step"), run.last("epoch")
        if steps:
            duration = f"{steps:,.0f} steps" + ("" if epochs is None else f" ({epochs:.3g} epochs)")
            texts.append(
                f"In run “{run.name}” the network {run.network or 'a vision transformer'} was trained on them for {duration} "
                "without any class label: only boxes and pixels."
            )
    results = [f"{evaluation.name}: {text}" for evaluation in report.evaluations if (text := sentence(evaluation))]
    texts += results[:MAX_SENTENCES]
    if len(results) > MAX_SENTENCES:
        texts.append(f"{len(results) - MAX_SENTENCES} more evaluations are in the table.")
    return texts or ["Embeddings only: no slides, no training and no evaluation were found in this folder."]


def slides_of_patients(cohort: Cohort) -> str:
    """Return, for example: 20 synthetic slides of 10 made-up patients."""
    synthetic = len(cohort.synthetic) == len(cohort.rows)
    text = f"{len(cohort.rows):,} {'synthetic ' if synthetic else ''}slide{'' if len(cohort.rows) == 1 else 's'}"
    if not cohort.patients:
        return text
    count = len(cohort.patients)
    patients = f"{count:,} {'made-up ' if synthetic else ''}patient{'' if count == 1 else 's'}"
    unnamed = sum(1 for row in cohort.rows if not row.patient_id)
    return f"{text} of {patients}" if not unnamed else f"{text} ({unnamed} without a patient id, the others of {patients})"


def score_table(scored: list[Evaluation]) -> TableItem:
    """Return model and baselines of every evaluation, with intervals and the paired difference."""
    columns = ["", "balanced accuracy", "model minus this", "macro F1", "AUROC", "features"]
    rows: list[list[str]] = []
    strong = set()
    for evaluation in scored:
        rows.append([f"{evaluation.title} ({evaluation.scope})"])
        strong.add(len(rows))
        accuracy, f1, auroc = (str(evaluation.scores.get(name, "–")) for name in ("balanced_accuracy", "macro_f1", "auroc"))
        rows.append([MODEL, accuracy, "", f1, auroc, evaluation.standardised])
        for baseline in evaluation.baselines:
            difference = baseline.difference.signed() if baseline.difference else "–"
            rows.append([baseline.name, str(baseline.score), difference, "", "", baseline.standardised])
        if evaluation.chance is not None:
            rows.append(["guessing", f"{evaluation.chance:.3f}", "", "", "", ""])
    caption = (
        "In brackets: 95% interval over patients; there is none where one patient alone has a class. Second column: how much "
        "better the model is on the same patients; an interval that leaves out 0 is more than luck. Last column: what was done "
        "to the features before they were compared, chosen on training patients by one rule for all."
    )
    return TableItem(columns, rows, caption, frozenset(range(1, 5)), frozenset(strong))


def _keep_scores(report: Report, scored: list[Evaluation]) -> None:
    """Write the scores as CSV (one number a column) and into report.json."""
    rows: list[list[object]] = []
    numbers = []
    for evaluation in scored:
        entries = [(MODEL, metric, score) for metric, score in evaluation.scores.items()]
        entries += [(baseline.name, "balanced_accuracy", baseline.score) for baseline in evaluation.baselines]
        for name, metric, score in entries:
            origin = (evaluation.name, evaluation.probe, evaluation.level)
            rows.append([*origin, name, metric, score.point, score.low, score.high])
        standardised = {baseline.name: baseline.standardised for baseline in evaluation.baselines}
        numbers.append(
            {
                "name": evaluation.name,
                "probe": evaluation.probe,
                "level": evaluation.level,
                "n": evaluation.n,
                "n_patients": evaluation.n_patients,
                "groups": evaluation.groups,
                "scores": {metric: vars(score) for metric, score in evaluation.scores.items()},
                "standardised": {MODEL: evaluation.standardised} | standardised,
                "pretraining": evaluation.pretrained_on,
                "data_sha256": evaluation.data_sha256,
                "settings": evaluation.settings,
                "baselines": {
                    baseline.name: {
                        "balanced_accuracy": vars(baseline.score),
                        "difference": baseline.difference and vars(baseline.difference),
                    }
                    for baseline in evaluation.baselines
                },
            }
        )
    report.write_csv("scores", ["evaluation", "probe", "level", "what", "metric", "point", "low", "high"], rows)
    report.numbers["evaluations"] = numbers


def results(report: Report) -> Section | None:
    """Section of evaluations: confusion matrices, what else `evaluate` drew, retrieval tables, remarks."""
    if not report.evaluations:
        return None
    section = Section("results", "Which classes are told apart")
    for output, evaluation in zip(report.inventory.evaluations, report.evaluations, strict=True):
        if evaluation.confusion is not None:
            section.items.append(_confusion(report, evaluation, evaluation.confusion))
        for name, caption in DRAWN.items():
            drawn = output.folder / f"{name}.png"
            if drawn.is_file():
                copy = report.files / report.unused(f"{name}-{evaluation.name}", ".png")
                with atomic_path(copy) as temporary:
                    shutil.copyfile(drawn, temporary)
                caption, alt = f"{evaluation.title}. {caption}", f"{name} of {evaluation.name}"
                section.items.append(FigureItem(copy, caption, alt, narrow=True))
        section.items += [_retrieval_table(evaluation)] if evaluation.retrieval else []
    curves = [
        KCurve(evaluation.name, evaluation.per_k, evaluation.chosen_k)
        for evaluation in report.evaluations
        if evaluation.probe == "knn" and len(evaluation.per_k) > 1
    ]
    if curves:
        caption = (
            "Score against the number of neighbours that vote, measured on patients set aside for this choice; "
            "the ring marks the number chosen."
        )
        section.items.append(report.figure("neighbours", draw_per_k(curves), caption, "Neighbours against score"))
    for evaluation in report.evaluations:
        section.items += [TextItem(f"Remark on {evaluation.title}: {warning}.") for warning in evaluation.warnings]
    return section


def _confusion(report: Report, evaluation: Evaluation, counts: np.ndarray) -> FigureItem:
    rows = [[label, *(f"{n:g}" for n in row)] for label, row in zip(evaluation.labels, counts, strict=True)]
    report.write_csv(f"confusion-{evaluation.name}", ["truth", *evaluation.labels], rows)
    caption = (
        f"{evaluation.title}. Each row is a true class and shows what its {evaluation.units} were taken for: the count, and "
        "its share of the row. The diagonal is right."
    )
    figure, alt = draw_confusion(counts, evaluation.labels), f"Confusion matrix of {evaluation.name}"
    return report.figure(f"confusion-{evaluation.name}", figure, caption, alt, narrow=True)


def _retrieval_table(evaluation: Evaluation) -> TableItem:
    """Return the rule of retrieval, the number of answers, and the measures with their intervals."""
    rows: list[list[str]] = []
    for rule, per_k in evaluation.retrieval.items():
        rows.append([f"answers from {rule}"])
        rows += [[k, *(str(scores.get(name, "–")) for name in RETRIEVAL)] for k, scores in per_k.items()]
    caption = (
        f"{evaluation.title}. Precision: share of the answers that are of the class asked for. Hit: is one among them. mAP: "
        "are they at the front. Vote: balanced accuracy of the answers' majority."
    )
    return TableItem(["answers", *RETRIEVAL.values()], rows, caption, frozenset(range(1, 5)))


def embedding_maps(report: Report) -> Section | None:
    """Section of maps: the embeddings of each folder of feature files, at tile and object level."""
    from odis_path.features.read import levels_in

    section = Section("maps", "Maps of the embeddings")
    folders = sorted(report.inventory.features, key=lambda folder: "random" in folder.name)  # untrained twins come last
    left_out = 0
    for folder in folders:
        for level in levels_in(folder.folder):
            if level == "slide":
                continue
            if len(section.items) == MAX_MAPS:
                left_out += 1
            elif (figure := _map_of(report, folder, level)) is not None:
                section.items.append(figure)
    if section.items:
        text = (
            "Every point is a tile, or an object as far as it lies in a tile; points that the model finds alike lie close "
            "together. A good map has one island per class on the left, and all slides mixed on the right: a map with one "
            "island per slide means that the model sees staining before tissue."
        )
        section.items.insert(0, TextItem(text))
    if left_out:
        section.items.append(TextItem(f"{MAX_MAPS} maps are shown, {left_out} more are left out."))
    return section


def _map_of(report: Report, folder: FeatureFolder, level: str) -> FigureItem | None:
    name = folder.name
    try:
        embeddings = read_embeddings(folder.folder, level)
    except (UserError, OSError, KeyError, IndexError, ValueError) as error:
        report.add_problem(f"map of {name}", error)
        return None
    if embeddings is None or len(embeddings.features) < MIN_MAP_ROWS:
        return None
    xy = layout_2d(embeddings.features)
    near, units = neighbourhood(embeddings), "tiles" if level == "tile" else "boxes of objects"
    report.numbers.setdefault("maps", {})[f"{name}, {level}"] = {"rows": len(xy), "of": embeddings.total, **vars(near)}
    report.write_csv(f"map-{name}-{level}", ["slide", "class", "x", "y"], _map_rows(embeddings, xy))
    figure = draw_map(embeddings, xy, report.colors)
    encoder = ", mode ".join(part for part in (embeddings.encoder, embeddings.mode) if part) or "encoder not named"
    caption = (
        f"{len(xy):,} of {embeddings.total:,} {units} of {name} ({encoder}; t-SNE of the first 50 principal components). "
        f"Of the ten nearest neighbours of a point, {near.same_class:.0%} are of its class (at random: "
        f"{near.chance_class:.0%}) and {near.same_slide:.0%} of its slide (at random: {near.chance_slide:.0%})."
    )
    return report.figure(f"map-{name}-{level}", figure, caption, f"Map of {level} embeddings by class and by slide")


def _map_rows(embeddings: Embeddings, xy: np.ndarray) -> list[list[object]]:
    rows = zip(embeddings.slide.tolist(), embeddings.label.tolist(), xy.tolist(), strict=True)
    return [[embeddings.slides[slide], embeddings.labels[label], round(x, 3), round(y, 3)] for slide, label, (x, y) in rows]
