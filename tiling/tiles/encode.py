"""The pixels of a slide file: patches cut, judged and encoded in threads, or the slide's own encoded tiles."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np

from annotations.errors import UserError
from tiling.grid import GridPlan
from tiling.tissue.quality import blur_score
from tiling.wsi import codec
from tiling.wsi.backends.tiff_direct import DirectReader
from tiling.wsi.level_view import pixel_bounds
from tiling.wsi.patches import JOB_PATCHES, map_patches, run_in_order
from tiling.wsi.slide import Slide

MOST_BAD = 0.5  # share of the tiles; a slide with more of them that cannot be decoded fails


class EncodedTile(NamedTuple):
    """A tile as JPEG. blur: see `blur_score`. problem: why it could not be decoded whole, else empty."""

    data: bytes
    blur: float
    problem: str


def encode_tiles(slide: Slide, plan: GridPlan, *, quality: int, copy: bool = False, threads: int = 1) -> Iterator[EncodedTile]:
    """Read, judge and encode the tiles of a plan, in order; what cannot be decoded of a tile is black.

    quality: of the JPEG. copy: give the stored bytes where `stored_level` finds them. Raises UserError where more than half of
    the tiles cannot be decoded whole.
    """
    if not len(plan.coords):  # a tile may be wider than any memory, where it is wider than the slide
        return
    level = stored_level(slide, plan) if copy else None
    if level is not None:
        results = _copied(slide, plan, level, quality, threads)
    else:
        work = partial(_encode, quality=quality)
        results = map_patches(slide, plan.coords, plan.size_l0, plan.patch_px, work, threads)
    problems: list[str] = []
    for (data, blur), problem in results:
        if problem:
            problems.append(problem)
            if len(problems) > MOST_BAD * len(plan.coords):
                first = f"{len(problems)} of its {len(plan.coords)} tiles cannot be decoded, the first: {problems[0]}"
                raise UserError(f"{slide.info.path}: {first}: is the file whole?")
        yield EncodedTile(data, blur, problem)


def stored_level(slide: Slide, plan: GridPlan) -> int | None:
    """The level whose stored JPEG tiles are the tiles of a plan, pixel for pixel; None where there is none.

    A coarser level counts only where the pixels would be read from it too: never with --resample exact, and with "fast" where
    it looks like an average of level 0.
    """
    reader = slide.reader
    if not isinstance(reader, DirectReader) or not len(plan.coords):
        return None
    for level, page in enumerate(reader.pages):
        if page.codec != "jpeg" or (page.tile_w, page.tile_h) != (plan.patch_px, plan.patch_px):
            continue
        own = slide.downsample(level)
        if own is None or own * plan.patch_px != plan.size_l0:
            continue
        whole = (plan.coords + plan.size_l0 <= np.array([page.width, page.height]) * own).all()
        if not whole or (plan.coords % plan.size_l0).any():
            continue
        if level == 0 or slide.choose_level(own) == level:
            return level
    return None


def count_missing_tiles(slide: Slide, plan: GridPlan) -> int:
    """The number of tiles that reach into stored tiles that the file leaves empty: the background colour is there."""
    if not len(plan.coords):
        return 0
    boxes = np.concatenate([plan.coords, plan.coords + plan.size_l0], axis=1)
    view = slide.choose_view(plan.size_l0 / plan.patch_px, boxes)
    stored = slide.reader.sparse_tiles(view.level)
    if stored is None:
        return 0
    empty = np.pad(stored.missing.astype(np.int64).cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    tile = np.array([stored.tile_w, stored.tile_h, stored.tile_w, stored.tile_h]) // view.scale
    edges = pixel_bounds(view, boxes)
    edges[:, 2:] = np.minimum(edges[:, 2:], (view.width, view.height))
    edges += (stored.cut_x, stored.cut_y) * 2
    left, top, right, bottom = ((edges - (0, 0, 1, 1)) // tile + (0, 0, 1, 1)).T
    return int((empty[bottom, right] - empty[top, right] - empty[bottom, left] + empty[top, left] > 0).sum())


def _encode(tile: np.ndarray, quality: int) -> tuple[bytes, float]:
    return codec.encode_jpeg(tile, quality), blur_score(tile)


def _copied(slide: Slide, plan: GridPlan, level: int, quality: int, threads: int) -> Iterator[tuple[tuple[bytes, float], str]]:
    reader = slide.reader
    assert isinstance(reader, DirectReader)
    side = plan.patch_px

    def copy(row: int, column: int) -> tuple[tuple[bytes, float], str]:
        problem = ""
        try:
            data, tile = reader.tile_bytes(level, row, column), reader.decode_tile(level, 1, row, column)
            if data is not None and tile is not None:  # decoded too: a corrupt one must not pass
                return (data, blur_score(tile)), ""
            if tile is None:
                tile = np.empty((side, side, 3), np.uint8)
                tile[...] = reader.background
        except (ValueError, OSError) as error:
            tile, problem = np.zeros((side, side, 3), np.uint8), f"stored tile {column}, {row} of level {level}: {error}"
        return _encode(tile, quality), problem

    def copy_all(places: list[tuple[int, int]]) -> list[tuple[tuple[bytes, float], str]]:
        return [copy(row, column) for row, column in places]

    places = np.round(plan.coords[:, ::-1] / plan.size_l0).astype(int).tolist()
    return run_in_order(copy_all, (places[i : i + JOB_PATCHES] for i in range(0, len(places), JOB_PATCHES)), threads)
