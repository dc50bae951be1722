"""Summarise `annotate`: a line a slide, and a table of classes with the fate of their objects."""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from annotations.errors import UserError
from tiling.jobs.outcome import Outcome
from tiling.jobs.summary import Outcomes, show_lines
from tiling.slide_file.read import SlideFile

if TYPE_CHECKING:
    from rich.console import Console

    from annotations.geometry.clip import TileBoxes
    from annotations.objects import ObjectTable
    from annotations.readers.geojson.large_file import Clipped, Grid

RESULT_ATTR = "annotation_result"
_REMARK = re.compile(r"(?:(\d+) )?(.*?)(?: \(annotation ([^()]*)\))?", re.DOTALL)  # a number, what it is of, and their ids
SHOWN_IDS = 5  # annotations that a line calls by their ids
# Shares of the objects' area on tiles below which a warning is due: where they miss tiles, and where each touches one at least.
LITTLE_INSIDE, LEAST_INSIDE = 0.5, 0.25
FEW_OUTSIDE = 0.1  # of the objects
UNCLASSIFIED = "(unclassified)"
WORDS = {
    "points_skipped": "points without --point-size",
    "lines_skipped": "lines",
    "empty": "no geometry",
    "malformed": "not understood",
    "invalid_dropped": "fewer than 3 corners",
    "beyond": "beyond any slide",
    "zero_area": "no area",
    "tangled": "crossing themselves too often to be repaired",
    "outside": "on no tile",
    "repeated": "given twice",
    "unlisted_image": "of an image that the file does not list",
    "no_image": "of an image that is not here",
}

# What else reading changed or read as something else, by its name among the counts of a table.
CHANGED = {
    "ignored": "TMA cores, tiles or the root of QuPath left out",
    "vertices_dropped": "positions left out that are no numbers, or beyond any slide",
    "holes_dropped": "holes left out that are no rings, or in no region",
    "boxes": "cells without an outline taken as their bounding boxes",
    "parts_dropped": "parts of outlines left out that have fewer than 3 corners",
    "masks_as_boxes": "run-length masks that are empty, damaged or of another size than their image, taken as their boxes",
    "outlines_as_boxes": "outlines that cannot be used, taken as their boxes",
    "unknown_category": "objects of a category that the file does not list, taken without a class",
    "crowds": "crowds (iscrowd), each taken as one object",
    "shared_ids": "objects that share their id with another",
}
SLIDES_EACH = 3  # what is said of more slides is said once


def by_label(table: ObjectTable, boxes: TileBoxes) -> dict[str, dict[str, Any]]:
    """Class name ("" for none) -> objects, boxes, repaired, and skipped: reason -> objects left out or on no tile."""
    names = (*table.labels, "")
    n = len(names)
    on_tile = np.zeros(len(table), dtype=bool)
    on_tile[boxes.object] = True
    # -1, unclassified, counts as the last name.
    number = np.where(table.label < 0, n - 1, table.label).astype(np.int64)
    objects = np.bincount(number, minlength=n).tolist()
    boxed = np.bincount(number[boxes.object], minlength=n).tolist()
    outside = np.bincount(number[~on_tile], minlength=n).tolist()
    found: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(names):
        why = {"outside": outside[i]} if outside[i] else {}
        repaired = int(table.log.repaired.get(name, 0))
        found[name] = {"objects": objects[i], "boxes": boxed[i], "repaired": repaired, "skipped": why}
    for (name, reason), count in sorted(table.log.skipped.items()):
        row = found.setdefault(name, {"objects": 0, "boxes": 0, "repaired": 0, "skipped": {}})
        row["skipped"][reason] = row["skipped"].get(reason, 0) + int(count)
    if not any(found[""][key] for key in ("objects", "boxes", "repaired", "skipped")):
        del found[""]
    return found


def placement(clipped: Clipped, grid: Grid, which: int) -> dict[str, Any]:
    """Measures of whether the annotations lie where the tissue is: extents, objects off the slide, and on tiles by origin."""
    n = len(clipped)
    extent = (clipped.extent_l0 + np.tile(grid.shifts[which], 2)).tolist() if n else []
    low = grid.coords_l0.min(axis=0) if len(grid.coords_l0) else np.zeros(2)
    high = grid.coords_l0.max(axis=0) + grid.size_l0 if len(grid.coords_l0) else np.zeros(2)
    return {
        "extent_l0": [round(value, 1) for value in extent],
        "tiles_extent_l0": [round(float(value), 1) for value in (*low, *high)],
        "off_slide": n - int(clipped.on_slide[which]),
        "area_on_tiles": _area_on_tiles(clipped, which),
        "on_tiles": [n - int(boxes.counts.get("outside", 0)) for boxes in clipped.boxes],
    }


