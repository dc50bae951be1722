"""Embeddings of one slide file: of its tiles, and of its objects in their tiles or in windows of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from annotations.errors import UserError
from annotations.objects import Kind
from odis_path.embedding.request import EmbedJob
from odis_path.embedding.windows import ObjectWindows, window_encoder, window_px
from tiling.slide_file.read import SlideFile
from tiling.slide_file.window import TileWindows

if TYPE_CHECKING:
    from odis_path.embedding.encoder import FrozenEncoder

Pixels = TypeVar("Pixels")
MOST_TORN = 0.5  # share of tiles that cannot be read; a slide with more of them fails
OBJECTS_A_PASS = 64  # objects that share one pass over the patches of a tile


class TornSlideFile(SlideFile):
    """A slide file of which tiles that cannot be read from its slide are black, as `tile` stores them, and kept in `torn`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.torn: set[int] = set()

    def region(self, i: int, x: int, y: int, side_px: int) -> np.ndarray:
        """Decode as `SlideFile.region` does. Raises UserError where more than half cannot be read, or the slide is gone."""
        try:
            return super().region(i, x, y, side_px)
        except UserError:
            if self.has_pixels or len(self.torn) > MOST_TORN * len(self):
                raise
            self.check_source()
            self.torn.add(i)
            return np.zeros((side_px, side_px, 3), np.uint8)

    def tiles(self, numbers: np.ndarray) -> np.ndarray:
        """Decode as `SlideFile.tiles` does."""
        try:
            return super().tiles(numbers)
        except UserError:
            return np.stack([self.tile(int(i)) for i in numbers])


def object_rows(file: SlideFile, kinds: tuple[str, ...] | None) -> np.ndarray:
    """Choose the rows of /boxes to embed, int64 (m,). Raises UserError where the slide has no boxes."""
    if not file.has_boxes:
        raise UserError(f"{file.path}: has no boxes: run odis-path annotate or odis-path propose on its folder first")
    rows = file.boxes_table()["object"]
    if kinds is None:
        return np.arange(len(rows))
    kind = file.objects_table(ids=False)["kind"][rows]
    return np.flatnonzero(np.isin(kind, [number for number in Kind if number.word in kinds]))


def embed_objects(encoder: FrozenEncoder, file: SlideFile, rows: np.ndarray, job: EmbedJob) -> np.ndarray:
    """Embed boxes: float32 (m, D), in the order of `rows`."""
    return encode_rows(encoder, file, file.box_tiles[rows], boxes_seen(encoder, file, job)[rows], job)


def boxes_seen(encoder: FrozenEncoder, file: SlideFile, job: EmbedJob) -> np.ndarray:
    """Return the boxes of /boxes that a mode takes: the part in their tile or, for windows, the whole object; float (M, 4)."""
    if job.mode != "window":
        return file.boxes_table()["xyxy"]
    return TileWindows(file).whole_boxes(window_px(encoder, file, job))


def embed_tiles(encoder: FrozenEncoder, file: SlideFile, job: EmbedJob) -> np.ndarray:
    """Embed tiles: float32 (N, D). In a box mode the mean over its boxes; a tile without one is seen whole."""
    if job.mode == "full":
        return encode_rows(encoder, file, np.arange(len(file)), None, job)
    rows = object_rows(file, job.kinds)
    tile_of = file.box_tiles[rows]
    side = float(file.patch_size)
    bare = np.setdiff1d(np.arange(len(file)), tile_of)
    boxes = np.concatenate([boxes_seen(encoder, file, job)[rows], np.tile([0, 0, side, side], (len(bare), 1))])
    owner = np.concatenate([tile_of, bare])
    order = np.argsort(owner, kind="stable")
    box_features = encode_rows(encoder, file, owner[order], boxes[order], job)
    total = np.zeros((len(file), encoder.dim), dtype=np.float64)
    np.add.at(total, owner[order], box_features)
    return (total / np.bincount(owner, minlength=len(file))[:, None]).astype(np.float32)


def encode_rows(
    encoder: FrozenEncoder, file: SlideFile, tile_of: np.ndarray, boxes: np.ndarray | None, job: EmbedJob
) -> np.ndarray:
    """Embed tile tile_of[i] (with boxes[i]) for every i: float32 (n, D). Tiles of the next batch are read meanwhile."""
    from odis_path.embedding.encoder import batches, encode_objects

    if job.mode == "window":
        assert boxes is not None
        return encode_windows(encoder, file, tile_of, boxes, job)
    features = np.zeros((len(tile_of), encoder.dim), dtype=np.float32)
    if boxes is not None and job.mode == "masked" and encoder.module.shares_passes:
        for rows, tiles in shared_passes(file, tile_of, job.batch):
            features[np.concatenate(rows)] = encode_objects(encoder, tiles, [boxes[of_tile] for of_tile in rows])
        return features

    def read(part: slice) -> np.ndarray:
        numbers, back = np.unique(tile_of[part], return_inverse=True)
        return file.tiles(numbers)[back]

    for part, tiles in read_ahead(list(batches(len(tile_of), job.batch)), read):
        features[part] = encoder.encode(tiles, None if boxes is None else boxes[part], job.mode)
    return features


def encode_windows(
    encoder: FrozenEncoder, file: SlideFile, tile_of: np.ndarray, boxes: np.ndarray, job: EmbedJob
) -> np.ndarray:
    """Embed boxes[i], masked, of tile tile_of[i], each in a window around it: float32 (n, D)."""
    from odis_path.embedding.encoder import batches

    features = np.zeros((len(tile_of), encoder.dim), dtype=np.float32)
    windows, encoder = ObjectWindows(file, window_px(encoder, file, job)), window_encoder(encoder)

    def read(part: slice) -> tuple[np.ndarray, np.ndarray]:
        return windows.around(tile_of[part], boxes[part])

    for part, (pixels, inside) in read_ahead(list(batches(len(tile_of), job.batch)), read):
        features[part] = encoder.encode(pixels, inside, "masked")
    return features


def shared_passes(file: SlideFile, tile_of: np.ndarray, batch: int) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
    """Yield batches of (rows of each pass, their tiles): rows of one tile go together, up to OBJECTS_A_PASS.

    Passes of like length go together, so that little is filled up.
    """
    from odis_path.embedding.encoder import batches

    order = np.argsort(tile_of, kind="stable")
    by_tile = np.split(order, np.flatnonzero(np.diff(tile_of[order])) + 1) if len(order) else []
    passes = [rows[i : i + OBJECTS_A_PASS] for rows in by_tile for i in range(0, len(rows), OBJECTS_A_PASS)]
    passes.sort(key=len)

    def read(part: slice) -> np.ndarray:
        return np.stack([file.tile(int(tile_of[rows[0]])) for rows in passes[part]])

    for part, tiles in read_ahead(list(batches(len(passes), batch)), read):
        yield passes[part], tiles


def read_ahead(parts: list[slice], read: Callable[[slice], Pixels]) -> Iterator[tuple[slice, Pixels]]:
    """Yield each part with its pixels, the next one being read in a thread."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending = pool.submit(read, parts[0]) if parts else None
        for number, part in enumerate(parts):
            assert pending is not None
            tiles = pending.result()
            if number + 1 < len(parts):
                pending = pool.submit(read, parts[number + 1])
            yield part, tiles
