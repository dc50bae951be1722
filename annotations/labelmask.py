"""Label images (instance masks, PNG or TIFF) -> table: the outline of every value, along the borders of its pixels."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import shapely

from annotations.build import Objects, kind_of, table_of_outlines
from annotations.content import PNG
from annotations.errors import UserError
from annotations.frame import SlideFrame
from annotations.table import CELL, ObjectTable
from annotations.trace import trace

SIDECAR = ".classes.json"
MAX_PIXELS = 1 << 29  # a slide of 100,000 x 80,000 at a quarter of its resolution; tracing takes some 15 bytes a pixel
ALWAYS_FINE = 1 << 26  # pixels below which nothing is suspicious
MAX_RATIO = 20_000  # pixels a byte of the file: nothing packs an image that far, damage and bombs claim to


class _Sidecar(msgspec.Struct, gc=False):
    classes: dict[str, str | int | None] = {}
    mpp: float | None = None


def read_labelmask(data: bytes, path: Path, *, kind: str, scale: float | None, frame: SlideFrame) -> ObjectTable:
    """One object a value above 0 of an image of whole numbers; its id is the value.

    Pixel (column, row) covers the square from (column, row) to (column + 1, row + 1), times the scale: `scale`, else the
    sidecar's mpp, else the slide's size over the image's, which must agree in width and height. A value in several
    patches is one MultiPolygon. Classes come from a JSON file beside it, `<name>.classes.json`: {"1": "tumour", ...}, or
    {"classes": {"1": "tumour", ...}, "mpp": 1.0}; a value without one is unclassified.
    Raises UserError for colour images, fractions, and where the scale cannot be known.
    """
    source = str(path)
    mask = decoded(data, source)
    sidecar = _sidecar(path)
    notes = []
    if scale is None and sidecar.mpp and frame.mpp_l0:
        scale = sidecar.mpp / frame.mpp_l0
    if scale is None:
        height, width = mask.shape
        scale = frame.scale_of_image(width, height, source)
        notes.append(f"label image of {width} x {height} taken as the whole slide: scaled by {scale:g}")
    values, outlines = trace(mask)
    rows = np.arange(len(values))
    names = [None if (name := sidecar.classes.get(str(value))) is None else str(name) or None for value in values.tolist()]
    objects = Objects([str(value) for value in values.tolist()], names, [kind_of(kind, CELL)] * len(values))
    outlines = shapely.transform(outlines, lambda xy: xy * scale) if len(outlines) and scale != 1 else outlines
    none = np.zeros((0, 2)), np.zeros(0, np.int64)
    counts = {"features": len(values)}
    table, _ = table_of_outlines(objects, np.asarray(outlines, dtype=object), rows, rows, none, counts, None, 1.0, source)
    return replace(table, remarks=table.remarks.noted(*notes))


def decoded(data: bytes, source: str) -> np.ndarray:
    """An image of whole numbers, (height, width). Raises UserError for any other."""
    import imagecodecs
    import tifffile

    try:
        if data.startswith(PNG):
            width, height = struct.unpack(">II", data[16:24])
            _refuse_size(width * height, len(data), source)
            image: Any = imagecodecs.png_decode(data)
        else:
            import io
            import logging

            logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it says of a damaged file, we say in a line
            with tifffile.TiffFile(io.BytesIO(data)) as file:
                _refuse_size(int(np.prod(file.series[0].shape[-3:], dtype=float)), len(data), source)
                image = file.series[0].asarray()
    except UserError:
        raise
    except Exception as error:  # the decoders raise whatever comes to them
        raise UserError(f"{source}: not a readable image: {' '.join(str(error).split())[:200]}: save the mask again") from None
    image = np.squeeze(image)
    if image.ndim != 2 or image.dtype.kind not in "iub":
        what = f"{' x '.join(map(str, image.shape))} of {image.dtype}"
        raise UserError(f"{source}: {what} is no label image: save one channel of whole numbers, 0 for background")
    return image.astype(np.uint8) if image.dtype.kind == "b" else image


def _refuse_size(pixels: int, size: int, source: str) -> None:
    if not pixels > 0 or pixels > max(ALWAYS_FINE, MAX_RATIO * size):
        raise UserError(f"{source}: says it has {pixels} pixels in {size} bytes: damaged: save the mask again")
    if pixels > MAX_PIXELS:
        raise UserError(f"{source}: {pixels / 1e6:.0f} megapixels, {MAX_PIXELS / 1e6:.0f} at most: save it reduced")


def _sidecar(path: Path) -> _Sidecar:
    """What the JSON file beside a mask says; nothing where there is none."""
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
