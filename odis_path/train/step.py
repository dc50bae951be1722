"""One training step: views to tokens to losses, student against teacher."""

from __future__ import annotations

from collections.abc import Iterable
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor, nn

from odis_path.data.colour import apply_colours
from odis_path.data.views import cut_views, normalise
from odis_path.losses import Center, cross_view_loss, entropy, masked_patch_loss
from odis_path.model.head import DinoHead
from odis_path.model.vit import ObjViT, build_encoder
from odis_path.train.config import PretrainConfig
from odis_path.train.schedule import StepValues


class Views(NamedTuple):
    """A batch on the device: images normalised, view-major (view * B + tile)."""

    globals_: Tensor  # float (2B, 3, g, g)
    locals_: Tensor  # float (LB, 3, l, l), L may be 0
    mask_global: Tensor | None  # bool (2B, N)
    mask_local: Tensor | None  # bool (LB, N')
    hidden: Tensor  # bool (2B, N)
    hidden_rows: Tensor  # int64 (n,), rows of the flattened hidden
    seen: Tensor  # bool (2 + L, B)


class Encoded(NamedTuple):
    """Head outputs: obj (V, B, K) logits, patches (n, K) logits of the hidden patches (None without patch loss).

    token: (2B, D) [OBJ] embeddings of the global views, before the head.
    """

    obj: Tensor
    patches: Tensor | None
    token: Tensor


class Network(nn.Module):
    """Encoder and head(s); the student is wrapped in DistributedDataParallel whole, so a step is one wrapped forward."""

    def __init__(self, encoder: ObjViT, head: DinoHead, patch_head: DinoHead | None) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.patch_head = patch_head  # None: shared with [OBJ]

    def forward(self, views: Views, *, with_locals: bool, hide: bool, patches: bool) -> Encoded:
        """hide: replace hidden patches by the mask token (the student); patches: project the hidden patches."""
        batch = views.seen.shape[1]
        tokens = self.encoder(views.globals_, views.mask_global, views.hidden if hide else None)
        obj = [tokens.obj]
        if with_locals and len(views.locals_):
            obj.append(self.encoder(views.locals_, views.mask_local).obj)
        logits = self.head(torch.cat(obj)).unflatten(0, (-1, batch))
        if not patches:
            return Encoded(logits, None, tokens.obj)
        chosen = tokens.patches.flatten(0, 1)[views.hidden_rows]
        return Encoded(logits, (self.patch_head or self.head)(chosen), tokens.obj)


def build_network(config: PretrainConfig, *, student: bool) -> Network:
    """Student (drop path on) or teacher of a configuration."""
    m, h = config.model, config.head
    encoder = build_encoder(
        m.name, m.kwargs, weights=m.weights, drop_path=m.drop_path if student else 0.0, pool=m.pool,
        checkpoint_blocks=m.checkpoint_blocks and student,
    )  # fmt: skip

    def head() -> DinoHead:
        return DinoHead(
            encoder.embed_dim, h.out_dim, hidden_dim=h.hidden_dim, bottleneck_dim=h.bottleneck_dim, layers=h.layers,
            norm_last_layer=h.norm_last_layer,
        )  # fmt: skip

    network = Network(encoder, head(), head() if config.loss.patch_weight and not h.shared else None)
    if not config.loss.patch_weight:
        network.encoder.mask_token.requires_grad_(False)  # unused in a step, it would stop DistributedDataParallel
    return network


def make_views(batch: dict[str, Tensor], config: PretrainConfig, tile_px: int, device: torch.device) -> Views:
    """Cut, colour and normalise all views of a collated batch, on the device."""
    v, d = config.views, config.data
    moved = {key: value.to(device, non_blocking=True) for key, value in batch.items() if key not in ("target", "rects")}
    tiles = moved["tile"].permute(0, 3, 1, 2).float().div_(255)
    colours = moved["colours"]
    images = cut_views(tiles, moved["theta_global"], v.global_size, sqrt(v.global_scale[1]) * tile_px / v.global_size)
    images = normalise(apply_colours(images, colours[:2].flatten(0, 1), moved["blurred_global"]), d.mean, d.std)
    local = images.new_zeros(0, 3, v.local_size, v.local_size)
    if v.local_count:
        local = cut_views(tiles, moved["theta_local"], v.local_size, sqrt(v.local_scale[1]) * tile_px / v.local_size)
        local = normalise(apply_colours(local, colours[2:].flatten(0, 1), moved["blurred_local"]), d.mean, d.std)
    masked = config.target.mask
    return Views(
        images, local,
        moved["mask_global"].flatten(0, 1) if masked else None,
        moved["mask_local"].flatten(0, 1) if masked and v.local_count else None,
        moved["hidden"].flatten(0, 1), moved["hidden_rows"], moved["seen"],
    )  # fmt: skip


