"""The sections of a report on slides, training and settings; `SECTIONS` lists all sections as they are read."""

from __future__ import annotations

import json
from collections.abc import Callable

from annotations.errors import UserError
from annotations.objects import Kind
from odis_path.reporting.cohort_table import UNCLASSIFIED, Cohort, SlideRow
from odis_path.reporting.figures import boxes as box_figures
from odis_path.reporting.figures import slides as slide_figures
from odis_path.reporting.figures.training import draw_training
from odis_path.reporting.figures.variance import draw_shares, read_shares
from odis_path.reporting.inventory import RunFolder
from odis_path.reporting.page import FigureItem, FoldItem, Report, Section, TableItem, TextItem
from odis_path.reporting.sections_results import embedding_maps, headline, results, slides_of_patients
from odis_path.reporting.sections_tiles import attention, crops
from odis_path.versions import versions

MAX_SLIDE_FIGURES = 4
MAX_TABLE_ROWS = 300
MAX_VARIANCE_RUNS = 3
FOLD_FROM = 9
KIND_COLUMNS = {Kind.TISSUE: "tissue regions", Kind.CELL: "cells", Kind.PROPOSAL: "proposals"}
LOGGED = ("step", "epoch", "loss", "loss_obj", "loss_patch", "knn_balanced_accuracy", "embedding_spread", "images_per_s")
STACK = ("python", "odis-path", "torch", "timm", "numpy", "scikit-learn", "shapely", "openslide-python", "h5py", "matplotlib")


def cohort(report: Report) -> Section | None:
    """Section of the cohort: a row per slide, and the number of objects of each class."""
    table = report.cohort
    if not table.rows:
        return None
    section = Section("cohort", "Slides and annotations")
    section.items.append(TextItem(f"{slides_of_patients(table)}, {table.tiles:,} tiles, {table.boxes:,} boxes."))
    columns = ["slide", "patient", "size, level-0 px", "µm per px", "tile", "tiles", "boxes", *KIND_COLUMNS.values()]
    rows = [_slide_row(row) for row in table.rows]
    report.write_csv("cohort", columns, rows)
    report.numbers["cohort"] = {
        "slides": len(rows),
        "patients": len(table.patients),
        "tiles": table.tiles,
        "boxes": table.boxes,
        "objects": [{"kind": kind, "class": name, "count": n} for (kind, name), n in sorted(table.objects().items())],
        "synthetic_slides": table.synthetic,
    }
    filled = [i for i in range(len(columns)) if i < 7 or any(row[i] != "0" for row in rows)]
    shown = [[row[i] for i in filled] for row in rows[:MAX_TABLE_ROWS]]
    caption = "Tile: side in pixels and what that is on the slide. Last columns: objects by kind."
    if len(rows) > len(shown):
        caption += f" The first {len(shown)} of {len(rows)}; all are in {report.files.name}/cohort.csv."
    if classes := _class_table(table):
        section.items.append(classes)
    fold = f"All {len(rows)} slides" if len(rows) >= FOLD_FROM else ""
    section.items.append(TableItem([columns[i] for i in filled], shown, caption, frozenset(range(3, 10)), fold=fold))
    return section


def _slide_row(row: SlideRow) -> list[str]:
    by_kind = [sum(n for (kind, _), n in row.objects.items() if kind == shown.word) for shown in KIND_COLUMNS]
    return [
        row.slide_id,
        row.patient_id or "–",
        f"{row.size_l0[0]:,} × {row.size_l0[1]:,}",
        f"{row.mpp_level0:.3g}",
        f"{row.tile_px} px = {row.tile_um:.0f} µm",
        f"{row.tiles:,}",
        f"{row.boxes:,}",
        *(f"{n:,}" for n in by_kind),
    ]


def _class_table(table: Cohort) -> TableItem | None:
    counts = table.objects()
    if not counts:
        return None
    slides = {key: sum(1 for row in table.rows if row.objects.get(key)) for key in counts}
    order = {kind.word: int(kind) for kind in Kind}
    keys = sorted(counts, key=lambda key: (order.get(key[0], len(order)), key[1] == UNCLASSIFIED, key[1]))
    rows = [[kind, name, f"{counts[kind, name]:,}", f"{slides[kind, name]} of {len(table.rows)}"] for kind, name in keys]
    caption = "Objects by class; a proposal is a guess of image analysis, not an annotation."
    return TableItem(["kind", "class", "objects", "on slides"], rows, caption, frozenset({2, 3}))


def slides(report: Report) -> Section | None:
    """Section of thumbnails: a few slides, one of each patient first."""
    chosen = _of_different_patients(report.cohort, MAX_SLIDE_FIGURES)
    if not chosen:
        return None
    section = Section("slides", "What was cut and annotated")
    if len(chosen) < len(report.cohort.rows):
        section.items.append(TextItem(f"{len(chosen)} of the {len(report.cohort.rows)} slides, of different patients first."))
    for row in chosen:
        picture = slide_figures.read_picture(row.path)
        synthetic = " (synthetic)" if row.synthetic else ""
        caption = f"Slide {row.slide_id}{synthetic}. Left: the tissue that was found, outlined, and the tiles cut from it. " + (
            "Right: annotated regions as the box each has in a tile (frames); cells and proposals as dots."
            if row.boxes
            else "Right: the same without drawing."
        )
        figure = slide_figures.draw_slide(picture, report.colors)
        section.items.append(
            report.figure(f"slide-{row.slide_id}", figure, caption, f"Overview of slide {row.slide_id}", photo=True)
        )
        if row.boxes and (close_up := _close_up(report, row)) is not None:
            section.items.append(close_up)
    return section


