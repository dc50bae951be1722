"""COCO json, what detectors export to -> one table per image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from annotations.errors import UserError
from annotations.positions import rings_from_lists
from annotations.rings import polygons_from_rings, repaired, usable
from annotations.table import CELL, UNCLASSIFIED, ObjectTable, empty_table


class _Image(msgspec.Struct, gc=False):
    id: int | str
    file_name: str


class _Category(msgspec.Struct, gc=False):
    id: int | str
    name: str


class _Annotation(msgspec.Struct, gc=False):
    image_id: int | str
    id: int | str | None = None
    category_id: int | str | None = None
    bbox: list[float] | None = None
    segmentation: list[list[float]] | dict[str, Any] | None = None


class _Document(msgspec.Struct):
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
    path = Path(path)
    try:
        document = msgspec.json.decode(path.read_bytes(), type=_Document)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}: check the path") from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not COCO json: {error}: it needs images, annotations and categories") from None
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
    return {name: _table(group, labels, label_of) for name, group in zip(names, groups, strict=True)}


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
    outlines, kept = repaired(outlines, counts)
    rectangles, of_box = _rectangles(boxes, counts)
    rows = np.concatenate([of_outline[kept], np.array(box_row, dtype=np.int64)[of_box]])
    if not len(rows):
        return empty_table(counts, labels)
    order = np.argsort(rows, kind="stable")
    rows = rows[order]
    label = np.array([label_of.get(item.category_id, UNCLASSIFIED) for _, item in group], dtype=np.int16)
    _add(
        counts, "unknown_category", sum(item.category_id is not None and item.category_id not in label_of for _, item in group)
    )
    ids = np.empty(len(group), dtype=object)
    ids[:] = [str(row if item.id is None else item.id) for row, item in group]
    geometry = np.concatenate([outlines, rectangles])[order]
    return ObjectTable(geometry, ids[rows], label[rows], np.full(len(rows), CELL, np.uint8), labels, counts)


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