class Criterion(nn.Module):
    """The weighted sum of the [OBJ] loss and the patch loss, with their centers."""

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__()
        self.config = config.loss
        self.obj_center = Center(config.head.out_dim, config.loss.center_momentum)
        self.patch_center = Center(config.head.out_dim, config.loss.center_momentum)

    def forward(self, teacher: Encoded, student: Encoded, views: Views, temperature: float) -> dict[str, Tensor]:
        """Losses of a batch and figures for the log; updates the centers after they were used (DINO eq. 4)."""
        c = self.config
        seen = views.seen.float()
        probabilities = self.obj_center.sharpen(teacher.obj, temperature)
        obj = cross_view_loss(probabilities, student.obj, c.student_temperature, seen)
        self.obj_center.update(teacher.obj.flatten(0, 1), seen[: len(teacher.obj)].flatten())
        loss, patch = c.obj_weight * obj, obj.new_zeros(())
        if teacher.patches is not None and student.patches is not None:
            images, patches = views.hidden.shape
            rows, image, counts = views.hidden_rows, views.hidden_rows // patches, None
            keep = torch.ones_like(rows, dtype=torch.bool)
            if c.patch_in_box_only and views.mask_global is not None:
                keep = views.mask_global.flatten()[rows]
                counts = (views.hidden & views.mask_global).sum(1)
            target = self.patch_center.sharpen(teacher.patches, temperature)
            target = target * keep[:, None].to(target.dtype)  # a zero target row adds nothing
            patch = masked_patch_loss(target, student.patches, image, images, c.student_temperature, counts)
            self.patch_center.update(teacher.patches, keep)
            loss = loss + c.patch_weight * patch
        return {
            "loss": loss, "loss_obj": obj.detach(), "loss_patch": patch.detach(),
            "teacher_entropy": entropy(probabilities), "token_spread": token_spread(teacher.token),
        }  # fmt: skip


def token_spread(obj: Tensor) -> Tensor:
    """Mean standard deviation of unit [OBJ] embeddings times sqrt(D): 1 for a uniform sphere, 0 when collapsed."""
    unit = torch.nn.functional.normalize(obj.detach().float(), dim=-1)
    return unit.std(0).mean() * sqrt(unit.shape[-1])


def parameter_groups(network: nn.Module) -> list[dict[str, object]]:
    """AdamW groups as in iBOT: no weight decay on biases and 1-D parameters, decay on all else."""
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim <= 1 or name.endswith(".bias") else decay).append(parameter)
    return [{"params": decay, "decays": True}, {"params": plain, "decays": False}]


def set_schedule(optimizer: torch.optim.Optimizer, values: StepValues) -> None:
    """Write this step's learning rate and weight decay into the optimizer."""
    for group in optimizer.param_groups:
        group["lr"] = values.lr
        group["weight_decay"] = values.weight_decay if group["decays"] else 0.0


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], limit: float, mode: str) -> None:
    """Scale gradients down to `limit`: each parameter's norm (iBOT's recipe) or the norm of all together. 0: off."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if not limit or not grads:
        return
    norms = torch.stack(torch._foreach_norm(grads))
    if mode == "global":
        norms = norms.norm().expand(len(grads))
    factors = (limit / (norms + 1e-6)).clamp_max(1.0)
    torch._foreach_mul_(grads, list(factors.unbind()))


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """EMA by name over parameters (teacher <- m teacher + (1 - m) student); buffers are copied."""
    mine, theirs = dict(teacher.named_parameters()), dict(student.named_parameters())
    torch._foreach_lerp_(list(mine.values()), [theirs[name] for name in mine], 1.0 - momentum)
    source = dict(student.named_buffers())
    for name, buffer in teacher.named_buffers():
        buffer.copy_(source[name])
