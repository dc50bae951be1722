"""loss.tile_center: teacher logits of a tile's objects minus their mean."""

from __future__ import annotations

import torch

from odis_path.model.network import Encoded, Views
from odis_path.training.criterion import Criterion, centred_in_tile
from tests.odis_path.conftest import tiny_config


def test_each_object_loses_the_mean_of_the_objects_of_its_tile_and_view_that_are_seen() -> None:
    logits = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))  # two views, three tiles of two objects
    seen = torch.ones(2, 6)
    seen[:, 3] = 0  # the second tile shows one object only
    out = centred_in_tile(logits, seen, 2, 0.5)
    first = logits[:, :2] - 0.5 * logits[:, :2].mean(1, keepdim=True)
    assert torch.allclose(out[:, :2], first)
    assert torch.equal(out[:, 2:4], logits[:, 2:4])
    assert torch.allclose(out[:, 4:] + 0.5 * logits[:, 4:].mean(1, keepdim=True), logits[:, 4:])


def loss_of(logits: torch.Tensor, tile_center: float, window_um: float = 0) -> torch.Tensor:
    config = tiny_config(
        "unused",
        "unused",
        target={"objects": 2},
        loss={"tile_center": tile_center, "patch_weight": 0},
        head={"out_dim": 5},
        views={"local_count": 0, "window_um": window_um},
    )
    obj = logits if not window_um else logits.flatten(1, 2)[:, :, None]
    student = torch.zeros_like(obj)
    seen = torch.ones(obj.shape[:3], dtype=torch.bool)
    empty = torch.zeros(0)
    views = Views(empty, empty, None, None, torch.zeros(2, 1, dtype=torch.bool), torch.zeros(0, dtype=torch.int64), seen)
    token = torch.randn(2, obj.shape[1], 3)
    parts = Criterion(config)(Encoded(obj, None, token), Encoded(student, None, token), views, 0.1)
    return parts["teacher_entropy"]


def test_what_objects_of_a_tile_share_is_gone_from_the_targets() -> None:
    """Logits that depend on the tile alone give uniform targets, in one pass or in windows of their own."""
    tile = 3 * torch.randn(2, 4, 1, 5, generator=torch.Generator().manual_seed(1)).expand(2, 4, 2, 5)
    uniform = torch.log(torch.tensor(5.0))
    assert loss_of(tile, 0.0) < uniform - 0.5
    assert torch.allclose(loss_of(tile, 1.0), uniform, atol=1e-5)
    assert torch.allclose(loss_of(tile, 1.0, window_um=20), uniform, atol=1e-5)
