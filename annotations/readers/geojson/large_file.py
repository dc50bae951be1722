"""One annotation file -> the boxes it has in tiles, without all of its outlines in memory at a time.

A large GeoJSON file is cut between features, and each part is read, repaired and clipped by itself:
in this process and in others beside it. What is kept of an object is its row, not its outline.
"""

from __future__ import annotations

import json
import mmap
import multiprocessing
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import shapely

from annotations.errors import UserError
from annotations.geometry.clip import TileBoxes, clip_to_tiles, concatenate_boxes
from annotations.geometry.rings import IrregularPositionError
from annotations.objects import KindOption, ObjectTable, concatenate
from annotations.readers.geojson.decode import decode_features
from annotations.readers.geojson.qupath import (
    _TYPE_OF_OLD_ID,
    _collector_paused,
    _object_type,
    _table,
    nuclei_as_geometry,
)

LARGE_BYTES = 24 << 20  # a smaller file is read in one piece
STREAM_BYTES = 256 << 20  # what cannot be cut, and is larger than this, is refused where memory is to be bounded
PACKED = 10  # times as large is a file once it is unpacked
PER_PROCESS_BYTES = 64 << 20  # to start a process takes as long as to read a good part of this
NUMBERED = "\0"  # begins the id of a feature that has none: its number in its part
NUMBER = re.compile(NUMBERED + r"(\d+)")
UNKNOWN = "\ufffd"  # stands for what a file cannot store

ReadFile = Callable[[Path], ObjectTable]
ReadText = Callable[[bytes, str], ObjectTable]


@dataclass(frozen=True)
class Grid:
    """The tiles to clip to, and the options of clipping.

    coords_l0: (N, 2) top-left corner of each tile, level-0 pixels; size_l0: their side; patch_px: the same in target pixels
    shifts: one or more (dx, dy), level-0 pixels, that the objects are moved by before they are clipped, each in turn
    slide_l0: width and height of the slide, level-0 pixels; polygons: keep the clipped outlines too
    """

    coords_l0: np.ndarray
    size_l0: float
    patch_px: int
    slide_l0: tuple[float, float]
    shifts: tuple[tuple[float, float], ...] = ((0.0, 0.0),)
    polygons: bool = False


@dataclass(frozen=True)
class Clipped:
    """n objects without their outlines, and their boxes.

    table: the objects, their geometry None; area_l0: float64 (n,), level-0 pixels
    boxes: one per shift of the grid; on_slide: for each shift, objects that reach the slide
    extent_l0: float64 (4,), x0, y0, x1, y1 of all objects, unmoved, level-0 pixels; NaN where there are none
    """

    table: ObjectTable
    area_l0: np.ndarray
    boxes: tuple[TileBoxes, ...]
    on_slide: tuple[int, ...]
    extent_l0: np.ndarray

    def __len__(self) -> int:
        return len(self.table)


def clip_table(table: ObjectTable, grid: Grid) -> Clipped:
    """The boxes of the objects of a table, for every shift of the grid."""
    bounds = shapely.bounds(table.geometry).reshape(-1, 4)
    boxes, on_slide = [], []
    for shift in grid.shifts:
        moved = table.shifted(*shift) if any(shift) else table
        low, high = bounds[:, :2] + shift, bounds[:, 2:] + shift
        on_slide.append(int(((low < grid.slide_l0) & (high > 0)).all(axis=1).sum()))
        cut = clip_to_tiles(moved.geometry, grid.coords_l0, grid.size_l0, grid.patch_px, polygons=grid.polygons)
        boxes.append(cut)
    area = np.asarray(shapely.area(table.geometry), dtype=np.float64)
    rows = replace(table, geometry=np.full(len(table), None, dtype=object))
    return Clipped(rows, area, tuple(boxes), tuple(on_slide), _extent(bounds))


def _stored(clipped: Clipped) -> Clipped:
    """The same with no NUL in ids and classes, which HDF5 takes for the end of a text."""
    table = clipped.table
    if NUMBERED in "".join(table.labels):
        table = replace(table, labels=tuple(name.replace(NUMBERED, UNKNOWN) for name in table.labels))
    if NUMBERED in "".join(table.id):
        table = replace(table, id=np.array([name.replace(NUMBERED, UNKNOWN) for name in table.id], dtype=object))
    return replace(clipped, table=table)


