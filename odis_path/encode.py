"""From tiles to embeddings with a frozen encoder, in the four inference modes.

full: [OBJ] of the whole tile. masked: masked attention, [OBJ] pools from the box alone (best for ODIS). crop: the box cut
out and resized to a tile. blackout: patches outside the box painted black (worse for every model in the post, kept so
that it can be shown).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from annotations.errors import UserError
from odis_path.data.crops import View, patch_mask
from odis_path.data.views import normalise
from odis_path.model.names import is_model_name
from odis_path.model.vit import ObjViT, build_encoder

Mode = Literal["full", "masked", "crop", "blackout"]
MODES = ("full", "masked", "crop", "blackout")


@dataclass(frozen=True)
class FrozenEncoder:
    """An encoder ready for inference: eval mode, on its device, with the normalisation it was trained with."""

    module: ObjViT
    name: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    device: torch.device

    @property
    def dim(self) -> int:
        return self.module.embed_dim

    def grid(self, tile_px: int) -> int:
        """Patches along a side of a tile; a tile that is no multiple of the patch is resized to the nearest one."""
        return max(1, round(tile_px / self.module.patch_px))


def pick_device(name: str = "auto") -> torch.device:
    """auto: the GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def is_checkpoint(source: str) -> bool:
    """Whether a checkpoint file or a run folder is meant, and no timm model."""
    path = Path(source)
    return path.exists() or (not is_model_name(source) and (path.suffix in (".pt", ".pth") or len(path.parts) > 1))


