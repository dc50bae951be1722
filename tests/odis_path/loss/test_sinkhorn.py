"""Sinkhorn-Knopp against the plain algorithm on probabilities, over ranks, and at extreme logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from odis_path.loss.sinkhorn import sinkhorn
from tests.odis_path.conftest import NoWaiting
from tests.odis_path.ranks import on_two_ranks


def plain_sinkhorn(logits: Tensor, temperature: float, iterations: int) -> Tensor:
    """The algorithm as SwAV prints it: Q is (K, B), rows to 1 / K, columns to 1 / B, in turn; at last columns to 1."""
    z = logits.double().numpy().T / temperature
    q = np.exp(z - z.max())
    q /= q.sum()
    prototypes, batch = q.shape
    for _ in range(iterations):
        for k in range(prototypes):
            q[k] /= q[k].sum() * prototypes
        for b in range(batch):
            q[:, b] /= q[:, b].sum() * batch
    return torch.from_numpy((q * batch).T)


def some_logits(n: int = 13, k: int = 6) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


@pytest.mark.parametrize("iterations", [1, 3, 8])
def test_assignments_are_those_of_the_plain_algorithm(iterations: int) -> None:
    z = some_logits()
    ours = sinkhorn(z, 0.3, iterations=iterations)
    assert ours.dtype == torch.float64
    assert torch.allclose(ours, plain_sinkhorn(z, 0.3, iterations), atol=1e-12)
    assert torch.allclose(ours.sum(1), torch.ones(13, dtype=torch.float64), atol=1e-12)


def test_two_rows_by_hand() -> None:
    """exp(z / tau) = [[1, 2], [1, 1]]: columns / (2, 3), rows / (7/6, 5/6)."""
    z = 0.5 * torch.tensor([[1.0, 2.0], [1.0, 1.0]], dtype=torch.float64).log()
    expected = torch.tensor([[3 / 7, 4 / 7], [3 / 5, 2 / 5]], dtype=torch.float64)
    assert torch.allclose(sinkhorn(z, 0.5, iterations=1), expected, atol=1e-14)
    assert torch.allclose(sinkhorn(z, 0.5, iterations=0), (2 * z).softmax(1), atol=1e-14)


def test_rows_of_weight_0_take_no_part_whatever_they_hold() -> None:
    z = some_logits()
    weight = torch.ones(13)
    weight[[0, 5, 12]] = 0
    z[0], z[5], z[12] = float("nan"), float("inf"), -1e30
    ours = sinkhorn(z, 0.1, weight)
    live = weight > 0
    assert torch.equal(ours[~live], torch.zeros(3, 6, dtype=torch.float64))
    assert torch.allclose(ours[live], plain_sinkhorn(z[live], 0.1, 3), atol=1e-12)
    assert torch.equal(sinkhorn(z, 0.1, live), ours)
    assert torch.equal(sinkhorn(z, 0.1, torch.zeros(13)), torch.zeros_like(z))
    assert sinkhorn(z[:0], 0.1).shape == (0, 6)


def test_prototypes_are_used_equally_as_iterations_grow() -> None:
    z = some_logits() + 3 * torch.arange(6)  # softmax alone would choose the last one for nearly every row
    unequal = [float((sinkhorn(z, 1.0, iterations=i).sum(0) - 13 / 6).abs().max()) for i in (0, 1, 3, 100)]
    assert unequal[0] > 5
    assert unequal == sorted(unequal, reverse=True)
    assert unequal[-1] < 1e-6


def test_order_copies_and_shifts_of_the_batch_change_nothing() -> None:
    z = some_logits()
    ours = sinkhorn(z, 0.1)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(sinkhorn(z[order], 0.1), ours[order], atol=1e-12)
    assert torch.allclose(sinkhorn(torch.cat([z, z]), 0.1), torch.cat([ours, ours]), atol=1e-12)
    assert torch.allclose(sinkhorn(z + 7, 0.1), ours, atol=1e-12)
    by_prototype = z + torch.arange(6)  # a constant bias of a prototype is what the columns take out
    assert torch.allclose(sinkhorn(by_prototype, 0.1), ours, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_extreme_logits_stay_finite(dtype: torch.dtype) -> None:
    """Rows wholly at -500 beside rows at +500: exp(-25000) against the largest logit is 0 in any format."""
    z = (some_logits(40, 8) > 0).to(dtype) * 1000 - 500
    z[3], z[4], z[5, 2] = -500, 500, 500
    q = sinkhorn(z, 0.04)
    assert q.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.isfinite(q).all()
    assert torch.allclose(q.sum(1), torch.ones(40, dtype=q.dtype), atol=1e-5)


def test_no_gradient_no_change_of_the_input_and_no_waiting_for_the_device() -> None:
    z = some_logits().requires_grad_(True)
    before = z.detach().clone()
    with NoWaiting():
        assert not sinkhorn(z, 0.1).requires_grad
        sinkhorn(z, 0.1, torch.ones(13))
    assert torch.equal(z, before)


CASES = {"unequal": (4, 13), "one rank empty": (0, 13), "one row": (12, 13), "no row": (0, 0)}


def share_of_ranks(rank: int, world: int) -> dict[str, Any]:
    """The rows of a rank, `cut` of them on the first, with and without weights."""
    results = {}
    for name, (cut, n) in CASES.items():
        z = some_logits()[:n] * 40  # exp(z / 0.04) of one rank underflows beside the other's
        weight = torch.ones(n)
        weight[[i for i in (1, 2, 7) if i < n]] = 0
        own = slice(0, n) if world == 1 else (slice(0, cut) if rank == 0 else slice(cut, n))
        with NoWaiting():
            results[name] = sinkhorn(z[own], 1.0)
            results[f"{name}, sharp"] = sinkhorn(z[own], 0.04)
            results[f"{name}, weights"] = sinkhorn(z[own], 1.0, weight[own])
    dead = torch.zeros(4) if rank == 0 else torch.ones(9)
    half = slice(0, 4) if rank == 0 else slice(4, 13)
    results["all weight on one rank"] = (
        sinkhorn(some_logits()[half], 0.1, dead)
        if world == 2
        else sinkhorn(some_logits(), 0.1, torch.cat([dead, torch.ones(9)]))
    )
    return results


@pytest.mark.ranks
def test_two_ranks_with_unequal_rows_equal_one(tmp_path: Path) -> None:
    one = share_of_ranks(0, 1)
    two = on_two_ranks(share_of_ranks, tmp_path)
    for name, whole in one.items():
        joined = torch.cat([part[name] for part in two])
        assert torch.allclose(joined, whole, atol=1e-10, rtol=0), name
    own = sinkhorn(some_logits()[:4] * 40, 1.0)
    assert not torch.allclose(two[0]["unequal"], own, atol=1e-3)  # a rank alone would get another answer
