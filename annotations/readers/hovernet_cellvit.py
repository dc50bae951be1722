"""Cells of HoVer-Net (json) and CellViT (cells.json) -> table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np

from annotations.errors import UserError
from annotations.geometry.rings import IrregularPositionError, rings_from_json, rings_from_lists
from annotations.objects import Kind, ObjectTable
from annotations.readers.detect import loads
from annotations.readers.slide_context import SlideContext
from annotations.readers.table_builder import Objects, add, build_table, kind_of

NAN = float("nan")


class _Cell(msgspec.Struct, gc=False):
    contour: msgspec.Raw = msgspec.Raw()
    bbox: list[tuple[float, float]] | None = None
    type: int | str | None = None
    type_prob: float | None = None


class _HoverNet(msgspec.Struct, gc=False):
    nuc: dict[str, _Cell]
    mag: float | None = None


class _CellViT(msgspec.Struct, gc=False):
    cells: list[_Cell]
    type_map: dict[str, str] | None = None


_hovernet = msgspec.json.Decoder(_HoverNet, strict=False)
_cellvit = msgspec.json.Decoder(_CellViT, strict=False)


def read_hovernet(data: bytes, source: str, *, kind: str, scale: float | None, slide: SlideContext) -> ObjectTable:
    """Nuclei of HoVer-Net, scaled from the magnification `mag` they were found at to level 0.

    mag counts as HoVer-Net's readers count it: against the objective power of the slide, which its mpp stands for (0.23
    and 0.25 are both 40). Without a mag (images, not slides) coordinates stand as they are; `scale` overrides both.
    Classes are numbers as text: name them by a class map. Raises UserError where the slide's resolution is not known.
    """
    found = loads(data, source, _hovernet, "HoVer-Net json (keys: nuc, mag)")
    notes = []
    if scale is None and found.mag:
        if not slide.magnification:
            raise UserError(
                f"{source}: HoVer-Net json (keys: nuc, mag) at {found.mag:g}x of a slide of unknown mpp: give scale or mpp"
            )
        scale = slide.magnification / found.mag
        notes.append(f"HoVer-Net at {found.mag:g}x, the slide taken as {slide.magnification:g}x: scaled by {scale:g}")
    table = _table(list(found.nuc), list(found.nuc.values()), {}, source, kind, scale or 1.0)
    return replace(table, log=table.log.with_notes(*notes))


def read_cellvit(data: bytes, source: str, *, kind: str, scale: float | None, slide: SlideContext) -> ObjectTable:
    """Cells of CellViT's cells.json, which counts level-0 pixels, with the class names of its type_map.

    A cell without a contour (cell_detection.json) is its bounding box, (row, column) corners there ("boxes").
    """
    found = loads(data, source, _cellvit, "CellViT json (cells, type_map)")
    ids = [str(i) for i in range(len(found.cells))]
    return _table(ids, found.cells, found.type_map or {}, source, kind, scale or 1.0)


def _table(
    ids: list[str], cells: Sequence[_Cell], type_map: dict[str, str], source: str, kind: str, scale: float
) -> ObjectTable:
    counts = {"features": len(cells)}
    names = [None if cell.type is None else type_map.get(str(cell.type), str(cell.type)) or None for cell in cells]
    objects = Objects(ids, names, [kind_of(kind, Kind.CELL)] * len(cells))
    if any(cell.type_prob is not None for cell in cells):
        objects.confidence = [NAN if cell.type_prob is None or abs(cell.type_prob) > 1e30 else cell.type_prob for cell in cells]
    raws, owner, boxes = [], [], 0
    for row, cell in enumerate(cells):
        if bytes(cell.contour) not in (b"", b"null"):
            raws.append(msgspec.Raw(b"".join((b"[", cell.contour, b"]"))))
        elif cell.bbox is not None and len(cell.bbox) == 2:
            raws.append(_rectangle(cell.bbox))
            boxes += 1
        else:
            objects.lost.append((row, "empty"))
            continue
        owner.append(row)
    add(counts, "empty", len(objects.lost))
    add(counts, "boxes", boxes)
    try:
        rings = rings_from_json(raws)
    except IrregularPositionError:
        try:
            rings = rings_from_lists([[_pairs(json.loads(bytes(raw).decode(errors="replace"))[0])] for raw in raws])
        except ValueError as error:  # a number of more than 4300 digits
            raise UserError(f"{source}: a contour is not JSON as a computer can hold it: {error}: save it again") from None
    none = np.zeros((0, 2)), np.zeros(0, np.int64)
    rows = np.array(owner, dtype=np.int64)
    return build_table(objects, rings, rows, none, counts, point_size_l0=None, scale=scale, source=source)[0]


def _rectangle(corners: list[tuple[float, float]]) -> msgspec.Raw:
    """(row, column) of two corners as the JSON of a ring."""
    (y0, x0), (y1, x1) = corners
    return msgspec.Raw(msgspec.json.encode([[[x0, y0], [x1, y0], [x1, y1], [x0, y1]]]))


def _pairs(ring: Any) -> list[tuple[float, float]]:
    """The positions of a contour; NaN, NaN where one is not a pair of numbers."""
    if not isinstance(ring, list):
        return []
    return [(_number(at[0]), _number(at[1])) if isinstance(at, list) and len(at) > 1 else (NAN, NAN) for at in ring]


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and abs(value) < 1e300 else NAN
