"""The two losses of a step and their centers, exact over any number of ranks.

Equations: DINO (arXiv 2104.14294, eq. 1 and 4), iBOT (arXiv 2111.07832, eq. 3), ODIS (arXiv 2506.05409). Every mean over
samples is a sum over all ranks divided by a count over all ranks; `world` undoes the division by world size that
DistributedDataParallel applies to gradients.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odis_path.distributed import all_reduce_sum, world_size


class Center(nn.Module):
    """The running mean of teacher logits: c <- m c + (1 - m) sum / count (DINO eq. 4).

    Sum and count are over all ranks and over all micro-batches of a step: `accumulate` each, then `update` once.
    """

    value: Tensor

    def __init__(self, dim: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(dim))
        self._accumulated: Tensor | None = None  # sum and count of the step's micro-batches on this rank

    @torch.no_grad()
    def accumulate(self, logits: Tensor, weight: Tensor | None = None) -> None:
        """Take in the rows of a micro-batch. logits: (n, K); weight: (n,) 0 or 1."""
        logits = logits.to(self.value.dtype)
        if weight is None:
            total, count = logits.sum(0), logits.new_tensor([float(len(logits))])
        else:
            total, count = weight.to(logits.dtype) @ logits, weight.to(logits.dtype).sum()[None]
        packed = torch.cat([total, count])
        self._accumulated = packed if self._accumulated is None else self._accumulated + packed

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the mean of what all ranks accumulated. Nothing happens where no rank has a row."""
        if self._accumulated is None:
            return
        packed, self._accumulated = all_reduce_sum(self._accumulated), None
        mean = packed[:-1] / packed[-1].clamp_min(1)
        moved = torch.lerp(mean, self.value, self.momentum)
        self.value.copy_(torch.where(packed[-1] > 0, moved, self.value))


def teacher_probabilities(logits: Tensor, center: Tensor, temperature: float | Tensor) -> Tensor:
    """Compute softmax((z - c) / tau), in the type of the center: (.., K), (K,) -> (.., K)."""
    return F.softmax((logits.to(center.dtype) - center) / temperature, dim=-1)


def count_view_pairs(seen: Tensor, queries: int = 2) -> Tensor:
    """Count pairs of a teacher view and another student view: bool or 0 and 1 (V, ...), globals first -> scalar."""
    seen = seen.to(torch.float64)
    return (seen[:queries].sum(0) * seen.sum(0)).sum() - seen[:queries].sum()


def cross_view_loss(
    teacher: Tensor, student_logits: Tensor, temperature: float, weight: Tensor | None = None, pairs: Tensor | None = None
) -> Tensor:
    """Compute L_obj, the mean over teacher view q and student view v != q of H(P_t(q), P_s(v)).

    teacher: probabilities (Q, B, K) of the global views; student_logits: (V, B, K), the first Q of them the same
    views; weight: (V, B), 0 where a view lacks its box, so that no pair with it counts. pairs: how many pairs count over all
    ranks, of this batch if None; in a step of several micro-batches their mean, since their losses are averaged. Returns a
    scalar.
    """
    log_student = F.log_softmax(student_logits.to(teacher.dtype) / temperature, dim=-1)
    losses = -torch.einsum("qbk,vbk->qvb", teacher, log_student)
    queries, views, _ = losses.shape
    different = ~torch.eye(queries, views, dtype=torch.bool, device=losses.device)[:, :, None]
    pair_weight = different.to(losses.dtype).expand_as(losses)
    if weight is not None:
        pair_weight = pair_weight * weight[None].to(losses.dtype) * weight[:queries, None].to(losses.dtype)
    count = all_reduce_sum(pair_weight.sum().detach().clone()) if pairs is None else pairs.to(losses.dtype)
    return (losses * pair_weight).sum() * world_size() / torch.where(count > 0, count, torch.ones_like(count))


def masked_patch_loss(
    teacher: Tensor,
    student_logits: Tensor,
    image: Tensor,
    images: int,
    temperature: float,
    counts: Tensor | None = None,
) -> Tensor:
    """Compute L_patch, the mean over images of sum_i m_i H_i / max(sum m, 1), on masked patches only.

    teacher: probabilities (n, K) of the n masked patches; student_logits: (n, K); image: int64 (n,) the image of each row,
    below `images` (global views of this rank, the same number on every rank); counts: (images,) masked patches an image,
    counted from `image` when None (which a GPU has to be waited for). Images with no masked patch count as zero, as in
    iBOT. Returns a scalar.
    """
    if counts is None:
        counts = torch.bincount(image, minlength=images)
    log_student = F.log_softmax(student_logits.to(teacher.dtype) / temperature, dim=-1)
    loss = -(teacher * log_student).sum(-1)
    share = 1.0 / counts.clamp_min(1).to(loss.dtype)
    return (loss * share[image]).sum() / images


@torch.no_grad()
def entropy(probabilities: Tensor, weight: Tensor | None = None) -> Tensor:
    """Compute the mean entropy of rows in nats: (.., K) -> scalar. log K means uniform, 0 one prototype: both are collapse.

    weight: (..), rows of weight 0 do not count.
    """
    rows: Tensor = -torch.special.xlogy(probabilities, probabilities).sum(-1)
    return rows.mean() if weight is None else (rows * weight).sum() / weight.sum().clamp_min(1)
