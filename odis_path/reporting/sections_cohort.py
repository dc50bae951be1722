"""The sections of a report on slides, training and settings; `ORDER` lists all sections as they are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from annotations.objects import Kind
from odis_path.reporting.cohort_table import UNCLASSIFIED, Cohort
from odis_path.reporting.figures import boxes as box_figures
from odis_path.reporting.figures import slides as slide_figures
from odis_path.reporting.figures.training import draw_training
from odis_path.reporting.inventory import RunFolder
from odis_path.reporting.page import FigureItem, FoldItem, Report, Section, TableItem, TextItem
from odis_path.reporting.sections_results import embedding_maps, headline, results, slides_of_patients
from odis_path.reporting.sections_tiles import attention, crops

MAX_SLIDE_FIGURES = 4
MAX_TABLE_ROWS = 300
FOLD_FROM = 9
SHOWN_KINDS = {"tissue": "tissue regions", "cell": "cells", "proposal": "proposals"}


def cohort(report: Report) -> Section | None:
    """One row per slide, and how many objects of which class there are."""
    c = report.cohort
    if not c.rows:
        return None
    section = Section("cohort", "Slides and annotations")
    many = f"{slides_of_patients(c)}, {c.tiles:,} tiles, {sum(r.boxes for r in c.rows):,} boxes."
    section.items.append(TextItem(many))
    columns = ["slide", "patient", "size, level-0 px", "µm per px", "tile", "tiles", "boxes", *SHOWN_KINDS.values()]
    rows = [_slide_row(r) for r in c.rows]
    report.write_csv("cohort", columns, [list(map(str, row)) for row in rows])
    report.numbers["cohort"] = {
        "slides": len(c.rows),
        "patients": len(c.patients),
        "tiles": c.tiles,
        "boxes": sum(r.boxes for r in c.rows),
        "objects": [{"kind": k, "class": n, "count": v} for (k, n), v in sorted(c.objects().items())],
        "synthetic_slides": c.synthetic,
    }
    filled = [i for i in range(len(columns)) if i < 7 or any(row[i] != "0" for row in rows)]
    shown = [[row[i] for i in filled] for row in rows[:MAX_TABLE_ROWS]]
    rest = (
        f" The first {len(shown)} of {len(rows)}; all are in {report.files.name}/cohort.csv." if len(rows) > len(shown) else ""
    )
    caption = "Tile: side in pixels and what that is on the slide. Last columns: objects by kind." + rest
    if table := _class_table(c):
        section.items.append(table)
    fold = f"All {len(rows)} slides" if len(rows) >= FOLD_FROM else ""
    section.items.append(TableItem([columns[i] for i in filled], shown, caption, frozenset(range(3, 10)), fold=fold))
    return section


def _slide_row(r: Any) -> list[str]:
    by_kind = {kind: sum(n for (k, _), n in r.objects.items() if k == kind) for kind in SHOWN_KINDS}
    return [
        r.slide_id,
        r.patient_id or "–",
        f"{r.size_l0[0]:,} × {r.size_l0[1]:,}",
        f"{r.mpp_level0:.3g}",
        f"{r.tile_px} px = {r.tile_um:.0f} µm",
        f"{r.tiles:,}",
        f"{r.boxes:,}",
        *(f"{n:,}" for n in by_kind.values()),
    ]


def _class_table(c: Cohort) -> TableItem | None:
    counts = c.objects()
    if not counts:
        return None
    slides = {key: sum(1 for r in c.rows if r.objects.get(key)) for key in counts}
    words = [kind.word for kind in Kind]
    keys = sorted(
        counts, key=lambda key: (words.index(key[0]) if key[0] in words else len(words), key[1] == UNCLASSIFIED, key[1])
    )
    rows = [[kind, name, f"{counts[kind, name]:,}", f"{slides[kind, name]} of {len(c.rows)}"] for kind, name in keys]
    caption = "Objects by class; a proposal is a guess of image analysis, not an annotation."
    return TableItem(["kind", "class", "objects", "on slides"], rows, caption, frozenset({2, 3}))


def slides(report: Report) -> Section | None:
    """Thumbnails of some slides, one of each patient first."""
    chosen = _spread(report.cohort, MAX_SLIDE_FIGURES)
    if not chosen:
        return None
    section = Section("slides", "What was cut and annotated")
    if len(chosen) < len(report.cohort.rows):
        section.items.append(TextItem(f"{len(chosen)} of the {len(report.cohort.rows)} slides, of different patients first."))
    for row in chosen:
        picture = slide_figures.read_picture(row.path)
        made_up = " (synthetic)" if row.synthetic else ""
        caption = f"Slide {row.slide_id}{made_up}. Left: the tissue that was found, outlined, and the tiles cut from it. " + (
            "Right: annotated regions as the box each has in a tile (frames); cells and proposals as dots."
            if row.boxes
            else "Right: the same without drawing."
        )
        figure = slide_figures.draw_slide(picture, report.colors)
        section.items.append(
            report.figure(f"slide-{row.slide_id}", figure, caption, f"Overview of slide {row.slide_id}", photo=True)
        )
        if row.boxes and (item := _close_up(report, row)) is not None:
            section.items.append(item)
    return section


def _close_up(report: Report, row: Any) -> FigureItem | None:
    """Boxes of a slide over its pixels, at three scales."""
    from annotations.errors import UserError

    try:
        picture = box_figures.read_boxes(row.path)
    except (UserError, OSError) as error:
        report.problems.append(f"boxes of {row.slide_id}: {' '.join(str(error).split())}")
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


def _spread(c: Cohort, count: int) -> list[Any]:
    """Up to `count` slides with tiles, the first of every patient before any second."""
    turn: dict[str, int] = {}
    ranked = []
    for number, row in enumerate(r for r in c.rows if r.tiles):
        patient = row.patient_id or row.slide_id
        turn[patient] = turn.get(patient, -1) + 1
        ranked.append((turn[patient], number, row))
    return [row for _, _, row in sorted(ranked, key=lambda item: item[:2])[:count]]


def training(report: Report) -> Section | None:
    """Curves of every run, and a table of what came out."""
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
    section.items.append(TableItem(columns, [_run_row(r) for r in runs], numeric=frozenset(range(2, 8))))
    for run in runs:
        keys = list(dict.fromkeys(key for row in run.rows for key in row))
        report.write_csv(f"training-{run.name}", keys, [[row.get(key, "") for key in keys] for row in run.rows])
    report.numbers["training"] = {run.name: {key: run.last(key) for key in _FIGURES} for run in runs}
    return section


_FIGURES = ("step", "epoch", "loss", "loss_obj", "loss_patch", "knn_balanced_accuracy", "embedding_spread", "images_per_s")


def _run_row(run: RunFolder) -> list[str]:
    def text(value: float | None, pattern: str) -> str:
        return "–" if value is None else format(value, pattern)

    knn = run.series("knn_balanced_accuracy")[1]
    return [
        run.name,
        str((run.config.get("model") or {}).get("name", "–")),
        text(run.last("step"), ",.0f"),
        text(run.last("epoch"), ".3g"),
        text(run.last("loss"), ".3f"),
        text(knn[-1] if knn else None, ".3f"),
        text(max(knn) if knn else None, ".3f"),
        text(run.last("images_per_s"), ",.0f"),
    ]


def settings(report: Report) -> Section | None:
    """Everything that was set: tiling, training, evaluation, software."""
    import json

    section = Section("settings", "Every setting")
    for i, parameters in enumerate(report.cohort.parameter_sets(), 1):
        title = "Tiling" if i == 1 else f"Tiling, set {i}"
        section.items.append(FoldItem(title, json.dumps(parameters, indent=2, sort_keys=True)))
    section.items += [FoldItem(f"Training: {run.name}", run.config_text.strip()) for run in report.inventory.runs]
    for e in report.evaluations:
        shown = {"settings": e.settings, "groups": e.groups, "data_sha256": e.data_sha256}
        section.items.append(FoldItem(f"Evaluation: {e.name}", json.dumps(shown, indent=2, sort_keys=True)))
    section.items += [
        FoldItem(f"Software of run {run.name}", json.dumps(run.versions, indent=2, sort_keys=True))
        for run in report.inventory.runs
        if run.versions
    ]
    section.items.append(FoldItem("Software that wrote this report", json.dumps(software(), indent=2)))
    report.numbers["software"] = software()
    return section


def software() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    import platform
    from importlib import metadata

    names = ("odis-path", "torch", "timm", "numpy", "scikit-learn", "shapely", "openslide-python", "h5py", "matplotlib")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


ORDER: tuple[Callable[[Report], Section | None], ...] = (
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
