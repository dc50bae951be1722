"""Marker segments of a JPEG stream (ITU-T T.81, annex B), and what they say of its colours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

SOI, EOI = b"\xff\xd8", b"\xff\xd9"  # start and end of an image
DRI = b"\xff\xdd\x00\x04"  # start of the segment that defines the restart interval
RESTARTS = [bytes([0xFF, 0xD0 + i]) for i in range(8)]
APP0, APP14, COM, DQT, DHT, SOS = 0xE0, 0xEE, 0xFE, 0xDB, 0xC4, 0xDA
FRAMES = set(range(0xC0, 0xD0)) - {DHT, 0xC8, 0xCC}
SEQUENTIAL_FRAMES = (0xC0, 0xC1)  # baseline and extended sequential, Huffman coded
TABLES_AND_NOTES = {*range(0xE0, 0xF0), COM, DQT, DHT}  # what may stand before a frame and mean nothing for its layout
ADOBE_RGB = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"  # tells a decoder: no colour transform
ADOBE_YCBCR = ADOBE_RGB[:-1] + b"\x01"


class Segment(NamedTuple):
    """A marker and where its segment begins and ends in the stream, in bytes."""

    marker: int
    start: int
    end: int


def segments(stream: bytes) -> Iterator[Segment]:
    """Yield the segments after the start of an image, up to the header of its scan, included."""
    at = len(SOI)
    while at + 4 <= len(stream) and stream[at] == 0xFF:
        segment = Segment(stream[at + 1], at, at + 2 + int.from_bytes(stream[at + 2 : at + 4], "big"))
        yield segment
        if segment.marker == SOS:
            return
        at = segment.end


def without_colour_markers(stream: bytes) -> bytes:
    """Return a JPEG stream without its start and without the markers from which a decoder would guess its colours.

    Raises ValueError where it is no JPEG stream.
    """
    if stream[:2] != SOI:
        raise ValueError("is no JPEG stream")
    at = 2
    while at + 4 <= len(stream) and stream[at] == 0xFF and stream[at + 1] in (APP0, APP14):
        at += 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
    return stream[at:]


def is_taken_for_rgb(stream: bytes) -> bool:
    """Tell whether libjpeg takes a stream of three components for RGB: by its JFIF marker, by Adobe's, by their names."""
    adobe_transform = None
    for marker, start, end in segments(stream):
        body = stream[start + 4 : end]
        if marker == APP0 and body.startswith(b"JFIF\0"):
            return False
        if marker == APP14 and body.startswith(b"Adobe") and len(body) > 11:
            adobe_transform = body[11]
        if marker in FRAMES:
            return body[6::3] == b"RGB" if adobe_transform is None else adobe_transform == 0
    return False
