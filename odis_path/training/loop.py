"""The training loop, to be read from top to bottom.

One file for every method: `odis`, `ibot`, `dino` and the ablations differ only in their configuration. The same command runs
alone or under torchrun. A run that stops goes on from its newest checkpoint, bit for bit on a CPU.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from annotations.errors import UserError
from odis_path.checkpoint import Checkpoint, as_begun, latest_checkpoint, load_into, newest_checkpoint, save_checkpoint
from odis_path.config import PretrainConfig
from odis_path.data.dataset import TileSamples, kinds_of
from odis_path.data.sampler import Batch, StepSampler, collate, next_batch
from odis_path.data.tile_index import TileIndex, held_out_patients, index_tiles
from odis_path.distributed import Ranks, all_reduce_sum, any_rank, mean_of_ranks, start_ranks, stop_ranks
from odis_path.embedding.encoder import FrozenEncoder
from odis_path.features.pretraining import kept_in_checkpoint, slides_of
from odis_path.loss.dino_ibot import count_view_pairs
from odis_path.model.network import Network, build_network
from odis_path.training.compile import compile_blocks, compiles
from odis_path.training.criterion import Criterion
from odis_path.training.knn_monitor import IdentityWatch, KnnProbe, identity_pairs
from odis_path.training.log.run_log import RunLog, record_start, write_run_files
from odis_path.training.log.trackers import open_trackers
from odis_path.training.optim import StepValues, clip_gradients, parameter_groups, set_schedule, step_values, update_teacher
from odis_path.training.resume import check_sizes, check_views, config_difference, data_difference, data_facts
from odis_path.training.signals import watch_signals
from odis_path.training.step import build_student, make_views, start_line
from tiling.storage.locks import sweep

Result = TypeVar("Result")


@dataclass
class Run:
    """Everything that training moves."""

    config: PretrainConfig
    ranks: Ranks
    folder: Path
    train: TileIndex
    held_out: TileIndex
    student: Network
    wrapped: nn.Module  # the student, under DistributedDataParallel where there are several ranks
    teacher: Network
    criterion: Criterion
    optimizer: torch.optim.Optimizer
    compiled: bool
    data: dict[str, Any]  # what it trains on, see odis_path.training.resume
    steps_per_epoch: int
    total_steps: int
    step: int = 0
    lost: set[int] = field(default_factory=set)  # tiles that could not be read from their slides, on this rank
    told: set[int] = field(default_factory=set)  # those of them that the log has
    damaged: list[Path] = field(default_factory=list)  # newer checkpoints than the one it went on from, gone at the next

    @property
    def epoch(self) -> float:
        return self.step / self.steps_per_epoch


class RunStoppedError(UserError):
    """SIGTERM or SIGUSR1 came: the run was saved and can go on."""


def pretrain(config: PretrainConfig, *, from_previous: bool = False) -> Path:
    """Train from a configuration; returns the newest checkpoint. Under torchrun every rank calls it.

    The run folder gets config.yaml, versions.json, split.csv, train.jsonl and checkpoint-<step>.pt. A folder with a
    checkpoint of the same configuration goes on from there; one of another configuration is refused. from_previous: where
    the newest checkpoint is damaged, go on from the newest that is whole; else that is an error.
    """
    ranks = start_ranks(config.run.device)
    try:
        run = prepare(config, ranks, from_previous=from_previous)
        if run.step >= run.total_steps:
            if ranks.first:
                print(f"{run.folder}: already trained to step {run.step}, nothing to do", file=sys.stderr)
        else:
            train(run)
        found = latest_checkpoint(run.folder)
        assert found is not None
        return found
    finally:
        stop_ranks()


def prepare(config: PretrainConfig, ranks: Ranks, *, from_previous: bool = False) -> Run:
    """Build data, networks and optimizer, and load the newest checkpoint of the run folder if there is one."""
    check_sizes(config, ranks.world)
    folder = Path(config.run.out)
    if ranks.first:
        sweep(folder)
    index = index_tiles(
        config.data.tiles, need_boxes=kinds_of(config) if config.data.boxless == "drop" else None,
        need_polygons=config.target.geometry == "polygon",
    )  # fmt: skip
    away = held_out_patients(index, config.data.holdout, config.data.holdout_patients, config.run.seed)
    train_tiles, held_out = index.of_patients(away, inside=False), index.of_patients(away, inside=True)
    steps_per_epoch = len(train_tiles) // config.optim.batch_size
    if steps_per_epoch == 0:
        raise UserError(
            f"{config.data.tiles}: {len(train_tiles)} tiles to train on, fewer than optim.batch_size="
            f"{config.optim.batch_size}; tile more slides or set optim.batch_size={max(1, len(train_tiles) // 2)}"
        )
    torch.manual_seed(config.run.seed)
    checkpoint, damaged = newest_checkpoint(folder, from_previous=from_previous)
    config, student = build_student(config, checkpoint)
    student.to(ranks.device)
    check_views(config, student.encoder.patch_px)
    if ranks.first and student.encoder.loaded is not None:
        print(start_line(config, student.encoder), file=sys.stderr)
    state = student.state_dict()
    teacher = build_network(config, student=False, like=state).to(ranks.device)
    teacher.load_state_dict(state)
    teacher.requires_grad_(False).eval()
    student.train()
    compiled = compiles(config, ranks)
    if compiled:
        compile_blocks(student, teacher)
    groups = parameter_groups(student, config.optim.layer_decay, decay_gain=config.optim.decay_gain)
    optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)
    wrapped: nn.Module = student
    if ranks.world > 1:
        ids = [ranks.device.index] if ranks.device.type == "cuda" else None
        wrapped = nn.parallel.DistributedDataParallel(student, device_ids=ids, gradient_as_bucket_view=True)
    total = max(1, round(config.optim.epochs * steps_per_epoch))
    criterion = Criterion(config, compiled=compiled).to(ranks.device)
    run = Run(
        config, ranks, folder, train_tiles, held_out, student, wrapped, teacher, criterion, optimizer, compiled,
        data_facts(index, away), steps_per_epoch, total, damaged=damaged,
    )  # fmt: skip
    if checkpoint is not None:
        resume(run, checkpoint)
    else:
        on_first(ranks, partial(write_run_files, run.folder, run.config, run.train, away), f"{run.folder}: not begun")
    if "pretrained_on" not in run.data:
        base = config.model.name if config.model.weights == "timm" else config.model.weights
        run.data["pretrained_on"] = kept_in_checkpoint(slides_of(run.train, away), base)
    return run


def resume(run: Run, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's state into a run. Raises UserError where it was made by another configuration, or on other tiles."""
    run.config, kept = as_begun(run.config, checkpoint.state["config"])
    difference = config_difference(run.config, checkpoint.config)
    if difference:
        raise UserError(
            f"{checkpoint.path}: was trained with {difference}; use the same configuration to go on (it lies in "
            f"{run.folder / 'config.yaml'}), or another run.out"
        )
    if other := data_difference(run.data, checkpoint.state.get("data")):
        raise UserError(
            f"{checkpoint.path}: was trained on other tiles than {run.config.data.tiles} holds now ({other}): give those to go "
            "on, or another run.out (and model.weights to start from what was learned)"
        )
    for module, key in ((run.student, "student"), (run.teacher, "teacher"), (run.criterion, "criterion")):
        load_into(module, checkpoint.state[key], checkpoint.path, key)
    run.optimizer.load_state_dict(checkpoint.state["optimizer"])
    if "pretrained_on" in (checkpoint.state.get("data") or {}):
        run.data["pretrained_on"] = checkpoint.state["data"]["pretrained_on"]
    run.step = checkpoint.step
    if run.ranks.first:
        old = f", with {' '.join(kept)} as it began" if kept else ""
        instead = f", not from {', '.join(path.name for path in run.damaged)}: damaged" if run.damaged else ""
        print(f"{run.folder}: going on from step {run.step} of {run.total_steps}{old}{instead}", file=sys.stderr)


