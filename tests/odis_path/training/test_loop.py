"""The loop: resume bit for bit, schedules, EMA, freezing, what is refused."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch
import yaml

from annotations.errors import UserError
from odis_path.checkpoint import TrainedState, load_checkpoint, save_checkpoint
from odis_path.config import config_folders, load_config
from odis_path.distributed import Ranks
from odis_path.model.network import build_network
from odis_path.training import loop
from odis_path.training.optim import clip_gradients, parameter_groups, step_values, update_teacher
from odis_path.training.setup import Run, prepare
from odis_path.training.step import forward_backward
from tests.odis_path.conftest import assert_same_sample, take_steps, tiny_config, tiny_values

CPU = Ranks(0, 1, torch.device("cpu"))


def flat_state(path: Path) -> dict[str, Any]:
    state = load_checkpoint(path).state
    parts = {f"{k}.{n}": v for k in ("student", "teacher", "criterion") for n, v in getattr(state, k).items()}
    for i, moments in state.optimizer["state"].items():
        parts.update({f"optimizer.{i}.{n}": v for n, v in moments.items()})
    return parts


def assert_equal_states(a: Path, b: Path) -> None:
    first, second = flat_state(a), flat_state(b)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("workers", [0, 2])
def test_stop_and_go_equals_one_run_bit_for_bit(tiny_tiles: Path, tmp_path: Path, workers: int) -> None:
    """Twelve steps in one go, and the same with a stop after five (in the middle of an epoch)."""
    whole = tiny_config(tiny_tiles, tmp_path / "whole", data={"workers": workers})
    halves = tiny_config(tiny_tiles, tmp_path / "halves", data={"workers": workers})
    straight = loop.pretrain(whole)
    run = prepare(halves, CPU)
    assert run.total_steps == 12
    list(take_steps(run, 5))
    loop.save(run)
    resumed = loop.pretrain(halves)
    assert straight.name == resumed.name == "checkpoint-00000012.pt"
    assert_equal_states(straight, resumed)


def test_the_same_command_again_does_nothing(tiny_tiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tiny_tiles, tmp_path / "run", optim={"epochs": 1})
    first = loop.pretrain(config)
    stamp = first.stat().st_mtime_ns
    assert loop.pretrain(config) == first
    assert first.stat().st_mtime_ns == stamp
    assert "nothing to do" in capsys.readouterr().err


def test_a_run_folder_of_another_configuration_is_refused(tiny_tiles: Path, tmp_path: Path) -> None:
    loop.pretrain(tiny_config(tiny_tiles, tmp_path / "run", optim={"epochs": 1}))
    with pytest.raises(UserError, match=r"optim\.lr"):
        loop.pretrain(tiny_config(tiny_tiles, tmp_path / "run", optim={"epochs": 1, "lr": 1e-3}))


def test_a_run_leaves_its_log_split_and_settings(tiny_tiles: Path, tmp_path: Path) -> None:
    folder = loop.pretrain(tiny_config(tiny_tiles, tmp_path / "run")).parent
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    losses = [row for row in rows if "loss" in row]
    assert [row["step"] for row in losses] == list(range(1, 13))
    assert all(math.isfinite(row["loss"]) and row["images_per_s"] > 0 for row in losses)
    knn = [row for row in rows if "knn_balanced_accuracy" in row]
    assert [row["step"] for row in knn] == [0, 6, 12]
    assert all(0 <= row["knn_balanced_accuracy"] <= 1 and row["knn_queries"] == 24 for row in knn)
    split = (folder / "split.csv").read_text()
    assert split.count(",test") == 2  # one patient of three, two slides
    assert yaml.safe_load((folder / "config.yaml").read_text())["optim"]["batch_size"] == 8
    assert json.loads((folder / "versions.json").read_text())["torch"] == torch.__version__.split("+")[0]


@pytest.mark.parametrize("recipe", sorted(p.stem for folder in config_folders() for p in folder.glob("*.yaml")))
def test_every_recipe_trains(recipe: str, tiny_tiles: Path, tmp_path: Path) -> None:
    """Each YAML in configs/ as it is, its sizes made small: the loss is finite and the student moves."""
    tiny = tiny_values(tiny_tiles, tmp_path / "run")
    small = [
        f"{section}.{key}={json.dumps(value)}"
        for section in ("data", "model", "head", "run")
        for key, value in tiny[section].items()
        if key != "drop_path"
    ] + ["model.weights=null"]
    small += ["views.global_size=32", "views.local_size=16", "optim.batch_size=8", "optim.epochs=0.34", "eval.every_epochs=0"]
    config = load_config(recipe, small)
    folder = loop.pretrain(config).parent
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert all(math.isfinite(row["loss"]) for row in rows[1:])  # after the row of step 0
    assert (rows[-1]["loss_patch"] > 0) == (config.loss.patch_weight > 0)


def test_accumulated_micro_batches_give_the_gradient_of_the_batch(tiny_tiles: Path, tmp_path: Path) -> None:
    weights = []
    for parts in (1, 2):
        config = tiny_config(
            tiny_tiles,
            tmp_path / str(parts),
            model={"drop_path": 0.0},
            optim={"accumulate": parts, "epochs": 0.17},
            loss={"center_momentum": 1.0},
            eval={"every_epochs": 0},
        )
        weights.append(load_checkpoint(loop.pretrain(config)).state.optimizer["state"])
    for name, moments in weights[0].items():
        other = weights[1][name]["exp_avg"]
        assert torch.allclose(moments["exp_avg"], other, atol=2e-6), name


def test_schedules_start_and_end_where_the_recipe_says(tmp_path: Path) -> None:
    config = tiny_config(
        "x", tmp_path, optim={"batch_size": 256, "warmup_epochs": 2, "lr": 1e-3, "min_lr": 1e-6, "ema": [0.996, 1]}
    )
    at = [step_values(config, step, 10, 100) for step in range(101)]
    assert at[0].lr == pytest.approx(1e-4 / 2)
    assert at[19].lr == pytest.approx(1e-3)
    assert at[60].lr == pytest.approx((1e-3 + 1e-6) / 2)
    assert at[100].lr == pytest.approx(1e-6)
    assert (at[0].weight_decay, at[100].weight_decay) == pytest.approx((0.04, 0.4))
    assert (at[0].ema, at[100].ema) == pytest.approx((0.996, 1.0))
    assert at[0].teacher_temperature == pytest.approx(0.04)
    assert [at[4].last_layer_frozen, at[5].last_layer_frozen] == [True, False]


def test_the_teacher_follows_by_name_buffers_included(tmp_path: Path) -> None:
    config = tiny_config("x", tmp_path)
    student, teacher = build_network(config, student=True), build_network(config, student=False)
    student.register_buffer("count", torch.tensor(3.0))
    teacher.register_buffer("count", torch.tensor(0.0))
    before = {n: p.detach().clone() for n, p in teacher.named_parameters()}
    update_teacher(teacher, student, 0.9)
    for name, p in student.named_parameters():
        averaged = dict(teacher.named_parameters())[name]
        assert torch.allclose(averaged, 0.9 * before[name] + 0.1 * p, atol=1e-7), name
    assert float(teacher.count) == 3.0  # type: ignore[arg-type]


def test_weight_decay_spares_biases_and_vectors(tmp_path: Path) -> None:
    network = build_network(tiny_config("x", tmp_path), student=True)
    decay, plain = parameter_groups(network)
    assert all(p.ndim > 1 for p in decay["params"])  # type: ignore[attr-defined]
    assert all(p.ndim <= 1 for p in plain["params"])  # type: ignore[attr-defined]
    count = sum(len(group["params"]) for group in (decay, plain))  # type: ignore[arg-type]
    assert count == sum(p.requires_grad for p in network.parameters())


def test_clipping_is_per_parameter_or_global_as_named() -> None:
    def grads() -> list[torch.nn.Parameter]:
        parameters = [torch.nn.Parameter(torch.zeros(4)) for _ in range(2)]
        parameters[0].grad, parameters[1].grad = torch.full((4,), 3.0), torch.full((4,), 0.1)
        return parameters

    parameters_alone = grads()
    clip_gradients(parameters_alone, 3.0, "per_parameter")
    assert [float(p.grad.norm()) for p in parameters_alone] == pytest.approx([3.0, 0.2], rel=1e-5)
    together = grads()
    clip_gradients(together, 3.0, "global")
    assert float(torch.cat([p.grad for p in together]).norm()) == pytest.approx(3.0, rel=1e-5)
    assert float(together[1].grad.norm()) < 0.2


def test_the_last_layer_stands_still_while_frozen(tiny_tiles: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_tiles, tmp_path / "run", optim={"freeze_last_layer_epochs": 1, "epochs": 1})
    run = prepare(config, CPU)
    before = run.student.head.last_layer.weight.detach().clone()
    moved = run.student.head.mlp[0].weight.detach().clone()  # type: ignore[union-attr,operator]
    list(take_steps(run))
    assert torch.equal(run.student.head.last_layer.weight, before)
    assert not torch.equal(run.student.head.mlp[0].weight, moved)  # type: ignore[arg-type]
    assert not run.teacher.training


def test_a_torn_save_leaves_the_last_checkpoint(tiny_tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tiny_tiles, tmp_path / "run")
    good = save_checkpoint(tmp_path / "run", 3, 0.5, config, TrainedState(), keep=2)

    def torn(_content: object, file: IO[bytes]) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(UserError, match="No space"):
        save_checkpoint(tmp_path / "run", 4, 0.7, config, TrainedState(), keep=2)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [good.name]
    assert load_checkpoint(tmp_path / "run").step == 3


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, 0.0, tiny_config("x", tmp_path), TrainedState(), keep=2)
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == ["checkpoint-00000002.pt", "checkpoint-00000003.pt"]


def test_a_loss_that_is_not_finite_stops_with_one_line(
    tiny_tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = forward_backward

    def poisoned(run: Run, *args: Any, **more: Any) -> dict[str, torch.Tensor]:
        parts = real(run, *args, **more)
        return {**parts, "loss": parts["loss"] * (math.nan if run.step == 3 else 1)}

    monkeypatch.setattr("odis_path.training.step.forward_backward", poisoned)
    with pytest.raises(UserError, match="loss is nan at step 4"):
        loop.pretrain(tiny_config(tiny_tiles, tmp_path / "run"))


def test_sigterm_saves_and_the_same_command_goes_on(tiny_tiles: Path, tmp_path: Path) -> None:
    values = tiny_values(tiny_tiles, tmp_path / "run", optim={"epochs": 400}, eval={"every_epochs": 0})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "odis_path", "pretrain", str(tmp_path / "config.yaml")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    log = tmp_path / "run" / "train.jsonl"
    for _ in range(1800):
        if log.exists() and log.read_text().count("\n") > 3:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=180)
    assert process.returncode != 0
    assert "saved; the same command goes on from there" in error
    assert "Traceback" not in error
    stopped = load_checkpoint(tmp_path / "run")
    assert 0 < stopped.step < 2400
    run = prepare(load_config(tmp_path / "config.yaml"), CPU)
    assert run.step == stopped.step


def test_samples_are_a_function_of_seed_epoch_and_index(tiny_tiles: Path, tmp_path: Path) -> None:
    from odis_path.data.dataset import TileSamples
    from odis_path.data.tile_index import index_tiles

    config = tiny_config(tiny_tiles, tmp_path)
    a, b = (TileSamples(index_tiles(tiny_tiles), config, 8) for _ in range(2))
    b[(5, 1)]  # history does not matter
    assert_same_sample(a[(2, 7)], b[(2, 7)])
    assert not np.array_equal(a[(2, 7)].views.theta_global, a[(3, 7)].views.theta_global)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optim.lrr=1"], "did you mean optim.lr"),
        (["optim.epochs=many"], "optim.epochs is 'many'"),
        (["epochs"], "not an override"),
        (["data.holdout=1.5"], "data.holdout is 1.5"),
        (["views.local_scale=[0.5,0.1]"], "local_scale"),
        (["target.containment=most"], "target.containment is 'most'"),
    ],
)
def test_a_wrong_key_or_value_is_one_line(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config("demo", overrides)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_config_that_is_no_yaml_or_missing_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such config"):
        load_config("nowhere.yaml")
    (tmp_path / "bad.yaml").write_text("data: [unclosed\n")
    with pytest.raises(UserError, match="cannot be read as YAML") as caught:
        load_config(tmp_path / "bad.yaml")
    assert "\n" not in str(caught.value)


def test_too_few_tiles_or_indivisible_batches_are_told(tiny_tiles: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"fewer than optim\.batch_size=500"):
        loop.pretrain(tiny_config(tiny_tiles, tmp_path, optim={"batch_size": 500}))
    with pytest.raises(UserError, match="multiple of 3"):
        loop.pretrain(tiny_config(tiny_tiles, tmp_path, optim={"accumulate": 3}))
    with pytest.raises(UserError, match="no such folder"):
        loop.pretrain(tiny_config(tmp_path / "nothing", tmp_path))


def test_a_checkpoint_of_another_shape_is_refused(tiny_tiles: Path, tmp_path: Path) -> None:
    from odis_path.checkpoint import load_into

    path = loop.pretrain(tiny_config(tiny_tiles, tmp_path / "run", optim={"epochs": 0.17}))
    wider = build_network(
        tiny_config("x", tmp_path, head={"out_dim": 128, "hidden_dim": 32, "bottleneck_dim": 16}), student=False
    )
    with pytest.raises(UserError, match=r"last_layer.*\(64, 16\) there, \(128, 16\) here|differences"):
        load_into(wider, load_checkpoint(path).state.teacher, path, "teacher")
    (tmp_path / "torn.pt").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path / "torn.pt")


def test_a_sigterm_to_the_whole_group_saves_too(tiny_tiles: Path, tmp_path: Path) -> None:
    """torchrun and some schedulers signal the process group: the loader's workers must not die of it."""
    values = tiny_values(tiny_tiles, tmp_path / "run", optim={"epochs": 400}, eval={"every_epochs": 0}, data={"workers": 2})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "odis_path", "pretrain", str(tmp_path / "config.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    log = tmp_path / "run" / "train.jsonl"
    for _ in range(1800):
        if log.exists() and log.read_text().count("\n") > 3:
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    _, error = process.communicate(timeout=180)
    assert "saved; the same command goes on from there" in error, error
    assert "Traceback" not in error
