"""Clip one annotation file to tiles without all of its outlines in memory at a time.

A large GeoJSON file is split between features, and each chunk is read, repaired and clipped by itself:
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
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import shapely

from annotations.errors import UserError
from annotations.geometry.clip import TileBoxes, clip_to_tiles, concatenate_boxes
from annotations.objects import ObjectTable, concatenate
from annotations.readers.geojson.decode import collector_paused, unique_keys
from annotations.readers.geojson.qupath import UNKNOWN, read_geojson
from annotations.readers.options import ReadOptions
from annotations.readers.read import read_annotations

LARGE_BYTES = 24 << 20  # a smaller file is read in one piece
STREAM_BYTES = 256 << 20  # what cannot be split, and is larger than this, is refused where memory is to be bounded
PACKED = 10  # times as large is a file once it is unpacked
PER_PROCESS_BYTES = 64 << 20  # to start a process takes as long as to read a good part of this
CHUNK_BYTES = 12 << 20
EDGE_BYTES = 1 << 16  # what stands before and behind the features fits in here
TAILS = 32  # so many ends of the list are tried
NUMBERED = "\0"  # begins the id of a feature that has none: its number in its chunk
NUMBER = re.compile(NUMBERED + r"(\d+)")

_KEY = rb'\{\s*(?:"id"\s*:\s*(?:"[^"\\]*"|-?\d+|null)\s*,\s*)?(?:"type"\s*:\s*"Feature"|"geometry"\s*:|"properties"\s*:)'
_LIST = re.compile(rb'(?:"features"\s*:\s*|^\s*)\[(?=\s*' + _KEY + rb")")
_BETWEEN = re.compile(rb"\}\s*,\s*(?=" + _KEY + rb")")
_TAIL = re.compile(rb"\}\s*\]")


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
    """Clip the objects of a table, for every shift of the grid."""
    bounds = shapely.bounds(table.geometry).reshape(-1, 4)
    boxes, on_slide = [], []
    for shift in grid.shifts:
        moved = table.shifted(*shift) if any(shift) else table
        low, high = bounds[:, :2] + shift, bounds[:, 2:] + shift
        on_slide.append(int(((low < grid.slide_l0) & (high > 0)).all(axis=1).sum()))
        boxes.append(clip_to_tiles(moved.geometry, grid.coords_l0, grid.size_l0, grid.patch_px, polygons=grid.polygons))
    area = np.asarray(shapely.area(table.geometry), dtype=np.float64)
    rows = replace(table, geometry=np.full(len(table), None, dtype=object))
    return Clipped(rows, area, tuple(boxes), tuple(on_slide), _extent(bounds))


def _storable(clipped: Clipped) -> Clipped:
    """Return the same with no NUL in ids and classes, which HDF5 takes for the end of a text."""
    table = clipped.table
    if NUMBERED in "".join(table.labels):
        table = replace(table, labels=tuple(name.replace(NUMBERED, UNKNOWN) for name in table.labels))
    if NUMBERED in "".join(table.id):
        table = replace(table, id=np.array([name.replace(NUMBERED, UNKNOWN) for name in table.id], dtype=object))
    return replace(clipped, table=table)


def join_clipped(parts: Sequence[Clipped], grid: Grid, *, sort_labels: bool = True) -> Clipped:
    """Join the objects of several files or chunks, one after the other; labels as annotations.objects.concatenate has them."""
    if len(parts) == 1:
        return parts[0]
    sizes = [len(part) for part in parts]
    boxes = [
        concatenate_boxes(of_shift, sizes, len(grid.coords_l0)) for of_shift in zip(*(p.boxes for p in parts), strict=True)
    ]
    return Clipped(
        table=concatenate([part.table for part in parts], sort_labels=sort_labels),
        area_l0=np.concatenate([part.area_l0 for part in parts]),
        boxes=tuple(boxes),
        on_slide=tuple(map(sum, zip(*(part.on_slide for part in parts), strict=True))),
        extent_l0=_extent(np.array([part.extent_l0 for part in parts if len(part)]).reshape(-1, 4)),
    )


def _extent(bounds: np.ndarray) -> np.ndarray:
    return np.concatenate([bounds[:, :2].min(0), bounds[:, 2:].max(0)]) if len(bounds) else np.full(4, np.nan)


def clip_file(path: Path, grid: Grid, options: ReadOptions, *, processes: int = 1, stream: bool = False) -> Clipped:
    """Read an annotation file and clip it.

    processes: at most so many work at a file that can be split.
    stream: bound memory: chunks are read one after the other, and a large file that cannot be split is refused.
    The result is the same whichever way is taken. Raises UserError as read_annotations.
    """
    path = Path(path)
    size = path.stat().st_size if path.is_file() else 0
    if size >= LARGE_BYTES and not options.measurements:
        chunks = _chunks(path)
        parts = _clip_chunks(chunks, grid, options, 1 if stream else processes) if chunks is not None else None
        if parts is not None:
            return _storable(join_chunks(parts, grid))
    if stream and size and size * (PACKED if _is_packed(path) else 1) > STREAM_BYTES:
        what = "packed, nested, damaged, or no list of features"
        raise UserError(f"{path}: cannot be read in parts ({what}): unpack it, or leave out --stream")
    return _storable(clip_table(read_annotations(path, options), grid))


def _chunks(path: Path) -> list[FeatureChunk] | None:
    try:
        return split_features(path)
    except OSError:  # who reads it whole says what is wrong with it
        return None


def _is_packed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4)[:2] in (b"\x1f\x8b", b"PK")


def clip_chunk(chunk: FeatureChunk, grid: Grid, options: ReadOptions) -> Clipped | None:
    """Clip a chunk of a file; None where it does not stand by itself, so that the file has to be read whole."""
    try:
        return clip_table(read_chunk(chunk.text(), str(chunk.path), options), grid)
    except UserError:
        return None


@collector_paused()
def read_chunk(text: bytes, source: str, options: ReadOptions) -> ObjectTable:
    """Read GeoJSON text (FeatureChunk.text) as read_annotations reads a file.

    Ids that are missing are numbers within the chunk. Raises UserError where the text is no GeoJSON.
    """
    table = read_geojson(text, source, options, id_prefix=NUMBERED)
    return replace(table, source=np.full(len(table), Path(source).name, dtype=object))


def _clip_chunks(chunks: Sequence[FeatureChunk], grid: Grid, options: ReadOptions, processes: int) -> list[Clipped] | None:
    """Clip every chunk, in order; None as soon as one of them does not stand by itself."""
    size = chunks[-1].stop - chunks[0].start
    helpers = min(processes, size // PER_PROCESS_BYTES, len(chunks)) - 1
    clip = partial(clip_chunk, grid=grid, options=options)
    if helpers >= 1:
        try:
            return _clip_with_helpers(chunks, clip, helpers)
        except BrokenProcessPool:  # no process can be started here, or one was killed: alone it may still go well
            pass
    parts = []
    for chunk in chunks:
        part = clip(chunk)
        if part is None:
            return None
        parts.append(part)
    return parts


def _clip_with_helpers(
    chunks: Sequence[FeatureChunk], clip: Callable[[FeatureChunk], Clipped | None], helpers: int
) -> list[Clipped] | None:
    """Clip chunks in other processes, from the first on, and in this one, from the last on, until the two meet.

    This process starts while the helpers are being started.
    """
    own: dict[int, Clipped] = {}
    pool = ProcessPoolExecutor(helpers, multiprocessing.get_context("spawn"), initializer=_settle)
    try:
        futures = [pool.submit(clip, chunk) for chunk in chunks]
        for number in reversed(range(len(chunks))):
            if any(future.done() and not future.cancelled() and future.result() is None for future in futures):
                return None
            if futures[number].cancel():
                part = clip(chunks[number])
                if part is None:
                    return None
                own[number] = part
        parts = [own[number] if number in own else future.result() for number, future in enumerate(futures)]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    complete = [part for part in parts if part is not None]
    return complete if len(complete) == len(parts) else None


def _settle() -> None:
    """Leave Ctrl-C to the parent, and end when it does (killed, too)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def join_chunks(parts: Sequence[Clipped], grid: Grid) -> Clipped:
    """Join the chunks of one file: numbered through, its classes in order of appearance, as if read whole."""
    first = 0
    numbered = []
    for part in parts:
        table = part.table
        repairs = tuple(_numbered(line, first) for line in table.log.repairs)
        ids = np.array([*(_numbered(name, first) for name in table.id.tolist()), None], dtype=object)[:-1]
        numbered.append(replace(part, table=replace(table, id=ids, log=replace(table.log, repairs=repairs))))
        first += table.counts["features"]
    return join_clipped(numbered, grid, sort_labels=False)


