"""Regularisers that spread embeddings over the sphere: KoLeo and KDE, exact over any number of ranks.

Both look at all rows of all ranks: a row is pushed away from rows of other ranks too, and its gradient holds what the
losses of other ranks send it. As in `losses`, the loss of a rank is the sum over its rows * world / count over all ranks,
so that the mean of gradients in DistributedDataParallel is the gradient of one rank with all rows.

Give them one view at a time: two views of a tile belong together and must not push each other apart.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from odis_path.distributed import world_size

EPSILON = 1e-8  # in the log of KoLeo: two equal rows cost log(1e8), not infinity


def koleo(tokens: Tensor, weight: Tensor | None = None, rows: int | None = None) -> Tensor:
    """Compute -mean_i log(min_{j != i} ||z_i - z_j|| + 1e-8), z the tokens at unit length: (n, D) -> scalar, to be minimised.

    The Kozachenko-Leonenko estimate of the entropy, with the sign turned (Sablayrolles et al., arXiv 1806.03198;
    DINOv2, arXiv 2304.07193). The nearest row is looked up without gradient, its distance computed again with it; two equal
    rows have gradient 0.

    weight: (n,) 0 or 1; a row of weight 0 is neither i nor j. n may differ between ranks and be 0; fewer than two rows
    of weight 1 in all give 0, with a graph. rows: the largest n of all ranks, where the caller knows it: without it, two
    or more ranks have to wait for each other's n. float32, or float64 if the tokens are, also under autocast.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        pool = _pool_of_ranks(tokens, weight, rows)
        if not len(pool.all_rows):
            return pool.own.sum()
        with torch.no_grad():
            nearest = (pool.own @ pool.all_rows.T).masked_fill(~pool.pairs, -torch.inf).argmax(1)
        difference = torch.where(pool.counted[:, None], pool.own - pool.all_rows[nearest], 1.0)
        distance = torch.linalg.vector_norm(difference, dim=1)
        return pool.mean(-(distance + EPSILON).log())


def kde(tokens: Tensor, concentration: float = 5.0, weight: Tensor | None = None, rows: int | None = None) -> Tensor:
    """Compute mean_i log sum_{j != i} exp(k z_i.z_j), z the tokens at unit length: (n, D) -> scalar, to be minimised.

    The log density at each row that a von Mises-Fisher kernel of concentration k puts there from all other rows, without
    its constant (Wang and Isola, arXiv 2005.10242; in place of KoLeo in Virchow2, arXiv 2408.00738). It is lower the
    further rows are apart. weight, rows and ranks as in `koleo`.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        pool = _pool_of_ranks(tokens, weight, rows)
        scores = (concentration * pool.own @ pool.all_rows.T).masked_fill(~pool.pairs, -torch.inf)
        scores = torch.where(pool.counted[:, None], scores, 0.0)  # a row of -inf alone would have a gradient of NaN
        return pool.mean(torch.logsumexp(scores, dim=1))


class _Pool(NamedTuple):
    """The rows of this rank among those of all ranks, padding included; all of them at unit length."""

    own: Tensor  # (n, D)
    all_rows: Tensor  # (M, D)
    pairs: Tensor  # bool (n, M), row j of `every` is another row than i, and of weight 1
    counted: Tensor  # bool (n,), row i has weight 1 and there is another one
    total: Tensor  # int64 scalar, rows of weight 1 on all ranks

    def mean(self, values: Tensor) -> Tensor:
        """Compute the share of this rank of the mean over all rows, times world: (n,) -> scalar."""
        return torch.where(self.counted, values, 0.0).sum() * world_size() / self.total.clamp_min(1)


def _pool_of_ranks(tokens: Tensor, weight: Tensor | None, rows: int | None) -> _Pool:
    """Bring rows to unit length and gather them; what a row of weight 0 holds is dropped first, NaN too."""
    n = len(tokens)
    keep = torch.ones(n, dtype=torch.bool, device=tokens.device) if weight is None else weight > 0
    tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32)).masked_fill(~keep[:, None], 0)
    own = F.normalize(tokens, dim=1)
    all_rows, live, first = own, keep, 0
    if world_size() > 1:
        rows = _largest(n, tokens.device) if rows is None else rows
        if n > rows:
            raise ValueError(f"{n} rows on rank {dist.get_rank()}, but rows={rows}")
        block = F.pad(torch.cat([own, keep[:, None].to(own.dtype)], dim=1), (0, 0, 0, rows - n))
        all_rows = _Gather.apply(block)
        first = rows * dist.get_rank()
        all_rows, live = all_rows[:, :-1], all_rows[:, -1].detach() > 0
    other = (
        torch.arange(len(all_rows), device=all_rows.device) != torch.arange(first, first + n, device=all_rows.device)[:, None]
    )
    total = live.sum()
    return _Pool(own, all_rows, other & live, keep & (total > 1), total)


def _largest(n: int, device: torch.device) -> int:
    """Find the largest n of all ranks. Waits for the device."""
    size = torch.tensor(n, device=device)
    dist.all_reduce(size, op=dist.ReduceOp.MAX)
    return int(size.item())


class _Gather(torch.autograd.Function):
    """Blocks (rows, C) of all ranks end to end, (world * rows, C). Backward: the sum over ranks of the gradients."""

    @staticmethod
    def forward(ctx: Any, block: Tensor) -> Tensor:
        ctx.rows = len(block)
        parts = [torch.empty_like(block) for _ in range(world_size())]
        dist.all_gather(parts, block.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        first = ctx.rows * dist.get_rank()
        return total[first : first + ctx.rows]
