"""Which files of a folder are one DICOM series: OpenSlide reads the whole slide from any one of them."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from tiling.urls import url_of

SERIES_UID = 0x0020000E
TRANSFER_SYNTAX = 0x00020010
IMPLICIT = b"1.2.840.10008.1.2"
LONG_LENGTH = frozenset([b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"])
ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
UNDEFINED = 0xFFFFFFFF
HEADER_BYTES = 4 << 20  # more than ever stands before the sought tag; what is no DICOM ends there


def one_per_series(paths: Iterable[Path]) -> list[Path]:
    """The paths without the .dcm files whose series is there already, by another file of the same folder."""
    paths = list(paths)
    dicoms = [path for path in paths if path.suffix.lower() == ".dcm" and not url_of(path)]
    in_folder = Counter(path.parent for path in dicoms)
    series = {path: (path.parent, series_uid(path)) for path in dicoms if in_folder[path.parent] > 1}
    first = {key: path for path, key in reversed(series.items())}
    return [path for path in paths if path not in series or not series[path][1] or first[series[path]] == path]


def series_uid(path: Path) -> str:
    """SeriesInstanceUID of a DICOM file; "" where it has none or is no such file."""
    try:
        with path.open("rb") as file:
            return _series_uid(file) if file.read(132)[128:] == b"DICM" else ""
    except (OSError, struct.error, ValueError):  # cut off, or no DICOM after all
        return ""


def _series_uid(file: BinaryIO) -> str:
    """Walk the elements, which stand in the order of their tags, and past the sequences before the one that is sought."""
    depth, implicit = 0, False
    while file.tell() < HEADER_BYTES:
        group, element = struct.unpack("<HH", file.read(4))
        tag = group << 16 | element
        if group == 0xFFFE or (implicit and group != 2):
            (length,) = struct.unpack("<I", file.read(4))
        elif (kind := file.read(2)) in LONG_LENGTH:
            _, length = struct.unpack("<HI", file.read(6))
        else:
            (length,) = struct.unpack("<H", file.read(2))
        if tag in (ITEM_END, SEQUENCE_END):
            depth -= 1
        elif length == UNDEFINED:
            implicit, depth = implicit or (tag != ITEM and kind == b"UN"), depth + 1
        elif depth == 0 and tag == SERIES_UID:
            return file.read(length).rstrip(b"\0 ").decode("ascii")
        elif depth == 0 and tag > SERIES_UID:
            return ""
        elif tag == TRANSFER_SYNTAX:
            implicit = file.read(length).rstrip(b"\0 ") == IMPLICIT
        else:
            file.seek(length, 1)
    return ""
