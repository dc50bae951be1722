"""The progress bar of a run, and the result of a command: notes, sums, a table of failures."""

from __future__ import annotations

import io
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from tiling.jobs.outcome import Note, Outcome, joined

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_LINE_EVERY_S = 30.0
SUMMARY_WIDTH = 160  # columns where the output is no terminal
MANY_ITEMS = 3  # a note on more items than this has a line of its own
NOT_TRIED = "not tried: stopped before it"


class ProgressBar:
    """One bar with an ETA on a terminal, a line now and then elsewhere; both on stderr."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total = title, total
        self.count = self.failed = 0
        self.worked, self.worked_s, self.seconds = 0, 0.0, 0.0  # items that were not skipped; their seconds; those of all
        self.last_failed = ""
        self.bar: Any = None
        self.task: Any = None
        self.started = self.last_line = time.monotonic()

    def __enter__(self) -> ProgressBar:
        if self.total and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
            from rich.progress import TimeRemainingColumn as Remaining

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            tail = (TextColumn("ETA"), Remaining(), TextColumn("{task.fields[remark]}"))
            self.bar = Progress(*columns, *tail, console=Console(stderr=True))
            self.task = self.bar.add_task(self.title, total=self.total, remark="")
            self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def advance(self, outcome: Outcome) -> None:
        self.count += 1
        self.failed += not outcome.ok
        self.seconds += outcome.seconds
        if not outcome.skipped:
            self.worked += 1
            self.worked_s += outcome.seconds
        if not outcome.ok:
            self.last_failed = outcome.item
        remark = f"{self.failed} failed (last: {self.last_failed})" if self.failed else ""
        if self.bar is not None:
            self.bar.update(self.task, advance=1, remark=remark)
        elif time.monotonic() - self.last_line > PLAIN_LINE_EVERY_S:
            self.last_line = time.monotonic()
            print(f"{self.title}: {self.count}/{self.total} {remark} {self._eta()}", file=sys.stderr, flush=True)

    def _eta(self) -> str:
        """Estimate the time left from the items that were not skipped, in their share of the time since the start."""
        if not self.worked:
            return ""
        share = self.worked_s / self.seconds if self.seconds else 1.0
        seconds_per_item = (time.monotonic() - self.started) * share / self.worked
        return f"ETA {seconds_per_item * (self.total - self.count):.0f} s"


class Result(ABC):
    """The result of a command: `print` it, take its `summary` as text, or let a notebook show it."""

    @property
    def failed(self) -> Sequence[Any]:
        """Items that failed; empty where a command that fails raises UserError instead."""
        return ()

    @abstractmethod
    def show(self, console: Console) -> None:
        """Write it to a console."""

    def width(self) -> int | None:
        """Columns it needs where it is not written to a terminal; None: as many as $COLUMNS says."""
        return None

    def print(self) -> None:
        """Write it to stdout."""
        from rich.console import Console

        self.show(Console(width=None if sys.stdout.isatty() else self.width()))

    def summary(self) -> str:
        """The same as plain text."""
        return self._recorded().export_text()

    def _repr_html_(self) -> str:
        return self._recorded().export_html(code_format="<pre>{code}</pre>", inline_styles=True)

    def _recorded(self) -> Console:
        from rich.console import Console

        # force_jupyter: a console in a notebook would show what is written to it, whatever its file.
        console = Console(file=io.StringIO(), record=True, width=self.width() or SUMMARY_WIDTH, force_jupyter=False)
        self.show(console)
        return console


class Outcomes(Result, Sequence[Outcome]):
    """The outcomes of a command's items in their order, and their summary.

    title: the command. out: where the output is. columns: keys of `Outcome.info`, numbers to be summed over the items.
    wall_s: seconds the command took; those of its workers are summed in a column of their own.
    """

    def __init__(
        self,
        outcomes: Iterable[Outcome],
        title: str,
        out: Path | str,
        columns: Sequence[str] = (),
        wall_s: float | None = None,
    ) -> None:
        self._items = list(outcomes)
        self.title, self.out, self.columns, self.wall_s = title, out, tuple(columns), wall_s

    @overload
    def __getitem__(self, index: int) -> Outcome: ...
    @overload
    def __getitem__(self, index: slice) -> list[Outcome]: ...
    def __getitem__(self, index: int | slice) -> Outcome | list[Outcome]:
        return self._items[index]

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return f"Outcomes({self.title}: {', '.join(f'{count} {name}' for name, count in self.counts().items())})"

    @property
    def failed(self) -> list[Outcome]:
        """The items that failed, and those that were not tried because the run stopped before them."""
        return [outcome for outcome in self if not outcome.ok]

    def counts(self) -> dict[str, int]:
        """The numbers of items done, skipped, failed and (only where there are any) not tried."""
        skipped = sum(outcome.skipped for outcome in self)
        untried = sum(outcome.error == NOT_TRIED for outcome in self)
        failed = len(self.failed) - untried
        counts = {"done": len(self) - skipped - failed - untried, "skipped": skipped, "failed": failed}
        return counts | ({"not tried": untried} if untried else {})

    def width(self) -> int | None:
        """As many columns as keep each failure on one line."""
        rows = [(outcome.item, outcome.message) for outcome in self.failed if outcome.error != NOT_TRIED]
        return max(SUMMARY_WIDTH, sum(max(map(len, texts)) for texts in zip(*rows, strict=True)) + 20)

    def show(self, console: Console) -> None:
        """Notes, the sums, a table of failures, and where the output is."""
        from rich.table import Table

        sums = {key: sum(outcome.info.get(key, 0) for outcome in self) for key in self.columns}
        times = {} if self.wall_s is None else {"seconds": float(self.wall_s)}
        times["worker seconds"] = float(sum(outcome.seconds for outcome in self))
        values = {**self.counts(), **sums, **times}
        table = Table(title=self.title, title_justify="left")
        for head in values:
            table.add_column(head, justify="right")
        table.add_row(*(f"{value:,}" if isinstance(value, int) else f"{value:,.1f}" for value in values.values()))
        show_lines(console, summarise(self))  # first: there may be thousands
        console.print(table)
        untried = [outcome for outcome in self.failed if outcome.error == NOT_TRIED]
        show_failures(console, [outcome for outcome in self.failed if outcome.error != NOT_TRIED])
        if untried:
            again = "put right what stopped the run, then run it again"
            show_lines(console, [f"not tried: {len(untried)}, from {untried[0].item} on: {again}"])
        show_lines(console, [f"output: {self.out}"])


def show_failures(console: Console, failures: Sequence[Outcome], title: str = "failures") -> None:
    """Write a table with a row a failure, where there are any."""
    from rich.table import Table
    from rich.text import Text

    if failures:
        table = Table("item", "problem", title=title, title_justify="left")
        for outcome in failures:
            table.add_row(Text(outcome.item), Text(outcome.message))
        console.print(table)


def show_lines(console: Console, lines: Iterable[str]) -> None:
    """Write lines as they are, each on one line however long."""
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def summarise(outcomes: Iterable[Outcome]) -> list[str]:
    """The notes on items that went well, and why items were made anew, as lines.

    A note on more than MANY_ITEMS items is one line, its numbers summed; the other notes of an item are one line together,
    once for all items that have the same.
    """
    done = [outcome for outcome in outcomes if outcome.ok]
    uses: dict[str, dict[str, list[Note]]] = {}  # text -> item -> its notes
    for outcome in done:
        for note in outcome.notes:
            uses.setdefault(note.text, {}).setdefault(outcome.item, []).append(note)
    common = {text: items for text, items in uses.items() if len(items) > MANY_ITEMS}
    lines = [f"made anew: {line}" for line in _by_text((outcome.item, outcome.redone) for outcome in done)]
    for text, items in common.items():
        notes = [note for group in items.values() for note in group]
        ids = tuple(name for note in notes for name in note.ids)
        lines.append(f"{_and_more(list(items))}: {Note(text, sum(note.count for note in notes), ids)}")
    rest = ((outcome.item, joined(note for note in outcome.notes if note.text not in common)) for outcome in done)
    return [f"note: {line}" for line in lines + _by_text(rest)]


def _by_text(texts: Iterable[tuple[str, str]]) -> list[str]:
    """(item, text) -> lines "item and 3 more: text", in the order of the first items; empty texts are left out."""
    items: dict[str, list[str]] = {}
    for item, text in texts:
        if text:
            items.setdefault(text, []).append(item)
    return [f"{_and_more(names)}: {text}" for text, names in items.items()]


def _and_more(items: Sequence[str]) -> str:
    return f"{items[0]} and {len(items) - 1} more" if len(items) > 1 else items[0]
