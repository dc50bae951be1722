"""Set a run up: data, networks and optimizer, and the checkpoint that it goes on from."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn

from annotations.errors import UserError
from odis_path.checkpoint import Checkpoint, DataFacts, as_begun, load_into, newest_checkpoint
from odis_path.config import PretrainConfig
from odis_path.data.dataset import TileSamples, kinds_of
from odis_path.data.sampler import Batch, StepSampler, collate
from odis_path.data.tile_index import TileIndex, held_out_patients, index_tiles
from odis_path.data.windows import training_samples
from odis_path.distributed import Ranks, on_first_rank
from odis_path.features.pretraining import kept_in_checkpoint, slides_of
from odis_path.model.network import Network, build_network
from odis_path.model.vit import ObjViT
from odis_path.training.compile import compile_blocks, compiles
from odis_path.training.criterion import Criterion
from odis_path.training.log.run_log import write_run_files
from odis_path.training.optim import parameter_groups, schedules_line, with_schedules, with_schedules_of
from odis_path.training.resume import check_sizes, check_views, config_difference, data_difference, data_facts
from tiling.storage.locks import sweep


@dataclass
class Run:
    """Everything that training moves. step: the number of steps done. config: with the schedules of its length."""

    config: PretrainConfig
    ranks: Ranks
    train: TileIndex
    held_out: TileIndex
    student: Network
    wrapped: nn.Module  # the student, under DistributedDataParallel where there are several ranks
    teacher: Network
    criterion: Criterion
    optimizer: torch.optim.Optimizer
    compiled: bool
    data: DataFacts
    step: int = 0
    damaged: list[Path] = field(default_factory=list)  # newer checkpoints than the one it went on from, gone at the next
    folder: Path = field(init=False)
    steps_per_epoch: int = field(init=False)
    total_steps: int = field(init=False)

    def __post_init__(self) -> None:
        self.folder = Path(self.config.run.out)
        self.steps_per_epoch, self.total_steps = count_steps(self.config, len(self.train))
        self.config = with_schedules(self.config, self.total_steps)

    @property
    def epoch(self) -> float:
        return self.step / self.steps_per_epoch

    def steps_of(self, epochs: float) -> int:
        """Return the nearest number of steps to some epochs, at least one."""
        return max(1, round(epochs * self.steps_per_epoch))


def count_steps(config: PretrainConfig, tiles: int) -> tuple[int, int]:
    """Count the steps of an epoch of so many training tiles, and those of the run."""
    steps_per_epoch = tiles // config.optim.batch_size
    return steps_per_epoch, max(1, round(config.optim.epochs * steps_per_epoch))


def split_tiles(config: PretrainConfig) -> tuple[TileIndex, set[str]]:
    """Index the tiles of a configuration and choose the held-out patients. UserError where too few are left to train on."""
    index = index_tiles(
        config.data.tiles,
        need_boxes=kinds_of(config) if config.data.boxless == "drop" else None,
        need_polygons=config.target.geometry == "polygon",
    )
    away = held_out_patients(index, config.data.holdout, config.data.holdout_patients, config.run.seed)
    tiles = len(index.of_patients(away, inside=False))
    if tiles < config.optim.batch_size:
        raise UserError(
            f"{config.data.tiles}: {tiles} tiles to train on, fewer than optim.batch_size="
            f"{config.optim.batch_size}; tile more slides or set optim.batch_size={max(1, tiles // 2)}"
        )
    return index, away


def prepare(config: PretrainConfig, ranks: Ranks, *, from_previous: bool = False) -> Run:
    """Build data, networks and optimizer, and load the newest checkpoint of the run folder if there is one."""
    check_sizes(config, ranks.world)
    folder = Path(config.run.out)
    if ranks.first:
        sweep(folder)
    index, away = split_tiles(config)
    train_tiles = index.of_patients(away, inside=False)
    torch.manual_seed(config.run.seed)
    checkpoint, damaged = newest_checkpoint(folder, from_previous=from_previous)
    if checkpoint is not None:
        config = with_schedules_of(config, checkpoint.config)
    config, student, teacher = build_networks(config, checkpoint, ranks)
    compiled = compiles(config, ranks)
    if compiled:
        compile_blocks(student, teacher)
    groups = parameter_groups(student, config.optim.layer_decay, decay_gain=config.optim.decay_gain)
    optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)
    wrapped: nn.Module = student
    if ranks.world > 1:
        ids = [ranks.device.index] if ranks.device.type == "cuda" else None
        wrapped = nn.parallel.DistributedDataParallel(student, device_ids=ids, gradient_as_bucket_view=True)
    run = Run(
        config=config,
        ranks=ranks,
        train=train_tiles,
        held_out=index.of_patients(away, inside=True),
        student=student,
        wrapped=wrapped,
        teacher=teacher,
        criterion=Criterion(config, compiled=compiled).to(ranks.device),
        optimizer=optimizer,
        compiled=compiled,
        data=data_facts(index, away),
        damaged=damaged,
    )
    if checkpoint is not None:
        resume(run, checkpoint)
    else:
        on_first_rank(ranks, partial(write_run_files, folder, run.config, train_tiles, away), f"{folder}: not begun")
        if ranks.first and (line := schedules_line(config, run.steps_per_epoch, run.total_steps)):
            print(line, file=sys.stderr)
    if "pretrained_on" not in run.data:
        base = config.model.name if config.model.weights == "timm" else config.model.weights
        run.data["pretrained_on"] = kept_in_checkpoint(slides_of(train_tiles, away), base)
    return run


def resume(run: Run, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's state into a run. Raises UserError where it was made by another configuration, or on other tiles."""
    state = checkpoint.state
    run.config, kept = as_begun(run.config, checkpoint.stored_config)
    if difference := config_difference(run.config, checkpoint.config):
        raise UserError(
            f"{checkpoint.path}: was trained with {difference}; use the same configuration to go on (it lies in "
            f"{run.folder / 'config.yaml'}), or another run.out"
        )
    if difference := data_difference(run.data, state.data):
        raise UserError(
            f"{checkpoint.path}: was trained on other tiles than {run.config.data.tiles} holds now ({difference}): give those "
            "to go on, or another run.out (and model.weights to start from what was learned)"
        )
    load_into(run.student, state.student, checkpoint.path, "student")
    load_into(run.teacher, state.teacher, checkpoint.path, "teacher")
    load_into(run.criterion, state.criterion, checkpoint.path, "criterion")
    run.optimizer.load_state_dict(state.optimizer)
    if state.data is not None and "pretrained_on" in state.data:
        run.data["pretrained_on"] = state.data["pretrained_on"]
    run.step = checkpoint.step
    if run.ranks.first:
        old = f", with {' '.join(kept)} as it began" if kept else ""
        instead = f", not from {', '.join(path.name for path in run.damaged)}: damaged" if run.damaged else ""
        print(f"{run.folder}: going on from step {run.step} of {run.total_steps}{old}{instead}", file=sys.stderr)


