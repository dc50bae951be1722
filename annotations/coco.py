"""COCO json, what detectors export to -> one table per image."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from annotations.build import mended, remarks_of
from annotations.errors import UserError
from annotations.positions import rings_from_lists
from annotations.remarks import Remarks
from annotations.rings import polygons_from_rings, usable
from annotations.table import CELL, UNCLASSIFIED, ObjectTable, empty_table


class _Image(msgspec.Struct, gc=False):
    id: int | str
    file_name: str
    width: float | None = None
    height: float | None = None


class _Category(msgspec.Struct, gc=False):
    id: int | str
    name: str


class _Annotation(msgspec.Struct, gc=False):
    image_id: int | str
    id: int | str | None = None
    category_id: int | str | None = None
    bbox: list[float] | None = None
    segmentation: list[list[float]] | dict[str, Any] | None = None
    score: float | None = None


class CocoDocument(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category] = []


def read_coco(path: Path) -> dict[str, ObjectTable]:
    """`file_name` of each image -> its objects (kind CELL), in pixels of that image; images without objects as well.

    A segmentation given as polygons is the outline; without one, or with a run-length mask, the bounding box
    (x, y, width, height) is. All tables share `labels`, the category names in the file's order.
    The tables' counts: "features"; "masks_as_boxes"; "empty" ones with neither outline nor box; "zero_area",
        "invalid_dropped", "repaired", "vertices_dropped" as in read_annotations; "unknown_category".
    Raises UserError where the file is missing, not COCO json, or names an image it does not list.
    """
    return read_coco_images(path)[0]


def read_coco_images(path: Path) -> tuple[dict[str, ObjectTable], dict[str, tuple[int, int]]]:
    """`file_name` of each image -> its objects, as read_coco gives them, and -> its width and height where they are stated."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}: check the path") from None
    return coco_tables(decode_coco(data, str(path)), str(path))


def decode_coco(data: bytes, source: str) -> CocoDocument:
    """A COCO json. Raises UserError where it is none."""
    try:
        return msgspec.json.decode(data, type=CocoDocument)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: not COCO json: {error}: it needs images, annotations and categories") from None


def decode_detections(data: bytes, source: str) -> CocoDocument:
    """A bare list of detections, each with its image_id, as a document whose names are the ids as text."""
    try:
        found = msgspec.json.decode(data, type=list[_Annotation])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: not a list of COCO detections: {error}: give image_id, category_id and bbox") from None
    images = dict.fromkeys(item.image_id for item in found)
    categories = dict.fromkeys(item.category_id for item in found if item.category_id is not None)
    return CocoDocument([_Image(i, str(i)) for i in images], found, [_Category(i, str(i)) for i in categories])


def coco_tables(document: CocoDocument, path: str) -> tuple[dict[str, ObjectTable], dict[str, tuple[int, int]]]:
    """What read_coco_images returns, of a document; path: what errors call it."""
    position = {image.id: i for i, image in enumerate(document.images)}
    names = [image.file_name for image in document.images]
    if len(position) < len(names) or len(set(names)) < len(names):
        raise UserError(f"{path}: two images share an id or a file_name: make them unique")
    groups: list[list[tuple[int, _Annotation]]] = [[] for _ in names]
    for row, item in enumerate(document.annotations):
        if item.image_id not in position:
            raise UserError(f"{path}: annotation {row} names image {item.image_id}, which is not under images: add it")
        groups[position[item.image_id]].append((row, item))
    labels = tuple(dict.fromkeys(category.name for category in document.categories))
    label_of = {category.id: labels.index(category.name) for category in document.categories}
    sizes = {
        image.file_name: (round(image.width), round(image.height)) for image in document.images if image.width and image.height
    }
    plain = _plain_tables(groups, labels, label_of)
    tables = (plain.get(i) or _table(group, labels, label_of) for i, group in enumerate(groups))
    return dict(zip(names, tables, strict=True)), sizes