def join_clipped(pieces: Sequence[Clipped], grid: Grid) -> Clipped:
    """The objects of several files, one after the other, as one."""
    if len(pieces) == 1:
        return pieces[0]
    sizes = [len(piece) for piece in pieces]
    joined = [
        concatenate_boxes(several, sizes, len(grid.coords_l0)) for several in zip(*(p.boxes for p in pieces), strict=True)
    ]
    return Clipped(
        table=concatenate(piece.table for piece in pieces),
        area_l0=np.concatenate([piece.area_l0 for piece in pieces]),
        boxes=tuple(joined),
        on_slide=tuple(map(sum, zip(*(piece.on_slide for piece in pieces), strict=True))),
        extent_l0=_extent(np.array([piece.extent_l0 for piece in pieces if len(piece)]).reshape(-1, 4)),
    )


def _extent(bounds: np.ndarray) -> np.ndarray:
    return np.concatenate([bounds[:, :2].min(0), bounds[:, 2:].max(0)]) if len(bounds) else np.full(4, np.nan)


def clip_file(
    path: Path, grid: Grid, *, read: ReadFile, read_text: ReadText | None = None, processes: int = 1, stream: bool = False
) -> Clipped:
    """Read an annotation file and clip it.

    read: reads any file whole. read_text: reads a part of a GeoJSON file, itself GeoJSON, as read_chunk does; None
    where files are not to be cut. processes: at most so many work at a file that can be cut.
    stream: bound memory: parts are read one after the other, and a large file that cannot be cut is refused.
    The result is the same whichever way is taken, and whoever calls.
    """
    path = Path(path)
    size = path.stat().st_size if path.is_file() else 0
    if read_text is not None and size >= LARGE_BYTES:
        parts = _parts(path)
        pieces = _pieces(parts, grid, read_text, 1 if stream else processes) if parts is not None else None
        if pieces is not None:
            return _stored(_joined_parts(pieces, grid))
    if stream and size and size * (PACKED if _is_packed(path) else 1) > STREAM_BYTES:
        what = "packed, nested, damaged, or no list of features"
        raise UserError(f"{path}: cannot be read in parts ({what}): unpack it, or leave out --stream")
    return _stored(clip_table(read(path), grid))


def _parts(path: Path) -> list[FeatureChunk] | None:
    try:
        return split_features(path)
    except OSError:  # who reads it whole says what is wrong with it
        return None


def _is_packed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4)[:2] in (b"\x1f\x8b", b"PK")


def clip_chunk(part: FeatureChunk, grid: Grid, read_text: ReadText) -> Clipped | None:
    """One part of a file; None where it does not stand by itself, so that the file has to be read whole."""
    try:
        return clip_table(read_text(part.text(), str(part.path)), grid)
    except UserError:
        return None


def read_chunk(
    text: bytes,
    source: str,
    *,
    kind: KindOption = "auto",
    point_size_l0: float | None = None,
    scale: float | None = None,
    nuclei: bool = False,
) -> ObjectTable:
    """GeoJSON text (FeatureChunk.text) -> its table, as read_annotations makes it of a file, with its arguments.

    Ids that are missing are numbers within the part. Raises UserError where the text is no GeoJSON.
    """
    side = None if point_size_l0 is None else point_size_l0 / (scale or 1)
    with _collector_paused():
        text = nuclei_as_geometry(text) if nuclei else text
        try:
            table = _read_part(text, source, kind, side)
        except IrregularPositionError:
            table = _read_part(text, source, kind, side, tolerant=True)
    return replace(table.scaled(scale or 1), source=np.full(len(table), Path(source).name, dtype=object))


def _read_part(
    text: bytes, source: str, kind: KindOption, point_size_l0: float | None, *, tolerant: bool = False
) -> ObjectTable:
    """Its own function, so that the decoded positions are gone before the collector runs again."""
    features = decode_features(text, source, tolerant=tolerant)
    for number, feature in enumerate(features):
        key = feature.id
        if key is None or key == "" or key in _TYPE_OF_OLD_ID:
            # The id of an old file is its type, which must not go with it.
            feature.object_type = _object_type(feature)
            feature.id = f"{NUMBERED}{number}"
        elif type(key) is str and NUMBERED in key:
            feature.id = key.replace(NUMBERED, UNKNOWN)
    return _table(features, kind, point_size_l0, {"features": len(features)}, source)


