"""From tiles to embeddings with a frozen encoder, in the four inference modes.

full: [OBJ] of the whole tile. masked: masked attention, [OBJ] pools from the box alone (best for ODIS). crop: the box cut
out and resized to a tile. blackout: patches outside the box painted black (worse for every model in the post, kept so
that it can be shown). window: masked, in a window around the box in place of the
tile (`embedding.windows` cuts it).

A model that was trained to be averaged is averaged, in the same modes: masked is the mean over the patches in the box, of a
pass that sees the whole tile; crop and blackout average all patches of the picture that is cut out or painted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock

import numpy as np
import torch
import torch.nn.functional as F

from annotations.errors import UserError
from odis_path.checkpoint import Checkpoint, load_checkpoint, load_into
from odis_path.data.crops import Crop, patch_mask
from odis_path.data.views import normalise
from odis_path.embedding.request import Mode
from odis_path.model.create import POOL_WORDS, WORDS_OF_POOL, create_vit, embedding_pool
from odis_path.model.network import build_network
from odis_path.model.source import is_checkpoint, settled_source
from odis_path.model.vit import ObjViT, wrapped


@dataclass(frozen=True)
class FrozenEncoder:
    """An encoder ready for inference: eval mode, on its device, with the normalisation it was trained with.

    trained_px: side of the images it was trained on, None where nothing says it. resize_px: side that tiles are resized to
    before they are seen, None for their own (or the nearest multiple of the patch). pool_reason: what settled the pooling.
    window_um: side of the windows it was trained on, 0 where it was trained on tiles.
    """

    module: ObjViT
    name: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    device: torch.device
    trained_px: int | None = None
    resize_px: int | None = None
    pool_reason: str = ""
    window_um: float = 0.0

    @property
    def dim(self) -> int:
        return self.module.out_dim

    @property
    def pool(self) -> str:
        """cls, mean, cls+mean, or attention: the model's own attention pooling."""
        return WORDS_OF_POOL[self.module.pool]

    def grid(self, tile_px: int) -> int:
        """Patches along a side of a tile; a tile that is no multiple of the patch is resized to the nearest one."""
        return max(1, round((self.resize_px or tile_px) / self.module.patch_px))

    def size_px(self, tile_px: int) -> int:
        """Side at which a tile is seen."""
        return self.grid(tile_px) * self.module.patch_px

    def about(self, tile_px: int, what: str = "tiles") -> str:
        """Describe in a line how it pools, and the size at which it sees such tiles beside the one it was trained at."""
        size = self.size_px(tile_px)
        line = f"{self.name}: pooling {self.pool} ({self.pool_reason}); {what} of {tile_px} px are seen at {size} px"
        if self.trained_px is None:
            return f"{line}; the size trained at is not known"
        if size == self.trained_px:
            return f"{line}, as trained"
        return (
            f"{line}, trained at {self.trained_px} px: positions are interpolated; --resize {self.trained_px} for its own size"
        )

    @torch.inference_mode()
    def encode(self, tiles: np.ndarray, boxes: np.ndarray | None = None, mode: Mode = "full") -> np.ndarray:
        """Embed tiles, or one box in each.

        tiles: uint8 (B, S, S, 3), windows in mode window; boxes: (B, 4) in their px, needed by every mode but full.
        Returns float32 (B, D).
        """
        if mode != "full" and boxes is None:
            raise ValueError(f"mode {mode} needs boxes")
        side = tiles.shape[1]
        grid = self.grid(side)
        size = grid * self.module.patch_px
        if mode == "crop" and boxes is not None:
            images = torch.stack([_cut(tile, box, size) for tile, box in zip(tiles, boxes, strict=True)]).to(self.device)
        else:
            images = _whole(self, tiles, size)
        mask = None
        if mode in ("masked", "window", "blackout") and boxes is not None:
            mask = torch.from_numpy(box_masks(boxes, side, grid)).to(self.device)
            if mode == "blackout":
                keep = mask.reshape(-1, 1, grid, grid).float()
                images = images * F.interpolate(keep, size=(size, size), mode="nearest")
                mask = None
        return _obj(self, images, mask)


