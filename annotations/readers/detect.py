"""Unpack the bytes of an annotation file by what they begin with, and detect its format."""

from __future__ import annotations

import io
import json
import re
import zipfile
import zlib
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from annotations.errors import UserError

PNG = b"\x89PNG\r\n\x1a\n"
ALWAYS_FINE = 1 << 28  # unpacked bytes below which no packing is suspicious
MAX_RATIO = 200  # annotations pack to a tenth or a twentieth of their size; a bomb to a thousandth
_STEP = 1 << 24
_PLAIN_START = re.compile(
    rb'\s*(?:\[\s*(?:\]|\{\s*"(?:type|id|geometry|properties)"\s*:)'
    rb'|\{\s*"type"\s*:\s*"(?:Feature|FeatureCollection|GeometryCollection|(?:Multi)?(?:Point|LineString|Polygon))")'
)
_REFUSED = {
    b"SQLite format 3\x00": "an SQLite store: save it as GeoJSON (TIAToolbox: AnnotationStore.to_geojson)",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file: save the outlines as GeoJSON, or the labels as a TIFF mask",
    b"\xac\xed\x00\x05": "QuPath's own data: export the objects as GeoJSON (File, Export objects as GeoJSON)",
}


T = TypeVar("T")


class _Readable(Protocol):
    def read(self, size: int = ..., /) -> bytes: ...


def read_unpacked(path: Path) -> bytes:
    """Read the content of a file, unpacked where it is gzip or a zip of one file. Raises UserError (path, what, way out)."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder: name a file in it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        if data[:2] == b"\x1f\x8b":
            import gzip

            with gzip.GzipFile(fileobj=io.BytesIO(data)) as packed:
                return _unpacked(packed, len(data), path)
        if data[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
            return _only_member(path, data)
    except (EOFError, OSError, ValueError, zlib.error, zipfile.BadZipFile, RuntimeError) as error:
        raise UserError(f"{path}: damaged or unsupported archive: {str(error)[:200]}: export or copy it again") from None
    return data


def _unpacked(packed: _Readable, size: int, path: Path) -> bytes:
    limit = max(ALWAYS_FINE, MAX_RATIO * size)
    parts, total = [], 0
    while part := packed.read(_STEP):
        total += len(part)
        if total > limit:
            raise UserError(f"{path}: unpacks to more than {total // size} times its size: no annotations do: get it anew")
        parts.append(part)
    return b"".join(parts)


def _only_member(path: Path, data: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = [n for n in archive.namelist() if not n.endswith("/") and not n.startswith("__MACOSX/")]
        if len(names) != 1:
            raise UserError(f"{path}: the archive holds {len(names)} files: pack one GeoJSON file per archive")
        with archive.open(names[0]) as packed:
            return _unpacked(packed, len(data), path)


def detect_format(data: bytes, source: str) -> str:
    """Tell the format of a file: one of geojson, hovernet, cellvit, coco, detections, xml, parquet, png, tiff.

    What is not known is called geojson, whose reader says what is wrong. Raises UserError for what is known and not read.
    """
    start = data[:64]
    for magic, what in _REFUSED.items():
        if start.startswith(magic):
            raise UserError(f"{source}: is {what}")
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise UserError(f"{source}: is a Python pickle (a .dat of TIAToolbox?), which could run code: save it as GeoJSON")
    if start.startswith(b"PAR1"):
        return "parquet"
    if start.startswith(PNG):
        return "png"
    if start[:4] in (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+"):
        return "tiff"
    if start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"<" or start[:4] in (b"\xff\xfe<\x00", b"\xfe\xff\x00<"):
        return "xml"
    return _json_format(data)


def _json_format(data: bytes) -> str:
    head = data[:4096].removeprefix(b"\xef\xbb\xbf").lstrip()
    if head[:1] == b"[":
        first = head[: head.find(b"}") + 1 or None]  # a run-length mask is an object within the first
        is_coco = b'"image_id"' in first or b'"segmentation"' in first
        return "detections" if is_coco and b'"geometry"' not in first else "geojson"
    if _PLAIN_START.match(head) or head[:1] != b"{":
        return "geojson"
    keys = _keys(data)
    if "nuc" in keys:
        return "hovernet"
    if "cells" in keys:
        return "cellvit"
    if "images" in keys and "annotations" in keys:
        return "coco"
    return "geojson"


def _keys(data: bytes) -> set[str]:
    """Return the keys of a JSON object, its values skipped; none where it cannot be read."""
    try:
        return set(msgspec.json.decode(data.removeprefix(b"\xef\xbb\xbf"), type=dict[str, msgspec.Raw]))
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        pass
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return set()
    return set(document) if isinstance(document, dict) else set()


def decode_known(data: bytes, source: str, decoder: msgspec.json.Decoder[T], what: str) -> T:
    """Decode a JSON document of known form; the standard library's reader is asked where NaN or Infinity are in the way."""
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        problem = error
    try:
        cleaned = json.loads(data, parse_constant=lambda _: None)
        return decoder.decode(msgspec.json.encode(cleaned))
    except (ValueError, RecursionError, msgspec.MsgspecError):
        raise UserError(f"{source}: not {what} as it should be: {problem}: save it again") from None
