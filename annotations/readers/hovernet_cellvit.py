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
from annotations.readers.detect import decode_known
from annotations.readers.options import ReadOptions
from annotations.readers.table_builder import NO_POINTS, Objects, build_table

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


def read_hovernet(data: bytes, source: str, options: ReadOptions) -> ObjectTable:
    """Read nuclei of HoVer-Net, scaled from the magnification `mag` they were detected at to level 0.

    mag counts as HoVer-Net's readers count it: against the objective power of the slide, which its mpp stands for (0.23
    and 0.25 are both 40). Without a mag (images, not slides) coordinates stand as they are; options.scale overrides both.
    Classes are numbers as text: name them by a class map. Raises UserError where the slide's resolution is not known.
    """
    document = decode_known(data, source, _hovernet, "HoVer-Net json (keys: nuc, mag)")
    notes = []
    if options.scale is None and document.mag:
        power = options.slide.magnification
        if not power:
            raise UserError(
                f"{source}: HoVer-Net json (keys: nuc, mag) at {document.mag:g}x of a slide of unknown mpp: give scale or mpp"
            )
        options = replace(options, scale=power / document.mag)
        notes.append(f"HoVer-Net at {document.mag:g}x, the slide taken as {power:g}x: scaled by {options.scale:g}")
    return _table(list(document.nuc), list(document.nuc.values()), {}, source, options).with_notes(*notes)


def read_cellvit(data: bytes, source: str, options: ReadOptions) -> ObjectTable:
    """Read cells of CellViT's cells.json, which counts level-0 pixels, with the class names of its type_map.

    A cell without a contour (cell_detection.json) is its bounding box, (row, column) corners there ("boxes").
    """
    document = decode_known(data, source, _cellvit, "CellViT json (cells, type_map)")
    ids = [str(i) for i in range(len(document.cells))]
    return _table(ids, document.cells, document.type_map or {}, source, options)


def _table(ids: list[str], cells: Sequence[_Cell], type_map: dict[str, str], source: str, options: ReadOptions) -> ObjectTable:
    names = [None if cell.type is None else type_map.get(str(cell.type), str(cell.type)) or None for cell in cells]
    objects = Objects(ids, names, [options.kind_of(Kind.CELL)] * len(cells))
    if any(cell.type_prob is not None for cell in cells):
        objects.confidence = [NAN if cell.type_prob is None or abs(cell.type_prob) > 1e30 else cell.type_prob for cell in cells]
    raws, owner = [], []
    for row, cell in enumerate(cells):
        if bytes(cell.contour) not in (b"", b"null"):
            raws.append(msgspec.Raw(b"".join((b"[", cell.contour, b"]"))))
        elif cell.bbox is not None and len(cell.bbox) == 2:
            raws.append(_rectangle(cell.bbox))
            objects.counts["boxes"] += 1
        else:
            objects.lose(row, "empty")
            continue
        owner.append(row)
    try:
        rings = rings_from_json(raws)
    except IrregularPositionError:
        try:
            rings = rings_from_lists([[_pairs(json.loads(bytes(raw).decode(errors="replace"))[0])] for raw in raws])
        except ValueError as error:  # a number of more than 4300 digits
            raise UserError(f"{source}: a contour is not JSON as a computer can hold it: {error}: save it again") from None
    return build_table(objects, rings, np.array(owner, dtype=np.int64), NO_POINTS, options, source)[0]


def _rectangle(corners: list[tuple[float, float]]) -> msgspec.Raw:
    """Return (row, column) of two corners as the JSON of a ring."""
    (y0, x0), (y1, x1) = corners
    return msgspec.Raw(msgspec.json.encode([[[x0, y0], [x1, y0], [x1, y1], [x0, y1]]]))


def _pairs(ring: Any) -> list[tuple[float, float]]:
    """Return the positions of a contour; NaN, NaN where one is not a pair of numbers."""
    if not isinstance(ring, list):
        return []
    return [(_number(at[0]), _number(at[1])) if isinstance(at, list) and len(at) > 1 else (NAN, NAN) for at in ring]


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and abs(value) < 1e300 else NAN
