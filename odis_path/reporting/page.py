"""The parts of a report page: figures, tables, text, sections; and the report as a result."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from annotations.errors import one_line
from annotations.objects import Kind
from odis_path.figures import style
from odis_path.reporting.cohort_table import Cohort
from odis_path.reporting.evaluations import Evaluation
from odis_path.reporting.inventory import Inventory
from tiling.jobs.summary import Result, show_lines
from tiling.storage.atomic import atomic_path
from tiling.storage.csv_file import write_csv_file
from tiling.storage.slide_id import safe_id

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class FigureItem:
    """A picture with one sentence below it; `alt` says what it shows to those who do not see it."""

    path: Path
    caption: str
    alt: str
    narrow: bool = False
    photo: bool = False

    @property
    def uri(self) -> str:
        """The picture as a data URI; photographs as JPEG, which keeps the page to a few megabytes."""
        if not self.photo:
            return "data:image/png;base64," + base64.b64encode(self.path.read_bytes()).decode()
        from PIL import Image

        buffer = io.BytesIO()
        with Image.open(self.path) as image:
            image.convert("RGB").save(buffer, "JPEG", quality=88, subsampling=0)
        return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


@dataclass(frozen=True)
class TableItem:
    """A table. A row of one cell is a heading across all columns.

    `numeric` are the columns of numbers, `strong` the rows to stress; with `fold` it is folded away under that title.
    """

    columns: list[str]
    rows: list[list[str]]
    caption: str = ""
    numeric: frozenset[int] = frozenset()
    strong: frozenset[int] = frozenset()
    fold: str = ""


@dataclass(frozen=True)
class TextItem:
    """A paragraph."""

    text: str
    lead: bool = False


@dataclass(frozen=True)
class FoldItem:
    """Text that is folded away until asked for, such as a configuration; it is printed unfolded."""

    title: str
    text: str


Item = FigureItem | TableItem | TextItem | FoldItem


@dataclass
class Section:
    """A part of the report under one heading."""

    anchor: str
    title: str
    items: list[Item] = field(default_factory=list)


@dataclass
class Report(Result):
    """The data that sections draw on, and the place for their pictures and numbers.

    page: the HTML file. problems: what could not be shown, and why.
    """

    inventory: Inventory
    cohort: Cohort
    evaluations: list[Evaluation]
    files: Path
    page: Path
    problems: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    _used: set[str] = field(default_factory=set)

    def figure(
        self, name: str, figure: Any, caption: str, alt: str, *, narrow: bool = False, photo: bool = False
    ) -> FigureItem:
        """Save a matplotlib figure as PNG among the report's files."""
        path = self.files / self.unused(name, ".png")
        with atomic_path(path) as temporary:
            style.save_png(figure, temporary)
        return FigureItem(path, caption, alt, narrow, photo)

    def unused(self, name: str, suffix: str) -> str:
        """Return a file name made of `name` that no earlier figure or table has."""
        clean = safe_id(re.sub(r"[^\w.-]", "-", name).strip("-.")) or "figure"
        number, candidate = 1, clean + suffix
        while candidate in self._used:
            number += 1
            candidate = f"{clean}-{number}{suffix}"
        self._used.add(candidate)
        return candidate

    def write_csv(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Write a table as CSV among the report's files."""
        write_csv_file(self.files / self.unused(name, ".csv"), [columns, *rows])

    def add_problem(self, part: str, error: Exception) -> None:
        """Note, in one line, why a part could not be shown."""
        self.problems.append(f"{part}: {one_line(error)}")

    @property
    def failed(self) -> list[str]:
        """Files of the folder that cannot be read."""
        return [*self.inventory.problems, *self.cohort.problems]

    def show(self, console: Console) -> None:
        """Write the problems, a line each, and where the page is."""
        show_lines(console, [*(f"problem: {problem}" for problem in self.problems), f"report: {self.page}"])

    @property
    def class_names(self) -> list[str]:
        """Every class of the report, tissue first, in the order in which colours are given."""
        names = [name for kind in Kind for name in self.cohort.classes(kind.word)]
        names += [label for evaluation in self.evaluations for label in evaluation.labels]
        return list(dict.fromkeys(names))

    @property
    def colors(self) -> dict[str, str]:
        return style.class_colors(self.class_names)
