"""Ranks of a distributed run: start and stop them, sum and average exactly over any number of them."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from annotations.errors import UserError, one_line

Result = TypeVar("Result")


def world_size() -> int:
    """Return the number of ranks, 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce_sum(value: Tensor) -> Tensor:
    """Sum a tensor over all ranks (in place); no gradient passes."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value


@dataclass(frozen=True)
class Ranks:
    """This process among all: rank 0 writes, every rank trains."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


def start_ranks(device: str = "auto") -> Ranks:
    """Join the process group that torchrun describes in the environment, or be the only rank."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "auto":
        device = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    elif device == "cuda":
        device = f"cuda:{local}"
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        line = one_line(error)[:200]
        raise UserError(f"run.device is {device!r}: {line}; take auto, cpu or cuda") from None
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world > 1 and not dist.is_initialized():
        # Its functions' default arguments keep the group of the moment they are imported, and DDP imports them: such a
        # group outlives destroy_process_group, and its threads may abort the process while Python ends.
        importlib.import_module("torch.distributed.nn")
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    return Ranks(int(os.environ.get("RANK", "0")), world, chosen)


def stop_ranks() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def any_rank(flag: bool, ranks: Ranks) -> bool:
    """Return True on every rank when the flag is true on one."""
    if ranks.world == 1:
        return flag
    value = torch.tensor([float(flag)], device=ranks.device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def on_first_rank(ranks: Ranks, work: Callable[[], Result], failed: str) -> Result | None:
    """Do on rank 0 what only it does; returns the result there, None on the others.

    Every rank calls, and all end where a UserError is raised: one that went on would wait for the first for ever. failed: what
    the others say.
    """
    result, problem = None, None
    if ranks.first:
        try:
            result = work()
        except UserError as error:
            problem = error
    if any_rank(problem is not None, ranks):
        raise problem or UserError(f"{failed}, see what rank 0 says")
    return result


def mean_of_ranks(values: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Average a small tensor of figures over ranks."""
    if ranks.world > 1:
        dist.all_reduce(values)
    return values / ranks.world
