"""Simple features that a good encoder must beat: mean colour, grey texture, size of the box. They need no training.

Each is computed on the very regions the encoder was given: the tile, or the box (or boxes) of the tile.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from annotations.errors import UserError, one_line
from annotations.objects import Kind
from odis_path.features.read import FeatureSet
from tiling.slide_file.read import SlideFile

MIN_SIDE_PX = 8
MAX_SIDE_PX = 128  # texture is measured on regions shrunk to this, as fine noise says little
SLIDE_TILES = 64
_GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_LEVELS = 16
_BATCH = 64


@dataclass(frozen=True)
class PixelBaselines:
    """Features by name, float32 (n, d) each; empty, with a remark, where the pixels could not be read."""

    features: dict[str, np.ndarray]
    warnings: tuple[str, ...] = ()


def rgb_mean(region: np.ndarray) -> np.ndarray:
    """Average red, green and blue of uint8 (h, w, 3): float32 (3,) in 0..255."""
    return np.asarray(region.reshape(-1, 3).mean(axis=0, dtype=np.float64), dtype=np.float32)


def grey_texture(region: np.ndarray) -> np.ndarray:
    """Measure the grey texture of uint8 (h, w, 3), sides >= 8: float32 (31,).

    Histograms of uniform local binary patterns at radius 1 and 2 (10 bins each; Ojala et al. 2002); contrast,
    homogeneity, energy and correlation of grey-level co-occurrence at distances 1 and 3, mean over four directions
    (Haralick et al. 1973); and mean, spread and skewness of the grey level.
    """
    from skimage.feature import graycomatrix, graycoprops, local_binary_pattern

    step = max(1, -(-max(region.shape[:2]) // MAX_SIDE_PX))
    grey = _shrink(region @ _GREY, step)
    patterns = [
        np.bincount(local_binary_pattern(grey.astype(np.uint8), 8, r, method="uniform").astype(int).ravel(), minlength=10)
        for r in (1, 2)
    ]
    coarse = np.clip(grey * (_LEVELS / 256), 0, _LEVELS - 1).astype(np.uint8)
    angles = [0, np.pi / 4, np.pi / 2, 3 * np.pi / 4]
    together = graycomatrix(coarse, [1, 3], angles, levels=_LEVELS, symmetric=True, normed=True)
    haralick = [graycoprops(together, p).mean(axis=1) for p in ("contrast", "homogeneity", "energy", "correlation")]
    spread = grey.std()
    skewness = ((grey - grey.mean()) ** 3).mean() / max(spread, 1e-3) ** 3
    parts = [*(p / grey.size for p in patterns), *haralick, [grey.mean() / 255, spread / 255, skewness]]
    return np.concatenate(parts).astype(np.float32)


def _shrink(image: np.ndarray, step: int) -> np.ndarray:
    """Average blocks of step x step; a rest at the right and below is dropped."""
    h, w = image.shape[0] // step * step, image.shape[1] // step * step
    if step == 1:
        return image
    return np.asarray(image[:h, :w].reshape(h // step, step, w // step, step).mean(axis=(1, 3)))


def box_size(xyxy: np.ndarray) -> np.ndarray:
    """Take the logarithm of width and height of boxes (n, 4): float32 (n, 2)."""
    return np.asarray(np.log(np.maximum(xyxy[:, 2:] - xyxy[:, :2], 1e-3)), dtype=np.float32)


def cut_box(tile: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Cut the box out of a tile (S, S, 3), rounded outward and at least 8 px a side."""
    side = tile.shape[0]
    least = min(MIN_SIDE_PX, side)
    start, stop = np.floor(box[:2]).astype(int), np.ceil(box[2:]).astype(int)
    short = np.maximum(least - (stop - start), 0)
    start = np.clip(start - short // 2, 0, side - least)
    stop = np.clip(np.maximum(stop, start + least), 0, side)
    return tile[start[1] : stop[1], start[0] : stop[0]]


def pixel_baselines(features: FeatureSet, *, threads: int = 2) -> PixelBaselines:
    """Measure rgb_mean and texture of every row, from the slide files the embeddings were made of.

    Tiles embedded in a box mode are averaged over the same boxes; slides over at most 64 of their tiles.
    """
    if not len(features):
        return PixelBaselines({})
    rows_of: dict[str, list[int]] = defaultdict(list)
    for i, slide in enumerate(features.slide_id.tolist()):
        rows_of[slide].append(i)
    features_by_name: dict[str, np.ndarray] = {}
    try:
        for slide, rows in rows_of.items():
            path = features.sources.get(slide)
            if path is None or not path.is_file():
                raise UserError(f"{path or slide}: the slide file is gone")
            for name, block in _slide_baselines(path, features.take(np.array(rows)), threads).items():
                whole = features_by_name.setdefault(name, np.zeros((len(features), block.shape[1]), dtype=np.float32))
                whole[rows] = block
    except (UserError, OSError) as error:
        return PixelBaselines({}, (f"baselines of mean colour and texture were left out: {one_line(error)}",))
    return PixelBaselines(features_by_name)


def _slide_baselines(path: Path, features: FeatureSet, threads: int) -> dict[str, np.ndarray]:
    """Measure the rows of one slide. Pixels are read in this thread and measured in others, some rows at a time."""
    measured: list[dict[str, np.ndarray]] = []
    with SlideFile(path) as file, ThreadPoolExecutor(threads) as pool:
        regions = _regions(file, features)
        while batch := list(islice(regions, _BATCH)):
            measured += pool.map(_measure, batch)
    return {name: np.stack([row[name] for row in measured]) for name in measured[0]}


def _measure(regions: list[np.ndarray]) -> dict[str, np.ndarray]:
    return {
        "rgb_mean": np.mean([rgb_mean(r) for r in regions], axis=0),
        "texture": np.mean([grey_texture(r) for r in regions], axis=0),
    }


def _regions(file: SlideFile, features: FeatureSet) -> Iterator[list[np.ndarray]]:
    """Yield the pixels the encoder saw of each row of one slide: a list of uint8 (h, w, 3)."""
    if features.level == "slide":
        chosen = np.random.default_rng(0).permutation(len(file))[:SLIDE_TILES]
        if not len(chosen):
            raise UserError(f"{file.path}: holds no tiles")
        yield from ([file.tile(int(i)) for i in np.sort(chosen)] for _ in range(len(features)))
        return
    fits = features.tile.max(initial=-1) < len(file) and np.array_equal(file.coords[features.tile], features.coords)
    if not fits:
        raise UserError(f"{file.path}: its tiles are not those that were embedded: embed the slide again")
    boxes_of = _tile_boxes(file, features) if features.level == "tile" and features.mode != "full" else None
    decoded_tile = -1
    for tile, box in zip(features.tile.tolist(), features.xyxy, strict=True):
        if tile != decoded_tile:  # rows of a tile follow each other: it is decoded once
            pixels, decoded_tile = file.tile(tile), tile
        if features.level == "object":
            yield [cut_box(pixels, box)] if features.mode != "full" else [pixels]
        else:
            boxes = boxes_of[tile] if boxes_of is not None else []
            yield [cut_box(pixels, box) for box in boxes] or [pixels]


def _tile_boxes(file: SlideFile, features: FeatureSet) -> list[np.ndarray]:
    """Return the boxes of each tile that its embedding is the mean of."""
    table = file.boxes_table()
    chosen = features.parameters.get("kinds", "all")
    kinds = [kind for kind in Kind if chosen == "all" or kind.word in chosen]
    keep = np.isin(file.objects_table(ids=False)["kind"][table["object"]], kinds)
    tile = file.box_tiles[keep]
    return np.split(table["xyxy"][keep], np.searchsorted(tile, np.arange(1, len(file))))
