"""Read COCO json of many images: one table per image, and the fate of every annotation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import numpy as np

from annotations.errors import UserError
from annotations.objects import MAX_LABELS, SHOWN_IDS, SHOWN_REPAIRS, UNCLASSIFIED, Kind, ObjectTable, ReadLog
from annotations.readers.coco.document import Annotation, Category, CocoDocument, Image, Keys, decode_coco, key_of, name_of
from annotations.readers.coco.shapes import Outlined, Size, outlined

FAR_PX = 1e9  # no image is as wide


@dataclass(frozen=True)
class CocoTables:
    """Objects of the images of a file.

    tables: `file_name` of each image -> its objects; sizes: -> its width and height where they are known.
    unlisted: what is left out because the file does not list its image, by class ("unlisted_image").
    """

    tables: dict[str, ObjectTable]
    sizes: dict[str, Size]
    unlisted: ReadLog


def read_coco(path: Path) -> dict[str, ObjectTable]:
    """Read `file_name` of each image -> its objects (of kind cell), in pixels of that image; images without objects as well.

    The outline is that of the segmentation, polygons or a run-length mask; the bounding box (x, y, width, height) where there
    is none, or none that can be used. All tables share `labels`, the category names in the file's order.
    The tables' counts: "features"; left out are "empty" ones with neither outline nor box, "malformed" and "zero_area" ones,
        "invalid_dropped" of fewer than three corners, "repeated" ones, given twice with one id; "masks_as_boxes" and
        "outlines_as_boxes" whose segmentation is of no use, "unknown_category" of a category that the file does not list,
        "crowds" (iscrowd), "shared_ids" of different annotations, "repaired", "vertices_dropped", "parts_dropped".
    Raises UserError where the file is missing, not COCO json, where ids mean two images or two classes, and where it lists
    none of the images that its annotations are of.
    """
    return read_coco_images(path).tables


def read_coco_images(path: Path) -> CocoTables:
    """Read a COCO file as above, with the size of each image, and what is of no image of the file."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}: check the path") from None
    return coco_tables(decode_coco(data, str(path)), str(path))


def coco_tables(document: CocoDocument, path: str) -> CocoTables:
    """Sort the annotations of a document into tables, as read_coco_images; path: its name in errors."""
    position = _positions(document.images, path)
    names = list(dict.fromkeys(image.file_name for image in document.images))
    labels, label_of = _classes(document.categories, path)
    keys = Keys()
    image = np.array([position.get(keys[item.image_id], -1) for item in document.annotations], dtype=np.int64)
    if len(image) and (image < 0).all():
        first = document.annotations[0]
        where = "which is not under images, and so with all others: add them"
        raise UserError(f"{path}: annotation {name_of(first, 0)} names image {first.image_id}, {where}")
    order = np.argsort(image, kind="stable")
    ends = np.searchsorted(image[order], np.arange(-1, len(names)), side="right")
    unlisted, listed = order[: ends[0]], order[ends[0] :]
    lost = _Rows(document.annotations, unlisted, labels, label_of)
    rows = _Rows(document.annotations, listed, labels, label_of)
    done = outlined(rows.items, image[listed].tolist(), _sizes(document.images, position))
    objects = _Objects(rows, done, image[listed].tolist())
    ends -= ends[0]
    tables = {name: objects.table(ends[i], ends[i + 1]) for i, name in enumerate(names)}
    return CocoTables(tables, {names[i]: size for i, size in done.sizes.items()}, lost.left_out("unlisted_image"))


def _positions(images: Sequence[Image], path: str) -> dict[str, int]:
    """Number the ids of different images. Raises UserError where an id or a file_name means two of them."""
    number: dict[str, int] = {}
    known: dict[str, Image] = {}
    owner: dict[str, str] = {}
    for image in images:
        key = key_of(image.id)
        same = known.setdefault(key, image)
        if (same.file_name, same.width, same.height) != (image.file_name, image.width, image.height):
            raise UserError(f"{path}: two images share the id {key}, {same.file_name} and {image.file_name}: make it unique")
        if owner.setdefault(image.file_name, key) != key:
            raise UserError(
                f"{path}: two images share the file_name {image.file_name}, of the ids {owner[image.file_name]} and {key}: "
                "make it unique"
            )
        number.setdefault(key, len(number))
    return number


def _classes(categories: Sequence[Category], path: str) -> tuple[tuple[str, ...], dict[str, int]]:
    """Return class names, and the class of each category's id. Raises UserError where an id means two of them."""
    name_of_id: dict[str, str] = {}
    for category in categories:
        if (name := name_of_id.setdefault(key_of(category.id), category.name)) != category.name:
            raise UserError(f"{path}: category {category.id} is called both {name} and {category.name}: make its id unique")
    labels = {name: i for i, name in enumerate(dict.fromkeys(name for name in name_of_id.values() if name))}
    if len(labels) > MAX_LABELS:
        raise UserError(f"{path}: {len(labels)} categories, {MAX_LABELS} at most: are object names stored as categories?")
    return tuple(labels), {key: labels.get(name, UNCLASSIFIED) for key, name in name_of_id.items()}


def _sizes(images: Sequence[Image], position: Mapping[str, int]) -> dict[int, Size]:
    """Return width and height of the images that state both."""
    sizes = {}
    for image in images:
        width, height = (value if value and isfinite(value) else 0 for value in (image.width, image.height))
        if 0 < width < FAR_PX and 0 < height < FAR_PX:
            sizes[position[key_of(image.id)]] = (round(width), round(height))
    return sizes


