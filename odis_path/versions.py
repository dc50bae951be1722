"""Versions, commit and device of a run: its provenance."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from odis_path import __version__

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "h5py",
    "openslide-python",
    "openslide-bin",
    "tiffslide",
    "tifffile",
    "imagecodecs",
    "simplejpeg",
    "shapely",
    "msgspec",
    "scikit-learn",
    "scikit-image",
    "pillow",
    "pyarrow",
    "pydantic",
    "omegaconf",
    "typer",
    "rich",
    "matplotlib",
    "jinja2",
)
OPTIONAL = {"distributed": "cluster", "tensorboard": "tracking", "wandb": "tracking"}


def versions() -> dict[str, str]:
    """Return the versions of odis-path, Python and every package it stands on ("missing" where it is not installed)."""
    installed = {"odis-path": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for package in (*PACKAGES, *OPTIONAL):
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            installed[package] = "missing"
    return installed


def git_commit() -> str:
    """Return the commit of the checkout that odis-path runs from, "... with changes" where files differ; else ""."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return ""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def provenance(device: str, ranks: int) -> dict[str, Any]:
    """Return the provenance of a run: versions, commit, device (a torch name such as "cuda:0"), ranks, command line, time."""
    import torch

    gpu = device.startswith("cuda")
    return {
        **versions(),
        "torch_build": torch.__version__,
        "cuda": torch.version.cuda or "" if gpu else "",
        "git_commit": git_commit(),
        "ranks": ranks,
        "device": torch.cuda.get_device_name(device) if gpu else f"CPU, {torch.get_num_threads()} threads",
        "command": shlex.join(sys.argv),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
