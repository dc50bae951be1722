"""Where a large GeoJSON file can be cut between its features, so that the parts are read apart and the whole is never held.

A place to cut is guessed from how features begin. The guess is safe: when the file without its features is valid JSON, and
every part between brackets is a valid list, then the parts one after the other are the list that the whole file holds. JSON
has no second reading. Whoever reads a part that is not a valid list has to take the file in one piece.
"""

from __future__ import annotations

import json
import mmap
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PART_BYTES = 12 << 20
EDGE_BYTES = 1 << 16  # what stands before and behind the features fits in here
TAILS = 32  # so many ends of the list are tried
_KEY = rb'\{\s*(?:"id"\s*:\s*(?:"[^"\\]*"|-?\d+|null)\s*,\s*)?(?:"type"\s*:\s*"Feature"|"geometry"\s*:|"properties"\s*:)'
_LIST = re.compile(rb'(?:"features"\s*:\s*|^\s*)\[(?=\s*' + _KEY + rb")")
_BETWEEN = re.compile(rb"\}\s*,\s*(?=" + _KEY + rb")")
_TAIL = re.compile(rb"\}\s*\]")


@dataclass(frozen=True)
class Part:
    """Bytes start:stop of a file: features with commas between them, no brackets around; is_list: the file is a bare list."""

    path: Path
    start: int
    stop: int
    is_list: bool = False

    def text(self) -> bytes:
        """The part as a document like the whole one: a JSON list or a FeatureCollection."""
        before, behind = (b"[", b"]") if self.is_list else (b'{"type":"FeatureCollection","features":[', b"]}")
        with self.path.open("rb") as file:
            file.seek(self.start)
            return b"".join((before, file.read(self.stop - self.start), behind))


def cut_file(path: Path, part_bytes: int = PART_BYTES) -> list[Part] | None:
    """Parts of about `part_bytes` of a GeoJSON file, in order; None where it has to be read in one piece."""
    with path.open("rb") as file:
        if file.seek(0, 2) == 0:
            return None
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            inside = _inside(data)
            if inside is None:
                return None
            start, stop, is_list = inside
            ends: list[int] = []
            at = start + part_bytes
            while at < stop and (found := _BETWEEN.search(data, at - 1, stop)):
                ends.append(data.find(b",", found.start(), found.end()))
                at = ends[-1] + part_bytes
    starts = [start, *(end + 1 for end in ends)]
    return [Part(path, a, b, is_list) for a, b in zip(starts, [*ends, stop], strict=True)]


def _inside(data: mmap.mmap) -> tuple[int, int, bool] | None:
    """The bytes of the list of features, brackets excluded, and whether it is all there is; None where the rest of the file is
    not GeoJSON around it.
    """
    head = data[:EDGE_BYTES].removeprefix(b"\xef\xbb\xbf")
    offset = min(len(data), EDGE_BYTES) - len(head)
    found = _LIST.search(head)
    if found is None:
        return None
    start = offset + found.end()
    edge = max(start, len(data) - EDGE_BYTES)
    tail = data[edge:]
    for end in [match.end() - 1 for match in _TAIL.finditer(tail)][: -TAILS - 1 : -1]:
        try:
            rest = json.loads(head[: found.end()] + tail[end:], object_pairs_hook=_once)
        except (ValueError, RecursionError):
            continue
        is_list = rest == []
        if is_list or (isinstance(rest, dict) and rest.get("type", "FeatureCollection") == "FeatureCollection"):
            return (start, edge + end, is_list) if is_list or rest.get("features") == [] else None
    return None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; ValueError where a key comes twice: two lists of features are not for this way of reading."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice")
    return found
