"""Losses and centers against plain float64 formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from odis_path.loss.dino_ibot import Center, cross_view_loss, entropy, masked_patch_loss, teacher_probabilities


def softmax(row: Tensor) -> list[float]:
    values = [math.exp(v) for v in row.tolist()]
    return [v / sum(values) for v in values]


def cross_entropy(teacher: list[float], student: Tensor, temperature: float) -> float:
    q = softmax(student / temperature)
    return -sum(p * math.log(s) for p, s in zip(teacher, q, strict=True))


def test_the_cross_view_loss_is_the_sum_over_pairs_written_out() -> None:
    torch.manual_seed(0)
    views, batch, k = 5, 3, 7
    center, tau = torch.randn(k, dtype=torch.float64), 0.05
    z, s = torch.randn(2, batch, k, dtype=torch.float64), torch.randn(views, batch, k, dtype=torch.float64)
    teacher = Center(k).double()
    teacher.value.copy_(center)
    ours = cross_view_loss(teacher_probabilities(z, teacher.value, tau), s, 0.1)
    terms = [
        cross_entropy(softmax((z[q, b] - center) / tau), s[v, b], 0.1)
        for q in range(2)
        for v in range(views)
        if v != q
        for b in range(batch)
    ]
    assert len(terms) == 2 * (views - 1) * batch
    assert float(ours) == pytest.approx(sum(terms) / len(terms), rel=1e-12)


def test_a_pair_by_hand() -> None:
    """Two views, two prototypes: teacher (1, 0) and (0, 1) against uniform students costs log 2 each."""
    teacher = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]], dtype=torch.float64)
    assert float(cross_view_loss(teacher, torch.zeros(2, 1, 2, dtype=torch.float64), 0.1)) == pytest.approx(math.log(2))
    students = torch.tensor([[[0.0, 0.1]], [[0.1, 0.0]]], dtype=torch.float64)  # each predicts the other view's target
    expected = -math.log(math.e / (math.e + 1))
    assert float(cross_view_loss(teacher, students, 0.1)) == pytest.approx(expected)


def test_a_view_without_its_box_weighs_nothing() -> None:
    torch.manual_seed(1)
    p, s = torch.rand(2, 2, 4, dtype=torch.float64).softmax(-1), torch.randn(3, 2, 4, dtype=torch.float64)
    seen = torch.tensor([[1, 1], [1, 0], [1, 1]])
    terms = [
        cross_entropy(p[q, b].tolist(), s[v, b], 0.1)
        for q in range(2)
        for v in range(3)
        if v != q
        for b in range(2)
        if seen[q, b] and seen[v, b]
    ]
    assert float(cross_view_loss(p, s, 0.1, seen)) == pytest.approx(sum(terms) / len(terms), rel=1e-12)
    assert float(cross_view_loss(p, s, 0.1, torch.zeros(3, 2))) == 0.0


def test_the_patch_loss_is_a_mean_of_image_means() -> None:
    torch.manual_seed(2)
    image = torch.tensor([0, 0, 0, 2])  # image 1 has no hidden patch
    p, s = torch.rand(4, 5, dtype=torch.float64).softmax(-1), torch.randn(4, 5, dtype=torch.float64)
    h = [cross_entropy(p[i].tolist(), s[i], 0.1) for i in range(4)]
    expected = (sum(h[:3]) / 3 + 0 + h[3]) / 3
    assert float(masked_patch_loss(p, s, image, 3, 0.1)) == pytest.approx(expected, rel=1e-12)


def test_no_hidden_patch_at_all_is_zero_with_a_gradient() -> None:
    s = torch.zeros(0, 5, requires_grad=True)
    loss = masked_patch_loss(torch.zeros(0, 5), s, torch.zeros(0, dtype=torch.long), 4, 0.1)
    loss.backward()
    assert float(loss) == 0.0


def test_the_center_is_a_running_mean_of_weighted_rows() -> None:
    center = Center(3, momentum=0.9).double()
    rows = torch.randn(4, 3, dtype=torch.float64)
    center.accumulate(rows, torch.tensor([1, 0, 1, 1]))
    center.update()
    expected = 0.1 * rows[[0, 2, 3]].mean(0)
    assert torch.allclose(center.value, expected, atol=1e-14)
    center.accumulate(rows[:0])
    center.update()
    assert torch.allclose(center.value, expected, atol=1e-14)  # nothing seen, nothing moved


def test_entropy_of_known_rows() -> None:
    assert float(entropy(torch.full((2, 8), 1 / 8))) == pytest.approx(math.log(8), rel=1e-6)
    assert float(entropy(torch.eye(4))) == 0.0
