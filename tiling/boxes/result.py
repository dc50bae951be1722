"""The outcome of the annotations of one slide, as its slide file keeps it, and the notes on it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from tiling.jobs.outcome import Note, notes_of

if TYPE_CHECKING:
    from annotations.geometry.clip import TileBoxes
    from annotations.objects import ObjectTable
    from annotations.readers.geojson.large_file import Clipped, Grid

RESULT_ATTR = "annotation_result"
# Shares of the objects' area on tiles below which a warning is due: where objects miss tiles, and where each touches one.
MIN_AREA_ON_TILES, MIN_AREA_ALL_TOUCHING = 0.5, 0.25
MANY_OUTSIDE = 0.1  # share of the objects on no tile above which the first of them holds
# Why objects were left out, by the name of the reason among the counts of a table.
REASONS = {
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
# What else reading changed, by its name among the counts of a table.
CHANGES = {
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
    "scaled_images": "images are of another size than their boxes were drawn on, which were scaled",
}


@dataclass
class ClassCounts:
    """Numbers of one class. skipped: reason -> objects left out or on no tile."""

    objects: int = 0
    boxes: int = 0
    repaired: int = 0
    skipped: dict[str, int] = field(default_factory=dict)


AnyResult = TypeVar("AnyResult", bound="BoxResult")


@dataclass
class BoxResult:
    """The outcome of the annotations of one slide or image: an attribute of /objects, as JSON.

    labels: class name ("": unclassified) -> its numbers. notes: remarks of the reader. ids: reason or change -> ids of the
    first annotations behind it. changed: names in CHANGES -> how often.
    """

    labels: dict[str, ClassCounts] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    ids: dict[str, list[str]] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls: type[AnyResult], text: str) -> AnyResult:
        """Read the attribute; what an earlier version did not write has its default."""
        stored = json.loads(text)
        values = {item.name: stored[item.name] for item in fields(cls) if item.name in stored}
        labels = {name: ClassCounts(**counts) for name, counts in values.pop("labels", {}).items()}
        return cls(labels=labels, **values)

    def left_out_notes(self) -> list[Note]:
        """A note on each reason for which objects were left out."""
        total: Counter[str] = Counter()
        for counts in self.labels.values():
            total.update(counts.skipped)
        reasons = [reason for reason in dict.fromkeys([*REASONS, *total]) if total[reason]]
        return [self._note(f"left out, {REASONS.get(reason, reason)}", total[reason], reason) for reason in reasons]

    def changed_notes(self) -> list[Note]:
        """A note on each way in which reading changed objects."""
        return [self._note(text, self.changed[name], name) for name, text in CHANGES.items() if self.changed.get(name)]

    def _note(self, text: str, count: int, name: str) -> Note:
        return Note(text, count, tuple(self.ids.get(name, ())))


def reading_facts(table: ObjectTable, boxes: TileBoxes) -> dict[str, Any]:
    """The fields of a `BoxResult` for the objects of a table and their boxes."""
    return {
        "labels": counts_by_class(table, boxes),
        "notes": list(table.log.notes),
        "ids": {name: list(ids) for name, ids in table.log.ids.items()},
        "changed": {name: n for name in CHANGES if (n := int(table.counts.get(name, 0)))},
    }


def counts_by_class(table: ObjectTable, boxes: TileBoxes) -> dict[str, ClassCounts]:
    """Class name ("": unclassified) -> its numbers."""
    names = (*table.labels, "")
    n = len(names)
    on_tile = np.zeros(len(table), dtype=bool)
    on_tile[boxes.object] = True
    number = np.where(table.label < 0, n - 1, table.label).astype(np.int64)
    objects, boxed, outside = (
        np.bincount(number[rows], minlength=n).tolist() for rows in (slice(None), boxes.object, ~on_tile)
    )
    counts: dict[str, ClassCounts] = {}
    for i, name in enumerate(names):
        skipped = {"outside": outside[i]} if outside[i] else {}
        counts[name] = ClassCounts(objects[i], boxed[i], int(table.log.repaired.get(name, 0)), skipped)
    for (name, reason), count in sorted(table.log.skipped.items()):
        skipped = counts.setdefault(name, ClassCounts()).skipped
        skipped[reason] = skipped.get(reason, 0) + int(count)
    if counts[""] == ClassCounts():
        del counts[""]
    return counts


@dataclass
class AnnotateResult(BoxResult):
    """The outcome of `annotate` on one slide.

    skipped: objects left out; outside: objects on no tile; there: objects that were there before. origin: level0 or bounds,
    and shifted: (dx, dy) that objects were moved by, level-0 pixels. tiles: of the slide. files: names of annotation files.
    repairs: a line for each of the first outlines repaired. extent_l0, tiles_extent_l0: (x0, y0, x1, y1) of objects and tiles,
    level-0 pixels. off_slide: objects beyond the slide. area_on_tiles: share of the objects' area that lies on tiles.
    on_tiles: objects on tiles for each origin tried.
    """

    objects: int = 0
    boxes: int = 0
    repaired: int = 0
    skipped: int = 0
    outside: int = 0
    there: int = 0
    origin: str = "level0"
    shifted: list[int] = field(default_factory=lambda: [0, 0])
    tiles: int = 0
    points_skipped: int = 0
    files: list[str] = field(default_factory=list)
    repairs: list[str] = field(default_factory=list)
    unknown_classes: list[str] = field(default_factory=list)
    extent_l0: list[float] = field(default_factory=list)
    tiles_extent_l0: list[float] = field(default_factory=list)
    off_slide: int = 0
    area_on_tiles: float = 1.0
    on_tiles: list[int] = field(default_factory=list)

    def slide_notes(self) -> list[Note]:
        """Notes on the slide: what was taken together, where coordinates count from, what looks wrong."""
        notes = notes_of(
            f"added to {self.there} objects that were there" if self.there else "",
            f"taken together: {', '.join(self.files)}" if len(self.files) > 1 else "",
            *self.notes,
            self._origin_note(),
        )
        if self.points_skipped:
            notes.append(Note("points skipped: give them an extent with --point-size 12um", self.points_skipped))
        notes += self.changed_notes()
        if self.unknown_classes:
            notes.append(Note(f"classes that --classes does not name: {', '.join(self.unknown_classes)}"))
        if self.off_slide:
            notes.append(Note("objects lie outside the slide", self.off_slide))
        return notes + notes_of(self._placement_note())

    def _origin_note(self) -> str:
        both = len(self.on_tiles) == 2
        if self.origin == "bounds":
            tried = f" ({self.on_tiles[0]} objects on tiles from the slide's corner, {self.on_tiles[1]} so)" if both else ""
            return f"origin: the scanned area's corner, moved by {tuple(self.shifted)}{tried}"
        if both:
            tried = f"{self.on_tiles[0]} objects on tiles, {self.on_tiles[1]} from the scanned area's corner"
            return f"origin: the slide's corner ({tried})"
        return ""

    def _placement_note(self) -> str:
        if not self.objects:
            return "the annotations hold no outline"
        if not self.tiles:
            return "the slide has no tiles"
        if self.area_on_tiles >= (MIN_AREA_ON_TILES if self.outside > MANY_OUTSIDE * self.objects else MIN_AREA_ALL_TOUCHING):
            return ""
        touching = f"{self.objects - self.outside} of {self.objects} objects touch a tile"
        note = f"warning: annotations sit off the tissue: {touching}, {self.area_on_tiles:.0%} of their area is on tiles"
        if self.extent_l0 and self.tiles_extent_l0:  # they show another scale or swapped axes
            extents = (self.extent_l0, self.tiles_extent_l0)
            own, tiles = (f"x {x0:.0f}..{x1:.0f}, y {y0:.0f}..{y1:.0f}" for x0, y0, x1, y1 in extents)
            note += f" (they span {own}, the tiles {tiles}: another slide, another scale (--annotation-mpp), --origin?)"
        return note

    def details(self, slide_id: str) -> list[str]:
        """A line for each outline that was repaired, and for each reason why objects of known ids were left out."""
        lines = [f"repaired: {slide_id}: {repair}" for repair in self.repairs]
        if hidden := self.repaired - len(self.repairs):
            lines.append(f"repaired: {slide_id}: and {hidden} more")
        ids = {REASONS[reason]: ids for reason, ids in self.ids.items() if reason in REASONS}
        return lines + [f"left out: {slide_id}: {reason}: annotation {', '.join(names)}" for reason, names in ids.items()]


def placement(clipped: Clipped, grid: Grid, origin: int) -> dict[str, Any]:
    """The fields of an `AnnotateResult` that tell whether the annotations lie on the tissue. origin: row of the shifts."""
    n = len(clipped)
    extent = (clipped.extent_l0 + np.tile(grid.shifts[origin], 2)).tolist() if n else []
    low = grid.coords_l0.min(axis=0) if len(grid.coords_l0) else np.zeros(2)
    high = grid.coords_l0.max(axis=0) + grid.size_l0 if len(grid.coords_l0) else np.zeros(2)
    return {
        "extent_l0": [round(value, 1) for value in extent],
        "tiles_extent_l0": [round(float(value), 1) for value in (*low, *high)],
        "off_slide": n - int(clipped.on_slide[origin]),
        "area_on_tiles": area_on_tiles(clipped.boxes[origin], clipped.area_l0),
        "on_tiles": [n - int(boxes.counts.get("outside", 0)) for boxes in clipped.boxes],
    }


def area_on_tiles(boxes: TileBoxes, area_l0: np.ndarray) -> float:
    """Share of the objects' area, float (n,), that lies on tiles; what several tiles show of an object counts once."""
    shown = np.bincount(boxes.object, weights=boxes.visible, minlength=len(area_l0)).clip(max=1)
    return float((shown * area_l0).sum() / area_l0.sum()) if area_l0.sum() > 0 else 1.0


def class_rows(results: Iterable[BoxResult]) -> list[tuple[str, int, int, int, int, str]]:
    """Class, objects, boxes, repaired, skipped and why, over all slides, most objects first."""
    total: dict[str, Counter[str]] = {}
    reasons: dict[str, Counter[str]] = {}
    for result in results:
        for name, counts in result.labels.items():
            numbers: Mapping[str, int] = {"objects": counts.objects, "boxes": counts.boxes, "repaired": counts.repaired}
            total.setdefault(name, Counter()).update(numbers)
            reasons.setdefault(name, Counter()).update(counts.skipped)
    rows = []
    for name, sums in total.items():
        why = ", ".join(f"{n:,} {REASONS.get(reason, reason)}" for reason, n in reasons[name].most_common())
        skipped = reasons[name].total()
        rows.append((name or "(unclassified)", sums["objects"], sums["boxes"], sums["repaired"], skipped, why))
    return sorted(rows, key=lambda row: (-row[1], row[0]))
