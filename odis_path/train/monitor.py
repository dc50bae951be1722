"""What is watched while a run trains: k-NN on held-out patients, and signs of collapse."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from math import log, sqrt

import numpy as np
from torch import Tensor

from annotations.errors import UserError
from odis_path.data.dataset import TileIndex
from odis_path.encode import FrozenEncoder, batches
from odis_path.train.config import PretrainConfig
from tiling.slidefile import SlideFile, tile_labels

_BATCH = 64
COLLAPSE_SPREAD = 0.2  # of token_spread and embedding_spread: 1 spread over the sphere, 0 all equal
ENTROPY_SHARES = (0.01, 0.99)  # of log K: below, the targets are single prototypes; above, they say nothing
_CLEAR = 1.25  # a sign is over when its figure is this factor past the threshold: no flutter
IDENTITY_SHARE = 0.05  # of pairs of global views that are one and the same crop
_STRETCH = 0.1  # share of the run that a sign has to last before it is told ...
_LONGEST_STRETCH = 2000  # ... but not more steps than this


def labelled_tiles(index: TileIndex, names: dict[str, int], limit: int, seed: int) -> tuple[TileIndex, np.ndarray]:
    """At most `limit` tiles that carry a tissue label, and the labels int64 (n,); `names` grows by the classes met."""
    labels = np.full(len(index), -1, dtype=np.int64)
    for slide in np.unique(index.slide):
        with SlideFile(index.paths[slide]) as file:
            found, classes = tile_labels(file)
        numbers = np.array([names.setdefault(name, len(names)) for name in classes] + [-1], dtype=np.int64)
        here = index.slide == slide
        labels[here] = numbers[found[index.row[here]]]
    keep = np.flatnonzero(labels >= 0)
    if len(keep) > limit:
        keep = np.sort(np.random.default_rng(seed).choice(keep, limit, replace=False))
    return index.rows(keep), labels[keep]


def read_tiles(index: TileIndex) -> np.ndarray:
    """Pixels of all tiles of an index: uint8 (n, S, S, 3); black where a slide is torn, which training tells."""
    tiles = np.zeros((len(index), index.tile_px, index.tile_px, 3), dtype=np.uint8)
    for slide in np.unique(index.slide):
        with SlideFile(index.paths[slide]) as file:
            for i in np.flatnonzero(index.slide == slide):
                with suppress(UserError):
                    tiles[i] = file.tile(int(index.row[i]))
    return tiles


class KnnProbe:
    """k-NN from tiles of the training patients to tiles of the held-out ones, by tissue label, cosine, exp(cos / 0.07).

    `ready` is False where there is nothing to compare: no held-out patient, or fewer than two classes.
    """

    def __init__(self, gallery: TileIndex, queries: TileIndex, *, k: int, max_tiles: int, seed: int) -> None:
        self.k = k
        names: dict[str, int] = {}
        self.ready = False
        if not len(queries):
            return
        gallery, self.gallery_labels = labelled_tiles(gallery, names, max_tiles, seed)
        queries, self.query_labels = labelled_tiles(queries, names, max_tiles // 2, seed)
        self.names = list(names)
        self.ready = len(set(self.gallery_labels)) > 1 and len(queries) > 0
        if self.ready:
            self.gallery, self.queries = read_tiles(gallery), read_tiles(queries)

    def score(self, encoder: FrozenEncoder) -> dict[str, float]:
        """Balanced accuracy on the queries, and the spread of their embeddings (0: collapsed)."""
        from odis_path.evaluate.knn import balanced_accuracy, knn_scores

        gallery = np.concatenate([encoder.encode(self.gallery[s]) for s in batches(len(self.gallery), _BATCH)])
        queries = np.concatenate([encoder.encode(self.queries[s]) for s in batches(len(self.queries), _BATCH)])
        classes = len(self.names)
        scores = knn_scores(gallery, self.gallery_labels, queries, classes, min(self.k, len(gallery)))
        unit = queries / np.maximum(np.linalg.norm(queries, axis=1, keepdims=True), 1e-12)
        return {
            "knn_balanced_accuracy": float(balanced_accuracy(self.query_labels, scores.argmax(1), classes)),
            "knn_queries": len(queries),
            "embedding_spread": float(unit.std(0).mean() * np.sqrt(unit.shape[1])),
        }


class CollapseWatch:
    """Tells when a run collapses: once an episode, after the warm-up, when a sign has lasted for a stretch.

    Signs: `token_spread` or `embedding_spread` below COLLAPSE_SPREAD, `teacher_entropy` near 0 or near log K. Runs often dip
    early and recover, so a single low figure is no collapse.
    """

    def __init__(self, total_steps: int, *, warmup_steps: int = 0, prototypes: int = 0) -> None:
        self.stretch = min(_STRETCH * total_steps, _LONGEST_STRETCH)
        self.warmup_steps = warmup_steps
        self.log_k = log(prototypes) if prototypes > 1 else 0.0
        self.since: dict[str, int] = {}  # sign -> step at which it was first seen, of signs that last
        self.told = False

    def see(self, row: Mapping[str, float]) -> str | None:
        """Look at a row of the log (it holds `step`); the line to show, or None."""
        step = int(row["step"])
        if step <= self.warmup_steps:
            return None
        for sign, bad, over in self._signs(row):
            if over:
                self.since.pop(sign, None)
            elif bad or sign in self.since:
                first = self.since.setdefault(sign, step)
                if bad and not self.told and 0 < self.stretch <= step - first:
                    self.told = True
                    return f"step {step}: {self._words(sign, row, first)}"
        if self.told and not self.since:
            self.told = False
            return f"step {step}: recovered: {self._state(row)}"
        return None

    def _signs(self, row: Mapping[str, float]) -> list[tuple[str, bool, bool]]:
        """(sign, it shows, it is clearly over) of the figures that are in the row."""
        found = [
            (key, row[key] < COLLAPSE_SPREAD, row[key] > COLLAPSE_SPREAD * _CLEAR)
            for key in ("token_spread", "embedding_spread")
            if key in row
        ]
        if "teacher_entropy" in row and self.log_k:
            low, high = ENTROPY_SHARES
            share = row["teacher_entropy"] / self.log_k
            found.append(("entropy_low", share < low, share > low * _CLEAR))
            found.append(("entropy_high", share > high, 1 - share > (1 - high) * _CLEAR))
        return found

    def _words(self, sign: str, row: Mapping[str, float], first: int) -> str:
        if sign in ("token_spread", "embedding_spread"):
            what, now = "the embeddings of different tiles are nearly equal", f"{sign.replace('_', ' ')} {row[sign]:.2f} of 1"
            cure = "a lower optim.lr, or loss.koleo_weight=0.1"
        else:
            now = f"teacher entropy {row['teacher_entropy']:.2f}, log K {self.log_k:.2f}"
            low = sign == "entropy_low"
            what = "the teacher sees one prototype in a tile" if low else "the teacher tells no tiles apart"
            cure = f"a {'higher' if low else 'lower'} loss.teacher_temperature, or a lower optim.lr"
        return f"collapse? {what} since step {first} ({now}): if it stays so, begin a new run.out with {cure}"

    def _state(self, row: Mapping[str, float]) -> str:
        shown = ("token_spread", "embedding_spread", "teacher_entropy")
        return ", ".join(f"{key.replace('_', ' ')} {row[key]:.2f}" for key in shown if key in row)


def identity_pairs(rects: Tensor) -> int:
    """Samples whose two global views are the same rectangle of their tile, however turned and coloured: int (B, views, 6)."""
    return int((rects[:, 0, :4] == rects[:, 1, :4]).all(1).sum())


class IdentityWatch:
    """Tells, once a run, when `identity_pairs` is above IDENTITY_SHARE over all steps so far, by more than chance explains."""

    def __init__(self, config: PretrainConfig) -> None:
        self.batch, self.share, self.scale = config.optim.batch_size, config.target.whole_share, config.views.global_scale
        self.step = self.pairs = 0
        self.identical = 0.0
        self.told = False

    def see(self, row: Mapping[str, float]) -> str | None:
        """Look at a row of the log (it holds `step`); the line to show, or None."""
        if "identity_pairs" not in row:
            return None
        pairs = (int(row["step"]) - self.step) * self.batch
        self.step = int(row["step"])
        self.pairs, self.identical = self.pairs + pairs, self.identical + row["identity_pairs"] * pairs
        if self.told or self.identical - 2 * sqrt(self.identical) <= IDENTITY_SHARE * self.pairs:
            return None
        self.told = True
        return (
            f"step {self.step}: in {self.identical / self.pairs:.0%} of the samples so far both global views are the same crop "
            f"of their tile: lower target.whole_share (now {self.share:g}), above which a box counts as the whole tile, or the "
            f"start of views.global_scale (now {self.scale[0]:g} to {self.scale[1]:g})"
        )
