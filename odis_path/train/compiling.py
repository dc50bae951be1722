"""When and how a run is compiled: each block by itself, the views, and the loss of hidden patches (see `Criterion`)."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from odis_path.train.config import PretrainConfig
from odis_path.train.step import Network


def compiles(config: PretrainConfig, device: torch.device) -> bool:
    """Whether a run compiles what it computes; model.compile_blocks=auto: on a GPU for which there is a compiler."""
    wanted = config.model.compile_blocks
    return device.type == "cuda" and find_spec("triton") is not None if wanted == "auto" else wanted


def compile_blocks(*networks: Network) -> None:
    """Compile each block in place: names of weights stay as they are. Blocks of all depths share what is compiled.

    Sizes are compiled in: a run has two (global and local views), and the k-NN while training runs uncompiled.
    """
    # Past this many kinds of block in a process the compiler would silently give up; a run has three, a study of runs many.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for network in networks:
        for block in network.encoder.vit.blocks:  # type: ignore[union-attr]
            block.compile(dynamic=False)
