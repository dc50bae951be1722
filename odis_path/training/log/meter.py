"""Figures of the steps between two rows of the log."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from odis_path.data.sampler import Batch
from odis_path.distributed import Ranks, mean_of_ranks
from odis_path.training.knn_monitor import identity_pairs
from odis_path.training.log.rows import Row
from odis_path.training.optim import StepValues


class StepMeter:
    """Time, waiting for data and identical pairs of views since the last row of the log, on this rank.

    unreadable: tiles of the index that could not be read in any step so far.
    """

    def __init__(self, batch_size: int, ranks: Ranks) -> None:
        self.batch_size, self.ranks = batch_size, ranks
        self.unreadable: set[int] = set()
        self.restart()

    def restart(self) -> None:
        """Begin with the steps of the next row."""
        self._begin, self._waited_s, self._steps = time.perf_counter(), 0.0, 0
        self._pairs = self._identical = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        begin = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - begin

    def count(self, micro_batches: Sequence[Batch]) -> None:
        """Count a step."""
        self._steps += 1
        for batch in micro_batches:
            self._pairs += batch.views.rects.shape[1]
            self._identical += identity_pairs(batch.views.rects)
            self.unreadable.update(batch.unreadable)

    def figures(self, losses: Mapping[str, Tensor], values: StepValues) -> Row:
        """Figures for the log: losses of the last step and identical pairs as means over ranks, schedules, speed. Waits."""
        images = self._steps * self.batch_size
        share = torch.tensor(self._identical / self._pairs, device=self.ranks.device)
        named = {**losses, "identity_pairs": share}
        keys = sorted(named)
        means = mean_of_ranks(torch.stack([named[key].float() for key in keys]), self.ranks).tolist()
        elapsed = time.perf_counter() - self._begin
        return {
            **dict(zip(keys, means, strict=True)),
            "lr": values.lr,
            "wd": values.weight_decay,
            "ema": values.ema,
            "teacher_temperature": values.teacher_temperature,
            "images_per_s": images / elapsed,
            "data_wait_share": self._waited_s / elapsed,
        }
