"""Run a function on two gloo ranks, each its own process; used by the rank tests."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from odis_path.distributed import start_ranks, stop_ranks


def _enter(rank: int, world: int, port: int, work: Callable[..., Any], out: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    start_ranks("cpu")
    try:
        torch.save(work(rank, world, *args), Path(out) / f"rank{rank}.pt")
    finally:
        stop_ranks()
    remaining = [name for name in thread_names() if "gloo" in name]
    assert not remaining, f"the process group outlives its end: {remaining}"  # and may abort the process while Python ends


def thread_names() -> list[str]:
    names = []
    for name in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # a thread that ended meanwhile
            names.append(name.read_text().strip())
    return names


def on_two_ranks(work: Callable[..., Any], out: Path, *args: Any) -> list[Any]:
    """work(rank, world, *args) on two processes; the returned values (tensors, dicts), rank by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_enter, args=(2, port, work, str(out), args), nprocs=2, join=True)
    return [torch.load(out / f"rank{rank}.pt", weights_only=False) for rank in range(2)]
