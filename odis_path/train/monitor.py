"""What a run tells while it trains: k-NN on held-out patients, the log, the progress line."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from odis_path.data.dataset import TileIndex
from odis_path.encode import FrozenEncoder, batches, encode
from tiling.slidefile import SlideFile, tile_labels

_BATCH = 64
COLLAPSE_SPREAD = 0.2


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
    """Pixels of all tiles of an index: uint8 (n, S, S, 3)."""
    tiles = np.empty((len(index), index.tile_px, index.tile_px, 3), dtype=np.uint8)
    for slide in np.unique(index.slide):
        with SlideFile(index.paths[slide]) as file:
            for i in np.flatnonzero(index.slide == slide):
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

        gallery = np.concatenate([encode(encoder, self.gallery[s]) for s in batches(len(self.gallery), _BATCH)])
        queries = np.concatenate([encode(encoder, self.queries[s]) for s in batches(len(self.queries), _BATCH)])
        classes = len(self.names)
        scores = knn_scores(gallery, self.gallery_labels, queries, classes, min(self.k, len(gallery)))
        unit = queries / np.maximum(np.linalg.norm(queries, axis=1, keepdims=True), 1e-12)
        return {
            "knn_balanced_accuracy": float(balanced_accuracy(self.query_labels, scores.argmax(1), classes)),
            "knn_queries": len(queries),
            "embedding_spread": float(unit.std(0).mean() * np.sqrt(unit.shape[1])),
        }


class RunLog:
    """`train.jsonl` (one JSON object a line) and the progress bar of rank 0; other ranks stay silent."""

    def __init__(self, folder: Path, total_steps: int, *, active: bool, first_step: int, title: str) -> None:
        self.active = active
        self.total, self.title = total_steps, title
        self.last: dict[str, Any] = {}
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "train.jsonl"
        _forget_after(path, first_step)
        self._file = path.open("a", encoding="utf-8")
        self._bar: Any = None
        self._printed = time.monotonic()
        if sys.stderr.isatty():
            self._start_bar(first_step)

    def _start_bar(self, first_step: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"), console=Console(stderr=True),
        )  # fmt: skip
        self._task = self._bar.add_task(self.title, total=self.total, completed=first_step, figures="")
        self._bar.start()

    def write(self, row: dict[str, Any]) -> None:
        """Append a row and show its figures."""
        if not self.active:
            return
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self.last.update(row)
        figures = self._figures()
        if self._bar is not None:
            self._bar.update(self._task, completed=row["step"], figures=figures)
        elif time.monotonic() - self._printed > 30 or row["step"] >= self.total:
            self._printed = time.monotonic()
            print(f"{self.title}: step {row['step']}/{self.total} {figures}", file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """One line to the user, above the bar."""
        if self.active:
            (self._bar.console.print if self._bar is not None else lambda t: print(t, file=sys.stderr))(text)

    def _figures(self) -> str:
        last = self.last
        parts = [f"loss {last['loss']:.3f}"] if "loss" in last else []
        if "knn_balanced_accuracy" in last:
            parts.append(f"k-NN {last['knn_balanced_accuracy']:.3f}")
        if "images_per_s" in last:
            parts.append(f"{last['images_per_s']:.0f} tiles/s")
        return "  ".join(parts)

    def close(self) -> None:
        if not self.active:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if self._bar is not None:
            self._bar.stop()


def _forget_after(path: Path, step: int) -> None:
    """Drop the rows of steps after `step` (a run that died past its last checkpoint does them again), torn last line too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            continue
    from tiling.atomic import atomic_path

    with atomic_path(path) as temporary:
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
