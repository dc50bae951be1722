"""KoLeo and KDE against plain loops, over ranks with unequal rows, and at equal rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from odis_path.loss.koleo_kde import kde, koleo
from tests.odis_path.conftest import NoWaiting
from tests.odis_path.ranks import on_two_ranks

LOSSES = {"koleo": koleo, "kde": lambda tokens, weight=None, rows=None: kde(tokens, 5.0, weight, rows)}
Loss = Callable[..., Tensor]


@pytest.fixture(params=list(LOSSES))
def loss(request: pytest.FixtureRequest) -> Loss:
    return LOSSES[request.param]


def some_tokens(n: int = 9, dim: int = 5) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def unit_rows(tokens: Tensor) -> list[list[float]]:
    return [[v / math.sqrt(sum(u * u for u in row)) for v in row] for row in tokens.tolist()]


def plain_koleo(tokens: Tensor) -> float:
    z = unit_rows(tokens)
    nearest = [min(math.dist(a, b) for j, b in enumerate(z) if j != i) for i, a in enumerate(z)]
    return -sum(math.log(d + 1e-8) for d in nearest) / len(z)


def plain_kde(tokens: Tensor, k: float) -> float:
    z = unit_rows(tokens)
    sums = [
        sum(math.exp(k * sum(u * v for u, v in zip(a, b, strict=True))) for j, b in enumerate(z) if j != i)
        for i, a in enumerate(z)
    ]
    return sum(math.log(s) for s in sums) / len(z)


def spread_of(tokens: Tensor) -> float:
    """1 - the mean cosine of two different rows: 0 for a single point, 1 for a uniform sphere."""
    z = torch.nn.functional.normalize(tokens.detach(), dim=1)
    return 1 - float(((z @ z.T).sum() - len(z)) / (len(z) * (len(z) - 1)))


def test_values_are_those_of_plain_loops() -> None:
    z = some_tokens()
    assert float(koleo(z)) == pytest.approx(plain_koleo(z), abs=1e-12)
    for k in (0.5, 5.0, 40.0):
        assert float(kde(z, k)) == pytest.approx(plain_kde(z, k), abs=1e-12)
    assert float(kde(z)) == pytest.approx(plain_kde(z, 5.0), abs=1e-12)


def test_values_by_hand() -> None:
    """Three unit vectors at right angles, of any length: distance sqrt 2 each, cosine 0; two opposite: 2 and -1."""
    corners = torch.diag(torch.tensor([1.0, 2.0, 7.0], dtype=torch.float64))
    assert float(koleo(corners)) == pytest.approx(-0.5 * math.log(2), abs=1e-7)
    assert float(kde(corners)) == pytest.approx(math.log(2), abs=1e-12)
    opposite = torch.tensor([[3.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    assert float(koleo(opposite)) == pytest.approx(-math.log(2), abs=1e-7)
    assert float(kde(opposite)) == pytest.approx(-5, abs=1e-12)


def test_gradients_are_those_of_finite_differences(loss: Loss) -> None:
    weight = torch.tensor([1, 1, 0, 1, 1, 0, 1, 1, 1])
    assert torch.autograd.gradcheck(loss, (some_tokens().requires_grad_(True),))
    assert torch.autograd.gradcheck(lambda t: loss(t, weight), (some_tokens().requires_grad_(True),))


def test_rows_of_weight_0_are_neither_queries_nor_neighbours(loss: Loss) -> None:
    z, weight = some_tokens(), torch.ones(9)
    weight[[0, 4, 8]] = 0
    z[0], z[4], z[8] = z[1], float("nan"), 0.0  # the nearest row possible, and two that would spoil everything
    z.requires_grad_(True)
    value = loss(z, weight)
    value.backward()
    live = z.detach()[weight > 0].requires_grad_(True)
    alone = loss(live)
    alone.backward()
    assert torch.allclose(value, alone, atol=1e-14)
    assert z.grad is not None
    assert live.grad is not None
    assert torch.equal(z.grad[weight == 0], torch.zeros(3, 5, dtype=torch.float64))
    assert torch.allclose(z.grad[weight > 0], live.grad, atol=1e-14)
    assert torch.equal(loss(z, weight > 0), value)


def test_fewer_than_two_rows_give_zero_with_a_graph(loss: Loss) -> None:
    one_live = torch.tensor([0, 1, 0])
    for n, weight in [(0, None), (1, None), (3, one_live), (3, torch.zeros(3)), (0, torch.zeros(0))]:
        z = some_tokens(n).requires_grad_(True)
        value = loss(z, weight)
        value.backward()
        assert value.shape == ()
        assert float(value.detach()) == 0.0
        assert torch.equal(z.grad, torch.zeros_like(z))


def test_equal_rows_have_finite_gradients(loss: Loss) -> None:
    for dtype in (torch.float32, torch.float64):
        z = some_tokens(6).to(dtype)
        z[1], z[2] = z[0], 2 * z[0]
        for tokens in (z, z[:1].expand(6, -1).clone()):
            tokens.requires_grad_(True)
            value = loss(tokens)
            value.backward()
            assert torch.isfinite(value)
            assert torch.isfinite(tokens.grad).all()


def test_a_gradient_step_spreads_the_rows(loss: Loss) -> None:
    """The sign: rows around one direction move apart when the loss falls."""
    z = (some_tokens(30) * 0.1 + torch.ones(5, dtype=torch.float64)).requires_grad_(True)
    before, value = spread_of(z), loss(z).detach()
    for _ in range(20):
        (gradient,) = torch.autograd.grad(loss(z), z)
        with torch.no_grad():
            z -= 0.05 * gradient / gradient.norm(dim=1).mean()
    assert spread_of(z) > 1.3 * before
    assert loss(z) < value


def test_half_precision_is_computed_in_float32_under_autocast_too(loss: Loss) -> None:
    z = some_tokens(40, 32).bfloat16()
    exact = float(loss(z.double()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(z)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(exact, abs=1e-5)


def test_one_rank_never_waits_for_the_device(loss: Loss) -> None:
    z, weight = some_tokens().requires_grad_(True), torch.ones(9)
    with NoWaiting():
        loss(z, weight).backward()
        loss(z).backward()
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        bool(weight.sum() > 2)


CASES: dict[str, tuple[int, int, list[int]]] = {  # rows of the first rank, of all, rows of weight 0
    "unequal": (2, 9, []),
    "unequal, weights": (3, 9, [1, 5, 6]),
    "one rank empty": (0, 9, []),
    "one rank without weight": (3, 9, [0, 1, 2]),
    "a row each": (1, 2, []),
    "one row in all": (1, 1, []),
    "one live row in all": (4, 9, [0, 1, 2, 3, 5, 6, 7, 8]),
    "no row": (0, 0, []),
}


def share_of_ranks(rank: int, world: int) -> dict[str, Tensor]:
    """Value and gradients by row of a rank's share, divided by world as DistributedDataParallel does."""
    results = {}
    for case, (cut, n, dead) in CASES.items():
        weight = torch.ones(n)
        weight[dead] = 0
        own = slice(0, n) if world == 1 else (slice(0, cut) if rank == 0 else slice(cut, n))
        for name, loss in LOSSES.items():
            for rows in (None, 9):
                z = some_tokens(n)[own].requires_grad_(True)
                with NoWaiting() if rows or world == 1 else nullcontext():
                    value = loss(z, weight[own], rows)
                    value.backward()
                assert z.grad is not None
                results[f"{case}, {name}, {rows}"] = torch.cat([value.detach()[None], z.grad.flatten()]) / world
    if world > 1:
        with pytest.raises(ValueError, match=f"2 rows on rank {rank}, but rows=1"):
            koleo(some_tokens(2), rows=1)
    return results | through_ddp(rank, world)


