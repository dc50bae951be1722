"""What reading did to the objects of each class, for the user to see: repaired, left out and why, read as what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

SHOWN_REPAIRS = 200  # repairs that are told one by one
SHOWN_IDS = 20  # objects of a reason that are called by their ids


@dataclass(frozen=True)
class Remarks:
    """Numbers by class name ("": unclassified), which stay true when tables are put together.

    repaired: class -> objects whose outline was invalid. skipped: (class, reason) -> objects left out, the reasons as in
    the counts of a table. repairs: "id: what was wrong", the first SHOWN_REPAIRS. notes: what else the user should know.
    ids: reason, or another of the counts of a table -> the objects behind it, the first SHOWN_IDS; of COCO and VOC alone.
    """

    repaired: dict[str, int] = field(default_factory=dict)
    skipped: dict[tuple[str, str], int] = field(default_factory=dict)
    repairs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    ids: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def noted(self, *notes: str) -> Remarks:
        """The same with more notes."""
        return replace(self, notes=(*self.notes, *notes))

    def renamed(self, name: Callable[[str], str]) -> Remarks:
        """The same under other class names; "" stays ""."""
        repaired: Counter[str] = Counter()
        skipped: Counter[tuple[str, str]] = Counter()
        for label, n in self.repaired.items():
            repaired[name(label) if label else ""] += n
        for (label, reason), n in self.skipped.items():
            skipped[name(label) if label else "", reason] += n
        return replace(self, repaired=dict(repaired), skipped=dict(skipped))


def join_remarks(several: Iterable[Remarks]) -> Remarks:
    """The sum of them; a note that comes twice is told once."""
    several = list(several)
    repaired: Counter[str] = Counter()
    skipped: Counter[tuple[str, str]] = Counter()
    for each in several:
        repaired.update(each.repaired)
        skipped.update(each.skipped)
    names = dict.fromkeys(name for each in several for name in each.ids)
    ids = {name: tuple(id for each in several for id in each.ids.get(name, ()))[:SHOWN_IDS] for name in names}
    repairs = tuple(line for each in several for line in each.repairs)[:SHOWN_REPAIRS]
    notes = tuple(dict.fromkeys(note for each in several for note in each.notes))
    return Remarks(dict(repaired), dict(skipped), repairs, notes, ids)
