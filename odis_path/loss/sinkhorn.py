"""Sinkhorn-Knopp: teacher assignments that use all prototypes equally, the other way to keep a teacher from collapse.

Equations: SwAV (arXiv 2006.09882, sec. 3), in the place of softmax and center as in DINOv2 (arXiv 2304.07193).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from odis_path.distributed import all_reduce_sum, world_size


@torch.no_grad()
def sinkhorn(logits: Tensor, temperature: float, weight: Tensor | None = None, iterations: int = 3) -> Tensor:
    """Compute Q: exp(z / tau), its columns and then its rows divided by their sums, `iterations` times: (n, K) -> (n, K).

    logits: (n, K) rows of this rank; n may differ between ranks and be 0, columns are summed over all ranks. weight: (n,)
    0 or 1; a row of weight 0, whatever is in it, takes no part and comes out as zeros. All other rows sum to 1. float32,
    or float64 if the logits are. Every rank has to call. Zero iterations are a softmax.

    Computed as log Q, with the largest value of a sum taken out before exp, so that a row far below the largest logit of
    the batch does not underflow to 0 / 0. The 1 / K and 1 / B of the marginals cancel in the division of the rows.
    """
    log = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    keep = torch.ones(len(log), dtype=torch.bool, device=log.device) if weight is None else weight > 0
    log = log.masked_fill(~keep[:, None], 0)
    row = torch.zeros_like(log[:, :1]).masked_fill(~keep[:, None], -torch.inf)
    column = log.new_zeros(log.shape[1])
    for step in range(iterations):
        if step:
            row = torch.where(keep[:, None], -torch.logsumexp(log - column, dim=1, keepdim=True), row)
        column = _logsumexp_of_ranks(torch.logsumexp(log + row, dim=0))
    return F.softmax(log - column, dim=1).masked_fill(~keep[:, None], 0)


def _logsumexp_of_ranks(local: Tensor) -> Tensor:
    """Compute log of the sum over ranks of exp: (K,) of this rank, -inf where it has no row -> (K,), alike on all ranks."""
    if world_size() == 1:
        return local
    top = local.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX)
    return top + all_reduce_sum((local - top).exp()).log()
