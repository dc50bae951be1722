"""The parts of a training step around the networks: build the student, cut the views of a batch."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from odis_path.checkpoint import Checkpoint
from odis_path.config import PretrainConfig
from odis_path.data.sampler import Batch
from odis_path.data.views import compiled_view_images, view_images
from odis_path.model.network import Network, Views, build_network
from odis_path.model.vit import ObjViT


def build_student(config: PretrainConfig, checkpoint: Checkpoint | None) -> tuple[PretrainConfig, Network]:
    """The student, with the weights it starts from, or shaped as in the checkpoint that it is to take; and how it pools.

    The configuration comes back with model.pool settled: `auto` is what the weights, or the checkpoint, were trained with.
    """
    if checkpoint is None:
        student = build_network(config, student=True, weights=True)
    else:
        if config.model.pool == "auto":
            config = with_pool(config, checkpoint.config.model.pool)
        student = build_network(config, student=True, like=checkpoint.state["student"])
    return with_pool(config, student.encoder.pool), student


def with_pool(config: PretrainConfig, pool: str) -> PretrainConfig:
    """The configuration with this model.pool."""
    return config.model_copy(update={"model": config.model.model_copy(update={"pool": pool})})


def start_line(config: PretrainConfig, encoder: ObjViT) -> str:
    """Describe the start of a run, in a line: the layout of its weights, how they pool, the size they were trained at."""
    loaded, m = encoder.loaded, config.model
    assert loaded is not None
    obj = encoder.pool == "obj"
    parts = [f"{loaded.layout} layout, {loaded.loaded} tensors"]
    parts.append("[OBJ] goes on from the class token" if obj else "pooled by the mean of in-box patches (model.pool=linear)")
    size, other = config.views.global_size, ", positions are interpolated" if encoder.has_positions else ""
    if encoder.trained_px is not None:
        same = size == encoder.trained_px
        parts.append(f"views.global_size={size}, " + ("as trained" if same else f"trained at {encoder.trained_px} px{other}"))
    if encoder.norm is not None and encoder.norm != (config.data.mean, config.data.std):
        mean, std = (list(values) for values in encoder.norm)
        parts.append(f"trained with another mean and std: set data.mean={mean} data.std={std}")
    source = m.name if m.weights == "timm" else m.weights
    return f"start weights {source}: {'; '.join(parts)}{encoder.adapted()}"


def make_views(batch: Batch, config: PretrainConfig, tile_px: int, device: torch.device, *, compiled: bool = False) -> Views:
    """Cut, colour and normalise all views of a batch on the device; compiled: by kernels made for their sizes."""
    v, d, sampled = config.views, config.data, batch.views
    draw = compiled_view_images() if compiled else view_images

    def moved(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    def images_of(theta: Tensor, colours: Tensor, blurred: Tensor, size_px: int, scale: tuple[float, float]) -> Tensor:
        shrink = sqrt(scale[1]) * tile_px / size_px
        return draw(pixels, moved(theta), colours, None if compiled else moved(blurred), size_px, shrink, d.mean, d.std)

    pixels, colours = moved(batch.pixels), moved(sampled.colours)
    images = images_of(sampled.theta_global, colours[:2], batch.blurred_global, v.global_size, v.global_scale)
    local = images.new_zeros(0, 3, v.local_size, v.local_size)
    if v.local_count:
        local = images_of(sampled.theta_local, colours[2:], batch.blurred_local, v.local_size, v.local_scale)
    masks_global = masks_local = None
    if config.target.mask:
        masks_global = moved(sampled.object_masks_global).flatten(0, 1)
        masks_local = moved(sampled.object_masks_local).flatten(0, 1) if v.local_count else None
        if config.loss.image_weight:
            masks_global = add_whole_image(masks_global)
            masks_local = None if masks_local is None else add_whole_image(masks_local)
    masked = moved(sampled.masked_patches).flatten(0, 1)
    return Views(images, local, masks_global, masks_local, masked, moved(batch.masked_rows), moved(sampled.object_visible))


def add_whole_image(masks: Tensor) -> Tensor:
    """Add to masks (B, K, N) one more object that is the whole image."""
    return torch.cat([masks, torch.ones_like(masks[:, :1])], dim=1)