def pick_device(name: str = "auto") -> torch.device:
    """Return the device of a name; auto: the GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def load_encoder(
    source: str | os.PathLike[str],
    *,
    device: str = "auto",
    random_weights: bool = False,
    seed: int = 0,
    pool: str | None = None,
    resize: int | None = None,
) -> FrozenEncoder:
    """Load what `pretrain` returned, a checkpoint file, a run folder, a timm model name, or a folder in the form of the hub.

    random_weights: the same architecture, untrained (the baseline): drawn from `seed`, with torch's own generator left as it
    was; no other thread may draw from it meanwhile. pool: cls, mean or cls+mean; None: as the model was trained. resize: side
    in px that tiles are resized to. Raises UserError where `source` is none of these, where its weights lack a token, norm or
    positions, and for what pool or resize cannot be.
    """
    on, source = pick_device(device), settled_source(os.fspath(source))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if is_checkpoint(source):
            encoder = _from_checkpoint(Path(source), on, random_weights, pool)
        else:
            encoder = _from_timm(source, on, random_weights, pool)
    patch = encoder.module.patch_px
    if resize is not None and resize % patch:
        near = sorted({max(1, resize // patch) * patch, -(-resize // patch) * patch})
        raise UserError(
            f"--resize {resize}: no multiple of the patch of {source}, {patch} px; take {' or '.join(map(str, near))}"
        )
    asked = [f"pool {pool}"] if pool is not None else []
    asked += [f"{resize} px"] if resize is not None else []
    name = f"{encoder.name} ({', '.join(asked)})" if asked else encoder.name
    return replace(encoder, resize_px=resize, name=name)


def _from_timm(source: str, device: torch.device, random_weights: bool, pool: str | None) -> FrozenEncoder:
    start = create_vit(source, weights=None if random_weights else "timm", native=True)
    reason = "as asked" if pool else f"as {start.published.name} is used" if start.published else "as trained"
    if pool is None and start.pool == "":
        reason = "its config names none"
    if start.norm_assumed:
        reason += "; mean and std of ImageNet, as its config.json states none"
    module = wrapped(start, embedding_pool(start, source, pool), source=source)
    assert start.norm is not None
    mean, std = start.norm
    name = f"random:{source}" if random_weights else source
    return FrozenEncoder(module.eval().to(device), name, mean, std, device, start.trained_px, pool_reason=reason)


def teacher_encoder(checkpoint: Checkpoint, *, random_weights: bool = False) -> ObjViT:
    """Build the teacher's encoder of a checkpoint, without the heads; with its weights unless they are to be random."""
    state = checkpoint.state.teacher
    network = build_network(checkpoint.config, student=False, like=state)
    if not random_weights:
        load_into(network, state, checkpoint.path, "teacher")
    return network.encoder.eval()


def _from_checkpoint(path: Path, device: torch.device, random_weights: bool, pool: str | None) -> FrozenEncoder:
    checkpoint = load_checkpoint(path)
    module = teacher_encoder(checkpoint, random_weights=random_weights)
    name = f"{checkpoint.config.name}:{checkpoint.config.model.name}@{checkpoint.step}"
    if random_weights:
        name = f"random:{checkpoint.config.model.name}"
    if pool is not None:
        if "cls" in pool and not module.has_obj:
            raise UserError(f"--pool {pool}: {path} has no [OBJ]: take --pool mean")
        if pool == "mean" and module.more_obj is not None:
            raise UserError(f"--pool mean: the patches of {path} see several [OBJ] tokens: take cls or cls+mean")
        module.pool = POOL_WORDS[pool]
    data, size = checkpoint.config.data, checkpoint.config.views.global_size
    reason, window_um = "as asked" if pool else "as trained", checkpoint.config.views.window_um
    return FrozenEncoder(module.to(device), name, data.mean, data.std, device, size, pool_reason=reason, window_um=window_um)


