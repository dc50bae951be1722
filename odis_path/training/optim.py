"""Optimisation: schedules as pure functions of the step, parameter groups, clipping, the teacher's update."""

from __future__ import annotations

from collections.abc import Iterable
from math import cos, log, pi
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from odis_path.config import OptimConfig, PretrainConfig
from odis_path.model.network import Network

EMA_START = 0.996  # the published one
START_LEFT = 0.05  # share of the start weights that a derived schedule leaves in the teacher, at most
WARMUP_SHARE, WARMUP_EPOCHS = 0.1, 10.0  # of a derived warm-up: share of the run, and at most the published epochs


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


def ema_ends(optim: OptimConfig, total_steps: int) -> tuple[float, float]:
    """Return the teacher's first and last momentum.

    auto: m_t = 1 - (1 - s) c_t along half a cosine c_t, whose sum over T steps is (T + 1) / 2, and log m <= m - 1: the product
    of all momenta is at most exp(-(1 - s) (T + 1) / 2), which s = 1 - 2 ln(1 / START_LEFT) / (T + 1) makes START_LEFT.
    """
    if not isinstance(optim.ema, str):
        return optim.ema
    return min(EMA_START, max(0.0, 1 - 2 * log(1 / START_LEFT) / (total_steps + 1))), 1.0


def start_left(ema: tuple[float, float], total_steps: int) -> float:
    """Return the share of the start weights in the teacher after a run: the product of the momenta of its steps."""
    start, end = ema
    momenta = end + 0.5 * (start - end) * (1 + np.cos(np.pi * np.arange(total_steps) / max(1, total_steps)))
    return float(np.prod(momenta))


def warmup_epochs(optim: OptimConfig) -> float:
    """Return the epochs over which the learning rate rises."""
    given = optim.warmup_epochs
    return min(WARMUP_EPOCHS, WARMUP_SHARE * optim.epochs) if isinstance(given, str) else given


def with_schedules(config: PretrainConfig, total_steps: int) -> PretrainConfig:
    """Return the configuration with numbers in place of auto, as a run of this length takes them."""
    o = config.optim
    numbers = {"warmup_epochs": warmup_epochs(o), "ema": ema_ends(o, total_steps)}
    return config.model_copy(update={"optim": o.model_copy(update=numbers)})


def with_schedules_of(config: PretrainConfig, begun: PretrainConfig) -> PretrainConfig:
    """Return the configuration with what a run began with in place of auto, whatever would be derived now."""
    numbers = {key: getattr(begun.optim, key) for key in ("warmup_epochs", "ema") if getattr(config.optim, key) == "auto"}
    return config.model_copy(update={"optim": config.optim.model_copy(update=numbers)})


def schedules_line(config: PretrainConfig, steps_per_epoch: int, total_steps: int) -> str:
    """Describe what the schedules of a configuration leave to the length of the run, in a line; empty where nothing."""
    o, parts = config.optim, []
    if o.warmup_epochs == "auto":
        epochs = warmup_epochs(o)
        parts.append(f"warm-up of {int(epochs * steps_per_epoch)} steps (optim.warmup_epochs={epochs:.4g})")
    if o.ema == "auto":
        (first, last), left = (ends := ema_ends(o, total_steps)), start_left(ends, total_steps)
        parts.append(f"teacher's momentum from {first:.4g} to {last:g} (optim.ema), {left:.1%} of the start weights stay in it")
    return f"schedules of {total_steps} steps: {'; '.join(parts)}" if parts else ""


def step_values(config: PretrainConfig, step: int, steps_per_epoch: int, total_steps: int) -> StepValues:
    """Compute all scheduled values at a step (0-based), as in DINO's recipe: warm-up then cosine, per step, not per epoch."""
    o, loss = config.optim, config.loss
    peak = o.lr * o.batch_size / 256
    warm = min(int(warmup_epochs(o) * steps_per_epoch), total_steps - 1)
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
        cosine(*ema_ends(o, total_steps), at),
        temperature,
        step < o.freeze_last_layer_epochs * steps_per_epoch,
        step < o.freeze_backbone_epochs * steps_per_epoch,
    )