def _area_on_tiles(clipped: Clipped, which: int) -> float:
    """Share of the area of all objects that lies on tiles; what several tiles show of an object counts once."""
    boxes, area = clipped.boxes[which], clipped.area_l0
    shown = np.bincount(boxes.object, weights=boxes.visible, minlength=len(area)).clip(max=1)
    return float((shown * area).sum() / area.sum()) if area.sum() > 0 else 1.0


def message(result: Mapping[str, Any]) -> str:
    """One line on a slide: what was taken together, where coordinates count from, what looks wrong."""
    objects, inside = result["objects"], result["objects"] - result["outside"]
    remarks = []
    if result.get("there"):
        remarks.append(f"added to {result['there']} objects that were there")
    if len(result["files"]) > 1:
        remarks.append(f"taken together: {', '.join(result['files'])}")
    remarks += result.get("notes", ())
    remarks += _origin(result)
    if result["points_skipped"]:
        remarks.append(f"{result['points_skipped']} points skipped: give them an extent with --point-size 12um")
    remarks += changed_lines(result.get("changed", {}), result.get("ids", {}))
    if unknown := result.get("unknown_classes"):
        remarks.append(f"classes that --classes does not name: {', '.join(unknown)}")
    if result.get("off_slide"):
        remarks.append(f"{result['off_slide']} objects lie outside the slide")
    if not objects:
        remarks.append("the annotations hold no outline")
    elif not result["tiles"]:
        remarks.append("the slide has no tiles")
    elif result.get("area_on_tiles", 1) < (LITTLE_INSIDE if result["outside"] > FEW_OUTSIDE * objects else LEAST_INSIDE):
        share = f"{inside} of {objects} objects touch a tile, {result['area_on_tiles']:.0%} of their area is on tiles"
        remarks.append(f"warning: annotations sit off the tissue: {share}{_extents(result)}")
    return "; ".join(remarks)


def changed_lines(counts: Mapping[str, int], ids: Mapping[str, Sequence[str]]) -> list[str]:
    """Remarks on objects that reading changed, from the counts of a table, with their ids where known."""
    return [f"{counts[name]} {what}{_called(ids.get(name, ()))}" for name, what in CHANGED.items() if counts.get(name)]


def left_out(skipped: Mapping[tuple[str, str], int], ids: Mapping[str, Sequence[str]]) -> list[str]:
    """Remarks on objects left out, over all classes: one for each reason, with their ids."""
    total: Counter[str] = Counter()
    for (_, reason), n in skipped.items():
        total[reason] += n
    return [f"{n} left out, {WORDS.get(reason, reason)}{_called(ids.get(reason, ()))}" for reason, n in total.items() if n]


def _called(ids: Sequence[str]) -> str:
    """Ids in brackets, as _REMARK takes them apart again."""
    names = [re.sub("[();]", "_", name) for name in ids[:SHOWN_IDS]]
    return f" (annotation {', '.join(names)}{', ...' if len(ids) > SHOWN_IDS else ''})" if ids else ""


def told_once(outcomes: Sequence[Outcome]) -> list[str]:
    """Take what is said of more than SLIDES_EACH slides out of their messages, numbers at its beginning and ids at its end
    aside; returns it as a line each, the numbers summed.
    """
    remarks: dict[str, list[tuple[Outcome, str, int, str]]] = {}
    for outcome in outcomes:
        for remark in outcome.message.split("; ") if outcome.ok and outcome.message else ():
            number, rest, ids = _REMARK.fullmatch(remark).groups()  # type: ignore[union-attr]
            remarks.setdefault(rest, []).append((outcome, remark, int(number or 0), ids or ""))
    lines = []
    for rest, where in remarks.items():
        if len(where) > SLIDES_EACH:
            total = sum(number for _, _, number, _ in where)
            who = f"{where[0][0].item} and {len(where) - 1} more"  # as finish says what whole messages share
            names = [name for _, _, _, ids in where[: SHOWN_IDS + 1] if ids for name in ids.split(", ")]
            lines.append(f"note: {who}: {f'{total} ' if total else ''}{rest}{_called(names)}")
            for outcome, remark, _, _ in where:
                others = outcome.message.split("; ")
                others.remove(remark)
                outcome.message = "; ".join(others)
    return lines


def _origin(result: Mapping[str, Any]) -> list[str]:
    on_tiles = result.get("on_tiles", [])
    found = f" ({on_tiles[0]} objects on tiles from the slide's corner, {on_tiles[1]} so)" if len(on_tiles) == 2 else ""
    if result["origin"] == "bounds":
        return [f"origin: the scanned area's corner, moved by {tuple(result['shifted'])}{found}"]
    if len(on_tiles) == 2:
        both = f"{on_tiles[0]} objects on tiles, {on_tiles[1]} from the scanned area's corner"
        return [f"origin: the slide's corner ({both})"]
    return []