class _Rows:
    """Annotations of a file: what they are, what they are called, and the class of each."""

    def __init__(
        self, items: Sequence[Annotation], rows: np.ndarray, labels: tuple[str, ...], label_of: Mapping[str, int]
    ) -> None:
        self.items = [items[row] for row in rows.tolist()]
        self.labels = labels
        self.ids = np.empty(len(rows), dtype=object)
        self.ids[:] = [name_of(items[row], row) for row in rows.tolist()]
        known = Keys()
        stated = [item.category_id for item in self.items]
        keys = [None if value is None or value != value else known[value] for value in stated]  # NaN, as pandas writes none
        self.label = np.array([UNCLASSIFIED if k is None else label_of.get(k, UNCLASSIFIED) for k in keys], dtype=np.int16)
        self.unknown = [row for row, key in enumerate(keys) if key is not None and key not in label_of]

    def class_of(self, row: int) -> str:
        label = int(self.label[row])
        return "" if label == UNCLASSIFIED else self.labels[label]

    def left_out(self, reason: str) -> ReadLog:
        """Log all of them as left out."""
        if not self.items:
            return ReadLog()
        skipped = Counter((self.class_of(row), reason) for row in range(len(self.items)))
        return ReadLog(skipped=dict(skipped), ids={reason: tuple(self.ids[:SHOWN_IDS])})


class _Objects:
    """Annotations sorted by their image, with the outlines of them and what was done to each."""

    def __init__(self, rows: _Rows, done: Outlined, image: Sequence[int]) -> None:
        self.rows, self.geometry, self.repaired = rows, done.geometry, done.repaired
        self.reason = done.reason | dict.fromkeys(_repeated(rows, image, done.changed), "repeated")
        done.changed.update((row, "unknown_category") for row in rows.unknown)
        done.changed.update((row, "crowds") for row, item in enumerate(rows.items) if item.iscrowd)
        done.changed.update((row, "repaired") for row in done.repaired)
        self.changes: dict[int, list[tuple[str, int]]] = {row: [(why, 1)] for row, why in self.reason.items()}
        for (row, what), n in done.changed.items():
            if row not in self.reason:
                self.changes.setdefault(row, []).append((what, n))
        self.scored = any(item.score is not None for item in rows.items)
        self.plain = np.ones(len(rows.items), dtype=bool)
        self.plain[list(self.changes)] = False

    def table(self, start: int, stop: int) -> ObjectTable:
        """Return the objects of one image, which are rows start:stop."""
        use: slice | list[int] = slice(start, stop)
        counts: Counter[str] = Counter()
        log = ReadLog()
        if not self.plain[start:stop].all():
            use = [row for row in range(start, stop) if row not in self.reason]
            ids: dict[str, list[str]] = {}
            for row in range(start, stop):
                for what, n in self.changes.get(row, ()):
                    counts[what] += n
                    ids.setdefault(what, []).append(self.rows.ids[row])
            log = self._log(range(start, stop), {what: tuple(names[:SHOWN_IDS]) for what, names in ids.items()})
        items = self.rows.items[use] if isinstance(use, slice) else [self.rows.items[row] for row in use]
        return ObjectTable(
            self.geometry[use],
            self.rows.ids[use],
            self.rows.label[use],
            np.full(len(items), Kind.CELL, np.uint8),
            self.rows.labels,
            {"features": int(stop - start), **dict(sorted(counts.items()))},
            confidence=_scores(items) if self.scored else None,
            log=log,
        )

    def _log(self, rows: range, ids: dict[str, tuple[str, ...]]) -> ReadLog:
        class_of, reason = self.rows.class_of, self.reason
        bad = [row for row in rows if row in self.repaired and row not in reason]
        return ReadLog(
            repaired=dict(Counter(class_of(row) for row in bad)),
            skipped=dict(Counter((class_of(row), reason[row]) for row in rows if row in reason)),
            repairs=tuple(f"{self.rows.ids[row]}: {why}" for row in bad if (why := self.repaired[row]))[:SHOWN_REPAIRS],
            ids=ids,
        )


def _repeated(rows: _Rows, image: Sequence[int], changed: Counter[tuple[int, str]]) -> list[int]:
    """Return annotations that come again with the same id; those that share an id with another object are counted."""
    first: dict[str, int] = {}
    again: list[int] = []
    if len(set(rows.ids)) == len(rows.ids):
        return again
    for row, item in enumerate(rows.items):
        if item.id is None or (earlier := first.setdefault(rows.ids[row], row)) == row:
            continue
        if image[earlier] == image[row] and _same(rows.items[earlier], item):
            again.append(row)
        else:
            changed[row, "shared_ids"] += 1
    return again


def _same(a: Annotation, b: Annotation) -> bool:
    """Tell whether two annotations of one id and image are the same object."""
    names = ("category_id", "bbox", "segmentation")
    return all(getattr(a, name) == getattr(b, name) for name in names)


def _scores(items: list[Annotation]) -> np.ndarray | None:
    """Return scores, float32 (n,), NaN where a detector gave none; None where it gave none at all."""
    if all(item.score is None for item in items):
        return None
    with np.errstate(over="ignore"):
        return np.array([np.nan if item.score is None else item.score for item in items]).astype(np.float32)
