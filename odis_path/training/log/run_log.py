"""The log of a run: `train.jsonl`, plain lines or a live table, and the provenance of each start."""

from __future__ import annotations

import csv
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from annotations.errors import UserError
from odis_path.config import PretrainConfig
from odis_path.data.tile_index import TileIndex
from odis_path.features.pretraining import side_of
from odis_path.training.collapse import CollapseWatch
from odis_path.training.knn_monitor import IdentityWatch
from odis_path.training.log.live_table import LiveTable, Progress
from odis_path.training.log.rows import Row, read_rows
from odis_path.training.log.trackers import Tracker
from tiling.storage.atomic import atomic_path, write_error

_QUIET_SECONDS = 30.0  # between plain lines


class RunLog:
    """`train.jsonl` (one JSON object a line), what the user sees, and the trackers, on rank 0; other ranks stay silent.

    prototypes: K, size of the head's output; its log is the greatest teacher entropy. warmup_steps: no collapse is told before.
    identity: watches for global views that are the same crop.
    """

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        *,
        active: bool,
        first_step: int = 0,
        title: str = "",
        prototypes: int = 0,
        warmup_steps: int = 0,
        trackers: Sequence[Tracker] = (),
        identity: IdentityWatch | None = None,
    ) -> None:
        self.active = active
        self._warned: set[str] = set()
        if not active:
            return
        self._trackers = list(trackers)
        collapse = CollapseWatch(total_steps, warmup_steps=warmup_steps, prototypes=prototypes)
        self._watches: list[CollapseWatch | IdentityWatch] = [collapse, identity] if identity else [collapse]
        self.progress = Progress(total_steps, first_step, title, collapse.log_k)
        folder.mkdir(parents=True, exist_ok=True)
        for row in _forget_after(folder / "train.jsonl", first_step):
            self.progress.take(row, old=True)
            for watch in self._watches:
                watch.see(row)
        self._path = folder / "train.jsonl"
        with self._writing():
            self._file = self._path.open("ab", buffering=0)  # a row that was not written is not tried again when it is closed
        self._lock = threading.RLock()
        self._printed: float | None = None
        self._unsaid = False
        self._live = _terminal()
        self._table: LiveTable | None = None  # from the first row on: what fails before leaves the terminal as it was

    def at(self, step: int) -> None:
        """Move the bar between rows: the run has done `step` steps."""
        if self.active:
            self.progress.step = step

    def write(self, row: Row) -> None:
        """Append a row (it holds `step` and `epoch`), show its figures, and tell of a collapse."""
        if not self.active:
            return
        with self._writing():
            line = json.dumps(row).encode() + b"\n"
            while line := line[self._file.write(line) or 0 :]:
                pass
        with self._lock:
            self.progress.take(row)
        self._track(row)
        self._unsaid = True
        now = time.monotonic()
        if self._live and self._table is None:
            self._table = LiveTable(self.progress, self._lock)
        if not self._live and "loss" in row and (self._printed is None or now - self._printed > _QUIET_SECONDS):
            self._say_line(now)
        for watch in self._watches:
            if message := watch.see(row):
                self.warn(message)

    def warn(self, text: str) -> None:
        """Print one line to the user, above the table."""
        if not self.active:
            return
        if self._table is not None:
            self._table.say(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def warn_once(self, text: str) -> None:
        """Print one line to the user, the first time it comes up."""
        if text not in self._warned:
            self._warned.add(text)
            self.warn(text)

    def close(self) -> None:
        """Flush the file, show the last state, close the trackers; a second call does nothing."""
        if not self.active or self._file.closed:
            return
        try:
            with self._writing(), self._file:
                os.fsync(self._file.fileno())
        finally:
            if self._table is not None:
                self._table.close()
            elif self._unsaid:
                self._say_line(time.monotonic())
            for tracker in self._trackers:
                tracker.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise write_error(self._path, error) from error

    def _say_line(self, now: float) -> None:
        self._printed, self._unsaid = now, False
        print(self.progress.text(), file=sys.stderr, flush=True)

    def _track(self, row: Row) -> None:
        """Hand the figures on; a tracker that fails is left out, training goes on."""
        figures = {key: value for key, value in row.items() if key != "step"}
        for tracker in list(self._trackers):
            try:
                tracker.log(figures, int(row["step"]))
            except Exception as error:  # a full disk, a lost connection: not worth a long run
                self._trackers.remove(tracker)
                name = type(tracker).__name__
                self.warn(f"{name} failed ({type(error).__name__}: {error}): left out from here, train.jsonl holds everything")


def _terminal() -> bool:
    """Tell whether stderr can show a live table."""
    return sys.stderr.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def _forget_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the rows of steps after `step` (a run that died past its last checkpoint does them again), and lines that are none.

    A run from the start begins with its row of step 0, and keeps none. Returns the rows kept.
    """
    if not path.exists():
        return []
    rows, wrong = read_rows(path)
    if wrong and wrong[0] <= len(rows):  # not only the last one, which a killed run leaves half
        print(f"{path}: lines {', '.join(map(str, wrong[:5]))} are no JSON, damaged: left out", file=sys.stderr)
    kept = [row for row in rows if isinstance(row.get("step"), int | float) and row["step"] <= step > 0]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    return kept


def write_run_files(folder: Path, config: PretrainConfig, tiles: TileIndex, away: set[str]) -> None:
    """Write config.yaml (resolved) and split.csv of a new run. tiles: of all slides; away: the held-out patients."""
    import yaml

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.out={folder} cannot be made: {error.strerror}; give a folder that can be written") from None
    with atomic_path(folder / "config.yaml") as path:
        path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    with atomic_path(folder / "split.csv") as path, path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["slide_id", "patient_id", "split"])
        for slide, patient in zip(tiles.slide_ids, tiles.patients, strict=True):
            rows.writerow([slide, patient, side_of(patient, away)])


def record_start(folder: Path, step: int, facts: dict[str, Any]) -> None:
    """Write `versions.json`: what the run began with, and under `resumed` what was different at each later start."""
    path = folder / "versions.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8")) if step else None
    except (OSError, ValueError):
        known = None
    if isinstance(known, dict):
        changed = {key: value for key, value in facts.items() if known.get(key) != value}
        known["resumed"] = [*known.get("resumed", []), {"step": step, **changed}]
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(known if isinstance(known, dict) else facts, indent=2), encoding="utf-8")
