"""Compile a run where it pays: each block by itself, the views, and the loss of masked patches (see `Criterion`)."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import torch._dynamo

from odis_path.config import PretrainConfig
from odis_path.distributed import Ranks
from odis_path.model.network import Network

_KINDS_OF_BLOCK = 64


def compiles(config: PretrainConfig, ranks: Ranks) -> bool:
    """Tell whether a run compiles; with model.compile_blocks=auto it does on a GPU, and says so where it cannot."""
    if config.model.compile_blocks != "auto":
        return config.model.compile_blocks
    if ranks.device.type != "cuda":
        return False
    missing = missing_for_compiling()
    if missing and ranks.first:
        print(f"training is not compiled, and slower for it: this machine lacks {missing}", file=sys.stderr)
    return not missing


def missing_for_compiling() -> str:
    """Describe what this machine lacks to compile for a GPU; empty where it lacks nothing."""
    if find_spec("triton") is None:
        return "the package triton"
    if not any(shutil.which(name) for name in (os.environ.get("CC", ""), "cc", "gcc", "clang") if name):
        return "a C compiler (gcc or clang)"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "the headers of Python (Python.h, often in a package python3-dev)"
    return ""


def compile_blocks(*networks: Network) -> None:
    """Compile each block in place: names of weights stay as they are. Blocks of all depths share what is compiled.

    Sizes are compiled in: a run has two (global and local views), and the k-NN while training runs uncompiled.
    """
    # Past so many kinds of block in a process the compiler silently gives up; a run has three, a study of runs many.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _KINDS_OF_BLOCK)
    for network in networks:
        for block in network.encoder.vit.blocks:
            block.compile(dynamic=False)
