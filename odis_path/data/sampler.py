"""Order tiles by rank and step, and stack samples into batches.

The order is a pure function of (seed, step): a run that stops and goes on sees the same tiles.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from annotations.errors import UserError
from odis_path.data.augment import SIGMA


class StepSampler(torch.utils.data.Sampler[list[tuple[int, int]]]):
    """Batches of this rank, from a step on: a pure function of (seed, step).

    Each epoch is one seeded permutation of all tiles, cut into global batches (the rest is dropped); rank r takes every
    world-th tile of each micro-batch from r on.
    """

    def __init__(
        self,
        tiles: int,
        batch: int,
        *,
        seed: int,
        first_step: int,
        last_step: int,
        rank: int,
        world: int,
        accumulate: int = 1,
    ) -> None:
        self.tiles, self.batch, self.seed = tiles, batch, seed
        self.first, self.last, self.rank, self.world, self.accumulate = first_step, last_step, rank, world, accumulate
        self.steps_per_epoch = tiles // batch

    def __len__(self) -> int:
        return (self.last - self.first) * self.accumulate

    def __iter__(self) -> Any:
        epoch_of, order = -1, np.zeros(0, np.int64)
        for step in range(self.first, self.last):
            epoch, at = divmod(step, self.steps_per_epoch)
            if epoch != epoch_of:
                order, epoch_of = np.random.default_rng([self.seed, epoch, 13]).permutation(self.tiles), epoch
            rows = order[at * self.batch : (at + 1) * self.batch]
            for micro in np.split(rows, self.accumulate):
                yield [(epoch, int(i)) for i in micro[self.rank :: self.world]]


def next_batch(batches: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The next batch of a loader; what a worker says of a user's mistake without the worker's traceback around it."""
    try:
        return next(batches)
    except UserError as error:
        raise UserError(re.sub(r"^[\w.]+Error: ", "", str(error).strip().splitlines()[-1])) from None


def collate(items: list[dict[str, np.ndarray]]) -> dict[str, Tensor]:
    """Stack samples, views first: theta_global (2, B, 2, 3), mask_global (2, B, K, N), hidden (2, B, N), seen (V, B, K)."""
    batch: dict[str, Tensor] = {}
    for key in items[0]:
        stacked = torch.from_numpy(np.stack([item[key] for item in items]))
        by_view = key in ("theta_global", "theta_local", "mask_global", "mask_local", "hidden", "seen", "colours")
        batch[key] = stacked.transpose(0, 1).contiguous() if by_view else stacked
    # Found on the CPU, so that the device need not be waited for.
    batch["hidden_rows"] = batch["hidden"].reshape(-1).nonzero()[:, 0]
    sigma = batch["colours"][:, :, SIGMA]
    batch["blurred_global"] = sigma[:2].reshape(-1).nonzero()[:, 0]
    batch["blurred_local"] = sigma[2:].reshape(-1).nonzero()[:, 0]
    return batch