def train(run: Run) -> None:
    """Steps from run.step to run.total_steps, with logs, k-NN and checkpoints on the way."""
    config, ranks = run.config, run.ranks
    log = on_first(ranks, partial(open_log, run), f"{run.folder}: not begun") or RunLog(run.folder, 0, active=False)
    e = config.eval
    probe = None
    if ranks.first and e.every_epochs:
        probe = KnnProbe(run.train, run.held_out, k=e.k, max_tiles=e.max_tiles, seed=config.run.seed)
        if not probe.ready:
            log.warn("k-NN while training: off (it needs tissue labels of two classes, and held-out patients that have them)")
    stop = watch_signals()
    every = max(1, round(e.every_epochs * run.steps_per_epoch))
    save_every = max(1, round(config.run.save_every_epochs * run.steps_per_epoch))
    try:
        for figures in steps(run):
            log.at(run.step)
            done = run.step >= run.total_steps
            scored = probe if run.step % every == 0 or done else None
            if figures is not None:
                check_figures(run, figures)
            if figures is not None or (e.every_epochs and run.step % every == 0):
                on_first(ranks, partial(tell, run, log, figures, scored), f"{run.folder}: not logged at step {run.step}")
            stopping = any_rank(stop["asked"], ranks) if ranks.world == 1 or figures is not None else False
            if run.step % save_every == 0 or done or stopping:
                save(run)
            if stopping and not done:
                raise RunStoppedError(
                    f"stopped at step {run.step} of {run.total_steps}: saved; the same command goes on from there"
                )
    finally:
        log.close()