def _extents(result: Mapping[str, Any]) -> str:
    """The extents of the objects and of the tiles: they show another scale or swapped axes."""
    mine, tiles = result.get("extent_l0"), result.get("tiles_extent_l0")
    if not mine or not tiles:
        return ""
    where = [f"x {a:.0f}..{c:.0f}, y {b:.0f}..{d:.0f}" for a, b, c, d in (mine, tiles)]
    return f" (they span {where[0]}, the tiles {where[1]}: another slide, another scale (--annotation-mpp), --origin?)"


def results_of(folder: Path, outcomes: Iterable[Outcome]) -> dict[str, dict[str, Any]]:
    """slide_id -> what annotate did there, this time or before, as the slide files say; of slides that went well."""
    found = {}
    for outcome in outcomes:
        path = folder / f"{outcome.item}.h5"
        text = None
        if outcome.ok and path.is_file():
            with contextlib.suppress(UserError), SlideFile(path) as file:  # it may be another run's by now
                text = file.group_attrs("objects").get(RESULT_ATTR)
        if text is not None:
            found[outcome.item] = json.loads(text)
    return found


def label_rows(results: Iterable[Mapping[str, Any]]) -> list[tuple[str, int, int, int, int, str]]:
    """Class, objects, boxes, repaired, skipped, why, most objects first, over all slides."""
    total: dict[str, Counter[str]] = {}
    reasons: dict[str, Counter[str]] = {}
    for result in results:
        for name, row in result.get("labels", {}).items():
            total.setdefault(name, Counter()).update({key: row[key] for key in ("objects", "boxes", "repaired")})
            reasons.setdefault(name, Counter()).update(row["skipped"])
    rows = []
    for name, sums in total.items():
        why = ", ".join(f"{n:,} {WORDS.get(reason, reason)}" for reason, n in reasons[name].most_common())
        skipped = reasons[name].total()
        rows.append((name or UNCLASSIFIED, sums["objects"], sums["boxes"], sums["repaired"], skipped, why))
    return sorted(rows, key=lambda row: (-row[1], row[0]))


class BoxOutcomes(Outcomes):
    """The outcomes of a command that stores boxes, told with a table of their classes.

    stored: what was made of the boxes, a result a slide file; None: as the slide files in `out` say, read when it is asked for.
    notes: lines on what belongs to no item. verbose: tell the outlines that were repaired, too (the first 200 of a slide), and
    what was left out, where it is known by its id.
    """

    def __init__(
        self,
        outcomes: Iterable[Outcome],
        title: str,
        out: Path | str,
        columns: Sequence[str],
        wall_s: float,
        *,
        stored: Sequence[Mapping[str, Any]] | None = None,
        notes: Sequence[str] = (),
        verbose: bool = False,
    ) -> None:
        super().__init__(outcomes, title, out, columns, wall_s)
        self.notes, self._stored, self._verbose = tuple(notes), stored, verbose

    @property
    def results(self) -> list[Mapping[str, Any]]:
        """The results of clipping, one for each slide file or image, as slide files keep them."""
        return list(results_of(Path(self.out), self).values() if self._stored is None else self._stored)

    def show(self, console: Console) -> None:
        """As `Outcomes.show`, what is said of many items once; then the classes."""
        items = [replace(outcome) for outcome in self]  # whose messages are shortened
        lines = [*told_once(items), *(f"note: {line}" for line in self.notes)]
        Outcomes(items, self.title, self.out, self.columns, self.wall_s).show(console)
        if self._verbose:
            results = results_of(Path(self.out), self).items()
            lines += [line for slide_id, result in results for line in _details(slide_id, result)]
        show_lines(console, lines)
        show_classes(console, self.results)


def show_classes(console: Console, results: Iterable[Mapping[str, Any]]) -> None:
    """Write the table of the classes of all results, where there are any."""
    from rich.table import Table
    from rich.text import Text

    rows = label_rows(results)
    if not rows:
        return
    table = Table(title="annotated, by class", title_justify="left")
    for name in ("class", "objects", "boxes", "repaired", "skipped", "why"):
        table.add_column(name, justify="left" if name in ("class", "why") else "right")
    for label, *numbers, why in rows:
        table.add_row(Text(label), *(f"{number:,}" for number in numbers), Text(str(why)))
    console.print(table)


def _details(slide_id: str, result: Mapping[str, Any]) -> list[str]:
    """A line for each outline that was repaired, and for each reason why objects of known ids were left out."""
    repairs = result.get("repairs", ())
    lines = [f"repaired: {slide_id}: {line}" for line in repairs]
    if more := result["repaired"] - len(repairs):
        lines.append(f"repaired: {slide_id}: and {more} more")
    ids = {reason: names for reason, names in result.get("ids", {}).items() if reason in WORDS}
    return lines + [f"left out: {slide_id}: {WORDS[reason]}: annotation {', '.join(names)}" for reason, names in ids.items()]
