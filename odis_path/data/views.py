"""Cut, turn, resize, colour and normalise the views of a batch on any device: one sampling call a view size."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from odis_path.data.augment import apply_colours


def cut_views(tiles: Tensor, theta: Tensor, size_px: int, max_shrink: float = 1.0) -> Tensor:
    """Cut views of tiles by bilinear sampling.

    tiles: float (B, 3, S, S) in [0, 1]; theta: float32 (V, B, 2, 3) from `odis_path.data.crops.crop_matrices`. Returns float
    (V * B, 3, size_px, size_px), view-major. Where a view may shrink its crop (max_shrink > 1.5 tile px a view px), it is
    sampled finer and averaged, so that nothing aliases.
    """
    views, batch = theta.shape[:2]
    finer = max(1, ceil(max_shrink - 0.5))
    out = size_px * finer
    # All views of a tile below each other in one sampling grid: the tile itself is never copied.
    affine = theta.transpose(0, 1).reshape(-1, 2, 3).to(tiles.dtype)
    grid = F.affine_grid(affine, [views * batch, 3, out, out], align_corners=False).view(batch, views * out, out, 2)
    images = F.grid_sample(tiles, grid, mode="bilinear", padding_mode="border", align_corners=False)
    images = images.reshape(batch, 3, views, out, out).permute(2, 0, 1, 3, 4).flatten(0, 1)
    return F.avg_pool2d(images, finer) if finer > 1 else images


def view_images(
    tiles: Tensor,
    theta: Tensor,
    colours: Tensor,
    blurred: Tensor | None,
    size_px: int,
    max_shrink: float,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Tensor:
    """Make all views of one size of a batch, ready for the network.

    tiles: uint8 (B, S, S, 3); theta: (V, B, 2, 3), see `cut_views`; colours: (V, B, 24) and blurred, see `apply_colours`.
    Returns float32 (V * B, 3, size_px, size_px), view-major.
    """
    images = cut_views(tiles.permute(0, 3, 1, 2).float() / 255, theta, size_px, max_shrink)
    return normalise(apply_colours(images, colours.flatten(0, 1), blurred), mean, std)


@cache
def compiled_view_images() -> Callable[..., Tensor]:
    """Compile `view_images` to a few kernels, in place of a hundred passes over memory; give it blurred=None."""
    return torch.compile(view_images, dynamic=False)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Bring (n, 3, h, w) in [0, 1] to zero mean and unit spread by channel."""
    shift = torch.tensor(mean, device=images.device, dtype=images.dtype)[:, None, None]
    scale = torch.tensor(std, device=images.device, dtype=images.dtype)[:, None, None]
    return (images - shift) / scale