def steps(run: Run) -> Any:
    """Train step by step; yields a row of figures at every log step and None else. run.step is the count of steps done."""
    config, ranks = run.config, run.ranks
    o = config.optim
    samples = TileSamples(run.train, config, run.student.encoder.patch_px)
    sampler = StepSampler(
        len(run.train), o.batch_size, seed=config.run.seed, first_step=run.step, last_step=run.total_steps,
        rank=ranks.rank, world=ranks.world, accumulate=o.accumulate,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(
        samples, batch_sampler=sampler, collate_fn=collate, num_workers=config.data.workers,
        pin_memory=ranks.device.type == "cuda", worker_init_fn=one_thread,
    )  # fmt: skip
    batches = iter(loader)
    since, waited, counted, identical = time.perf_counter(), 0.0, 0, 0
    while run.step < run.total_steps:
        values = step_values(config, run.step, run.steps_per_epoch, run.total_steps)
        set_schedule(run.optimizer, values)
        torch.manual_seed(step_seed(config.run.seed, run.step, ranks.rank))  # drop path depends on the step alone
        run.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        begin = time.perf_counter()
        micros = [next_batch(batches) for _ in range(o.accumulate)]
        waited += time.perf_counter() - begin
        identical += sum(identity_pairs(batch.views.rects) for batch in micros)
        run.lost.update(i for batch in micros for i in batch.unreadable)
        pairs = pairs_of(micros, ranks) if len(micros) > 1 else None
        for number, batch in enumerate(micros, 1):
            parts = forward_backward(run, batch, values, last=number == o.accumulate, pairs=pairs)
            for key, value in parts.items():
                sums[key] = sums.get(key, 0) + value.detach() / o.accumulate
        apply_gradients(run, values)
        run.step += 1
        counted += 1
        if run.step % config.run.log_every_steps == 0 or run.step == run.total_steps:
            sums["identity_pairs"] = torch.tensor(identical * ranks.world / (counted * o.batch_size), device=ranks.device)
            keys = sorted(sums)
            figures = mean_of_ranks(torch.stack([sums[key].float() for key in keys]), ranks).tolist()
            elapsed = time.perf_counter() - since
            yield {
                "step": run.step, "epoch": round(run.epoch, 4), **dict(zip(keys, figures, strict=True)), "lr": values.lr,
                "wd": values.weight_decay, "ema": values.ema, "teacher_temperature": values.teacher_temperature,
                "images_per_s": counted * o.batch_size / elapsed, "data_wait_share": waited / elapsed,
            }  # fmt: skip
            since, waited, counted, identical = time.perf_counter(), 0.0, 0, 0
        else:
            yield None


def pairs_of(micros: list[Batch], ranks: Ranks) -> Tensor:
    """Pairs of views that count in a step, over all ranks, a micro-batch: their losses then add up to that of the batch."""
    count = torch.stack([count_view_pairs(batch.views.object_visible) for batch in micros]).mean()
    return all_reduce_sum(count.to(ranks.device))


def forward_backward(
    run: Run, batch: Batch, values: StepValues, *, last: bool, pairs: Tensor | None = None
) -> dict[str, Tensor]:
    """Losses of one micro-batch and their gradients (reduced over ranks on the last one)."""
    config = run.config
    with_patches = config.loss.patch_weight > 0
    patch_mean = config.loss.patch_center == "all" and config.loss.centering == "center"
    bf16 = config.optim.amp == "bf16" or (config.optim.amp == "auto" and run.ranks.device.type == "cuda")
    with torch.no_grad():
        views = make_views(batch, config, run.train.tile_px, run.ranks.device, compiled=run.compiled)
    sync = run.wrapped.no_sync() if not last and run.ranks.world > 1 else nullcontext()  # type: ignore[operator]
    with sync:
        with torch.autocast(run.ranks.device.type, torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                teacher = run.teacher(views, with_locals=False, mask_patches=False, patches=with_patches, mean=patch_mean)
            student = run.wrapped(views, with_locals=True, mask_patches=with_patches, patches=with_patches)
        parts = run.criterion(teacher, student, views, values.teacher_temperature, pairs=pairs, last=last)
        (parts["loss"] / config.optim.accumulate).backward()
    return parts


def apply_gradients(run: Run, values: StepValues) -> None:
    """Clip, hold still what is frozen, step, and move the teacher."""
    if values.last_layer_frozen:
        for head in (run.student.head, run.student.patch_head):
            if head is not None:
                for parameter in head.last_layer.parameters():
                    parameter.grad = None  # as in iBOT: no step and no Adam moments
    if values.backbone_frozen:
        for parameter in run.student.encoder.vit.parameters():
            parameter.grad = None
    clip_gradients(run.student.parameters(), run.config.optim.clip, run.config.optim.clip_mode)
    run.optimizer.step()
    update_teacher(run.teacher, run.student, values.ema)


def check_figures(run: Run, figures: dict[str, Any]) -> None:
    """Stop every rank when the loss of any is not finite (figures are means over ranks, so all see it)."""
    if not np.isfinite(figures["loss"]):
        newest = latest_checkpoint(run.folder)
        raise UserError(
            f"{run.folder}: the loss is {figures['loss']} at step {run.step}: stopped; lower optim.lr or optim.clip"
            + (f", the last good state is {newest}" if newest else "")
        )


def tell(run: Run, log: RunLog, figures: dict[str, Any] | None, probe: KnnProbe | None) -> None:
    """Write the figures of a step, and the score of the teacher if it is due, into the log."""
    if figures is not None:
        log.write(figures)
        tell_lost(run, log)
    if probe is not None and probe.ready:
        score_teacher(run, probe, log)


def tell_lost(run: Run, log: RunLog) -> None:
    """Warn of tiles that could not be read, each once; others were taken in their place."""
    for i in sorted(run.lost - run.told):
        path, row = run.train.paths[int(run.train.slide[i])], int(run.train.row[i])
        log.warn(f"{path}: tile {row} cannot be read from its slide, another is taken in its place")
    run.told |= run.lost


def score_teacher(run: Run, probe: KnnProbe, log: RunLog) -> None:
    """k-NN of the teacher, into the log, which warns when the embeddings collapse."""
    data = run.config.data
    encoder = FrozenEncoder(run.teacher.encoder, run.config.name, data.mean, data.std, run.ranks.device)
    with torch.compiler.set_stance("force_eager"):  # its batches have sizes of their own
        row = probe.score(encoder)
    log.write({"step": run.step, "epoch": round(run.epoch, 4), **row})


def save(run: Run) -> None:
    """Write a checkpoint from rank 0, unless the weights are no longer finite; every rank calls, and waits until it is there.

    A rank that went on might end, upon which a launcher kills the others, or look for a checkpoint that is not there yet.
    """
    on_first(run.ranks, partial(write_checkpoint, run), f"{run.folder}: not saved at step {run.step}")


def on_first(ranks: Ranks, work: Callable[[], Result], failed: str) -> Result | None:
    """Do on rank 0 what only it does; its result there, None on the others.

    Every rank calls, and all end where a UserError is raised: one that went on would wait for the first for ever. failed: what
    the others say.
    """
    result, problem = None, None
    if ranks.first:
        try:
            result = work()
        except UserError as error:
            problem = error
    if any_rank(problem is not None, ranks):
        raise problem or UserError(f"{failed}, see what rank 0 says")
    return result


def write_checkpoint(run: Run) -> None:
    """The state of a run into its folder. Raises UserError where the weights are no longer finite."""
    probe = torch.stack([p.detach().float().abs().max() for p in run.student.parameters()]).max()
    if not torch.isfinite(probe):
        raise UserError(f"{run.folder}: the weights are not finite at step {run.step}: not saved; lower optim.lr")
    state = {
        "student": run.student.state_dict(), "teacher": run.teacher.state_dict(),
        "criterion": run.criterion.state_dict(), "optimizer": run.optimizer.state_dict(), "data": run.data,
    }  # fmt: skip
    save_checkpoint(run.folder, run.step, run.epoch, run.config, state, run.config.run.keep, run.damaged)
    run.damaged = []


def open_log(run: Run) -> RunLog:
    """The log of rank 0 with its trackers, and versions.json."""
    from odis_path.versions import provenance

    config, ranks = run.config, run.ranks
    record_start(run.folder, run.step, provenance(str(ranks.device), ranks.world))
    return RunLog(
        run.folder, run.total_steps, active=True, first_step=run.step, title=f"pretraining {config.name}",
        prototypes=config.head.out_dim, warmup_steps=round(config.optim.warmup_epochs * run.steps_per_epoch),
        trackers=open_trackers(config, run.step), identity=IdentityWatch(config),
    )  # fmt: skip


def step_seed(seed: int, step: int, rank: int) -> int:
    """A seed for the random layers of one step on one rank."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


def one_thread(_worker: int) -> None:
    """Loader workers use one thread each: the cores belong to training. A signal to the group of the run must not kill them."""
    torch.set_num_threads(1)
    if hasattr(os, "setpgrp"):
        os.setpgrp()