def _pieces(parts: Sequence[FeatureChunk], grid: Grid, read_text: ReadText, processes: int) -> list[Clipped] | None:
    """Every part clipped, in order; None as soon as one of them does not stand by itself."""
    size = parts[-1].stop - parts[0].start
    helpers = min(processes, size // PER_PROCESS_BYTES, len(parts)) - 1
    work = partial(clip_chunk, grid=grid, read_text=read_text)
    if helpers < 1:
        found: list[Clipped] = []
        for part in parts:
            piece = work(part)
            if piece is None:
                return None
            found.append(piece)
        return found
    try:
        return _shared(parts, work, helpers)
    except BrokenProcessPool:  # no process can be started here, or one was killed: alone it may still go well
        return _pieces(parts, grid, read_text, 1)


def _shared(
    parts: Sequence[FeatureChunk], work: Callable[[FeatureChunk], Clipped | None], helpers: int
) -> list[Clipped] | None:
    """This process works along: while the helpers start, and whenever both have enough to do."""
    found: dict[int, Clipped | None] = {}
    todo, flying = deque(range(len(parts))), dict[Future, int]()
    pool = ProcessPoolExecutor(helpers, multiprocessing.get_context("spawn"), initializer=_settle)
    try:
        while todo or flying:
            while todo and len(flying) < 2 * helpers:
                index = todo.popleft()
                flying[pool.submit(work, parts[index])] = index
            if todo:
                index = todo.popleft()
                found[index] = work(parts[index])
            done, _ = wait(flying, 0 if todo else None, FIRST_COMPLETED)
            found |= {flying.pop(future): future.result() for future in done}
            if any(piece is None for piece in found.values()):
                return None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return [piece for _, piece in sorted(found.items()) if piece is not None]


def _settle() -> None:
    """A helper leaves Ctrl-C to its parent, and ends when its parent does (killed, too)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _joined_parts(pieces: Sequence[Clipped], grid: Grid) -> Clipped:
    """The parts of one file as one: numbered through, its classes in order of appearance, as if read whole."""
    first = 0
    numbered = []
    for piece in pieces:
        table = piece.table
        repairs = tuple(_numbered(line, first) for line in table.log.repairs)
        table = replace(table, id=_ids(table.id, first), log=replace(table.log, repairs=repairs))
        numbered.append(replace(piece, table=table))
        first += table.counts["features"]
    whole = join_clipped(numbered, grid)
    names = dict.fromkeys(name for piece in pieces for name in piece.table.labels)
    index = {name: i for i, name in enumerate(names)}
    # The last element serves label -1, which indexes it from behind.
    to = np.array([*(index[name] for name in whole.table.labels), -1], dtype=np.int16)
    return replace(whole, table=replace(whole.table, label=to[whole.table.label], labels=tuple(names)))


def _ids(ids: np.ndarray, first: int) -> np.ndarray:
    """Numbers within a part turned into numbers within the file."""
    rows = [row for row, name in enumerate(ids.tolist()) if name[:1] == NUMBERED]
    if rows:
        ids = ids.copy()
        ids[rows] = [_numbered(name, first) for name in ids[rows].tolist()]
    return ids


def _numbered(text: str, first: int) -> str:
    """The same where it does not begin with a number within a part."""
    found = NUMBER.match(text)
    return f"{first + int(found[1])}{text[found.end() :]}" if found else text


PART_BYTES = 12 << 20


EDGE_BYTES = 1 << 16  # what stands before and behind the features fits in here


TAILS = 32  # so many ends of the list are tried


_KEY = rb'\{\s*(?:"id"\s*:\s*(?:"[^"\\]*"|-?\d+|null)\s*,\s*)?(?:"type"\s*:\s*"Feature"|"geometry"\s*:|"properties"\s*:)'


_LIST = re.compile(rb'(?:"features"\s*:\s*|^\s*)\[(?=\s*' + _KEY + rb")")


_BETWEEN = re.compile(rb"\}\s*,\s*(?=" + _KEY + rb")")


_TAIL = re.compile(rb"\}\s*\]")


@dataclass(frozen=True)
class FeatureChunk:
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


def split_features(path: Path, part_bytes: int = PART_BYTES) -> list[FeatureChunk] | None:
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
    return [FeatureChunk(path, a, b, is_list) for a, b in zip(starts, [*ends, stop], strict=True)]


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
