"""The parts of a training step around the networks: build the student, cut the views of a batch."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from odis_path.checkpoint import Checkpoint
from odis_path.config import PretrainConfig
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


def make_views(
    batch: dict[str, Tensor], config: PretrainConfig, tile_px: int, device: torch.device, *, compiled: bool = False
) -> Views:
    """Cut, colour and normalise all views of a collated batch, on the device; compiled: by kernels made for their sizes."""
    v, d = config.views, config.data
    moved = {key: value.to(device, non_blocking=True) for key, value in batch.items() if key not in ("target", "rects", "lost")}

    def images_of(kind: str, colours: Tensor, size_px: int, scale: tuple[float, float]) -> Tensor:
        draw = compiled_view_images() if compiled else view_images
        blurred = None if compiled else moved[f"blurred_{kind}"]
        shrink = sqrt(scale[1]) * tile_px / size_px
        return draw(moved["tile"], moved[f"theta_{kind}"], colours, blurred, size_px, shrink, d.mean, d.std)

    images = images_of("global", moved["colours"][:2], v.global_size, v.global_scale)
    local = images.new_zeros(0, 3, v.local_size, v.local_size)
    if v.local_count:
        local = images_of("local", moved["colours"][2:], v.local_size, v.local_scale)
    mask_global = mask_local = None
    seen = moved["seen"]
    if config.target.mask:
        mask_global = moved["mask_global"].flatten(0, 1)
        mask_local = moved["mask_local"].flatten(0, 1) if v.local_count else None
        if config.loss.image_weight:
            mask_global, mask_local = add_whole_image(mask_global), None if mask_local is None else add_whole_image(mask_local)
    return Views(images, local, mask_global, mask_local, moved["hidden"].flatten(0, 1), moved["hidden_rows"], seen)


def add_whole_image(mask: Tensor) -> Tensor:
    """Masks (B, K, N) with one more object that is the whole image."""
    return torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