def through_ddp(rank: int, world: int) -> dict[str, Tensor]:
    """Gradients of a layer's parameters, by DistributedDataParallel itself."""
    results = {}
    for name, loss in LOSSES.items():
        torch.manual_seed(3)
        layer = torch.nn.Linear(5, 4).double()
        wrapped = layer if world == 1 else torch.nn.parallel.DistributedDataParallel(layer)
        own = slice(0, 9) if world == 1 else (slice(0, 2) if rank == 0 else slice(2, 9))
        loss(wrapped(some_tokens()[own])).backward()
        results[f"ddp {name}"] = torch.cat([p.grad.flatten() for p in layer.parameters() if p.grad is not None])
    return results


@pytest.mark.ranks
def test_two_ranks_with_unequal_rows_equal_one(tmp_path: Path) -> None:
    one = share_of_ranks(0, 1)
    two = on_two_ranks(share_of_ranks, tmp_path)
    for name, whole in one.items():
        first, second = (part[name] for part in two)
        if name.startswith("ddp"):
            assert float(whole.abs().max()) > 1e-3
            assert torch.allclose(first, whole, atol=1e-10, rtol=0), name
            assert torch.equal(first, second)
            continue
        assert float(first[0] + second[0]) == pytest.approx(float(whole[0]), abs=1e-10), name
        assert torch.allclose(torch.cat([first[1:], second[1:]]), whole[1:], atol=1e-10, rtol=0), name
    z = torch.nn.functional.normalize(some_tokens(), dim=1)
    nearest = torch.cdist(z, z).fill_diagonal_(9).argmin(1)
    assert (nearest[:2] >= 2).any()  # the case asks for gradients that cross ranks, both ways
    assert (nearest[2:] < 2).any()
