"""Pictures for the report: the pair of crops of a tile, and where [OBJ] looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from odis_path.config import PretrainConfig
from odis_path.data.crops import Crop, turn_grid
from odis_path.data.dataset import TileSamples
from odis_path.data.tile_index import index_tiles
from odis_path.embedding.encoder import box_masks, load_encoder
from tiling.slide_file.read import SlideFile


@dataclass(frozen=True)
class CropPreview:
    """A tile, its boxes and the two global crops of one sample, as teacher and student see them before colour changes.

    tile uint8 (S, S, 3); boxes float32 (k, 4); target (4,) in tile px; rects int (2, 4) x, y, w, h of the crops in the tile;
    crops: two uint8 (s, s, 3); masks: two bool (g, g), the patches [OBJ] may attend to.
    """

    tile: np.ndarray
    boxes: np.ndarray
    target: np.ndarray
    rects: np.ndarray
    crops: list[np.ndarray]
    masks: list[np.ndarray]


def crop_pairs(
    slide_file: Path, rows: Sequence[int], config: PretrainConfig, patch_px: int = 16, epoch: int = 0
) -> list[CropPreview]:
    """Both global crops of some tiles, drawn as in training."""
    index = index_tiles(slide_file.parent)
    samples = TileSamples(index, config, patch_px)
    number = index.paths.index(slide_file)
    previews = []
    with SlideFile(slide_file) as file:
        for row in rows:
            rng = np.random.default_rng([config.run.seed, epoch, int(row)])
            target, sampled = samples.sample_views(rng, file, number, int(row))
            tile = file.tile(int(row))
            views = [Crop(*(int(v) for v in rect)) for rect in sampled.rects[:2]]
            grid = samples.grids[0]
            masks = [mask[0].reshape(grid, grid) for mask in sampled.object_masks_global]
            rects = sampled.rects[:2, :4]
            previews.append(CropPreview(tile, file.boxes(int(row)), target.box, rects, [_show(tile, v) for v in views], masks))
    return previews


def _show(tile: np.ndarray, view: Crop) -> np.ndarray:
    from PIL import Image

    part = Image.fromarray(tile[view.y : view.y + view.h, view.x : view.x + view.w])
    return np.ascontiguousarray(turn_grid(np.asarray(part.resize((view.size_px, view.size_px))), view.turn))


@torch.inference_mode()
def obj_attention(checkpoint: str | Path, tiles: np.ndarray, boxes: np.ndarray | None = None) -> np.ndarray:
    """Last-layer attention of [OBJ] over patches: uint8 (n, S, S, 3), boxes (n, 4) or None (all) -> float32 (n, g, g)."""
    from odis_path.data.views import normalise

    encoder = load_encoder(str(checkpoint), device="cpu")
    side = tiles.shape[1]
    grid = encoder.grid(side)
    size = grid * encoder.module.patch_px
    images = torch.from_numpy(np.ascontiguousarray(tiles)).permute(0, 3, 1, 2).float().div_(255)
    if size != side:
        images = torch.nn.functional.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
    mask = None if boxes is None else torch.from_numpy(box_masks(boxes, side, grid))
    attention = encoder.module.obj_attention(normalise(images, encoder.mean, encoder.std), mask)
    return attention.reshape(-1, grid, grid).numpy()
