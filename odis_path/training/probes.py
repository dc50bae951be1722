"""Scores of the teacher while a run trains: k-NN on held-out patients, and what its embeddings know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from odis_path.embedding.encoder import FrozenEncoder
from odis_path.training.knn_monitor import KnnProbe
from odis_path.training.log.rows import Row
from odis_path.training.log.run_log import RunLog
from odis_path.training.setup import Run
from odis_path.training.shortcut.variance_monitor import PIECES, TILES, VarianceProbe

_LEAST_TILES = 16  # of the variance probe, however few tiles the k-NN has


class Probe(Protocol):
    """A score of an encoder, as figures of the log."""

    def score(self, encoder: FrozenEncoder) -> Row: ...


def open_probes(run: Run, log: RunLog) -> list[Probe]:
    """Read the tiles of the scores while training; a score that has nothing to compare is left out, k-NN with a warning.

    The variance probe embeds a quarter of what the k-NN does, where there is one.
    """
    config = run.config
    knn = KnnProbe(run.train, run.held_out, k=config.eval.k, max_tiles=config.eval.max_tiles, seed=config.run.seed)
    if not knn.ready:
        log.warn("k-NN while training: off (it needs tissue labels of two classes, and held-out patients that have them)")
    most = max(_LEAST_TILES, knn.tiles // (4 * PIECES)) if knn.ready else TILES
    variance = VarianceProbe(config, run.train, run.held_out, run.student.encoder.patch_px, most)
    return ([knn] if knn.ready else []) + ([variance] if variance.ready else [])


def score_teacher(run: Run, probes: Sequence[Probe]) -> Row:
    """Score the teacher by all probes."""
    data = run.config.data
    encoder = FrozenEncoder(run.teacher.encoder, run.config.name, data.mean, data.std, run.ranks.device)
    row: Row = {}
    with torch.compiler.set_stance("force_eager"):  # their batches have sizes of their own
        for probe in probes:
            row |= probe.score(encoder)
    return row
