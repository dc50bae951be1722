"""Class-agnostic boxes for slides without annotations: nuclei and what they form, tile by tile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from annotations.errors import UserError
from annotations.objects import Kind
from tiling.jobs.outcome import ItemResult
from tiling.jobs.run import run_cohort
from tiling.jobs.summary import Outcomes
from tiling.proposals.from_annotations import propose_from_annotations
from tiling.proposals.nuclei import LABELS, Proposals, propose_tile
from tiling.proposals.stain import ProposalSettings, slide_levels
from tiling.slide_file.read import SlideFile, list_slide_files
from tiling.slide_file.write import parameters_hash, replace_groups
from tiling.storage.checksums import DAMAGED
from tiling.storage.locks import lock_file, lock_settings

METHOD_VERSION = 2  # raise it when the method changes, so that old proposals are made anew
LEVEL_TILES = 48  # tiles looked at to learn a slide's levels
COUNTED = ("nuclei", "clusters", "glands", "vessels", "nests")  # in the order of LABELS
COUNTED_FROM_CELLS = ("clusters", "parts")  # with from_cells
HASH_ATTR = "proposal_sha256"


def propose(
    folder: Path | str,
    workers: int | None = None,
    scheduler: str | None = None,
    replace: bool = False,
    timeout: float | None = None,
    from_cells: bool = False,
) -> Outcomes:
    """Add proposals to every slide file of a folder.

    A file with proposals of the same method is skipped. One with boxes from annotations fails with a line that says so,
    unless `replace` is set. timeout: seconds after which a slide is given up. from_cells: no image analysis: clusters of
    the annotated cells and connected parts of the annotated tissue are put beside the annotations (`from_annotations`). Raises
    UserError where the folder is missing or holds no slide file, where both `replace` and `from_cells` are set, and where
    another run proposes in the folder with other settings.
    """
    begun = perf_counter()
    if replace and from_cells:
        raise UserError("--replace overwrites the annotations that --from-cells needs: give one of them")
    files = [path.absolute() for path in list_slide_files(folder)]
    work = propose_from_annotations if from_cells else partial(propose_slide, replace=replace)
    folder = Path(folder)
    with lock_settings(folder, "propose", {"method": METHOD_VERSION, "replace": replace, "from_cells": from_cells}):
        outcomes = run_cohort(
            files,
            work,
            title="propose",
            workers=workers,
            scheduler=scheduler,
            name=_name,
            timeout=timeout,
            folder=folder,
            wrote=Path,
        )
    return Outcomes(outcomes, "propose", folder, COUNTED_FROM_CELLS if from_cells else COUNTED, perf_counter() - begun)


def propose_slide(path: Path, replace: bool = False, settings: ProposalSettings | None = None) -> ItemResult:
    """Propose boxes for one slide file; info: the counts in COUNTED."""
    with lock_file(path):
        return _proposed(path, replace, settings or ProposalSettings())


def _proposed(path: Path, replace: bool, settings: ProposalSettings) -> ItemResult:
    with SlideFile(path) as file:
        parameters = {"method_version": METHOD_VERSION, **asdict(settings)}
        digest = parameters_hash({**parameters, "tiles": file.attrs["parameters_sha256"]})[1]
        damaged, was_proposed = file.boxes_damaged, file.has_attr("objects", HASH_ATTR)
        if damaged and not (was_proposed or replace):
            raise UserError(f"{path}: its objects and boxes are damaged: run annotate again, or give --replace")
        if file.has_boxes and not damaged:
            objects = file.objects_table()
            if file.group_attrs("objects").get(HASH_ATTR) == digest:
                return ItemResult(_counts(objects["label"]), skipped=True)
            if not replace and (objects["kind"] != Kind.PROPOSAL).any():
                raise UserError(f"{path}: holds boxes from annotations: left as they are; --replace overwrites them")
        sample = np.unique(np.linspace(0, len(file) - 1, LEVEL_TILES).astype(int)) if len(file) else np.zeros(0, int)
        levels = slide_levels([file.tile(int(i)) for i in sample], file.mpp, settings)
        proposals = [propose_tile(file.tile(i), file.mpp, settings, levels) for i in range(len(file))]
        groups = proposal_groups(proposals, file.mpp)
    groups["objects"]["attrs"][HASH_ATTR] = digest  # on the group, so that it goes when annotate replaces the group
    replace_groups(path, groups)
    redone = "" if not was_proposed else DAMAGED if damaged else "the tiles or the method changed"
    return ItemResult(_counts(groups["objects"]["label"]), redone=redone)


def _counts(label: np.ndarray) -> dict[str, int]:
    counts = np.bincount(label, minlength=len(LABELS)).tolist()
    return dict(zip(COUNTED, counts, strict=True))


def proposal_groups(tiles: list[Proposals], mpp: float) -> dict[str, dict[str, Any]]:
    """Arrange groups /objects and /boxes of a slide file from the proposals of its tiles, in order; one object per box."""
    counts = np.array([len(proposals.label) for proposals in tiles], np.int64)
    total = int(counts.sum())

    def joined(name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        arrays = [np.zeros(shape, dtype), *(getattr(proposals, name) for proposals in tiles)]
        return np.concatenate(arrays).astype(dtype)

    objects: Mapping[str, Any] = {
        "id": np.array([f"proposal-{i}" for i in range(total)], dtype=object),
        "label": joined("label", (0,), np.int16),
        "kind": np.full(total, Kind.PROPOSAL, np.uint8),
        "area_um2": joined("area_px", (0,), np.float32) * np.float32(mpp**2),
        "attrs": {"labels": list(LABELS)},
    }
    boxes: Mapping[str, Any] = {
        "xyxy": joined("xyxy", (0, 4), np.float32),
        "offsets": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        "object": np.arange(total, dtype=np.int32),
        "visible": np.ones(total, np.float32),
    }
    return {"objects": dict(objects), "boxes": dict(boxes)}


def _name(path: Path) -> str:
    return path.stem
