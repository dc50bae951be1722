"""Optimisation: schedules as pure functions of the step, parameter groups, clipping, the teacher's update."""

from __future__ import annotations

from collections.abc import Iterable
from math import cos, pi
from typing import Any, NamedTuple

import torch
from torch import nn

from odis_path.config import PretrainConfig
from odis_path.model.network import Network


def parameter_groups(network: Network, layer_decay: float = 1.0, *, decay_gain: bool = False) -> list[dict[str, Any]]:
    """Group parameters for AdamW: no decay of biases and 1-D ones as in iBOT; layer-wise learning rates as in BEiT.

    decay_gain: the gain of the last layer decays too; iBOT's is a column, and so not 1-D.

    A block's rate is layer_decay times the next one's; heads, [OBJ] extras and the last norm have the full rate, tokens,
    position and patch embedding that of a block before the first.
    """
    depth = len(network.encoder.vit.blocks)
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            decays = (parameter.ndim > 1 and not name.endswith(".bias")) or (decay_gain and name.endswith("last_layer.gain"))
            groups.setdefault((decays, layer_decay ** (depth + 1 - layer_of(name, depth))), []).append(parameter)
    return [{"params": parameters, "decays": decays, "lr_scale": scale} for (decays, scale), parameters in groups.items()]


def layer_of(name: str, depth: int) -> int:
    """Return the depth of a parameter: 0 before the first block, i + 1 for block i, depth + 1 after the last."""
    if name.startswith("encoder.vit.blocks."):
        return int(name.split(".")[3]) + 1
    early = ("patch_embed.", "cls_token", "reg_token", "pos_embed", "norm_pre.", "rope.")
    return 0 if name.removeprefix("encoder.vit.").startswith(early) else depth + 1


def set_schedule(optimizer: torch.optim.Optimizer, values: StepValues) -> None:
    """Write this step's learning rate and weight decay into the optimizer."""
    for group in optimizer.param_groups:
        group["lr"] = values.lr * group["lr_scale"]
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
    """Move the teacher by name, m teacher + (1 - m) student, over parameters; buffers are copied."""
    averaged, current = dict(teacher.named_parameters()), dict(student.named_parameters())
    torch._foreach_lerp_(list(averaged.values()), [current[name] for name in averaged], 1.0 - momentum)
    buffers = dict(student.named_buffers())
    for name, buffer in teacher.named_buffers():
        buffer.copy_(buffers[name])


class StepValues(NamedTuple):
    """Scheduled values of one step."""

    lr: float
    weight_decay: float
    ema: float
    teacher_temperature: float
    last_layer_frozen: bool
    backbone_frozen: bool


def cosine(start: float, end: float, at: float) -> float:
    """Go from `start` at 0 to `end` at 1 along half a cosine."""
    return end + 0.5 * (start - end) * (1 + cos(pi * min(1.0, max(0.0, at))))


def step_values(config: PretrainConfig, step: int, steps_per_epoch: int, total_steps: int) -> StepValues:
    """Compute all scheduled values at a step (0-based), as in DINO's recipe: warm-up then cosine, per step, not per epoch."""
    o, loss = config.optim, config.loss
    peak = o.lr * o.batch_size / 256
    warm = min(int(o.warmup_epochs * steps_per_epoch), total_steps - 1)
    if step < warm:
        lr = peak * (step + 1) / warm
    else:
        lr = cosine(peak, min(o.min_lr, peak), (step - warm) / max(1, total_steps - warm))
    at = step / max(1, total_steps)
    heat = loss.teacher_temperature_epochs * steps_per_epoch
    low, high = loss.teacher_temperature
    temperature = high if heat <= 0 else low + (high - low) * min(1.0, step / heat)
    return StepValues(
        lr,
        cosine(*o.weight_decay, at),
        cosine(*o.ema, at),
        temperature,
        step < o.freeze_last_layer_epochs * steps_per_epoch,
        step < o.freeze_backbone_epochs * steps_per_epoch,
    )