def load_encoder(source: str, *, device: str = "auto", random_weights: bool = False, seed: int = 0) -> FrozenEncoder:
    """A checkpoint file, a run folder, or a timm model name.

    random_weights: the same architecture, untrained (the baseline): drawn from `seed`, with torch's own generator left as it
    was; no other thread may draw from it meanwhile. Raises UserError where `source` is neither.
    """
    where = pick_device(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if is_checkpoint(source):
            return _from_checkpoint(Path(source), where, random_weights=random_weights)
        module = build_encoder(source, weights=None if random_weights else "timm")
    cfg: Any = module.vit.pretrained_cfg
    name = f"random:{source}" if random_weights else source
    return FrozenEncoder(module.eval().to(where), name, tuple(cfg["mean"]), tuple(cfg["std"]), where)


def _from_checkpoint(path: Path, where: torch.device, *, random_weights: bool) -> FrozenEncoder:
    from odis_path.train.checkpoint import load_checkpoint, load_into
    from odis_path.train.step import build_network

    checkpoint = load_checkpoint(path)
    network = build_network(checkpoint.config, student=False)
    name = f"{checkpoint.config.name}:{checkpoint.config.model.name}@{checkpoint.step}"
    if random_weights:
        name = f"random:{checkpoint.config.model.name}"
    else:
        load_into(network, checkpoint.state["teacher"], checkpoint.path, "teacher")
    data = checkpoint.config.data
    return FrozenEncoder(network.encoder.eval().to(where), name, data.mean, data.std, where)


@torch.inference_mode()
def encode(encoder: FrozenEncoder, tiles: np.ndarray, boxes: np.ndarray | None = None, mode: Mode = "full") -> np.ndarray:
    """Embeddings of tiles, or of one box in each.

    tiles: uint8 (B, S, S, 3); boxes: (B, 4) in tile px, needed by every mode but full. Returns float32 (B, D).
    """
    if mode != "full" and boxes is None:
        raise ValueError(f"mode {mode} needs boxes")
    side = tiles.shape[1]
    grid = encoder.grid(side)
    size = grid * encoder.module.patch_px
    if mode == "crop" and boxes is not None:
        images = torch.stack([_cut(tile, box, size) for tile, box in zip(tiles, boxes, strict=True)]).to(encoder.device)
    else:
        images = _whole(encoder, tiles, size)
    mask = None
    if mode in ("masked", "blackout") and boxes is not None:
        mask = torch.from_numpy(box_masks(boxes, side, grid)).to(encoder.device)
        if mode == "blackout":
            keep = mask.reshape(-1, 1, grid, grid).float()
            images = images * F.interpolate(keep, size=(size, size), mode="nearest")
            mask = None
    return _obj(encoder, images, mask)


@torch.inference_mode()
def encode_objects(encoder: FrozenEncoder, tiles: np.ndarray, boxes: list[np.ndarray]) -> np.ndarray:
    """Masked embeddings of all boxes of each tile in one pass over its patches; for an encoder with a read-only [OBJ].

    tiles: uint8 (B, S, S, 3); boxes: B arrays (k, 4) in tile px. Returns float32 (sum of k, D), tile by tile.
    """
    side = tiles.shape[1]
    grid = encoder.grid(side)
    counts = [len(some) for some in boxes]
    masks = np.ones((len(tiles), max(counts), grid * grid), dtype=bool)  # what fills up is the whole tile, and dropped below
    for mask, some in zip(masks, boxes, strict=True):
        mask[: len(some)] = box_masks(some, side, grid)
    obj = _obj(encoder, _whole(encoder, tiles, grid * encoder.module.patch_px), torch.from_numpy(masks).to(encoder.device))
    return np.concatenate([row[:count] for row, count in zip(obj, counts, strict=True)])


def _whole(encoder: FrozenEncoder, tiles: np.ndarray, size_px: int) -> torch.Tensor:
    """uint8 (B, S, S, 3) -> float (B, 3, size_px, size_px) in [0, 1] on the device."""
    images = torch.from_numpy(np.ascontiguousarray(tiles)).to(encoder.device).permute(0, 3, 1, 2).float().div_(255)
    if size_px != tiles.shape[1]:
        images = F.interpolate(images, size=(size_px, size_px), mode="bilinear", antialias=True, align_corners=False)
    return images


_passing = Lock()


def _obj(encoder: FrozenEncoder, images: torch.Tensor, mask: torch.Tensor | None) -> np.ndarray:
    """The [OBJ] embeddings of images in [0, 1]: float32 (B, D), or (B, K, D) for masks (B, K, N)."""
    # One thread at a time: a rotary model is told in each pass how many of its tokens are [OBJ].
    with _passing, torch.autocast(encoder.device.type, torch.bfloat16, enabled=encoder.device.type == "cuda"):
        obj = encoder.module(normalise(images, encoder.mean, encoder.std), mask).obj
    return obj.float().cpu().numpy()


def box_masks(boxes: np.ndarray, side_px: int, grid: int) -> np.ndarray:
    """In-box patches of untouched tiles: (B, 4) in tile px -> bool (B, grid * grid). An empty box is a ValueError."""
    whole = View(0, 0, side_px, side_px, 0, side_px)
    masks = np.stack([patch_mask(whole, box, grid).ravel() for box in boxes])
    if not masks.any(1).all():
        raise ValueError(f"box {boxes[int(np.flatnonzero(~masks.any(1))[0])].tolist()} covers no patch of the tile")
    return masks


def _cut(tile: np.ndarray, box: np.ndarray, size_px: int) -> torch.Tensor:
    """The box, widened to a square inside the tile, as float (3, size_px, size_px) in [0, 1]."""
    side = tile.shape[0]
    length = min(side, max(2, int(np.ceil(max(box[2] - box[0], box[3] - box[1])))))
    x = int(np.clip(round((box[0] + box[2] - length) / 2), 0, side - length))
    y = int(np.clip(round((box[1] + box[3] - length) / 2), 0, side - length))
    cut = torch.from_numpy(np.ascontiguousarray(tile[y : y + length, x : x + length])).permute(2, 0, 1).float().div_(255)
    return F.interpolate(cut[None], size=(size_px, size_px), mode="bilinear", antialias=True, align_corners=False)[0]


def batches(count: int, size: int) -> Iterator[slice]:
    """Slices that cover range(count)."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def refuse_modes(mode: str) -> None:
    """UserError for a mode that does not exist."""
    if mode not in MODES:
        raise UserError(f"--mode {mode}: no such mode; take one of {', '.join(MODES)}")