@torch.inference_mode()
def encode_objects(encoder: FrozenEncoder, tiles: np.ndarray, boxes: list[np.ndarray]) -> np.ndarray:
    """Embed all boxes of each tile, masked, in one pass over its patches; for an encoder with a read-only [OBJ].

    tiles: uint8 (B, S, S, 3); boxes: B arrays (k, 4) in tile px. Returns float32 (sum of k, D), tile by tile.
    """
    side = tiles.shape[1]
    grid = encoder.grid(side)
    counts = [len(of_tile) for of_tile in boxes]
    masks = np.ones((len(tiles), max(counts), grid * grid), dtype=bool)  # padding sees the whole tile, dropped below
    for mask, of_tile in zip(masks, boxes, strict=True):
        mask[: len(of_tile)] = box_masks(of_tile, side, grid)
    obj = _obj(encoder, _whole(encoder, tiles, grid * encoder.module.patch_px), torch.from_numpy(masks).to(encoder.device))
    return np.concatenate([row[:count] for row, count in zip(obj, counts, strict=True)])


def _whole(encoder: FrozenEncoder, tiles: np.ndarray, size_px: int) -> torch.Tensor:
    """Turn uint8 (B, S, S, 3) into float (B, 3, size_px, size_px) in [0, 1] on the device."""
    images = torch.from_numpy(np.ascontiguousarray(tiles)).to(encoder.device).permute(0, 3, 1, 2).float().div_(255)
    if size_px != tiles.shape[1]:
        images = F.interpolate(images, size=(size_px, size_px), mode="bilinear", antialias=True, align_corners=False)
    return images


_passing = Lock()


def _obj(encoder: FrozenEncoder, images: torch.Tensor, mask: torch.Tensor | None) -> np.ndarray:
    """Return the [OBJ] embeddings of images in [0, 1]: float32 (B, D), or (B, K, D) for masks (B, K, N)."""
    # One thread at a time: a rotary model is set in each pass to how many of its tokens are [OBJ].
    with _passing, torch.autocast(encoder.device.type, torch.bfloat16, enabled=encoder.device.type == "cuda"):
        obj = encoder.module(normalise(images, encoder.mean, encoder.std), mask).obj
    return np.asarray(obj.float().cpu().numpy())


def box_masks(boxes: np.ndarray, side_px: int, grid: int) -> np.ndarray:
    """Mark the in-box patches of whole tiles: (B, 4) in tile px -> bool (B, grid * grid). ValueError for an empty box."""
    whole = Crop(0, 0, side_px, side_px, 0, side_px)
    masks = np.stack([patch_mask(whole, box, grid).ravel() for box in boxes])
    if not masks.any(1).all():
        raise ValueError(f"box {boxes[int(np.flatnonzero(~masks.any(1))[0])].tolist()} covers no patch of the tile")
    return masks


def _cut(tile: np.ndarray, box: np.ndarray, size_px: int) -> torch.Tensor:
    """Cut out the box, widened to a square inside the tile, as float (3, size_px, size_px) in [0, 1]."""
    side = tile.shape[0]
    length = min(side, max(2, int(np.ceil(max(box[2] - box[0], box[3] - box[1])))))
    x = int(np.clip(round((box[0] + box[2] - length) / 2), 0, side - length))
    y = int(np.clip(round((box[1] + box[3] - length) / 2), 0, side - length))
    cut = torch.from_numpy(np.ascontiguousarray(tile[y : y + length, x : x + length])).permute(2, 0, 1).float().div_(255)
    return F.interpolate(cut[None], size=(size_px, size_px), mode="bilinear", antialias=True, align_corners=False)[0]


def batches(count: int, size: int) -> Iterator[slice]:
    """Yield slices that cover range(count)."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
