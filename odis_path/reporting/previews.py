"""Pictures for the report: the pair of crops of a tile, and where [OBJ] looks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from odis_path.config import PretrainConfig
from odis_path.data.crops import Crop, turn_grid
from odis_path.data.tile_index import index_tiles
from odis_path.data.windows import training_samples
from odis_path.embedding.encoder import box_masks, load_encoder
from odis_path.reporting.figures.tiles import CropPair
from tiling.slide_file.read import SlideFile


def crop_pair(slide_file: Path, row: int, config: PretrainConfig, patch_px: int = 16, epoch: int = 0) -> CropPair:
    """Draw both global crops of a tile as in training, before colours change: of the tile, or of a window around its target.

    patch_px: side of the network's patches.
    """
    index = index_tiles(slide_file.parent)
    samples = training_samples(index, config, patch_px)
    sampled = samples.sample_tile(np.random.default_rng([config.run.seed, epoch, row]), index.paths.index(slide_file), row)
    tile, _, target, views = sampled[0] if isinstance(sampled, list) else sampled
    with SlideFile(slide_file) as file:
        boxes = target[None] if config.views.window_um else file.boxes(row)
    crops = [Crop(*rect) for rect in views.rects[:2].tolist()]
    grid = samples.grids[0]
    masks = [mask[0].reshape(grid, grid) for mask in views.object_masks_global]
    return CropPair(tile, boxes, target, views.rects[:2, :4], [_cut(tile, crop) for crop in crops], masks)


def _cut(tile: np.ndarray, crop: Crop) -> np.ndarray:
    from PIL import Image

    part = Image.fromarray(tile[crop.y : crop.y + crop.h, crop.x : crop.x + crop.w])
    return np.ascontiguousarray(turn_grid(np.asarray(part.resize((crop.size_px, crop.size_px))), crop.turn))


@torch.inference_mode()
def obj_attention(checkpoint: str | Path, tiles: np.ndarray, boxes: np.ndarray | None = None) -> np.ndarray:
    """Return the last-layer attention of [OBJ] over patches, float32 (n, g, g).

    tiles: uint8 (n, S, S, 3). boxes: float32 (n, 4) in px of the tiles, what it is kept to; None: nothing.
    """
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
