"""A look at views and targets before training: what colour alone gives away, and targets that teach little."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from math import sqrt
from typing import TYPE_CHECKING

import numpy as np
import torch

from odis_path.config import PretrainConfig
from odis_path.data.dataset import TileSamples
from odis_path.data.sampler import collate
from odis_path.data.tile_index import OpenSlides
from odis_path.data.views import view_images
from odis_path.training.knn_monitor import IDENTITY_SHARE, identity_pairs
from odis_path.training.log.rows import Row
from odis_path.training.shortcut.colour_rank import ViewRank, colour_statistics, equal_columns, rank_views
from odis_path.training.shortcut.schedule import schedule_warnings
from tiling.jobs.summary import Result, show_lines

if TYPE_CHECKING:
    from rich.console import Console

TILES = 200
LEAST_TILES = 20  # fewer have no rank worth a word
LEAST_CHANCE_SHARE = 0.4  # of the median rank that chance gives: below, colour finds the other view too often
MOST_SMALL = 0.25
MOST_BOXLESS = 0.5
_MOST_PX = 112  # side of the views that are looked at: colours are those of larger ones, for a quarter of the time
_CHUNK = 20  # tiles in memory at once


@dataclass(frozen=True)
class FirstLook(Result):
    """The look at `tiles` tiles of training.

    mean_colour, colour_spread: how well the mean, and mean and standard deviation, of the channels find the other global
    view of a tile; None for fewer than LEAST_TILES. identity_pairs: share of the tiles whose global views are one crop.
    small_targets: share of the targets that are smaller than a patch before neighbours join them; None where nothing is a
    target. boxless: share of tiles without a box that may be one; None where none is needed. warnings: of these and of the
    schedules, with the keys to change.
    """

    tiles: int
    mean_colour: ViewRank | None
    colour_spread: ViewRank | None
    identity_pairs: float
    small_targets: float | None
    boxless: float | None
    warnings: list[str]

    def lines(self) -> list[str]:
        """Say it in a few lines, warnings last."""
        shares = [f"identity pairs {self.identity_pairs:.0%}"]
        if self.small_targets is not None:
            shares.append(f"targets smaller than a patch {self.small_targets:.0%}")
        if self.boxless is not None:
            shares.append(f"tiles without a box {self.boxless:.0%}")
        lines = []
        if self.mean_colour is not None and self.colour_spread is not None:
            lines.append(f"mean colour finds the other view {self.mean_colour}")
            lines.append(f"mean and spread of colour find it {self.colour_spread}")
        lines.append(f"{', '.join(shares)}, of {self.tiles} tiles")
        return [f"first look: {line}" for line in lines] + [f"warning: {text}" for text in self.warnings]

    def row(self) -> Row:
        """Return its figures as those of a row of the log."""
        figures: dict[str, float | None] = {"look_tiles": self.tiles, "look_identity_pairs": self.identity_pairs}
        figures |= {"look_small_targets": self.small_targets, "look_boxless": self.boxless}
        for name, rank in (("mean_colour", self.mean_colour), ("colour_spread", self.colour_spread)):
            if rank is not None:
                figures |= {f"look_{name}_{key}": value for key, value in asdict(rank).items() if key != "count"}
        return {key: float(value) for key, value in figures.items() if value is not None}

    def show(self, console: Console) -> None:
        """Write its lines."""
        show_lines(console, self.lines())


def take_first_look(
    samples: TileSamples, steps_per_epoch: int, total_steps: int, device: torch.device | None = None
) -> FirstLook:
    """Draw the samples of the first epoch for at most TILES tiles, and look at colours, crops and boxes; and at the schedules.

    Tiles are drawn from `run.seed`; views are made on the device (the CPU where None). Raises UserError where pixels cannot be
    read, as training would.
    """
    config = samples.config
    seen = copy.copy(samples)
    seen.files = OpenSlides(samples.index.paths)  # workers that are forked later inherit no open file
    rng = np.random.default_rng([config.run.seed, 41])
    chosen = np.sort(rng.choice(len(seen), min(TILES, len(seen)), replace=False))
    statistics, identical = [], 0
    try:
        for start in range(0, len(chosen), _CHUNK):
            part, same = _global_views(seen, chosen[start : start + _CHUNK], device or torch.device("cpu"))
            statistics.append(part)
            identical += same
        small, boxless = _targets(seen, chosen) if config.target.crop or config.target.mask else (None, None)
    finally:
        seen.files.close()
    first, second = np.concatenate(statistics, axis=1)
    enough = len(chosen) >= LEAST_TILES
    mean = rank_views(first[:, :3], second[:, :3]) if enough else None
    spread = rank_views(*equal_columns(first, second)) if enough else None
    share = identical / len(chosen)
    warnings = _warnings(config, mean, spread, share, small, boxless)
    warnings += schedule_warnings(config, steps_per_epoch, total_steps)
    return FirstLook(len(chosen), mean, spread, share, small, boxless, warnings)


def _global_views(samples: TileSamples, chosen: np.ndarray, device: torch.device) -> tuple[np.ndarray, int]:
    """Cut and colour the global views of tiles: their statistics, float64 (2, n, 6), and the number of identity pairs.

    Of a tile with several windows the first.
    """
    drawn = [samples[0, int(i)] for i in chosen]
    batch = collate([item[0] if isinstance(item, list) else item for item in drawn])
    v = samples.config.views
    size_px = min(v.global_size, _MOST_PX)
    images = view_images(
        batch.pixels.to(device),
        batch.views.theta_global.to(device),
        batch.views.colours[:2].to(device),
        batch.blurred_global.to(device),
        size_px,
        sqrt(v.global_scale[1]) * batch.pixels.shape[1] / size_px,
        (0.0, 0.0, 0.0),
        (1.0, 1.0, 1.0),
    )
    statistics = colour_statistics(images.cpu().numpy())
    return statistics.reshape(2, len(chosen), -1), identity_pairs(batch.views.rects)


def _targets(samples: TileSamples, chosen: np.ndarray) -> tuple[float | None, float]:
    """Compute the share of targets smaller than a patch (None without a box), and that of tiles without a box."""
    small = []
    for i in chosen:
        slide, row = int(samples.index.slide[i]), int(samples.index.row[i])
        xyxy = samples.boxes(samples.files[slide], slide, row).xyxy
        if len(xyxy):
            area = (xyxy[:, 2:] - xyxy[:, :2]).prod(1)
            large = area >= samples.min_side_px**2  # targets are drawn among these, if there are any
            drawn = area[large] if large.any() else area
            small.append(float((drawn < samples.patch_side_px**2).mean()))
    return (float(np.mean(small)) if small else None), 1 - len(small) / len(chosen)


def _warnings(
    config: PretrainConfig,
    mean: ViewRank | None,
    spread: ViewRank | None,
    identical: float,
    small: float | None,
    boxless: float | None,
) -> list[str]:
    """List what is out of range, each with the keys to change."""
    warnings = []
    ranks = {"mean colour": mean, "mean and spread of colour": spread}
    giving = [name for name, rank in ranks.items() if rank and rank.median < LEAST_CHANCE_SHARE * rank.chance]
    if giving:
        warnings.append(
            f"the other view of a tile is often found by {giving[0]} alone: the network may learn the stain in place of the "
            f"object; raise {_colour_keys(config)}"
        )
    if identical > IDENTITY_SHARE:
        warnings.append(
            f"in {identical:.0%} of the tiles both global views are the same crop: lower target.whole_share "
            f"(now {config.target.whole_share:g}) or the start of views.global_scale (now {config.views.global_scale[0]:g})"
        )
    if small is not None and small > MOST_SMALL:
        warnings.append(
            f"{small:.0%} of the targets are smaller than a patch, which then shows mostly what is around them: use a smaller "
            "patch (model.kwargs.patch_size), a smaller views.window_um or views.global_scale, or larger objects (data.kinds)"
        )
    if boxless is not None and boxless > MOST_BOXLESS:
        warnings.append(
            f"{boxless:.0%} of the tiles have no box and are trained on as a whole: set data.boxless=drop, check data.kinds "
            f"(now {', '.join(config.data.kinds)}), or run odis-path annotate or propose"
        )
    return warnings


def _colour_keys(config: PretrainConfig) -> str:
    """Name the keys of colour changes below those of the strongest recipe, with their values."""
    v = config.views
    strong = {"gray_p": 0.3, "stain_scale": 0.5, "stain_shift": 0.25, "brightness": 0.3, "hue": 0.1, "stain_p": 0.9}
    weak = [f"views.{key} (now {getattr(v, key):g})" for key, value in strong.items() if getattr(v, key) < value]
    return (
        ", ".join(weak[:-1]) + (" and " if len(weak) > 1 else "") + weak[-1] if weak else "views.stain_scale and views.gray_p"
    )
