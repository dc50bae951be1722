"""Sections of results: the headline, each evaluation, the maps of embeddings."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from annotations.errors import UserError
from odis_path.figures.scores import draw_confusion, draw_per_k, draw_scores
from odis_path.reporting.cohort_table import Cohort
from odis_path.reporting.evaluations import MODEL, Evaluation, sentence
from odis_path.reporting.figures.embedding_map import Embeddings, draw_map, layout_2d, neighbourhood, read_embeddings
from odis_path.reporting.page import FigureItem, Item, Report, Section, TableItem, TextItem
from tiling.storage.atomic import atomic_path

MAX_MAPS = 4
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
    scored = [e for e in report.evaluations if e.main is not None]
    if not scored:
        return section
    section.items.append(score_table(report, scored))
    figure = draw_scores([(e.title, e.bars()) for e in scored], [e.chance for e in scored], "balanced accuracy")
    caption = (
        "Balanced accuracy is the share named rightly, averaged over classes, so that a rare class counts as much as a "
        "common one. Blue: the trained model. Grey: simple ways to the same answer. Lines: 95% intervals over patients."
    )
    section.items.append(report.figure("scores", figure, caption, "Balanced accuracy of model and baselines"))
    return section


def summary_sentences(report: Report) -> list[str]:
    """Sentences on slides, training and the best-known results."""
    c, texts = report.cohort, []
    if c.rows:
        sizes = sorted({f"{r.tile_px} px ({r.tile_um:.0f} µm)" for r in c.rows})
        boxes = sum(r.boxes for r in c.rows)
        kinds = {kind for kind, _ in c.objects()}
        what = "proposed" if kinds == {"proposal"} else "annotated or proposed" if "proposal" in kinds else "annotated"
        texts.append(
            f"{slides_of_patients(c)} {'was' if len(c.rows) == 1 else 'were'} cut into {c.tiles:,} tiles of {', '.join(sizes)}"
            + (f", with {boxes:,} boxes of {what} objects in them." if boxes else ", without boxes.")
        )
    for run in report.inventory.runs:
        steps, epochs = run.last("step"), run.last("epoch")
        if steps:
            network = (run.config.get("model") or {}).get("name", "a vision transformer")
            texts.append(
                f"In run “{run.name}” the network {network} was trained on them for {steps:,.0f} steps ({epochs:.3g} epochs) "
                "without any class label: only boxes and pixels."
            )
    told = [f"{e.name}: {text}" for e in report.evaluations if (text := sentence(e))]
    texts += told[:MAX_SENTENCES]
    if len(told) > MAX_SENTENCES:
        texts.append(f"{len(told) - MAX_SENTENCES} more evaluations are in the table.")
    return texts or ["Embeddings only: no slides, no training and no evaluation were found in this folder."]


def slides_of_patients(c: Cohort) -> str:
    """For example: 20 synthetic slides of 10 made-up patients."""
    made_up = len(c.synthetic) == len(c.rows)
    text = f"{len(c.rows):,} {'synthetic ' if made_up else ''}slide{'' if len(c.rows) == 1 else 's'}"
    if not c.patients:
        return text
    patients = f"{len(c.patients):,} {'made-up ' if made_up else ''}patient{'' if len(c.patients) == 1 else 's'}"
    unnamed = sum(1 for row in c.rows if not row.patient_id)
    return f"{text} of {patients}" if not unnamed else f"{text} ({unnamed} without a patient id, the others of {patients})"


def score_table(report: Report, scored: list[Evaluation]) -> TableItem:
    """Model and baselines of every evaluation, with intervals and the paired difference."""
    columns = ["", "balanced accuracy", "model minus this", "macro F1", "AUROC", "features"]
    rows: list[list[str]] = []
    strong = set()
    for e in scored:
        rows.append([f"{e.title} ({e.how_many})"])
        strong.add(len(rows))
        metrics = [str(e.scores.get(key, "–")) for key in ("balanced_accuracy", "macro_f1", "auroc")]
        rows.append([MODEL, metrics[0], "", *metrics[1:], e.standardised[MODEL]])
        for name, score, diff in e.baselines:
            rows.append([name, str(score), diff.signed() if diff else "–", "", "", e.standardised[name]])
        if e.chance is not None:
            rows.append(["guessing", f"{e.chance:.3f}", "", "", "", ""])
    _keep_scores(report, scored)
    caption = (
        "In brackets: 95% interval over patients; there is none where one patient alone has a class. Second column: how much "
        "better the model is on the same patients; an interval that leaves out 0 is more than luck. Last column: what was done "
        "to the features before they were compared, chosen on training patients by one rule for all."
    )
    return TableItem(columns, rows, caption, frozenset(range(1, 5)), frozenset(strong))


def _keep_scores(report: Report, scored: list[Evaluation]) -> None:
    """The scores as CSV (one number a column) and into report.json."""
    rows = []
    for e in scored:
        for metric, score in e.scores.items():
            rows.append([e.name, e.probe, e.level, MODEL, metric, score.point, score.low, score.high])
        for name, score, _ in e.baselines:
            rows.append([e.name, e.probe, e.level, name, "balanced_accuracy", score.point, score.low, score.high])
    report.write_csv("scores", ["evaluation", "probe", "level", "what", "metric", "point", "low", "high"], rows)
    report.numbers["evaluations"] = [
        {
            "name": e.name,
            "probe": e.probe,
            "level": e.level,
            "n": e.n,
            "n_patients": e.n_patients,
            "groups": e.groups,
            "scores": {k: vars(s) for k, s in e.scores.items()},
            "standardised": e.standardised,
            "pretraining": e.seen,
            "data_sha256": e.data_sha256,
            "settings": e.settings,
            "baselines": {n: {"balanced_accuracy": vars(s), "difference": d and vars(d)} for n, s, d in e.baselines},
        }
        for e in scored
    ]


def results(report: Report) -> Section | None:
    """Confusion matrices with counts, what else `evaluate` drew, retrieval tables, and its remarks."""
    if not report.evaluations:
        return None
    section = Section("results", "Which classes are told apart")
    for found, e in zip(report.inventory.evaluations, report.evaluations, strict=True):
        if e.confusion is not None:
            section.items.append(_confusion(report, e))
        for name, caption in DRAWN.items():
            if (found.folder / f"{name}.png").is_file():
                copy = report.files / report.unused(f"{name}-{e.name}", ".png")
                with atomic_path(copy) as temporary:
                    shutil.copyfile(found.folder / f"{name}.png", temporary)
                section.items.append(FigureItem(copy, f"{e.title}. {caption}", f"{name} of {e.name}", narrow=True))
        section.items += [_retrieval_table(e)] if e.retrieval else []
    series = [
        (e.name, [k for k, _ in e.per_k], [v for _, v in e.per_k], e.k)
        for e in report.evaluations
        if e.probe == "knn" and len(e.per_k) > 1
    ]
    if series:
        caption = (
            "Score against the number of neighbours that vote, measured on patients set aside for this choice; "
            "the ring marks the number chosen."
        )
        section.items.append(report.figure("neighbours", draw_per_k(series), caption, "Neighbours against score"))
    section.items += [TextItem(f"Remark on {e.title}: {remark}.") for e in report.evaluations for remark in e.warnings]
    return section


def _confusion(report: Report, e: Evaluation) -> FigureItem:
    counts = e.confusion if e.confusion is not None else np.zeros((0, 0))
    rows = [[label, *(f"{n:g}" for n in row)] for label, row in zip(e.labels, counts, strict=True)]
    report.write_csv(f"confusion-{e.name}", ["truth", *e.labels], rows)
    caption = (
        f"{e.title}. Each row is a true class and shows what its {e.things} were taken for: the count, and its share of "
        "the row. The diagonal is right."
    )
    figure = draw_confusion(counts, e.labels)
    return report.figure(f"confusion-{e.name}", figure, caption, f"Confusion matrix of {e.name}", narrow=True)


def _retrieval_table(e: Evaluation) -> TableItem:
    """The rule of retrieval, the number of answers, and each measure with its interval."""
    rows: list[list[str]] = []
    for rule, per_k in e.retrieval.items():
        rows.append([f"answers from {rule}"])
        rows += [[k, *(str(scores.get(name, "–")) for name in RETRIEVAL)] for k, scores in per_k.items()]
    caption = (
        f"{e.title}. Precision: share of the answers that are of the class asked for. Hit: is one among them. mAP: are they "
        "at the front. Vote: balanced accuracy of the answers' majority."
    )
    return TableItem(["answers", *RETRIEVAL.values()], rows, caption, frozenset(range(1, 5)))


def embedding_maps(report: Report) -> Section | None:
    """Maps of the embeddings of each folder of feature files, at tile and object level."""
    from odis_path.features.read import levels_in

    section = Section("maps", "Maps of the embeddings")
    wanted = [(f, level) for f in report.inventory.features for level in levels_in(f.folder) if level != "slide"]
    wanted.sort(key=lambda item: "random" in item[0].name)  # untrained twins come last
    left_out = 0
    for found, level in wanted:
        if len(section.items) < MAX_MAPS:
            section.items += _map_of(report, found.name, found.folder, level)
        else:
            left_out += 1
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


def _map_of(report: Report, name: str, folder: Path, level: str) -> list[Item]:
    try:
        e = read_embeddings(folder, level)
    except (UserError, OSError, KeyError, IndexError, ValueError) as error:
        report.problems.append(f"map of {name}: {' '.join(str(error).split())}")
        return []
    if e is None or len(e.features) < 20:
        return []
    xy = layout_2d(e.features)
    near, things = neighbourhood(e), "tiles" if level == "tile" else "boxes of objects"
    report.numbers.setdefault("maps", {})[f"{name}, {level}"] = {"rows": len(xy), "of": e.total, **vars(near)}
    report.write_csv(f"map-{name}-{level}", ["slide", "class", "x", "y"], _map_rows(e, xy))
    figure = draw_map(e, xy, report.colors)
    caption = (
        f"{len(xy):,} of {e.total:,} {things} of {name} ({_encoder(e)}; t-SNE of the first 50 principal components). "
        f"Of the ten nearest neighbours of a point, {near.same_class:.0%} are of its class (at random: "
        f"{near.chance_class:.0%}) and {near.same_slide:.0%} of its slide (at random: {near.chance_slide:.0%})."
    )
    return [report.figure(f"map-{name}-{level}", figure, caption, f"Map of {level} embeddings by class and by slide")]


def _encoder(e: Embeddings) -> str:
    return ", mode ".join(part for part in (e.encoder, e.mode) if part) or "encoder not named"


def _map_rows(e: Embeddings, xy: object) -> list[list[object]]:
    points = xy.tolist()  # type: ignore[attr-defined]
    return [
        [e.slides[s], e.labels[c], round(x, 3), round(y, 3)]
        for s, c, (x, y) in zip(e.slide.tolist(), e.label.tolist(), points, strict=True)
    ]
