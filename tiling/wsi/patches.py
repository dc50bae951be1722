"""Many patches of one slide: what neighbours share is decoded once, in several threads, in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from annotations.errors import UserError
from tiling.wsi.backends.tiff_direct import DirectReader
from tiling.wsi.level_view import BLOCK_PIXELS, LevelView, pixel_bounds
from tiling.wsi.slide import Slide

if TYPE_CHECKING:
    from tiling.wsi.backends.base import Reader

KEPT_BYTES = 128 << 20  # decoded stored tiles kept until the last patch that needs them is cut
JOB_BYTES = 6 << 20  # patches that one job of a thread cuts
JOB_PATCHES = 8  # at most: of more, the first have left the caches when they are taken
MOST_SHARING = 4  # threads among which a block's pixels are shared out; more of them take more memory
AHEAD = 2  # jobs a thread may be ahead of whoever takes the patches

Result = TypeVar("Result")
Job = Callable[[], list[tuple[Result, str]]]


def map_patches(
    slide: Slide,
    coords_l0: np.ndarray,
    size_l0: float,
    patch_px: int,
    work: Callable[[np.ndarray], Result],
    threads: int = 1,
) -> Iterator[tuple[Result, str]]:
    """Cut patches and give each to `work`, which runs in the threads; yields (result, problem) in the order of the coords.

    coords_l0: int64 (N, 2) top-left x, y in level-0 pixels, ordered by (y, x). size_l0: side in level-0 pixels; patch_px: in
    pixels of the patch, which `work` gets as uint8 (patch_px, patch_px, 3). problem: "" or what could not be decoded; there
    that part is black. threads: how many at most; a reader that is not made for threads gets one.
    """
    threads = max(1, threads) if slide.reader.threadsafe else 1
    if isinstance(slide.reader, DirectReader):
        jobs = _stored_jobs(slide, slide.reader, coords_l0, size_l0, patch_px, work, threads)
    else:
        jobs = _strip_jobs(slide, coords_l0, size_l0, patch_px, work, threads)
    return run_in_order(jobs, threads)


def read_tiles(slide: Slide, coords_l0: np.ndarray, size_l0: float, patch_px: int) -> Iterator[np.ndarray]:
    """Tiles of side `size_l0` at `coords_l0` (int64 (N, 2), ordered by (y, x)) as uint8 (patch_px, patch_px, 3).

    What neighbours share is decoded once; memory stays bounded whatever N is. Raises UserError at the first tile that
    cannot be decoded; `map_patches` goes on past it, in several threads.
    """
    for tile, problem in map_patches(slide, coords_l0, size_l0, patch_px, lambda tile: tile):
        if problem:
            raise UserError(f"{slide.info.path}: {problem}: is the file whole?")
        yield tile


class SharedTiles:
    """Decoded stored tiles of a view, each kept while patches that need it are left and there is room."""

    def __init__(self, reader: DirectReader, view: LevelView, uses: np.ndarray) -> None:
        self._reader, self._view = reader, view
        self._left = uses
        self._kept: dict[tuple[int, int], np.ndarray] = {}
        self._room = KEPT_BYTES
        self._lock = Lock()

    def get(self, row: int, column: int) -> np.ndarray | None:
        """As `DirectReader.decode_tile`; called once for each patch that needs the tile."""
        key = (row, column)
        with self._lock:
            self._left[key] -= 1
            last = self._left[key] <= 0
            tile = self._kept.get(key)
            if tile is not None:
                if last:
                    del self._kept[key]
                    self._room += tile.nbytes
                return tile
        tile = self._reader.decode_tile(self._view.level, self._view.scale, row, column)
        if tile is not None and not last:
            with self._lock:
                room = self._room >= tile.nbytes or not self._kept  # one at least, however large stored tiles are
                if key not in self._kept and self._left[key] > 0 and room:
                    self._kept[key] = tile
                    self._room -= tile.nbytes
        return tile


def count_tile_uses(reader: DirectReader, view: LevelView, edges: np.ndarray) -> np.ndarray:
    """Count the patches that need each stored tile: int32 (rows, columns). edges: int64 (N, 4), from `pixel_bounds`."""
    page = reader.pages[view.level]
    rows, columns = page.counts.shape
    left, top, right, bottom = edges[(edges[:, :2] < (view.width, view.height)).all(1) & (edges[:, 2:] > 0).all(1)].T
    tile_w, tile_h = page.tile_w // view.scale, page.tile_h // view.scale
    c0, r0 = left.clip(0) // tile_w, top.clip(0) // tile_h
    c1, r1 = (right.clip(max=view.width) - 1) // tile_w + 1, (bottom.clip(max=view.height) - 1) // tile_h + 1
    change = np.zeros((rows + 1, columns + 1), np.int32)
    for row, column, step in ((r0, c0, 1), (r0, c1, -1), (r1, c0, -1), (r1, c1, 1)):
        np.add.at(change, (row, column), step)
    return change.cumsum(axis=0).cumsum(axis=1)[:rows, :columns]


def _stored_jobs(
    slide: Slide,
    reader: DirectReader,
    coords_l0: np.ndarray,
    size_l0: float,
    patch_px: int,
    work: Callable[[np.ndarray], Result],
    threads: int,
) -> Iterator[Job]:
    boxes = np.concatenate([coords_l0, coords_l0 + size_l0], axis=1)
    view = slide.choose_view(size_l0 / patch_px, boxes)
    edges = pixel_bounds(view, boxes)
    uses = count_tile_uses(reader, view, edges)
    tile_w, tile_h = reader.pages[view.level].tile_w // view.scale, reader.pages[view.level].tile_h // view.scale
    whole = (edges == boxes / view.downsample).all(1) & ~(edges % (tile_w, tile_h, tile_w, tile_h)).any(1)
    whole &= (edges[:, 2:] - edges[:, :2] == patch_px).all(1) & (edges >= 0).all(1) & (uses.max(initial=0) == 1)
    shared = SharedTiles(reader, view, uses)
    most = BLOCK_PIXELS // min(threads, MOST_SHARING)  # bands decode what they share twice: none for what is no large patch
    large = (size_l0 / view.downsample) ** 2 > most

    def patch(box: tuple[float, ...], around: tuple[int, int, int, int], as_stored: bool) -> tuple[Result, str]:
        if as_stored:
            left, top, right, bottom = around
            pixels = reader.decode_stack(
                view.level, view.scale, top // tile_h, left // tile_w, bottom // tile_h, right // tile_w
            )
            if pixels is not None:
                return work(pixels), ""
        problems: list[str] = []

        def read(left: int, top: int, w: int, h: int) -> np.ndarray:
            pixels, problem = reader.read_region(view.level, view.scale, (left, top, left + w, top + h), shared.get)
            problems.append(problem)
            return pixels

        if large:
            pixels = slide.read_area(view, box, patch_px, patch_px, read, most)
        else:
            pixels = slide.resample_block(view, around, slide.read_block(view, around, read), box, patch_px, patch_px)
        return work(pixels), next(filter(None, problems), "")

    step = int(np.clip(JOB_BYTES // (3 * patch_px**2), 1, JOB_PATCHES))
    for start in range(0, len(coords_l0), step):
        part = [each[start : start + step].tolist() for each in (boxes, edges, whole)]
        yield lambda part=part: [patch(*each) for each in zip(*part, strict=True)]  # type: ignore[misc]


def _strip_jobs(
    slide: Slide, coords_l0: np.ndarray, size_l0: float, patch_px: int, work: Callable[[np.ndarray], Result], threads: int
) -> Iterator[Job]:
    """Neighbours of a row are read in one piece; where that fails, each alone."""
    boxes = np.concatenate([coords_l0, coords_l0 + size_l0], axis=1).astype(np.float64)
    view = slide.choose_view(size_l0 / patch_px, boxes)
    slide.reader.expect_strips()
    most = BLOCK_PIXELS // threads
    widest_l0 = max(size_l0, most / (size_l0 / view.downsample) ** 2 * size_l0)
    large = (size_l0 / view.downsample) ** 2 > most
    lock = Lock()

    def cut(part: np.ndarray) -> list[np.ndarray]:
        if large:
            return [slide.read_area(view, tuple(box), patch_px, patch_px, most=most) for box in part.tolist()]
        ((left, top, right, bottom),) = pixel_bounds(view, np.array([[*part[0, :2], *part[-1, 2:]]])).tolist()
        edges = (left, top, right, bottom)
        block = slide.read_block(view, edges)
        return [slide.resample_block(view, edges, block, tuple(box), patch_px, patch_px) for box in part.tolist()]

    def strip(part: np.ndarray) -> list[tuple[Result, str]]:
        reader = slide.reader
        try:
            patches = cut(part)
        except UserError:
            with lock:
                return [_alone(slide, view, box, patch_px, work, reader) for box in part]
        return [(work(patch), "") for patch in patches]

    for start, stop in _runs(coords_l0, size_l0, min(widest_l0, 64 * size_l0)):
        yield lambda part=boxes[start:stop]: strip(part)  # type: ignore[misc]


def _alone(
    slide: Slide, view: LevelView, box: np.ndarray, patch_px: int, work: Callable[[np.ndarray], Result], failed: Reader
) -> tuple[Result, str]:
    """One patch by itself, with a reader that has not failed yet."""
    if slide.reader is failed:
        slide.reopen()
    try:
        patch = slide.read_area(view, tuple(box.tolist()), patch_px, patch_px)
    except UserError as error:
        slide.reopen()
        problem = str(error).removeprefix(f"{slide.info.path}: ").removesuffix(": is the file whole?")
        return work(np.zeros((patch_px, patch_px, 3), np.uint8)), problem
    return work(patch), ""


def run_in_order(jobs: Iterable[Job], threads: int) -> Iterator[tuple[Result, str]]:
    """Run jobs, `threads` at a time and a few ahead, and yield their results in order."""
    if threads == 1:
        for job in jobs:
            yield from job()
        return
    running: deque[Future[list[tuple[Result, str]]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for job in jobs:
                running.append(pool.submit(job))
                if len(running) >= AHEAD * threads:
                    yield from running.popleft().result()
            while running:
                yield from running.popleft().result()
        finally:
            for future in running:
                future.cancel()


def _runs(coords_l0: np.ndarray, size_l0: float, widest_l0: float) -> Sequence[tuple[int, int]]:
    """Cut tiles into runs of neighbours in one row: no gap wider than a tile, no run wider than `widest_l0`."""
    runs: list[tuple[int, int]] = []
    start = 0
    for i in range(1, len(coords_l0) + 1):
        if i < len(coords_l0):
            (x, y), (before, row) = coords_l0[i], coords_l0[i - 1]
            near = y == row and x - before <= 2 * size_l0
            if near and x + size_l0 - coords_l0[start][0] <= widest_l0:
                continue
        runs.append((start, i))
        start = i
    return runs if len(coords_l0) else []
