"""The live table of a run on a terminal."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from datetime import timedelta
from math import isfinite
from typing import TYPE_CHECKING, Any

from odis_path.training.collapse import COLLAPSE_SPREAD
from odis_path.training.knn_monitor import IDENTITY_SHARE
from odis_path.training.log.rows import GROUPINGS

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

KNN = "knn_balanced_accuracy"
_FRAMES_PER_SECOND = 2.0  # of the live table; drawn by a thread of its own
_MUCH_WAITING = 0.05
_CELLS = 20  # with the other columns the table fits 80 characters
_BARS, _ASCII_BARS = "▁▂▃▄▅▆▇█", "_.-:=+*#"


class Trend:
    """The course of one figure over the whole run, as at most `cells` means of equally many values."""

    def __init__(self, cells: int = _CELLS) -> None:
        self.cells, self.per_cell = cells, 1
        self._sums: list[tuple[float, int]] = []

    def add(self, value: float) -> None:
        """Take the next value; a full row of cells is folded to half as many."""
        if self._sums and self._sums[-1][1] < self.per_cell:
            total, count = self._sums[-1]
            self._sums[-1] = (total + value, count + 1)
            return
        if len(self._sums) == self.cells:
            pairs = zip(self._sums[::2], self._sums[1::2], strict=True)
            self._sums = [(a + b, m + n) for (a, m), (b, n) in pairs]
            self.per_cell *= 2
        self._sums.append((value, 1))

    def means(self) -> list[float]:
        """Return the mean of each cell, oldest first."""
        return [total / count for total, count in self._sums]

    def line(self, *, ascii_only: bool = False) -> str:
        """Draw a bar a cell, between the least and the greatest mean; "!" for one that is not finite."""
        means, bars = self.means(), _ASCII_BARS if ascii_only else _BARS
        finite = [value for value in means if isfinite(value)]
        low, high = min(finite, default=0.0), max(finite, default=0.0)
        flat = high - low <= 1e-9 * max(abs(high), abs(low))

        def bar(value: float) -> str:
            if not isfinite(value):
                return "!"
            return bars[3] if flat else bars[min(7, int(8 * (value - low) / (high - low)))]

        return "".join(map(bar, means))


class Progress:
    """State of a run, fed with the rows of its log: last values, their trends, the best k-NN, time to go."""

    def __init__(self, total_steps: int, first_step: int, title: str, log_k: float) -> None:
        self.total, self.step, self.title, self.log_k = total_steps, first_step, title, log_k
        self.last: dict[str, Any] = {}
        self.trends: dict[str, Trend] = {}
        self.best: tuple[float, float] | None = None  # best k-NN, and its epoch
        self._begun = time.monotonic()
        self._times: deque[tuple[float, int]] = deque(maxlen=200)

    def take(self, row: dict[str, Any], *, old: bool = False) -> None:
        """Add a row. old: of an earlier start, so it says nothing about the time to go."""
        self.last.update(row)
        self.step = max(self.step, row["step"])
        for key, value in row.items():
            if isinstance(value, int | float) and key not in ("step", "epoch"):
                self.trends.setdefault(key, Trend()).add(value)
        if KNN in row and (self.best is None or row[KNN] > self.best[0]):
            self.best = (row[KNN], row["epoch"])
        if not old:
            self._times.append((time.monotonic(), row["step"]))

    @property
    def loss_parts(self) -> list[str]:
        """Keys of the parts of the loss that this run has."""
        return [key for key in self.last if key.startswith("loss_")]

    def elapsed(self) -> str:
        """Return the time since this start, h:mm:ss."""
        return str(timedelta(seconds=int(time.monotonic() - self._begun)))

    def eta(self) -> str:
        """Estimate the time to go, h:mm:ss, from the last rows; "?" before there are two of different steps."""
        if self.step >= self.total:
            return "0:00:00"
        if not self._times or self._times[-1][1] == self._times[0][1]:
            return "?"
        (begin, first), (end, last) = self._times[0], self._times[-1]
        remaining = (self.total - last) * (end - begin) / (last - first) - (time.monotonic() - end)
        return str(timedelta(seconds=int(max(0.0, remaining))))

    def text(self) -> str:
        """Say all of it in one plain line."""
        last = self.last
        parts = [f"step {self.step}/{self.total}"]
        if "epoch" in last:
            parts.append(f"epoch {last['epoch']:.2f}")
        if "loss" in last:
            inner = ", ".join(f"{key.removeprefix('loss_')} {last[key]:.3f}" for key in self.loss_parts)
            parts.append(f"loss {last['loss']:.3f}" + (f" ({inner})" if inner else ""))
        if self.best is not None:
            parts.append(f"k-NN {last[KNN]:.3f} (best {self.best[0]:.3f} at epoch {self.best[1]:.1f})")
        shares = [f"{name} {last[f'variance_{name}']:.2f}" for name in GROUPINGS if f"variance_{name}" in last]
        if shares:
            parts.append(f"variance by {', '.join(shares)}")
        if "teacher_entropy" in last:
            parts.append(f"entropy {last['teacher_entropy']:.2f}" + (f" of {self.log_k:.2f}" if self.log_k else ""))
        if "token_spread" in last:
            parts.append(f"spread {last['token_spread']:.2f}")
        if last.get("identity_pairs", 0.0) > IDENTITY_SHARE:
            parts.append(f"identity pairs {last['identity_pairs']:.0%}")
        if "images_per_s" in last:
            parts.append(f"{last['images_per_s']:.0f} tiles/s")
        if "data_wait_share" in last:
            parts.append(f"waiting for data {last['data_wait_share']:.0%}")
        return f"{self.title}: {', '.join(parts)}, ETA {self.eta()}"

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Return (figure, its key, value now, remark) for each line of the live table."""
        last = self.last
        figures = [("loss", "loss", "{:.3f}", "")]
        figures += [(f"  {key.removeprefix('loss_')}", key, "{:.3f}", "") for key in self.loss_parts]
        best = "" if self.best is None else f"best {self.best[0]:.3f} at epoch {self.best[1]:.1f}"
        figures.append(("k-NN balanced accuracy", KNN, "{:.3f}", best))
        zscored = "columns at mean 0 and spread 1"
        figures.append(("k-NN z-scored", f"{KNN}_zscored", "{:.3f}", zscored))
        figures += [(f"variance by {name}", f"variance_{name}", "{:.2f}", "") for name in GROUPINGS]
        most = f"at most log K = {self.log_k:.2f}" if self.log_k else ""
        figures.append(("teacher entropy", "teacher_entropy", "{:.2f}", most))
        low = last.get("token_spread", 1.0) < COLLAPSE_SPREAD
        spread = f"LOW: below {COLLAPSE_SPREAD}" if low else f"low below {COLLAPSE_SPREAD}"
        figures.append(("token spread", "token_spread", "{:.2f}", spread))
        many = "MANY: see target.whole_share" if last.get("identity_pairs", 0.0) > IDENTITY_SHARE else ""
        figures.append(("identity pairs", "identity_pairs", "{:.1%}", many))
        figures.append(("learning rate", "lr", "{:.2e}", ""))
        figures.append(("tiles/s", "images_per_s", "{:.0f}", ""))
        much = last.get("data_wait_share", 0.0) > _MUCH_WAITING
        figures.append(("waiting for data", "data_wait_share", "{:.0%}", "MUCH: see data.workers" if much else ""))
        return [(name, key, form.format(last[key]), note) for name, key, form, note in figures if key in last]


