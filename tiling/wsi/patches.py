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
MAX_SHARING = 4  # threads among which a block's pixels are shared out; more of them take more memory
AHEAD = 2  # jobs a thread may be ahead of whoever takes the patches

Part = TypeVar("Part")
Result = TypeVar("Result")


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
    patches: StoredTilePatches | StripPatches
    if isinstance(slide.reader, DirectReader):
        patches = StoredTilePatches(slide, slide.reader, coords_l0, size_l0, patch_px, threads)
    else:
        patches = StripPatches(slide, coords_l0, size_l0, patch_px, threads)

    def work_on(rows: slice) -> list[tuple[Result, str]]:
        return [(work(pixels), problem) for pixels, problem in patches.read(rows)]

    return run_in_order(work_on, patches.chunks, threads)


def read_tiles(slide: Slide, coords_l0: np.ndarray, size_l0: float, patch_px: int) -> Iterator[np.ndarray]:
    """Yield tiles of side `size_l0` at `coords_l0` (int64 (N, 2), ordered by (y, x)) as uint8 (patch_px, patch_px, 3).

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
        self._uses_left = uses
        self._kept: dict[tuple[int, int], np.ndarray] = {}
        self._free_bytes = KEPT_BYTES
        self._lock = Lock()

    def get(self, row: int, column: int) -> np.ndarray | None:
        """As `DirectReader.decode_tile`; called once for each patch that needs the tile."""
        key = (row, column)
        with self._lock:
            self._uses_left[key] -= 1
            is_last = self._uses_left[key] <= 0
            tile = self._kept.get(key)
            if tile is not None:
                if is_last:
                    del self._kept[key]
                    self._free_bytes += tile.nbytes
                return tile
        tile = self._reader.decode_tile(self._view.level, self._view.scale, row, column)
        if tile is not None and not is_last:
            with self._lock:
                fits = self._free_bytes >= tile.nbytes or not self._kept  # one at least, however large stored tiles are
                if key not in self._kept and self._uses_left[key] > 0 and fits:
                    self._kept[key] = tile
                    self._free_bytes -= tile.nbytes
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


class StoredTilePatches:
    """Patches put together from stored tiles, which are decoded straight. Safe to use from several threads.

    chunks: rows of the coords that one job of a thread reads.
    """

    def __init__(
        self, slide: Slide, reader: DirectReader, coords_l0: np.ndarray, size_l0: float, patch_px: int, threads: int
    ) -> None:
        self._slide, self._reader, self._patch_px = slide, reader, patch_px
        self._boxes = np.concatenate([coords_l0, coords_l0 + size_l0], axis=1)
        self._view = view = slide.choose_view(size_l0 / patch_px, self._boxes)
        self._edges = edges = pixel_bounds(view, self._boxes)
        page = reader.pages[view.level]
        self._tile_w, self._tile_h = tile = page.tile_w // view.scale, page.tile_h // view.scale
        uses = count_tile_uses(reader, view, edges)
        is_stack = (edges == self._boxes / view.downsample).all(1) & ~(edges % (tile * 2)).any(1)
        is_stack &= (edges[:, 2:] - edges[:, :2] == patch_px).all(1) & (edges >= 0).all(1) & (uses.max(initial=0) == 1)
        self._is_stack = is_stack  # exactly whole stored tiles, which no other patch needs
        self._shared = SharedTiles(reader, view, uses)
        # Bands decode what they share twice: none for what is no large patch.
        self._max_block_px = BLOCK_PIXELS // min(threads, MAX_SHARING)
        self._is_large = (size_l0 / view.downsample) ** 2 > self._max_block_px
        step = int(np.clip(JOB_BYTES // (3 * patch_px**2), 1, JOB_PATCHES))
        self.chunks = [slice(start, start + step) for start in range(0, len(coords_l0), step)]

    def read(self, rows: slice) -> Iterator[tuple[np.ndarray, str]]:
        """Yield (patch, problem) of some rows: uint8 (patch_px, patch_px, 3), and "" or what of it could not be decoded."""
        columns = (values[rows].tolist() for values in (self._boxes, self._edges, self._is_stack))
        for box_l0, edges, is_stack in zip(*columns, strict=True):
            pixels = self._decode_stack(edges) if is_stack else None
            yield (pixels, "") if pixels is not None else self._cut(box_l0, edges)

    def _decode_stack(self, edges: Sequence[int]) -> np.ndarray | None:
        left, top, right, bottom = edges
        rows = top // self._tile_h, bottom // self._tile_h
        columns = left // self._tile_w, right // self._tile_w
        return self._reader.decode_stack(self._view.level, self._view.scale, rows, columns)

    def _cut(self, box_l0: tuple[float, ...], edges: tuple[int, int, int, int]) -> tuple[np.ndarray, str]:
        slide, view, side, problems = self._slide, self._view, self._patch_px, [""]

        def read(left: int, top: int, w: int, h: int) -> np.ndarray:
            box = (left, top, left + w, top + h)
            pixels, problem = self._reader.read_region(view.level, view.scale, box, self._shared.get)
            problems.append(problem)
            return pixels

        if self._is_large:
            pixels = slide.read_area(view, box_l0, side, side, read, self._max_block_px)
        else:
            pixels = slide.resample_block(view, edges, slide.read_block(view, edges, read), box_l0, side, side)
        return pixels, next(filter(None, problems), "")


class StripPatches:
    """Patches cut from strips: neighbours of a row are read in one piece and, where that fails, each alone.

    chunks: rows of the coords that are one strip.
    """

    def __init__(self, slide: Slide, coords_l0: np.ndarray, size_l0: float, patch_px: int, threads: int) -> None:
        self._slide, self._patch_px = slide, patch_px
        self._boxes = np.concatenate([coords_l0, coords_l0 + size_l0], axis=1).astype(np.float64)
        self._view = view = slide.choose_view(size_l0 / patch_px, self._boxes)
        slide.reader.expect_strips()
        self._max_block_px = BLOCK_PIXELS // threads
        patch_pixels = (size_l0 / view.downsample) ** 2
        self._is_large = patch_pixels > self._max_block_px
        self._lock = Lock()
        widest_l0 = max(size_l0, self._max_block_px / patch_pixels * size_l0)
        self.chunks = _runs(coords_l0, size_l0, min(widest_l0, 64 * size_l0))

    def read(self, rows: slice) -> Iterator[tuple[np.ndarray, str]]:
        """As `StoredTilePatches.read`."""
        boxes, reader = self._boxes[rows], self._slide.reader
        try:
            patches = self._read_strip(boxes)
        except UserError:
            with self._lock:
                for box_l0 in boxes.tolist():
                    yield self._read_alone(box_l0, reader)
            return
        for pixels in patches:
            yield pixels, ""

    def _read_strip(self, boxes: np.ndarray) -> list[np.ndarray]:
        slide, view, side = self._slide, self._view, self._patch_px
        if self._is_large:
            return [slide.read_area(view, box_l0, side, side, max_block_px=self._max_block_px) for box_l0 in boxes.tolist()]
        (edges,) = pixel_bounds(view, np.array([[*boxes[0, :2], *boxes[-1, 2:]]])).tolist()
        block = slide.read_block(view, edges)
        return [slide.resample_block(view, edges, block, box_l0, side, side) for box_l0 in boxes.tolist()]

    def _read_alone(self, box_l0: tuple[float, ...], failed: Reader) -> tuple[np.ndarray, str]:
        """Read one patch by itself, with a reader that has not failed yet."""
        slide, side = self._slide, self._patch_px
        if slide.reader is failed:
            slide.reopen()
        try:
            return slide.read_area(self._view, box_l0, side, side), ""
        except UserError as error:
            slide.reopen()
            problem = str(error).removeprefix(f"{slide.info.path}: ").removesuffix(": is the file whole?")
            return np.zeros((side, side, 3), np.uint8), problem


def run_in_order(job: Callable[[Part], list[Result]], parts: Iterable[Part], threads: int) -> Iterator[Result]:
    """Run a job on each part, `threads` at a time and a few ahead, and yield the results in order."""
    if threads == 1:
        for part in parts:
            yield from job(part)
        return
    running: deque[Future[list[Result]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for part in parts:
                running.append(pool.submit(job, part))
                if len(running) >= AHEAD * threads:
                    yield from running.popleft().result()
            while running:
                yield from running.popleft().result()
        finally:
            for future in running:
                future.cancel()


def _runs(coords_l0: np.ndarray, size_l0: float, widest_l0: float) -> list[slice]:
    """Cut tiles into runs of neighbours in one row: no gap wider than a tile, no run wider than `widest_l0`."""
    runs: list[slice] = []
    start = 0
    for i in range(1, len(coords_l0) + 1):
        if i < len(coords_l0):
            (x, y), (previous_x, row_y) = coords_l0[i], coords_l0[i - 1]
            is_near = y == row_y and x - previous_x <= 2 * size_l0
            if is_near and x + size_l0 - coords_l0[start][0] <= widest_l0:
                continue
        runs.append(slice(start, i))
        start = i
    return runs if len(coords_l0) else []
