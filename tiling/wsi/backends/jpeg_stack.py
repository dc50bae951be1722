"""Several JPEG streams of one kind decoded in one call, as one tall picture.

Each call of a decoder reads headers and builds tables, and a thread of Python queues for the interpreter's lock several times
around it. Stored tiles of a slide share size, sampling and tables, and behind a restart marker a JPEG decoder knows nothing of
what came before (ITU-T T.81, F.2.1.3.1): so tiles one above the other with restart markers between them are one JPEG, which
can be put together without decoding anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tiling.wsi.codec import decode_jpeg
from tiling.wsi.jpeg_markers import DRI, EOI, RESTARTS, SEQUENTIAL_FRAMES, SOI, SOS, TABLES_AND_NOTES, segments

MAX_HEIGHT_PX = 65500  # of libjpeg
MAX_UNITS = 65535  # between restart markers


@dataclass(frozen=True)
class JpegHeader:
    """The header of a JPEG stream, up to its coded data.

    own: its bytes, with which every stream that goes into a stack has to begin. front, rest: the bytes of the stack's head
    around the two of its height. height, width: of the picture, in pixels. seams: at which scales rows of colour are made from
    those above and below them, so that pictures one above the other are not decoded as each alone: "none", "full", "all".
    """

    own: bytes
    front: bytes
    rest: bytes
    height: int
    width: int
    seams: str

    def stack(self, streams: Sequence[bytes]) -> bytes | None:
        """One JPEG of all streams, one above the other; None where one of them has another head or no end."""
        skip = len(self.own)
        parts = [self.front, (self.height * len(streams)).to_bytes(2, "big"), self.rest]
        for i, stream in enumerate(streams):
            if not stream.startswith(self.own) or not stream.endswith(EOI):
                return None
            parts += [stream[skip:-2], RESTARTS[i % 8]]
        parts[-1] = EOI
        return b"".join(parts)

    def decode(self, streams: Sequence[bytes], scale: int) -> np.ndarray | None:
        """Streams decoded at 1 / scale (1, 2, 4, 8): uint8 (n, h / scale, w / scale, 3).

        None where they cannot be decoded in one, and where something is wrong with one of them: each alone then says what. A
        stream with a few bytes too many behind its last pixels may pass here, with its pixels, though alone it is refused.
        """
        count, height, width = len(streams), self.height // scale, self.width // scale
        if self.seams == "all" or (self.seams == "full" and scale == 1) or self.height * count > MAX_HEIGHT_PX:
            return None
        if self.height % scale or self.width % scale or (data := self.stack(streams)) is None:
            return None
        try:
            return decode_jpeg(data, height * count, width).reshape(count, height, width, 3)
        except ValueError:
            return None


def parse_jpeg_header(stream: bytes, extra: bytes = b"", skip: int = 2) -> JpegHeader | None:
    """The header of a JPEG stream that can be stacked: one scan, sequential, Huffman coded, without restarts of its own.

    extra: segments that are stored elsewhere and go in place of the stream's bytes up to `skip`.
    """
    data = SOI + extra + stream[skip:]
    frame = 0
    for marker, start, end in segments(data):
        if marker in SEQUENTIAL_FRAMES and not frame:
            frame = start
        elif marker == SOS:
            return _header(stream[: end - 2 - len(extra) + skip], data[:end], frame, start) if frame else None
        elif marker not in TABLES_AND_NOTES:
            return None
    return None


def _header(own: bytes, data: bytes, frame: int, scan: int) -> JpegHeader | None:
    """Read a header from its bytes; frame, scan: where these segments begin in it. None of one that cannot be stacked."""
    depth, components = data[frame + 4], data[frame + 9]
    height, width = (int.from_bytes(data[frame + at : frame + at + 2], "big") for at in (5, 7))
    sampling = [(data[at] >> 4, data[at] & 15) for at in range(frame + 11, frame + 11 + 3 * components, 3)]
    if depth != 8 or data[scan + 4] != components:
        return None
    if components == 1:
        sampling = [(1, 1)]  # whatever it says: a single component is coded block by block
    unit_w, unit_h = (8 * max(factors) for factors in zip(*sampling, strict=True))
    if not height or height % unit_h:
        return None
    units = -(-width // unit_w) * (height // unit_h)
    if units > MAX_UNITS:
        return None
    seams = "none" if unit_h == 8 else "full" if sampling == [(2, 2), (1, 1), (1, 1)] else "all"
    head = SOI + DRI + units.to_bytes(2, "big") + data[2 : frame + 5]
    return JpegHeader(own, head, data[frame + 7 :], height, width, seams)
