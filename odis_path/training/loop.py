"""The training loop, to be read from top to bottom.

One file for every method: `odis`, `ibot`, `dino` and the ablations differ only in their configuration. The same command runs
alone or under torchrun. A run that stops goes on from its newest checkpoint, bit for bit on a CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from annotations.errors import UserError
from odis_path.checkpoint import TrainedState, latest_checkpoint, save_checkpoint
from odis_path.config import PretrainConfig
from odis_path.data.dataset import TileSamples
from odis_path.data.sampler import next_batch
from odis_path.distributed import any_rank, on_first_rank, start_ranks, stop_ranks
from odis_path.training.knn_monitor import IdentityWatch
from odis_path.training.log.meter import StepMeter
from odis_path.training.log.rows import Row
from odis_path.training.log.run_log import RunLog, record_start
from odis_path.training.log.trackers import open_trackers
from odis_path.training.optim import step_values, warmup_epochs
from odis_path.training.probes import Probe, open_probes, score_teacher
from odis_path.training.setup import Run, batch_loader, prepare, samples_of
from odis_path.training.shortcut.first_look import take_first_look
from odis_path.training.signals import watch_signals
from odis_path.training.step import train_step


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
        if run.step < run.total_steps:
            train(run)
        elif ranks.first:
            print(f"{run.folder}: already trained to step {run.step}, nothing to do", file=sys.stderr)
        checkpoint = latest_checkpoint(run.folder)
        assert checkpoint is not None
        return checkpoint
    finally:
        stop_ranks()


def train(run: Run) -> None:
    """Take the steps from run.step to run.total_steps; log, score the teacher and save on the way.

    Ranks agree on every stop: figures are means over all of them, and a signal to one is heard by all where they log.
    """
    config, ranks = run.config, run.ranks
    save_every = run.steps_of(config.run.save_every_epochs)
    score_every = run.steps_of(config.eval.every_epochs) if config.eval.every_epochs else 0
    log = on_first_rank(ranks, partial(open_log, run), f"{run.folder}: not begun") or RunLog(run.folder, 0, active=False)
    samples = samples_of(run)
    stop = watch_signals()
    try:
        begun = partial(begin, run, log, samples, scored=score_every > 0)
        probes = on_first_rank(ranks, begun, f"{run.folder}: not begun") or []
        batches = iter(batch_loader(run, samples))
        meter = StepMeter(config.optim.batch_size, ranks)
        for step in range(run.step, run.total_steps):
            values = step_values(config, step, run.steps_per_epoch, run.total_steps)
            with meter.waiting():
                micro_batches = [next_batch(batches) for _ in range(config.optim.accumulate)]
            meter.count(micro_batches)
            losses = train_step(run, micro_batches, values)
            run.step = step + 1
            log.at(run.step)

            is_last = run.step == run.total_steps
            log_due = is_last or run.step % config.run.log_every_steps == 0
            score_due = score_every > 0 and (is_last or run.step % score_every == 0)
            row: Row | None = None
            if log_due:
                row = {"step": run.step, "epoch": round(run.epoch, 4), **meter.figures(losses, values)}
                check_finite(run, row["loss"])
            if log_due or score_due:
                write = partial(write_log, run, log, row, meter.unreadable, probes if score_due else [])
                on_first_rank(ranks, write, f"{run.folder}: not logged at step {run.step}")
            stopping = any_rank(stop.requested, ranks) if log_due or ranks.world == 1 else False
            if is_last or stopping or run.step % save_every == 0:
                save(run)
            if stopping and not is_last:
                raise RunStoppedError(
                    f"stopped at step {run.step} of {run.total_steps}: saved; the same command goes on from there"
                )
            if log_due:
                meter.restart()
    finally:
        stop.release()
        log.close()


def check_finite(run: Run, loss: float) -> None:
    """Stop every rank when the loss of any is not finite (figures are means over ranks, so all see it)."""
    if not np.isfinite(loss):
        newest = latest_checkpoint(run.folder)
        raise UserError(
            f"{run.folder}: the loss is {loss} at step {run.step}: stopped; lower optim.lr or optim.clip"
            + (f", the last good state is {newest}" if newest else "")
        )


def open_log(run: Run) -> RunLog:
    """Open the log of rank 0 with its trackers, and write versions.json."""
    from odis_path.versions import provenance

    config, ranks = run.config, run.ranks
    record_start(run.folder, run.step, provenance(str(ranks.device), ranks.world))
    return RunLog(
        run.folder,
        run.total_steps,
        active=True,
        first_step=run.step,
        title=f"pretraining {config.name}",
        prototypes=config.head.out_dim,
        warmup_steps=round(warmup_epochs(config.optim) * run.steps_per_epoch),
        trackers=open_trackers(config, run.step),
        identity=IdentityWatch(config),
    )


def begin(run: Run, log: RunLog, samples: TileSamples, *, scored: bool) -> list[Probe]:
    """Tell what views, targets and schedules of a new run give away, before the hours are spent; open the teacher's scores.

    The row of step 0 holds the figures of that look, and the scores of the untrained teacher.
    """
    row: Row = {"step": 0, "epoch": 0.0}
    if run.step == 0:
        look = take_first_look(samples, run.steps_per_epoch, run.total_steps, run.ranks.device)
        for line in look.lines():
            log.warn(line)
        row |= look.row()
    probes = open_probes(run, log) if scored else []
    if run.step == 0:
        log.write(row | score_teacher(run, probes))
    return probes


def write_log(run: Run, log: RunLog, row: Row | None, unreadable: set[int], probes: Sequence[Probe]) -> None:
    """Write the figures of a step and the score of the teacher, where they are due.

    unreadable: tiles of run.train that could not be read so far; the user hears of each once.
    """
    if row is not None:
        log.write(row)
        for i in sorted(unreadable):
            path, tile = run.train.paths[int(run.train.slide[i])], int(run.train.row[i])
            log.warn_once(f"{path}: tile {tile} cannot be read from its slide, another is taken in its place")
    if probes:
        log.write({"step": run.step, "epoch": round(run.epoch, 4), **score_teacher(run, probes)})


def save(run: Run) -> None:
    """Write a checkpoint from rank 0, unless the weights are no longer finite; every rank calls, and waits until it is there.

    A rank that went on might end, upon which a launcher kills the others, or look for a checkpoint that is not there yet.
    """
    on_first_rank(run.ranks, partial(write_checkpoint, run), f"{run.folder}: not saved at step {run.step}")


def write_checkpoint(run: Run) -> None:
    """Write the state of a run into its folder. Raises UserError where the weights are no longer finite."""
    largest = torch.stack([p.detach().float().abs().max() for p in run.student.parameters()]).max()
    if not torch.isfinite(largest):
        raise UserError(f"{run.folder}: the weights are not finite at step {run.step}: not saved; lower optim.lr")
    state = TrainedState(
        student=run.student.state_dict(),
        teacher=run.teacher.state_dict(),
        criterion=run.criterion.state_dict(),
        optimizer=run.optimizer.state_dict(),
        data=run.data,
    )
    save_checkpoint(run.folder, run.step, run.epoch, run.config, state, run.config.run.keep, run.damaged)
    run.damaged = []