def build_networks(
    config: PretrainConfig, checkpoint: Checkpoint | None, ranks: Ranks
) -> tuple[PretrainConfig, Network, Network]:
    """Build the student and its copy, the teacher, on the device; the configuration has model.pool settled."""
    config, student = build_student(config, checkpoint)
    student.to(ranks.device)
    check_views(config, student.encoder.patch_px)
    if ranks.first and student.encoder.loaded is not None:
        print(start_line(config, student.encoder), file=sys.stderr)
    state = student.state_dict()
    teacher = build_network(config, student=False, like=state).to(ranks.device)
    teacher.load_state_dict(state)
    teacher.requires_grad_(False).eval()
    return config, student.train(), teacher


def build_student(config: PretrainConfig, checkpoint: Checkpoint | None) -> tuple[PretrainConfig, Network]:
    """Build the student, with the weights it starts from, or shaped as in the checkpoint that it is to take.

    The configuration comes back with model.pool settled: `auto` is what the weights, or the checkpoint, were trained with.
    """
    if checkpoint is None:
        student = build_network(config, student=True, weights=True)
    else:
        if config.model.pool == "auto":
            config = with_pool(config, checkpoint.config.model.pool)
        student = build_network(config, student=True, like=checkpoint.state.student)
    return with_pool(config, student.encoder.pool), student


def with_pool(config: PretrainConfig, pool: str) -> PretrainConfig:
    """Return the configuration with this model.pool."""
    return config.model_copy(update={"model": config.model.model_copy(update={"pool": pool})})


def start_line(config: PretrainConfig, encoder: ObjViT) -> str:
    """Describe the start of a run, in a line: the layout of its weights, how they pool, the size they were trained at."""
    loaded, m = encoder.loaded, config.model
    assert loaded is not None
    obj = encoder.pool == "obj"
    parts = [f"{loaded.layout} layout, {loaded.loaded} tensors"]
    parts.append("[OBJ] goes on from the class token" if obj else "pooled by the mean of in-box patches (model.pool=linear)")
    size, resized = config.views.global_size, ", positions are interpolated" if encoder.has_positions else ""
    if encoder.trained_px is not None:
        same = size == encoder.trained_px
        parts.append(f"views.global_size={size}, " + ("as trained" if same else f"trained at {encoder.trained_px} px{resized}"))
    if encoder.norm is not None and encoder.norm != (config.data.mean, config.data.std):
        mean, std = (list(values) for values in encoder.norm)
        parts.append(f"trained with another mean and std: set data.mean={mean} data.std={std}")
    source = m.name if m.weights == "timm" else m.weights
    return f"start weights {source}: {'; '.join(parts)}{encoder.adapted()}"


def samples_of(run: Run) -> TileSamples:
    """Return the training samples of a run."""
    return training_samples(run.train, run.config, run.student.encoder.patch_px)


def batch_loader(run: Run, samples: TileSamples | None = None) -> Iterable[Batch]:
    """Load the micro-batches of this rank from run.step on; see `odis_path.data.sampler.next_batch`.

    samples: those of `samples_of`, where they are at hand.
    """
    config, ranks = run.config, run.ranks
    sampler = StepSampler(
        len(run.train),
        config.optim.batch_size,
        seed=config.run.seed,
        first_step=run.step,
        last_step=run.total_steps,
        rank=ranks.rank,
        world=ranks.world,
        accumulate=config.optim.accumulate,
    )
    return torch.utils.data.DataLoader(
        samples or samples_of(run),
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=config.data.workers,
        pin_memory=ranks.device.type == "cuda",
        worker_init_fn=start_worker,
    )


def start_worker(_worker: int) -> None:
    """Give a loader worker one thread: the cores belong to training. A signal to the group of the run must not kill it."""
    torch.set_num_threads(1)
    if hasattr(os, "setpgrp"):
        os.setpgrp()
