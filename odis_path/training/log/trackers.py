"""Send the figures of a run to TensorBoard and Weights & Biases, each on request."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from annotations.errors import UserError, one_line
from odis_path.config import PretrainConfig
from tiling.storage.atomic import atomic_path


class Tracker(Protocol):
    """A place for figures over steps."""

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Take the figures of a step (steps done, from 1)."""

    def close(self) -> None:
        """Write what is still held back."""


class TensorBoardTracker:
    """Event files in `<folder>/tensorboard`; `first_step` steps are done, later ones of an earlier start are purged."""

    def __init__(self, folder: Path, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("run.tensorboard=true needs the extra: pip install 'odis-path[tracking]'") from None
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """One scalar a figure."""
        for key, value in figures.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        """Flush the event file."""
        self._writer.close()


class WandbTracker:
    """A run of Weights & Biases with the resolved config; a resumed run goes on in the same one (`<folder>/wandb-id.txt`).

    WANDB_MODE (online, offline, disabled) and the other variables of W&B hold as everywhere.
    """

    def __init__(self, folder: Path, project: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError("run.wandb=true needs the extra: pip install 'odis-path[tracking]'") from None
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=project,
                id=run_id(folder),
                resume="allow",
                name=folder.name,
                dir=str(folder),
                config=dict(config),
                settings={"console": "off"},  # it would log every frame of the live table
            )
        except Exception as error:  # no key, no network, a name that is refused: the user can mend each
            line = one_line(error)[:160]
            raise UserError(
                f"run.wandb=true: W&B did not start ({type(error).__name__}: {line}); run `wandb login`, "
                "set WANDB_MODE=offline, or leave run.wandb away"
            ) from None
        self._run.define_metric("*", step_metric="step")  # our step: a resumed run may log a step twice

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """One row of W&B's history."""
        self._run.log({"step": step, **figures})

    def close(self) -> None:
        """Finish the upload."""
        self._run.finish()


def run_id(folder: Path) -> str:
    """Return the W&B id of a run folder: drawn once, then kept in `wandb-id.txt`."""
    path = folder / "wandb-id.txt"
    if path.is_file() and (known := path.read_text(encoding="utf-8").strip()):
        return known
    new = secrets.token_hex(6)
    with atomic_path(path) as temporary:
        temporary.write_text(new + "\n", encoding="utf-8")
    return new


def open_trackers(config: PretrainConfig, first_step: int) -> list[Tracker]:
    """Open the trackers of `run.tensorboard` and `run.wandb`. Raises UserError where the extra is not installed."""
    folder, trackers = Path(config.run.out), list[Tracker]()
    if config.run.tensorboard:
        trackers.append(TensorBoardTracker(folder, first_step))
    if config.run.wandb:
        trackers.append(WandbTracker(folder, config.run.wandb_project, config.model_dump(mode="json")))
    return trackers
