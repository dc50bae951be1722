"""The request to `embed`, validated without torch before any model is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from annotations.errors import UserError
from annotations.objects import Kind
from odis_path.features.write import DATASETS, open_features
from odis_path.model.source import check_source, is_checkpoint

Mode = Literal["full", "masked", "window", "crop", "blackout"]
MODES = ("full", "masked", "window", "crop", "blackout")
LEVELS = ("tile", "object", "slide")
DTYPES = ("float16", "float32")
_SIZES_AND_TIMES = re.compile(r"(:\d+:\d+)+$")  # of the files of a checkpoint, at the end of its stamp


@dataclass(frozen=True)
class EncoderRequest:
    """An encoder and how to load it. checkpoint: absolute path of a file, a timm name, or local-dir: and an absolute path."""

    checkpoint: str
    stamp: str  # changes when the checkpoint does
    device: str
    random_weights: bool
    pool: str | None = None  # None: as the model was trained
    resize: int | None = None  # px


@dataclass(frozen=True)
class EmbedJob:
    """Settings of `embed` for every slide of a cohort; picklable, so that a cluster's workers can do it."""

    encoder: EncoderRequest
    out: Path
    level: str
    mode: Mode
    kinds: tuple[str, ...] | None  # None: all
    batch: int
    dtype: str
    pretraining: str = ""  # whom the encoder was trained on, see odis_path.features.pretraining
    overwrite: bool = False  # embeddings of another encoder are replaced
    window_um: float | None = None  # of mode window; None: as the model was trained

    def parameters(self) -> dict[str, Any]:
        """Return the parameters that decide the result, for the feature file's `parameters` attribute."""
        encoder = self.encoder
        view: dict[str, Any] = {"pool": encoder.pool or "as trained", "resize_px": encoder.resize or 0}
        if is_checkpoint(encoder.checkpoint) and not encoder.pool and not encoder.resize:
            view = {}  # as in older feature files: embeddings by a run's own encoder stay valid
        if self.mode == "window":
            view["window_um"] = self.window_um or "as trained"
        return {
            "checkpoint": encoder.stamp,
            "level": "tile" if self.level == "slide" else self.level,
            "mode": self.mode,
            "kinds": list(self.kinds) if self.kinds else "all",
            "dtype": self.dtype,
            "random_weights": encoder.random_weights,
            **view,
        }

    def settings(self) -> dict[str, Any]:
        """Return the same for runs at once: long paths are cut where they are shown, so what tells two apart comes first."""
        return {"model": "/".join(Path(self.encoder.checkpoint).parts[-2:]), **self.parameters()}


def check_options(
    checkpoint: str,
    *,
    level: str,
    mode: str,
    kinds: str,
    dtype: str,
    pool: str | None = None,
    resize: int | None = None,
    window_um: float | None = None,
) -> None:
    """Raise UserError, one line, for an option of `embed` that cannot be, and for a model that shows it cannot be loaded."""
    if level not in LEVELS:
        raise UserError(f"--level {level}: no such level; take one of {', '.join(LEVELS)}")
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: take {' or '.join(DTYPES)}")
    if mode not in MODES:
        raise UserError(f"--mode {mode}: no such mode; take one of {', '.join(MODES)}")
    parse_kinds(kinds)
    if resize is not None and resize < 1:
        raise UserError(f"--resize {resize}: is a side in px, above 0")
    if window_um is not None and mode != "window":
        raise UserError(f"--window-um {window_um:g}: is the side of a window: give --mode window with it")
    if window_um is not None and not 0 < window_um < float("inf"):
        raise UserError(f"--window-um {window_um:g}: is a side in micrometres, above 0")
    check_source(checkpoint, pool)


def parse_kinds(kinds: str) -> tuple[str, ...] | None:
    """Read "all" (None) or a comma-separated choice of tissue, cell, proposal. Raises UserError."""
    if kinds == "all":
        return None
    names = tuple(name.strip() for name in kinds.split(",") if name.strip())
    known = [kind.word for kind in Kind]
    wrong = [name for name in names if name not in known]
    if wrong or not names:
        raise UserError(f"--kinds {kinds}: no such kind {', '.join(wrong)}; take all, or some of {', '.join(known)}")
    return names


def other_encoder(out: Path, job: EmbedJob) -> str:
    """Tell why `out` is not for this job: the first file there with embeddings of another encoder; empty where there is none.

    A checkpoint that was only moved is the same, as its size and time are; the same one pooled in another way is another.
    """
    wanted = _identity(job.parameters())
    for path in sorted(out.glob("*.h5")) if out.is_dir() else []:
        try:
            with open_features(path) as file:
                levels = [file.attrs(name) for name in DATASETS.values() if name in file]
            made_by = [(str(attrs.get("encoder")), json.loads(attrs.get("parameters") or "{}")) for attrs in levels]
        except (UserError, ValueError):
            continue  # embedding it again tells what is wrong
        for encoder, parameters in made_by:
            if parameters and _identity(parameters) != wanted:
                random = ", random weights" if parameters.get("random_weights") else ""
                return (
                    f"{path}: holds embeddings of another encoder, {encoder} ({parameters.get('checkpoint')}{random}): "
                    "give another --out, or --overwrite to replace them"
                )
    return ""


def _identity(parameters: Mapping[str, Any]) -> tuple[str, bool, str, int]:
    """Return what makes two encoders the same: sizes and times of the files (or the name), random weights, pool, size seen."""
    stamp = str(parameters.get("checkpoint", ""))
    sizes_and_times = _SIZES_AND_TIMES.search(stamp)
    view = parameters.get("pool", "as trained"), parameters.get("resize_px", 0)
    return sizes_and_times[0] if sizes_and_times else stamp, bool(parameters.get("random_weights")), *view
