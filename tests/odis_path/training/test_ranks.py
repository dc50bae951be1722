"""Two gloo ranks equal one rank with the same global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from odis_path.checkpoint import load_checkpoint
from odis_path.config import PretrainConfig
from odis_path.data.dataset import SampledViews, TileSamples
from odis_path.data.sampler import Batch, StepSampler, collate
from odis_path.distributed import Ranks, mean_of_ranks
from odis_path.loss.dino_ibot import Center, cross_view_loss
from odis_path.training import loop
from odis_path.training.optim import parameter_groups, set_schedule, step_values
from odis_path.training.setup import Run, prepare
from odis_path.training.step import apply_gradients, forward_backward
from tests.odis_path.conftest import tiny_config, tiny_values
from tests.odis_path.ranks import on_two_ranks

pytestmark = pytest.mark.ranks


def loss_and_center(rank: int, world: int) -> dict[str, Any]:
    """The share of a rank of a fixed problem with unequal numbers of seen views and of rows."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(2, 6, 8, generator=generator, dtype=torch.float64)
    student = torch.randn(4, 6, 8, generator=generator, dtype=torch.float64)
    seen = torch.tensor([[1, 1, 0, 1, 1, 1], [1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1]])
    rows = torch.randn(7, 8, generator=generator, dtype=torch.float64)
    own = slice(0, 6) if world == 1 else slice(3 * rank, 3 * rank + 3)
    few = slice(0, 7) if world == 1 else (slice(0, 2) if rank == 0 else slice(2, 7))
    logits = student[:, own].clone().requires_grad_(True)
    loss = cross_view_loss(teacher[:, own].softmax(-1), logits, 0.1, seen[:, own])
    loss.backward()
    center = Center(8).double()
    center.accumulate(rows[few])
    center.update()
    return {"loss": loss.detach() / world, "gradient": logits.grad / world, "center": center.value}


def test_loss_gradient_and_center_are_exact_over_unequal_ranks(tmp_path: Path) -> None:
    one = loss_and_center(0, 1)
    two = on_two_ranks(loss_and_center, tmp_path)
    assert float(sum(part["loss"] for part in two)) == pytest.approx(float(one["loss"]), abs=1e-12)
    joined = torch.cat([part["gradient"] for part in two], dim=1)
    assert torch.allclose(joined, one["gradient"], atol=1e-12)
    for part in two:
        assert torch.allclose(part["center"], one["center"], atol=1e-12)


def train_steps(rank: int, world: int, values: dict[str, Any], count: int) -> dict[str, Any]:
    """Steps of real training in float64; returns weights, centers and the summed loss of each step."""
    config = PretrainConfig.model_validate(values)
    ranks = Ranks(rank, world, torch.device("cpu"))
    run = prepare(config, ranks)
    for module in (run.student, run.teacher, run.criterion):
        module.double()
    if world > 1:
        run.wrapped = torch.nn.parallel.DistributedDataParallel(run.student)
    run.optimizer = torch.optim.AdamW(parameter_groups(run.student), lr=0.0)
    samples = TileSamples(run.train, config, run.student.encoder.patch_px)
    sampler = StepSampler(
        len(run.train), config.optim.batch_size, seed=config.run.seed, first_step=0, last_step=count, rank=rank, world=world
    )
    losses = []
    for step, rows in enumerate(sampler):
        scheduled = step_values(config, step, run.steps_per_epoch, count)
        set_schedule(run.optimizer, scheduled)
        run.optimizer.zero_grad(set_to_none=True)
        batch = collate([samples[r] for r in rows])
        views = SampledViews(*(field.double() if field.dtype == torch.float32 else field for field in batch.views))
        batch = batch._replace(views=views)
        parts = forward_in_double(run, batch, scheduled)
        losses.append(mean_of_ranks(parts["loss"].detach().clone(), ranks))
        apply_gradients(run, scheduled)
    return {
        "losses": torch.stack(losses),
        "student": run.student.state_dict(),
        "teacher": run.teacher.state_dict(),
        "criterion": run.criterion.state_dict(),
    }


