"""A training step: views of the batch, losses and gradients of its micro-batches, the update of student and teacher."""

from __future__ import annotations

from contextlib import nullcontext
from math import sqrt

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from odis_path.config import PretrainConfig
from odis_path.data.sampler import Batch
from odis_path.data.views import compiled_view_images, view_images
from odis_path.distributed import Ranks, all_reduce_sum
from odis_path.loss.dino_ibot import count_view_pairs
from odis_path.model.network import Views
from odis_path.training.optim import StepValues, clip_gradients, set_schedule, update_teacher
from odis_path.training.setup import Run


def train_step(run: Run, micro_batches: list[Batch], values: StepValues) -> dict[str, Tensor]:
    """Take one optimisation step on a batch; returns losses and figures, means over its micro-batches on this rank."""
    set_schedule(run.optimizer, values)
    torch.manual_seed(step_seed(run.config.run.seed, run.step, run.ranks.rank))  # drop path depends on the step alone
    run.optimizer.zero_grad(set_to_none=True)
    pairs = mean_view_pairs(micro_batches, run.ranks) if len(micro_batches) > 1 else None
    figures: dict[str, Tensor] = {}
    for number, batch in enumerate(micro_batches, 1):
        parts = forward_backward(run, batch, values, last=number == len(micro_batches), pairs=pairs)
        for key, value in parts.items():
            figures[key] = figures.get(key, 0) + value.detach() / len(micro_batches)
    apply_gradients(run, values)
    return figures


def step_seed(seed: int, step: int, rank: int) -> int:
    """Derive a seed for the random layers of one step on one rank."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


def mean_view_pairs(micro_batches: list[Batch], ranks: Ranks) -> Tensor:
    """Count the pairs of views that weigh in a step, over all ranks, a micro-batch: losses then add up to the batch's."""
    count = torch.stack([count_view_pairs(batch.views.object_visible) for batch in micro_batches]).mean()
    return all_reduce_sum(count.to(ranks.device))


def forward_backward(
    run: Run, batch: Batch, values: StepValues, *, last: bool, pairs: Tensor | None = None
) -> dict[str, Tensor]:
    """Compute losses of one micro-batch and their gradients (reduced over ranks on the last one)."""
    config = run.config
    with_patches = config.loss.patch_weight > 0
    patch_mean = config.loss.patch_center == "all" and config.loss.centering == "center"
    bf16 = config.optim.amp == "bf16" or (config.optim.amp == "auto" and run.ranks.device.type == "cuda")
    with torch.no_grad():
        views = make_views(batch, config, run.ranks.device, compiled=run.compiled)
    with run.wrapped.no_sync() if isinstance(run.wrapped, DistributedDataParallel) and not last else nullcontext():
        with torch.autocast(run.ranks.device.type, torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                teacher = run.teacher(views, with_locals=False, mask_patches=False, patches=with_patches, mean=patch_mean)
            student = run.wrapped(views, with_locals=True, mask_patches=with_patches, patches=with_patches)
        parts: dict[str, Tensor] = run.criterion(teacher, student, views, values.teacher_temperature, pairs=pairs, last=last)
        torch.autograd.backward(parts["loss"] / config.optim.accumulate)
    return parts


def apply_gradients(run: Run, values: StepValues) -> None:
    """Drop gradients of what is frozen, clip the others, step, and move the teacher."""
    if values.last_layer_frozen:
        for head in (run.student.head, run.student.patch_head):
            if head is not None:
                for parameter in head.last_layer.parameters():
                    parameter.grad = None  # as in iBOT: no step and no Adam moments
    if values.backbone_frozen:
        for parameter in run.student.encoder.vit.parameters():
            parameter.grad = None
    clip_gradients(run.student.parameters(), run.config.optim.clip, run.config.optim.clip_mode)
    run.optimizer.step()
    update_teacher(run.teacher, run.student, values.ema)


def make_views(batch: Batch, config: PretrainConfig, device: torch.device, *, compiled: bool = False) -> Views:
    """Cut, colour and normalise all views of a batch on the device; compiled: by kernels made for their sizes."""
    v, d, sampled = config.views, config.data, batch.views
    draw = compiled_view_images() if compiled else view_images

    def moved(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    def images_of(theta: Tensor, colours: Tensor, blurred: Tensor, size_px: int, scale: tuple[float, float]) -> Tensor:
        shrink = sqrt(scale[1]) * pixels.shape[1] / size_px
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
