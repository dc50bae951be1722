"""Order tiles by rank and step, and stack samples into batches.

The order is a pure function of (seed, step): a run that stops and goes on sees the same tiles.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from annotations.errors import UserError
from odis_path.data.augment import SIGMA
from odis_path.data.dataset import SampledViews, TileSample


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

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch_of, order = -1, np.zeros(0, np.int64)
        for step in range(self.first, self.last):
            epoch, at = divmod(step, self.steps_per_epoch)
            if epoch != epoch_of:
                order, epoch_of = np.random.default_rng([self.seed, epoch, 13]).permutation(self.tiles), epoch
            rows = order[at * self.batch : (at + 1) * self.batch]
            for micro in np.split(rows, self.accumulate):
                yield [(epoch, int(i)) for i in micro[self.rank :: self.world]]


class Batch(NamedTuple):
    """Samples stacked: pixels uint8 (B, S, S, 3), fields of the views (V, B, ...), and the tiles that could not be read.

    masked_rows: int64, rows of the flattened masked_patches. blurred_*: int64, rows of the flattened views with a blur.
    """

    pixels: Tensor
    views: SampledViews[Tensor]
    unreadable: list[int]
    masked_rows: Tensor
    blurred_global: Tensor
    blurred_local: Tensor


def collate(items: Sequence[TileSample | list[TileSample]]) -> Batch:
    """Stack samples, windows of a tile after each other.

    Rows whose number depends on values are looked up here, so that the device need not be waited for.
    """
    samples = [sample for item in items for sample in (item if isinstance(item, list) else [item])]
    fields = zip(*(sample.views for sample in samples), strict=True)
    views = SampledViews(*(torch.from_numpy(np.stack(arrays, axis=1)) for arrays in fields))
    sigma = views.colours[:, :, SIGMA]
    return Batch(
        pixels=torch.from_numpy(np.stack([sample.pixels for sample in samples])),
        views=views,
        unreadable=[sample.unreadable for sample in samples if sample.unreadable is not None],
        masked_rows=views.masked_patches.reshape(-1).nonzero()[:, 0],
        blurred_global=sigma[:2].reshape(-1).nonzero()[:, 0],
        blurred_local=sigma[2:].reshape(-1).nonzero()[:, 0],
    )


def next_batch(batches: Iterator[Batch]) -> Batch:
    """Take the next batch of a loader; raise a user's mistake in a worker without the worker's traceback around it."""
    try:
        return next(batches)
    except UserError as error:
        raise UserError(re.sub(r"^[\w.]+Error: ", "", str(error).strip().splitlines()[-1])) from None