def _numbered(text: str, first: int) -> str:
    """Turn the number within a chunk that a text begins with into one within the file; any other text stays."""
    if text[:1] != NUMBERED or not (number := NUMBER.match(text)):
        return text
    return f"{first + int(number[1])}{text[number.end() :]}"


@dataclass(frozen=True)
class FeatureChunk:
    """Bytes start:stop of a file: features with commas between them, no brackets around; is_list: the file is a bare list."""

    path: Path
    start: int
    stop: int
    is_list: bool = False

    def text(self) -> bytes:
        """Return the chunk as a document like the whole one: a JSON list or a FeatureCollection."""
        opening, closing = (b"[", b"]") if self.is_list else (b'{"type":"FeatureCollection","features":[', b"]}")
        with self.path.open("rb") as file:
            file.seek(self.start)
            return b"".join((opening, file.read(self.stop - self.start), closing))


def split_features(path: Path, chunk_bytes: int = CHUNK_BYTES) -> list[FeatureChunk] | None:
    """Split a GeoJSON file into chunks of about chunk_bytes, in order; None where it has to be read in one piece."""
    with path.open("rb") as file:
        if file.seek(0, 2) == 0:
            return None
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            inside = _inside(data)
            if inside is None:
                return None
            start, stop, is_list = inside
            ends: list[int] = []
            at = start + chunk_bytes
            while at < stop and (between := _BETWEEN.search(data, at - 1, stop)):
                ends.append(data.find(b",", between.start(), between.end()))
                at = ends[-1] + chunk_bytes
    starts = [start, *(end + 1 for end in ends)]
    return [FeatureChunk(path, a, b, is_list) for a, b in zip(starts, [*ends, stop], strict=True)]


def _inside(data: mmap.mmap) -> tuple[int, int, bool] | None:
    """Return start and stop of the list of features, brackets excluded, and whether it is all there is.

    None where the rest of the file is not GeoJSON around it.
    """
    head = data[:EDGE_BYTES].removeprefix(b"\xef\xbb\xbf")
    offset = min(len(data), EDGE_BYTES) - len(head)
    opening = _LIST.search(head)
    if opening is None:
        return None
    start = offset + opening.end()
    edge = max(start, len(data) - EDGE_BYTES)
    tail = data[edge:]
    for end in [match.end() - 1 for match in _TAIL.finditer(tail)][: -TAILS - 1 : -1]:
        try:
            # Two lists of features are not for this way of reading.
            around = json.loads(head[: opening.end()] + tail[end:], object_pairs_hook=unique_keys)
        except (ValueError, RecursionError):
            continue
        is_list = around == []
        if is_list or (isinstance(around, dict) and around.get("type", "FeatureCollection") == "FeatureCollection"):
            return (start, edge + end, is_list) if is_list or around.get("features") == [] else None
    return None
