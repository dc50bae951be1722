"""Watch a run as it trains: k-NN on held-out patients, and the share of identical pairs of views."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from math import sqrt

import numpy as np
from torch import Tensor

from annotations.errors import UserError
from odis_path.config import PretrainConfig
from odis_path.data.tile_index import TileIndex
from odis_path.embedding.encoder import FrozenEncoder, batches
from tiling.slide_file.read import SlideFile
from tiling.slide_file.tile_labels import tile_labels

_BATCH = 64
IDENTITY_SHARE = 0.05  # of pairs of global views that are one and the same crop


def labelled_tiles(index: TileIndex, names: dict[str, int], limit: int, seed: int) -> tuple[TileIndex, np.ndarray]:
    """Choose at most `limit` tiles with a tissue label, and the labels int64 (n,); `names` grows by the classes met."""
    labels = np.full(len(index), -1, dtype=np.int64)
    for slide in np.unique(index.slide):
        with SlideFile(index.paths[slide]) as file:
            tile_label, classes = tile_labels(file)
        numbers = np.array([names.setdefault(name, len(names)) for name in classes] + [-1], dtype=np.int64)
        here = index.slide == slide
        labels[here] = numbers[tile_label[index.row[here]]]
    keep = np.flatnonzero(labels >= 0)
    if len(keep) > limit:
        keep = np.sort(np.random.default_rng(seed).choice(keep, limit, replace=False))
    return index.rows(keep), labels[keep]


def read_tiles(index: TileIndex) -> np.ndarray:
    """Read the pixels of all tiles of an index: uint8 (n, S, S, 3); black where a slide is torn there."""
    tiles = np.zeros((len(index), index.tile_px, index.tile_px, 3), dtype=np.uint8)
    for slide in np.unique(index.slide):
        with SlideFile(index.paths[slide]) as file:
            for i in np.flatnonzero(index.slide == slide):
                with suppress(UserError):
                    tiles[i] = file.tile(int(index.row[i]))
    return tiles


class KnnProbe:
    """k-NN from tiles of the training patients to tiles of the held-out ones, by tissue label, cosine, exp(cos / 0.07).

    Of embeddings as they are, and with each column at mean 0 and spread 1 over the training tiles, as `evaluate` may do.
    `ready` is False where there is nothing to compare: no held-out patient, or fewer than two classes. tiles: how many are
    embedded.
    """

    def __init__(self, gallery: TileIndex, queries: TileIndex, *, k: int, max_tiles: int, seed: int) -> None:
        self.k = k
        names: dict[str, int] = {}
        self.ready, self.tiles = False, 0
        if not len(queries):
            return
        gallery, self.gallery_labels = labelled_tiles(gallery, names, max_tiles, seed)
        queries, self.query_labels = labelled_tiles(queries, names, max_tiles // 2, seed)
        self.names = list(names)
        self.ready = len(set(self.gallery_labels)) > 1 and len(queries) > 0
        if self.ready:
            self.gallery, self.queries = read_tiles(gallery), read_tiles(queries)
            self.tiles = len(gallery) + len(queries)

    def score(self, encoder: FrozenEncoder) -> dict[str, float]:
        """Compute the balanced accuracy on the queries, raw and z-scored, and the spread of their embeddings (0: collapsed)."""
        from odis_path.evaluation.probes.knn import unit_rows
        from odis_path.evaluation.probes.standardise import Features

        gallery = np.concatenate([encoder.encode(self.gallery[s]) for s in batches(len(self.gallery), _BATCH)])
        queries = np.concatenate([encoder.encode(self.queries[s]) for s in batches(len(self.queries), _BATCH)])
        unit = unit_rows(queries)
        both = Features.of(np.concatenate([gallery, queries])).standardised("zscore", np.arange(len(gallery)))
        return {
            "knn_balanced_accuracy": self.accuracy(gallery, queries),
            "knn_balanced_accuracy_zscored": self.accuracy(both[: len(gallery)], both[len(gallery) :]),
            "knn_queries": len(queries),
            "embedding_spread": float(unit.std(0).mean() * np.sqrt(unit.shape[1])),
        }

    def accuracy(self, gallery: np.ndarray, queries: np.ndarray) -> float:
        """Compute the balanced accuracy on query embeddings (m, D) from gallery embeddings (n, D)."""
        from odis_path.evaluation.metrics import balanced_accuracy
        from odis_path.evaluation.probes.knn import knn_scores

        classes = len(self.names)
        scores = knn_scores(gallery, self.gallery_labels, queries, classes, min(self.k, len(gallery)))
        return float(balanced_accuracy(self.query_labels, scores.argmax(1), classes))


def identity_pairs(rects: Tensor) -> int:
    """Count samples whose two global views are the same rectangle of their tile, however turned and coloured.

    rects: int (V, B, 6), as in `odis_path.data.dataset.SampledViews`.
    """
    return int((rects[0, :, :4] == rects[1, :, :4]).all(1).sum())


class IdentityWatch:
    """Tells, once a run, when `identity_pairs` is above IDENTITY_SHARE over all steps so far, by more than chance explains."""

    def __init__(self, config: PretrainConfig) -> None:
        self.batch, self.share, self.scale = config.optim.batch_size, config.target.whole_share, config.views.global_scale
        self.step = self.pairs = 0
        self.identical = 0.0
        self.warned = False

    def see(self, row: Mapping[str, float]) -> str | None:
        """Look at a row of the log (it holds `step`); returns the line to show, or None."""
        if "identity_pairs" not in row:
            return None
        pairs = (int(row["step"]) - self.step) * self.batch
        self.step = int(row["step"])
        self.pairs, self.identical = self.pairs + pairs, self.identical + row["identity_pairs"] * pairs
        if self.warned or self.identical - 2 * sqrt(self.identical) <= IDENTITY_SHARE * self.pairs:
            return None
        self.warned = True
        return (
            f"step {self.step}: in {self.identical / self.pairs:.0%} of the samples so far both global views are the same crop "
            f"of their tile: lower target.whole_share (now {self.share:g}), above which a box counts as the whole tile, or the "
            f"start of views.global_scale (now {self.scale[0]:g} to {self.scale[1]:g})"
        )
