"""`pretrain`: train a model from a configuration; the result tells how the run ended."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from odis_path.config import load_config
from odis_path.model.architectures import patch_px
from odis_path.model.source import check_start
from odis_path.training.log.rows import VARIANCE, read_log
from tiling.jobs.summary import Result, show_lines

if TYPE_CHECKING:
    from rich.console import Console

    from odis_path.training.shortcut.first_look import FirstLook


def pretrain(
    config: Path | str, overrides: Mapping[str, Any] | Sequence[str] | None = None, from_previous: bool = False
) -> TrainedRun:
    """Train a model from a configuration; under torchrun every rank calls it.

    config: a YAML file, or the name of a recipe such as "odis_wsi". overrides: keys to change in it, as {"data.tiles":
    "tiles"} or ["data.tiles=tiles"]. A run that stopped goes on from its newest checkpoint; from_previous: from the last whole
    one, where the newest is damaged. Raises UserError for an impossible configuration or unusable tiles, where possible before
    torch is imported.
    """
    settings = load_config(config, override_words(overrides))
    goes_on = any(Path(settings.run.out).glob("checkpoint-*.pt"))
    check_start(settings.model.name, None if goes_on else settings.model.weights)
    from odis_path.training.loop import pretrain as train

    return TrainedRun(train(settings, from_previous=from_previous))


def look_before(config: Path | str, overrides: Mapping[str, Any] | Sequence[str] | None = None) -> FirstLook:
    """Look at the views, targets and schedules of a configuration without training, as `pretrain` does first."""
    settings = load_config(config, override_words(overrides))
    from odis_path.data.windows import training_samples
    from odis_path.training.setup import count_steps, split_tiles
    from odis_path.training.shortcut.first_look import take_first_look

    index, away = split_tiles(settings)
    train = index.of_patients(away, inside=False)
    samples = training_samples(train, settings, patch_px(settings.model.name, settings.model.kwargs))
    return take_first_look(samples, *count_steps(settings, len(train)))


def override_words(overrides: Mapping[str, Any] | Sequence[str] | None) -> list[str]:
    """Spell overrides as the command line does: key.sub=value, the value in YAML where it is more than a word."""
    if not isinstance(overrides, Mapping):
        return list(overrides or ())
    return [f"{key}={_yaml(value)}" for key, value in overrides.items()]


def _yaml(value: Any) -> str:
    import yaml

    if isinstance(value, os.PathLike | str):
        return os.fspath(value)  # read as the command line reads it
    text: str = yaml.safe_dump(value, default_flow_style=True, width=float("inf"))
    return text.removesuffix("\n").removesuffix("\n...")


@dataclass(frozen=True)
class TrainedRun(Result, os.PathLike[str]):
    """A run that ended well. checkpoint: the newest one; where a checkpoint is asked for, the run may be given itself."""

    checkpoint: Path

    @property
    def folder(self) -> Path:
        return self.checkpoint.parent

    def __fspath__(self) -> str:
        return str(self.checkpoint)

    def figures(self) -> dict[str, Any]:
        """Return the last value of every figure in its log."""
        last: dict[str, Any] = {}
        for row in read_log(self.folder):
            last.update(row)
        return last

    def show(self, console: Console) -> None:
        """Print a table of the last figures, and where the run lies."""
        from rich.table import Table

        last = self.figures()
        table = Table(title="pretrain")
        table.add_column("figure")
        table.add_column("last value", justify="right")
        parts = sorted(key for key in last if key.startswith("loss_"))
        after = (
            "knn_balanced_accuracy",
            "knn_balanced_accuracy_zscored",
            *VARIANCE,
            "token_spread",
            "identity_pairs",
            "images_per_s",
            "data_wait_share",
        )
        for key in ("step", "epoch", "loss", *parts, *after):
            if key in last:
                table.add_row(key.replace("_", " "), f"{last[key]:.4g}")
        console.print(table)
        show_lines(console, [f"checkpoint: {self.checkpoint}", f"log: {self.folder / 'train.jsonl'}"])
