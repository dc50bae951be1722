"""Cut, turn and resize the views of a batch on any device: one sampling call a view size."""

from __future__ import annotations

from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor


def cut_views(tiles: Tensor, theta: Tensor, size_px: int, max_shrink: float = 1.0) -> Tensor:
    """Views of tiles by bilinear sampling.

    tiles: float (B, 3, S, S) in [0, 1]; theta: float32 (V, B, 2, 3) from `odis_path.data.crops.view_matrix`. Returns float
    (V * B, 3, size_px, size_px), view-major. Where a view may shrink its crop (max_shrink > 1.5 tile px a view px), it is
    sampled finer and averaged, so that nothing aliases.
    """
    views, batch = theta.shape[:2]
    finer = ceil(max_shrink - 0.5)
    out = size_px * max(1, finer)
    grid = F.affine_grid(theta.reshape(-1, 2, 3).to(tiles.dtype), [views * batch, 3, out, out], align_corners=False)
    source = tiles.expand(views, *tiles.shape).reshape(-1, *tiles.shape[1:])
    images = F.grid_sample(source, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return F.avg_pool2d(images, finer) if finer > 1 else images


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(n, 3, h, w) in [0, 1] to zero mean and unit spread by channel."""
    shift = torch.tensor(mean, device=images.device, dtype=images.dtype)[:, None, None]
    scale = torch.tensor(std, device=images.device, dtype=images.dtype)[:, None, None]
    return (images - shift) / scale
