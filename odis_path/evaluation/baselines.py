"""Baselines on the same rows, folds and draws as the model: simple measures, and embeddings of other encoders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from annotations.errors import UserError
from odis_path.evaluation.pixel_baselines import box_size, pixel_baselines
from odis_path.evaluation.probes.standardise import Metric
from odis_path.evaluation.seen_patients import PretrainingOverlap, pretraining_overlap
from odis_path.evaluation.task import EvaluationTask
from odis_path.features.read import FeatureSet, read_features

RESERVED = ("model", "majority", "rgb_mean", "texture", "box_size")


@dataclass(frozen=True)
class Baseline:
    """Features of the rows of a task, float32 (n, d).

    metric: of the probes that measure distances. overlap: the tested patients that their encoder was pretrained on, None where
    there is no encoder.
    """

    name: str
    x: np.ndarray
    metric: Metric
    overlap: PretrainingOverlap | None = None


def baselines(
    task: EvaluationTask, folders: Mapping[str, Path], warnings: list[str], tell: Callable[[str], None]
) -> Iterator[Baseline]:
    """Yield every baseline that has features; `warnings` tells of those that have none."""
    features = task.features
    tell("baselines: mean colour and texture")
    measured = pixel_baselines(features)
    warnings += measured.warnings
    hand_made = dict(measured.features)
    if features.level == "object":
        hand_made["box_size"] = box_size(features.xyxy)
    for name, x in hand_made.items():
        yield Baseline(name, x, "euclidean")
    for name, folder in folders.items():
        tell(f"baseline: {name}")
        embeddings = aligned_features(features, folder)
        overlap = pretraining_overlap(task.cv, features, embeddings.pretraining_in(folder))
        yield Baseline(name, embeddings.x, "cosine", overlap)
    if not any("random" in name.lower() or "untrained" in name.lower() for name in folders):
        warnings.append(
            "no untrained encoder stands beside the model: embed with --random-weights and add --baseline random=FOLDER"
        )


def check_names(folders: Mapping[str, Path]) -> None:
    """Raise UserError for a baseline's name that is taken."""
    for name in folders:
        if not name or name in RESERVED:
            raise UserError(f"--baseline {name}={folders[name]}: this name is taken or empty: choose another")


def aligned_features(features: FeatureSet, folder: Path) -> FeatureSet:
    """Read the embeddings of the same tiles, boxes or slides from another folder, in the order of `features`.

    Raises UserError where one is missing there, lies elsewhere in its slide, or is seen at another mpp.
    """
    keys = _keys(features)

    def rows_in(index: FeatureSet) -> np.ndarray:
        row_of = {key: row for row, key in enumerate(_keys(index))}
        try:
            return np.array([row_of[key] for key in keys], dtype=np.int64)
        except KeyError as error:
            slide, tile, item, _ = error.args[0]
            what = {"slide": "", "tile": f", tile {tile}", "object": f", tile {tile}, object {item}"}[features.level]
            raise UserError(f"{folder}: no embedding of slide {slide}{what}: embed it with the same tiles and boxes") from None

    aligned = read_features(folder, features.level, lambda index: np.sort(rows_in(index)))
    aligned = aligned.take(rows_in(aligned))
    if not np.array_equal(aligned.coords, features.coords):
        raise UserError(f"{folder}: its tiles lie elsewhere in their slides: embed the same tiles with this encoder")
    if not np.isclose(aligned.mpp, features.mpp, rtol=1e-4, equal_nan=True):
        raise UserError(
            f"{folder}: mpp is {aligned.mpp:g}, the model's {features.mpp:g}: embed the same tiles with this encoder"
        )
    return aligned


def _keys(features: FeatureSet) -> list[tuple[str, int, int, int]]:
    """Slide, tile, object, and the running number of that object's box in the tile."""
    boxes: Counter[tuple[str, int, int]] = Counter()
    keys = []
    for key in zip(features.slide_id.tolist(), features.tile.tolist(), features.object.tolist(), strict=True):
        keys.append((*key, boxes[key]))
        boxes[key] += 1
    return keys
