"""Sections about single tiles: the pair of object-aware crops, and the attention of [OBJ]."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from annotations.objects import Kind
from odis_path.reporting.figures.tiles import Sample, draw_attention, draw_pairs, pick_tiles
from odis_path.reporting.inventory import RunFolder
from odis_path.reporting.page import Report, Section, TextItem

PAIRS, ATTENDED = 4, 5
MAX_RUNS = 3


def crops(report: Report) -> Section | None:
    """Section of training samples: tiles with their boxes and both crops of the pair."""
    run, paths = _run_with_tiles(report)
    if run is None:
        return None
    from annotations.errors import UserError

    samples = pick_tiles(paths, PAIRS)
    try:
        pairs = _pairs(samples, run)
    except (UserError, OSError, ValueError, KeyError) as error:
        report.problems.append(f"crops of run {run.name}: {' '.join(str(error).split())}")
        return None
    if not pairs:
        return None
    section = Section("crops", "What the model is shown")
    target = run.config.get("target") or {}
    mask = " Washed-out patches are those its [OBJ] token may not look at." if target.get("mask", True) else ""
    whole = float(target.get("whole_tile_p") or 0)
    rest = f" (In {whole:.0%} of all samples the target is the whole tile; those are not shown.)" if whole else ""
    aware = target.get("crop", True)
    caption = (
        f"Run “{run.name}”: each row is one tile with its annotated boxes; the yellow box is the target. "
        + (
            "Both crops (dashed frames) are drawn so that they show the target. "
            if aware
            else "Both crops are drawn at random. "
        )
        + f"Teacher and student must describe it alike in both.{mask}{rest}"
    )
    trained_on = (run.config.get("data") or {}).get("kinds")
    kinds = [kind for kind in Kind if trained_on is None or kind.word in trained_on]
    figure = draw_pairs(samples, pairs, report.colors, kinds)
    section.items.append(report.figure("crop-pairs", figure, caption, "Tiles with boxes, and two crops of each", photo=True))
    return section


def attention(report: Report) -> Section | None:
    """Section of attention: [OBJ] of each trained network, kept to a box and over the whole tile."""
    from annotations.errors import UserError

    section = Section("attention", "Where the model looks")
    trained = [run for run in report.inventory.runs if run.checkpoint is not None]
    for run in trained[:MAX_RUNS]:
        paths = _tiles_of(run, report)
        if not paths:
            continue
        try:
            section.items.append(_attention_of(report, run, paths))
        except (UserError, OSError, ValueError, KeyError, RuntimeError) as error:
            report.problems.append(f"attention of run {run.name}: {' '.join(str(error).split())[:300]}")
    if section.items and len(trained) > MAX_RUNS:
        section.items.append(TextItem(f"The first {MAX_RUNS} of {len(trained)} runs are shown."))
    if section.items:
        text = "[OBJ] is the token whose output is the embedding: what it attends to is what the embedding is made of."
        section.items.insert(0, TextItem(text))
    return section


def _attention_of(report: Report, run: RunFolder, paths: list[Path]) -> Any:
    from odis_path.reporting.previews import obj_attention

    samples = pick_tiles(paths, ATTENDED, seed=1)
    pairs = _pairs(samples, run)
    tiles, boxes = np.stack([p.tile for p in pairs]), np.stack([p.target for p in pairs]).astype(np.float32)
    inside = obj_attention(run.checkpoint, tiles, boxes)  # type: ignore[arg-type]
    whole = obj_attention(run.checkpoint, tiles, None)  # type: ignore[arg-type]
    share, size = (
        float(np.mean([_share_in_box(h, b, tiles.shape[1]) for h, b in zip(heat, boxes, strict=True)]))
        for heat in (whole, np.ones_like(whole))
    )
    report.numbers.setdefault("attention", {})[run.name] = {"share_in_box_when_whole_tile_is_open": share, "box_share": size}
    caption = (
        f"Run “{run.name}”: attention of [OBJ] in the last layer; grey patches are closed to it. "
        "Top: the tile and a target box. Middle: it may only look inside the box. Bottom: it may look anywhere; "
        f"{share:.0%} of its attention then falls into the box, which is {size:.0%} of the tile (means over these tiles)."
    )
    figure = draw_attention(samples, tiles, boxes, inside, whole)
    return report.figure(f"attention-{run.name}", figure, caption, "Attention of [OBJ] drawn over tiles", photo=True)


def _share_in_box(heat: np.ndarray, box: np.ndarray, side: int) -> float:
    """Attention on the patches whose centre lies in the box, of all attention."""
    centres = (np.arange(len(heat)) + 0.5) * side / len(heat)
    x_in, y_in = (centres > box[0]) & (centres < box[2]), (centres > box[1]) & (centres < box[3])
    return float(heat[np.ix_(y_in, x_in)].sum() / max(heat.sum(), 1e-12))


def _pairs(samples: Sequence[Sample], run: RunFolder) -> list[Any]:
    from odis_path.config import parse_config
    from odis_path.reporting.previews import crop_pairs

    config = parse_config(run.config, f"{run.name}/config.yaml")
    boxed = config.target.model_copy(update={"whole_tile_p": 0.0})  # a whole tile as target is nothing to look at
    config = config.model_copy(update={"target": boxed})
    return [crop_pairs(s.path, [s.row], config, patch_px=patch_px(run.config))[0] for s in samples]


def patch_px(config: dict[str, Any]) -> int:
    """Side of the network's patches in pixels: model.kwargs.patch_size, else what the model's name says, else 16."""
    model = config.get("model") or {}
    given = (model.get("kwargs") or {}).get("patch_size")
    said = re.search(r"patch(\d+)", str(model.get("name", "")))
    return int(given or (said.group(1) if said else 16))


def _tiles_of(run: RunFolder, report: Report) -> list[Path]:
    """Slide files with boxes that the run was trained on; else those of the report that have the same tile size."""
    rows = [r for r in report.cohort.rows if r.boxes and r.tiles]
    folder = Path(str((run.config.get("data") or {}).get("tiles", "")) or "-").resolve()
    own = [r for r in rows if r.path.parent.resolve() == folder]
    rows = own or rows
    return [r.path for r in rows if r.tile_px == rows[0].tile_px]


def _run_with_tiles(report: Report) -> tuple[RunFolder | None, list[Path]]:
    """The run to show crops of: the first that has object-aware crops, else the first."""
    runs = sorted(report.inventory.runs, key=lambda r: not (r.config.get("target") or {}).get("crop", True))
    for run in runs:
        paths = _tiles_of(run, report)
        if paths:
            return run, paths
    return None, []
