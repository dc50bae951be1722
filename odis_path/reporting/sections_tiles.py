"""Sections about single tiles: the pair of object-aware crops, and the attention of [OBJ]."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from annotations.errors import UserError
from annotations.objects import Kind
from odis_path.model.architectures import patch_px
from odis_path.reporting.figures.tiles import CropPair, Sample, draw_attention, draw_pairs, pick_tiles
from odis_path.reporting.inventory import RunFolder
from odis_path.reporting.page import FigureItem, Report, Section, TextItem

CROP_TILES, ATTENTION_TILES = 4, 5
MAX_RUNS = 3


def crops(report: Report) -> Section | None:
    """Section of training samples: tiles with their boxes and both crops of the pair."""
    run, paths = _run_with_tiles(report)
    if run is None:
        return None
    samples = pick_tiles(paths, CROP_TILES)
    try:
        pairs = _pairs(samples, run)
    except (UserError, OSError, ValueError, KeyError) as error:
        report.add_problem(f"crops of run {run.name}", error)
        return None
    if not pairs:
        return None
    target = run.section("target")
    drawn = "drawn so that they show the target" if target.get("crop", True) else "drawn at random"
    mask = " Washed-out patches are those its [OBJ] token may not look at." if target.get("mask", True) else ""
    whole = float(target.get("whole_tile_p") or 0)
    hidden = f" (In {whole:.0%} of all samples the target is the whole tile; those are not shown.)" if whole else ""
    caption = (
        f"Run “{run.name}”: each row is one tile with its annotated boxes; the yellow box is the target. "
        f"Both crops (dashed frames) are {drawn}. Teacher and student must describe it alike in both.{mask}{hidden}"
    )
    trained_on = run.section("data").get("kinds")
    kinds = [kind for kind in Kind if trained_on is None or kind.word in trained_on]
    figure = draw_pairs(samples, pairs, report.colors, kinds)
    item = report.figure("crop-pairs", figure, caption, "Tiles with boxes, and two crops of each", photo=True)
    return Section("crops", "What the model is shown", [item])


def attention(report: Report) -> Section | None:
    """Section of attention: [OBJ] of each trained network, kept to a box and over the whole tile."""
    section = Section("attention", "Where the model looks")
    checkpoints = [(run, run.checkpoint) for run in report.inventory.runs if run.checkpoint is not None]
    for run, checkpoint in checkpoints[:MAX_RUNS]:
        paths = _tiles_of(run, report)
        if not paths:
            continue
        try:
            section.items.append(_attention_of(report, run, checkpoint, paths))
        except (UserError, OSError, ValueError, KeyError, RuntimeError) as error:
            report.add_problem(f"attention of run {run.name}", error)
    if section.items and len(checkpoints) > MAX_RUNS:
        section.items.append(TextItem(f"The first {MAX_RUNS} of {len(checkpoints)} runs are shown."))
    if section.items:
        text = "[OBJ] is the token whose output is the embedding: what it attends to is what the embedding is made of."
        section.items.insert(0, TextItem(text))
    return section


def _attention_of(report: Report, run: RunFolder, checkpoint: Path, paths: list[Path]) -> FigureItem:
    from odis_path.reporting.previews import obj_attention

    samples = pick_tiles(paths, ATTENTION_TILES, seed=1)
    pairs = _pairs(samples, run)
    tiles = np.stack([pair.tile for pair in pairs])
    boxes = np.stack([pair.target for pair in pairs]).astype(np.float32)
    inside, whole = obj_attention(checkpoint, tiles, boxes), obj_attention(checkpoint, tiles, None)
    share, size = (
        float(np.mean([_share_in_box(heat, box, tiles.shape[1]) for heat, box in zip(heats, boxes, strict=True)]))
        for heats in (whole, np.ones_like(whole))
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
    """Return the share of attention on patches whose centre lies in the box. heat (g, g), box (4,) in px of the tile."""
    centres = (np.arange(len(heat)) + 0.5) * side / len(heat)
    x_in, y_in = (centres > box[0]) & (centres < box[2]), (centres > box[1]) & (centres < box[3])
    return float(heat[np.ix_(y_in, x_in)].sum() / max(heat.sum(), 1e-12))


def _pairs(samples: Sequence[Sample], run: RunFolder) -> list[CropPair]:
    from odis_path.config import parse_config
    from odis_path.reporting.previews import crop_pair

    config = parse_config(run.config, f"{run.name}/config.yaml")
    boxed = config.target.model_copy(update={"whole_tile_p": 0.0})  # a whole tile as target is nothing to look at
    config = config.model_copy(update={"target": boxed})
    side = patch_px(config.model.name, config.model.kwargs)
    return [crop_pair(sample.path, sample.row, config, side) for sample in samples]


def _tiles_of(run: RunFolder, report: Report) -> list[Path]:
    """List slide files with boxes that the run was trained on; else those of the report that have the same tile size."""
    rows = [row for row in report.cohort.rows if row.boxes and row.tiles]
    folder = Path(str(run.section("data").get("tiles", "")) or "-").resolve()
    rows = [row for row in rows if row.path.parent.resolve() == folder] or rows
    return [row.path for row in rows if row.tile_px == rows[0].tile_px]


def _run_with_tiles(report: Report) -> tuple[RunFolder | None, list[Path]]:
    """Choose the run to show crops of: the first that has object-aware crops, else the first."""
    for run in sorted(report.inventory.runs, key=lambda run: not run.section("target").get("crop", True)):
        paths = _tiles_of(run, report)
        if paths:
            return run, paths
    return None, []
