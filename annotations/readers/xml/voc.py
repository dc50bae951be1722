"""PASCAL VOC style XML, one file an image, as ImageNet's box files are -> a table."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import shapely

from annotations.errors import UserError
from annotations.geometry.rings import is_beyond, is_usable
from annotations.objects import SHOWN_IDS, UNCLASSIFIED, Kind, ObjectTable, ReadLog, empty_table
from annotations.readers.xml.tree import parse_xml

CORNERS = ("xmin", "ymin", "xmax", "ymax")


def read_voc(path: Path) -> tuple[ObjectTable, tuple[int, int] | None]:
    """Read the objects of one image (of kind cell) in its pixels, and its width and height, None where unknown.

    Corners (xmin, ymin, xmax, ymax) are taken as they stand. An object without a name is unclassified; ids count from 0
    behind the file's stem. counts: "features"; "empty" without a box; "zero_area" with a box of no extent; "beyond" with one
    that is on no conceivable image.
    Raises UserError where the file is missing, no XML, holds a document type or entities (refused unread), or a box
    that is no four numbers.
    """
    path = Path(path)
    root = _parsed(path)
    objects = root.findall("object")
    counts = {"features": len(objects)}
    names = tuple(dict.fromkeys(name for item in objects if (name := _text(item, "name"))))
    corners, row = [], []
    lost: dict[int, str] = {}
    for i, item in enumerate(objects):
        box = item.find("bndbox")
        if box is None:
            lost[i] = "empty"
            continue
        corners.append([_number(path, i, corner, _text(box, corner)) for corner in CORNERS])
        row.append(i)
    xyxy = np.array(corners, dtype=np.float64).reshape(-1, 4)
    good = is_usable(xyxy) & (xyxy[:, 2] > xyxy[:, 0]) & (xyxy[:, 3] > xyxy[:, 1])
    far = is_beyond(xyxy)
    lost |= {row[i]: "beyond" if far[i] else "zero_area" for i in np.flatnonzero(~good).tolist()}
    counts |= Counter(lost.values())
    log = _log(lost, [_text(item, "name") for item in objects], path.stem)
    size = _size(root)
    if not good.any():
        return empty_table(counts, names, log), size
    rows = np.array(row, dtype=np.int64)[good]
    label = [names.index(name) if (name := _text(objects[i], "name")) else UNCLASSIFIED for i in rows.tolist()]
    ids = np.empty(len(rows), dtype=object)
    ids[:] = [f"{path.stem}:{i}" for i in rows.tolist()]
    geometry = np.asarray(shapely.box(*xyxy[good].T), dtype=object).reshape(-1)
    kind = np.full(len(rows), Kind.CELL, np.uint8)
    return ObjectTable(geometry, ids, np.array(label, np.int16), kind, names, counts, log=log), size


def _log(lost: dict[int, str], names: list[str], stem: str) -> ReadLog:
    """Log objects that are left out, number -> why."""
    skipped = Counter((names[i], why) for i, why in lost.items())
    ids = {why: tuple(f"{stem}:{i}" for i, reason in lost.items() if reason == why)[:SHOWN_IDS] for why in set(lost.values())}
    return ReadLog(skipped=dict(skipped), ids=ids)


def _parsed(path: Path) -> ElementTree.Element:
    """Return the root element."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}: check the path") from None
    return parse_xml(data, str(path), "it needs <object><name/><bndbox> in <annotation>")


def _text(element: ElementTree.Element, tag: str) -> str:
    return (element.findtext(tag) or "").strip()


def _number(path: Path, row: int, corner: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{path}: object {row}: {corner} is {text!r}: give a number") from None


def _size(root: ElementTree.Element) -> tuple[int, int] | None:
    """Return width and height in pixels; None where they are missing or 0, as some tools write them."""
    try:
        width, height = (round(float(root.findtext(f"size/{side}") or 0)) for side in ("width", "height"))
    except (ValueError, OverflowError):
        return None
    return (width, height) if width > 0 and height > 0 else None
