"""The result of a command that stores boxes: notes, sums, and a table of classes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from annotations.errors import UserError
from tiling.boxes.result import RESULT_ATTR, AnnotateResult, BoxResult, class_rows
from tiling.jobs.outcome import Outcome
from tiling.jobs.summary import Outcomes, show_lines
from tiling.slide_file.read import SlideFile

if TYPE_CHECKING:
    from rich.console import Console


class BoxOutcomes(Outcomes):
    """The outcomes of a command that stores boxes; the summary has a table of their classes.

    stored: a result for each slide file; None: those in the slide files of `out`, read when they are asked for.
    notes: lines on what belongs to no item. verbose: list the outlines that were repaired (the first 200 of a slide) and the
    objects left out whose ids are known.
    """

    def __init__(
        self,
        outcomes: Iterable[Outcome],
        title: str,
        out: Path | str,
        columns: Sequence[str],
        wall_s: float,
        *,
        stored: Sequence[BoxResult] | None = None,
        notes: Sequence[str] = (),
        verbose: bool = False,
    ) -> None:
        super().__init__(outcomes, title, out, columns, wall_s)
        self.notes, self._stored, self._verbose = tuple(notes), stored, verbose

    @property
    def results(self) -> list[BoxResult]:
        """The results of clipping, one for each slide file or image, as slide files keep them."""
        return [*read_results(Path(self.out), self).values()] if self._stored is None else list(self._stored)

    def show(self, console: Console) -> None:
        """As `Outcomes.show`; then notes on no item, and the classes."""
        super().show(console)
        lines = [f"note: {line}" for line in self.notes]
        if self._verbose:
            results = read_results(Path(self.out), self).items()
            lines += [line for slide_id, result in results for line in result.details(slide_id)]
        show_lines(console, lines)
        show_classes(console, self.results)


def read_results(folder: Path, outcomes: Iterable[Outcome]) -> dict[str, AnnotateResult]:
    """slide_id -> what annotate did, this time or before, as the slide files keep it; of slides that went well."""
    results = {}
    for outcome in outcomes:
        path = folder / f"{outcome.item}.h5"
        if outcome.ok and path.is_file():
            with contextlib.suppress(UserError), SlideFile(path) as file:  # another run may have replaced it meanwhile
                if (text := file.group_attrs("objects").get(RESULT_ATTR)) is not None:
                    results[outcome.item] = AnnotateResult.from_json(text)
    return results


def show_classes(console: Console, results: Sequence[BoxResult]) -> None:
    """Write the table of the classes of all results, where there are any."""
    from rich.table import Table
    from rich.text import Text

    rows = class_rows(results)
    if not rows:
        return
    table = Table(title="annotated, by class", title_justify="left")
    for name in ("class", "objects", "boxes", "repaired", "skipped", "why"):
        table.add_column(name, justify="left" if name in ("class", "why") else "right")
    for label, *numbers, why in rows:
        table.add_row(Text(label), *(f"{number:,}" for number in numbers), Text(str(why)))
    console.print(table)
