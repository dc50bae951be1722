"""Label images (instance masks, PNG or TIFF) -> table: the outline of every value, along the borders of its pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import shapely

from annotations.errors import UserError
from annotations.geometry.trace_mask import trace_outlines
from annotations.objects import Kind, ObjectTable
from annotations.readers.mask_pixels import decode_label_image
from annotations.readers.options import ReadOptions
from annotations.readers.table_builder import NO_POINTS, Objects, table_of_outlines

SIDECAR = ".classes.json"
SHOWN = 3  # values that lie in several pieces are named


class _Sidecar(msgspec.Struct, gc=False):
    classes: dict[str, str | int | None] = {}
    mpp: float | None = None


def read_label_image(data: bytes, path: Path, options: ReadOptions) -> ObjectTable:
    """Read one object a value above 0 of an image of whole numbers; its id is the value.

    Pixel (column, row) covers the square from (column, row) to (column + 1, row + 1), times the scale: options.scale, else the
    sidecar's mpp, else the slide's size over the image's, which must agree in width and height. A value in several
    pieces, which share no side of a pixel (4-connected), is one MultiPolygon, which a note tells; split_values makes each
    piece an object, 7 becoming 7/0, 7/1, ... Classes come from a JSON file beside it, `<name>.classes.json`:
    {"1": "tumour", ...}, or {"classes": {"1": "tumour", ...}, "mpp": 1.0}; a value without one is unclassified.
    Raises UserError for colour images, fractions, and where the scale cannot be known.
    """
    source = str(path)
    mask = decode_label_image(data, source)
    sidecar = _sidecar(path)
    scale, notes = options.scale, []
    if scale is None and sidecar.mpp and options.slide.mpp_l0:
        scale = sidecar.mpp / options.slide.mpp_l0
    if scale is None:
        height, width = mask.shape
        scale = options.slide.scale_of_image(width, height, source)
        notes.append(f"label image of {width} x {height} taken as the whole slide: scaled by {scale:g}")
    values, outlines = trace_outlines(mask)
    pieces = shapely.get_num_geometries(outlines)
    notes += _pieces_note(values, pieces, options.split_values)
    owner = np.arange(len(values))
    if options.split_values:
        owner, outlines = np.repeat(owner, pieces), shapely.get_parts(outlines)
    if len(outlines) and scale != 1:
        outlines = shapely.transform(outlines, lambda xy: xy * scale)
    ids = [str(value) for value in values.tolist()]
    names = [None if (name := sidecar.classes.get(value)) is None else str(name) or None for value in ids]
    objects = Objects(ids, names, [options.kind_of(Kind.CELL)] * len(values))
    table, _ = table_of_outlines(objects, np.asarray(outlines, dtype=object), owner, NO_POINTS, options, source)
    return table.with_notes(*notes)


def _pieces_note(values: np.ndarray, pieces: np.ndarray, split: bool) -> list[str]:
    """Return the note on values that lie in several pieces: a mask of one value for all, or instances torn apart."""
    several = np.flatnonzero(pieces > 1)
    if not len(several):
        return []
    if len(several) == 1:
        what = ", each an object" if split else " and is one object: --split-values makes each piece one"
        return [f"value {values[several[0]]} lies in {pieces[several[0]]} pieces{what}"]
    most = several[np.argsort(-pieces[several], kind="stable")][:SHOWN]
    named = ", ".join(f"{values[i]} in {pieces[i]}" for i in most.tolist())
    ellipsis = ", ..." if len(several) > SHOWN else ""
    what = ", each piece an object" if split else " and each value is one object: --split-values makes each piece one"
    return [f"{len(several)} of {len(values)} mask values lie in several pieces ({named}{ellipsis}){what}"]


def _sidecar(path: Path) -> _Sidecar:
    """Read the JSON file beside a mask; nothing where there is none."""
    for name in (path.name + SIDECAR, path.stem.removesuffix(".ome") + SIDECAR):
        beside = path.with_name(name)
        if beside.is_file():
            break
    else:
        return _Sidecar()
    try:
        document = msgspec.json.decode(beside.read_bytes(), type=dict[str, Any])
        return msgspec.convert(document if "classes" in document else {"classes": document}, _Sidecar)
    except (msgspec.MsgspecError, OSError, UnicodeDecodeError) as error:
        raise UserError(f'{beside}: not classes of a mask: {error}: write {{"1": "tumour", "2": "stroma"}}') from None