class LiveTable:
    """The live table on a terminal: a thread draws it, so a log step costs next to nothing."""

    def __init__(self, progress: Progress, lock: threading.RLock) -> None:
        from rich.console import Console
        from rich.live import Live

        self._progress, self._lock = progress, lock
        self.console = Console(stderr=True)
        self._live = Live(
            console=self.console,
            get_renderable=self.render,
            refresh_per_second=_FRAMES_PER_SECOND,
            redirect_stdout=sys.stdout.isatty(),
        )
        self._live.start()

    def render(self) -> RenderableType:
        """Draw the table of this moment."""
        from rich.console import Group

        with self._lock:
            return Group(self._head(), self._table())

    def _head(self) -> Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        p = self._progress
        head = Table.grid(padding=(0, 2), expand=False)
        epoch = f"epoch {p.last['epoch']:.1f}" if "epoch" in p.last else ""
        head.add_row(
            Text(p.title, style="bold"),
            ProgressBar(total=p.total, completed=p.step, width=20),
            f"{p.step}/{p.total}",
            epoch,
            p.elapsed(),
            f"ETA {p.eta()}",
        )
        return head

    def _table(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, padding=(0, 1, 0, 0), show_header=False)
        table.add_column(no_wrap=True, min_width=22)
        table.add_column(no_wrap=True, min_width=8, justify="right")
        table.add_column(no_wrap=True, min_width=_CELLS)
        table.add_column(no_wrap=True)
        ascii_only = self.console.options.ascii_only
        for name, key, value, note in self._progress.rows():
            alarm = note[:3].isupper()
            course = Text(self._progress.trends[key].line(ascii_only=ascii_only), style="cyan")
            now = Text(value, style="bold red" if alarm else "bold")
            table.add_row(name, now, course, Text(note, style="" if alarm else "dim"))
        return table

    def say(self, text: str) -> None:
        """Print a line above the table."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True, style="yellow")

    def close(self) -> None:
        """Draw the last state and leave it standing."""
        self._live.stop()