def _plain_tables(
    groups: list[list[tuple[int, _Annotation]]], labels: tuple[str, ...], label_of: dict
) -> dict[int, ObjectTable]:
    """The tables of the images whose annotations are all good boxes, made in bulk (a million images take a minute)."""
    import shapely

    where = [i for i, group in enumerate(groups) if group and all(_is_box(item, label_of) for _, item in group)]
    if not where:
        return {}
    flat = [pair for i in where for pair in groups[i]]
    xywh = np.array([item.bbox for _, item in flat], dtype=np.float64)
    good = usable(xywh) & (xywh[:, 2:] > 0).all(axis=1)
    geometry = np.asarray(shapely.box(*xywh[:, :2].T, *(xywh[:, :2] + xywh[:, 2:]).T), dtype=object)
    label = np.array([label_of.get(item.category_id, UNCLASSIFIED) for _, item in flat], dtype=np.int16)
    ids = np.empty(len(flat), dtype=object)
    ids[:] = [str(row if item.id is None else item.id) for row, item in flat]
    kind = np.full(len(flat), CELL, np.uint8)
    ends = np.cumsum([len(groups[i]) for i in where]).tolist()
    tables = {}
    for i, start, stop in zip(where, [0, *ends], ends, strict=False):
        if good[start:stop].all():
            rows = slice(start, stop)
            counts = {"features": stop - start}
            scores = _scores([item for _, item in flat[rows]])
            tables[i] = ObjectTable(geometry[rows], ids[rows], label[rows], kind[rows], labels, counts, confidence=scores)
    return tables


def _is_box(item: _Annotation, label_of: dict) -> bool:
    known = item.category_id is None or item.category_id in label_of
    return known and not item.segmentation and item.bbox is not None and len(item.bbox) == 4


def _table(group: list[tuple[int, _Annotation]], labels: tuple[str, ...], label_of: dict) -> ObjectTable:
    counts: dict[str, int] = {"features": len(group)}
    polygons: list[list] = []
    polygon_row: list[int] = []
    boxes: list[list[float]] = []
    box_row: list[int] = []
    for i, (_, item) in enumerate(group):
        if isinstance(item.segmentation, list) and item.segmentation:
            polygons.extend([list(zip(flat[::2], flat[1::2], strict=False))] for flat in item.segmentation)
            polygon_row.extend([i] * len(item.segmentation))
        elif item.bbox is not None and len(item.bbox) == 4:
            boxes.append(item.bbox)
            box_row.append(i)
            if item.segmentation:
                _add(counts, "masks_as_boxes", 1)
        else:
            _add(counts, "empty", 1)
    outlines, of_outline = polygons_from_rings(*rings_from_lists(polygons), np.array(polygon_row, dtype=np.int64), counts)
    outlines, kept, was_bad, reasons = mended(outlines, counts)
    rectangles, of_box = _rectangles(boxes, counts)
    rows = np.concatenate([of_outline[kept], np.array(box_row, dtype=np.int64)[of_box]])
    label = np.array([label_of.get(item.category_id, UNCLASSIFIED) for _, item in group], dtype=np.int16)
    reason = dict.fromkeys(range(len(group)), "empty") | dict.fromkeys(polygon_row, "invalid_dropped")
    reason |= dict.fromkeys([*of_outline.tolist(), *box_row], "zero_area")
    names = (*labels, "")  # -1, unclassified, is the last
    skipped = Counter((names[label[i]], reason[i]) for i in sorted(reason.keys() - set(rows.tolist())))
    if not len(rows):
        return empty_table(counts, labels, Remarks(skipped=dict(skipped)))
    order = np.argsort(rows, kind="stable")
    rows = rows[order]
    _add(
        counts, "unknown_category", sum(item.category_id is not None and item.category_id not in label_of for _, item in group)
    )
    ids = np.empty(len(group), dtype=object)
    ids[:] = [str(row if item.id is None else item.id) for row, item in group]
    geometry = np.concatenate([outlines, rectangles])[order]
    scores = _scores([group[i][1] for i in rows.tolist()])
    kind = np.full(len(rows), CELL, np.uint8)
    flags = np.concatenate([was_bad, np.zeros(len(rectangles), dtype=bool)])[order]
    remarks = remarks_of(ids[rows], label[rows], labels, flags, reasons, dict(skipped))
    return ObjectTable(geometry, ids[rows], label[rows], kind, labels, counts, confidence=scores, remarks=remarks)


def _scores(items: list[_Annotation]) -> np.ndarray | None:
    """float32 (n,), NaN where a detector gave none; None where it gave none at all."""
    if all(item.score is None for item in items):
        return None
    with np.errstate(over="ignore"):
        return np.array([np.nan if item.score is None else item.score for item in items]).astype(np.float32)


def _rectangles(boxes: list[list[float]], counts: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Rectangles with area, and which of the boxes (x, y, width, height) each is."""
    import shapely

    xywh = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    width, height = xywh[:, 2], xywh[:, 3]
    good = usable(xywh) & (width > 0) & (height > 0)
    _add(counts, "zero_area", int((~good).sum()))
    xywh = xywh[good]
    corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    return np.asarray(shapely.box(*corners.T), dtype=object).reshape(-1), np.flatnonzero(good)


def _add(counts: dict[str, int], name: str, n: int) -> None:
    if n:
        counts[name] = counts.get(name, 0) + n