def forward_in_double(run: Run, batch: Batch, scheduled: Any) -> dict[str, torch.Tensor]:
    plain = torch.Tensor.float
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign,assignment]
    try:
        return forward_backward(run, batch, scheduled, last=True)
    finally:
        torch.Tensor.float = plain  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("objects", "loss", "steps"),
    [
        (1, {}, 20),
        (1, {"patch_center": "all"}, 4),
        (
            3,
            {"centering": "sinkhorn", "koleo_weight": 0.1, "kde_weight": 0.1, "image_weight": 0.5, "patch_in_box_only": True},
            4,
        ),
    ],
)
def test_two_ranks_train_like_one(tiny_tiles: Path, tmp_path: Path, objects: int, loss: dict[str, Any], steps: int) -> None:
    """Losses, weights and centers; free crops, so that views lack their object and masked counts differ between ranks."""
    config = tiny_config(
        tiny_tiles,
        tmp_path / "run",
        model={"drop_path": 0.0},
        optim={"clip": 0.5},
        eval={"every_epochs": 0},
        loss=loss,
        target={"crop": False, "objects": objects, "min_patches": 1},
    )
    values = config.model_dump(mode="json")
    one = train_steps(0, 1, values, steps)
    two = on_two_ranks(train_steps, tmp_path, values, steps)
    assert torch.allclose(two[0]["losses"], one["losses"], atol=1e-9)
    for key in ("student", "teacher", "criterion"):
        for name, value in one[key].items():
            assert torch.allclose(two[0][key][name], value, atol=1e-8), f"{key}.{name}"
            assert torch.equal(two[0][key][name], two[1][key][name]), f"{key}.{name} differs between ranks"


def test_ranks_share_an_epoch_without_overlap_and_reshuffle() -> None:
    def rows(rank: int, world: int) -> list[list[tuple[int, int]]]:
        return list(StepSampler(50, 8, seed=3, first_step=0, last_step=12, rank=rank, world=world))

    alone, first, second = rows(0, 1), rows(0, 2), rows(1, 2)
    for whole, a, b in zip(alone, first, second, strict=True):
        assert sorted(a + b) == sorted(whole)
        assert not set(a) & set(b)
    epochs = [{i for batch in alone[e * 6 : e * 6 + 6] for _, i in batch} for e in (0, 1)]
    assert [len(e) for e in epochs] == [48, 48]  # the last two of 50 are dropped, no tile comes twice
    assert [b for batch in alone[:6] for b in batch] != [(0, i) for _, i in (b for batch in alone[6:] for b in batch)]


def test_torchrun_trains_one_run_on_two_ranks(tiny_tiles: Path, tmp_path: Path) -> None:
    """The user's command under torchrun: one log, k-NN while training, one checkpoint, for which the other rank waits."""
    values = tiny_values(tiny_tiles, tmp_path / "run", run={"save_every_epochs": 2})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "odis_path"]
    done = subprocess.run(
        [*command, "pretrain", str(tmp_path / "config.yaml")],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "train.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))
    assert sum("knn_balanced_accuracy" in row for row in rows) == 3
    assert load_checkpoint(tmp_path / "run").step == 12


def whole_run(rank: int, world: int, values: dict[str, Any]) -> int:
    """Train as the command does, on ranks that have started."""
    return load_checkpoint(loop.pretrain(PretrainConfig.model_validate(values)).parent).step


def test_a_run_on_ranks_leaves_no_process_group_behind(tiny_tiles: Path, tmp_path: Path) -> None:
    """DDP is imported after the ranks started; `on_two_ranks` looks for threads of theirs that are left."""
    values = tiny_values(tiny_tiles, tmp_path / "run", optim={"epochs": 0.5}, eval={"every_epochs": 0})
    steps = on_two_ranks(whole_run, tmp_path, values)
    assert steps[0] == steps[1] > 0