def _close_up(report: Report, row: SlideRow) -> FigureItem | None:
    """Draw boxes of a slide over its pixels, at three scales."""
    try:
        picture = box_figures.read_boxes(row.path)
    except (UserError, OSError) as error:
        report.add_problem(f"boxes of {row.slide_id}", error)
        return None
    if picture is None:
        return None
    caption = (
        f"Slide {row.slide_id}, boxes over the pixels they were cut from. Each yellow frame is what the picture to its right "
        "shows. In the last one a pixel of the tile is several of the picture's: boxes that are off by a few are seen to be."
        + (" Black lines are the outlines behind the boxes." if picture.panels[1].rings else "")
    )
    figure = box_figures.draw_boxes(picture, report.colors)
    return report.figure(f"boxes-{row.slide_id}", figure, caption, f"Boxes of slide {row.slide_id} at three scales", photo=True)


def _of_different_patients(table: Cohort, count: int) -> list[SlideRow]:
    """Choose up to `count` slides with tiles, the first of every patient before any second."""
    by_patient: dict[str, int] = {}
    ranked = []
    for row in (row for row in table.rows if row.tiles):
        patient = row.patient_id or row.slide_id
        by_patient[patient] = by_patient.get(patient, 0) + 1
        ranked.append((by_patient[patient], row))
    return [row for _, row in sorted(ranked, key=lambda pair: pair[0])[:count]]


def training(report: Report) -> Section | None:
    """Section of training: the curves of every run, and a table of their last values."""
    runs = [run for run in report.inventory.runs if run.rows]
    if not runs:
        return None
    section = Section("training", "Training")
    caption = (
        "Left: the loss, what training lowers. Middle: how well tiles of held-out patients are named by their nearest "
        "neighbours while training goes on. Right: the learning rate. "
        + ("One line per run." if len(runs) > 1 else "Every epoch sees each tile once.")
    )
    section.items.append(report.figure("training", draw_training(runs), caption, "Curves of loss, k-NN and learning rate"))
    columns = ["run", "network", "steps", "epochs", "loss", "k-NN, last", "k-NN, best", "tiles per second"]
    section.items.append(TableItem(columns, [_run_row(run) for run in runs], numeric=frozenset(range(2, 8))))
    for run in runs:
        keys = list(dict.fromkeys(key for row in run.rows for key in row))
        report.write_csv(f"training-{run.name}", keys, [[row.get(key, "") for key in keys] for row in run.rows])
    if (knows := _knows(report, runs)) is not None:
        section.items.append(knows)
    report.numbers["training"] = {run.name: {key: run.last(key) for key in LOGGED} for run in runs}
    return section


def _knows(report: Report, runs: list[RunFolder]) -> FigureItem | None:
    """Draw what the embedding knows, of the first runs that measured it."""
    measured = [shares for run in runs if (shares := read_shares(run)) is not None]
    if not measured:
        return None
    report.numbers["embedding_variance"] = {shares.name: vars(shares) for shares in measured}
    caption = (
        "What the embedding knows: the share of its variance that the class explains, against patient, slide and tile, before "
        "training (grey) and after (blue). Good training lifts the class. Where it lifts tile, slide or patient instead, the "
        "network has learned to tell places and stains apart. Shares do not add up: a tile's holds that of its slide."
    )
    if len(measured) > MAX_VARIANCE_RUNS:
        caption += f" The first {MAX_VARIANCE_RUNS} of {len(measured)} runs; all are in {report.files.name}/report.json."
    figure = draw_shares(measured[:MAX_VARIANCE_RUNS])
    return report.figure(
        "embedding-knows", figure, caption, "Variance explained by class, patient, slide and tile", narrow=True
    )


def _run_row(run: RunFolder) -> list[str]:
    def text(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    return [
        run.name,
        run.network or "–",
        text(run.last("step"), ",.0f"),
        text(run.last("epoch"), ".3g"),
        text(run.last("loss"), ".3f"),
        text(run.last("knn_balanced_accuracy"), ".3f"),
        text(max(run.series("knn_balanced_accuracy")[1], default=None), ".3f"),
        text(run.last("images_per_s"), ",.0f"),
    ]


def settings(report: Report) -> Section | None:
    """Section of settings: tiling, training, evaluation, software."""
    section, runs = Section("settings", "Every setting"), report.inventory.runs
    for number, parameters in enumerate(report.cohort.parameter_sets(), 1):
        title = "Tiling" if number == 1 else f"Tiling, set {number}"
        section.items.append(FoldItem(title, json.dumps(parameters, indent=2, sort_keys=True)))
    section.items += [FoldItem(f"Training: {run.name}", run.config_text.strip()) for run in runs]
    for evaluation in report.evaluations:
        shown = {"settings": evaluation.settings, "groups": evaluation.groups, "data_sha256": evaluation.data_sha256}
        section.items.append(FoldItem(f"Evaluation: {evaluation.name}", json.dumps(shown, indent=2, sort_keys=True)))
    for run in runs:
        if run.versions:
            text = json.dumps(run.versions, indent=2, sort_keys=True)
            section.items.append(FoldItem(f"Software of run {run.name}", text))
    installed = versions()
    software = {name: installed[name] for name in STACK if installed[name] != "missing"}
    section.items.append(FoldItem("Software that wrote this report", json.dumps(software, indent=2)))
    report.numbers["software"] = software
    return section


SECTIONS: tuple[Callable[[Report], Section | None], ...] = (
    headline,
    cohort,
    slides,
    crops,
    training,
    results,
    embedding_maps,
    attention,
    settings,
)
