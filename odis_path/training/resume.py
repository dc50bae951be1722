"""Check that a run can start, and that it may go on from a checkpoint: same configuration, tiles and held-out patients."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from annotations.errors import UserError
from odis_path.checkpoint import DataFacts
from odis_path.config import PretrainConfig
from odis_path.data.tile_index import TileIndex

# Keys that may differ: they change where and how fast a run goes, not what it learns.
FREE = {
    "run.out",
    "run.save_every_epochs",
    "run.keep",
    "run.log_every_steps",
    "run.device",
    "run.tensorboard",
    "run.wandb",
    "run.wandb_project",
    "data.workers",
    "model.compile_blocks",
}


def check_sizes(config: PretrainConfig, world: int) -> None:
    """Raise UserError where batch and ranks do not divide."""
    share = world * config.optim.accumulate
    if config.optim.batch_size % share:
        raise UserError(
            f"optim.batch_size={config.optim.batch_size} cannot be cut into {world} ranks x "
            f"{config.optim.accumulate} micro-batches; take a multiple of {share}"
        )


def check_views(config: PretrainConfig, patch_px: int) -> None:
    """Raise UserError where a view holds no whole number of patches."""
    sizes = {"global_size": config.views.global_size}
    if config.views.local_count:
        sizes["local_size"] = config.views.local_size
    for key, size in sizes.items():
        if size % patch_px:
            near = sorted({max(1, size // patch_px) * patch_px, -(-size // patch_px) * patch_px})
            raise UserError(
                f"views.{key}={size} is no multiple of the patch of model.name={config.model.name}, {patch_px} px; "
                f"take {' or '.join(map(str, near))}"
            )


def config_difference(new: PretrainConfig, old: PretrainConfig) -> str:
    """Find the first key that makes two runs different runs, as "key=old, now key=new"; empty where none does."""

    def flat(config: PretrainConfig) -> dict[str, Any]:
        return {
            f"{s}.{k}": v
            for s, part in config.model_dump(mode="json").items()
            if isinstance(part, dict)
            for k, v in part.items()
        }

    a, b = flat(old), flat(new)
    for key in a:
        if key not in FREE and not key.startswith("eval.") and a[key] != b.get(key):
            return f"{key}={a[key]}, now {key}={b.get(key)}"
    return ""


def data_facts(index: TileIndex, away: set[str]) -> DataFacts:
    """Collect facts about the data of a run, for its checkpoints: counts to tell a user, and a hash of all that matters.

    index: every tile, held out or not. away: the held-out patients.
    """
    slides = json.dumps([index.slide_ids, index.patients, index.tile_px, round(index.mpp, 4), sorted(away)])
    content = slides.encode() + index.slide.tobytes() + index.row.tobytes()
    return {
        "slides": len(index.slide_ids),
        "tiles": len(index),
        "held_out": sorted(away),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def data_difference(new: DataFacts, old: DataFacts | None) -> str:
    """Describe how the tiles changed since a checkpoint; empty where they did not, or where it does not say (an older one)."""
    if old is None or new["sha256"] == old["sha256"]:
        return ""
    if (new["slides"], new["tiles"]) != (old["slides"], old["tiles"]):
        return f"{old['slides']} slides with {old['tiles']} tiles, now {new['slides']} with {new['tiles']}"
    if new["held_out"] != old["held_out"]:
        return f"patients {', '.join(old['held_out']) or 'none'} held out, now {', '.join(new['held_out']) or 'none'}"
    return f"other tiles or patients in the same number of slides ({old['slides']})"
