"""The tissue class of each tile of a slide file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from annotations.objects import Kind

if TYPE_CHECKING:
    from tiling.slide_file.read import SlideFile


def tile_labels(file: SlideFile, min_share: float = 0.5) -> tuple[np.ndarray, list[str]]:
    """The tissue class of each tile: the label with the largest clipped area, where it covers `min_share` of the tile.

    Only tissue objects (kind 0) with a class count. Returns int16 (N,), -1 where no class reaches the share, and the
    label names. The area of an object in a tile is visible * area_um2.
    """
    objects, boxes = file.objects_table(), file.boxes_table()
    names: list[str] = objects["labels"]
    labels = np.full(len(file), -1, np.int16)
    if not names or not len(file) or not len(boxes["object"]):
        return labels, names
    row = boxes["object"]
    counts = (objects["kind"][row] == Kind.TISSUE) & (objects["label"][row] >= 0)
    tile, row = file.box_tiles[counts], row[counts]
    area = boxes["visible"][counts].astype(float) * objects["area_um2"][row]
    table = np.zeros((len(file), len(names)))
    np.add.at(table, (tile, objects["label"][row]), area)
    best = table.argmax(axis=1)
    tile_area_um2 = (file.patch_size * file.mpp) ** 2
    enough = table[np.arange(len(file)), best] >= (min_share - 1e-4) * tile_area_um2
    labels[enough & (table.max(axis=1) > 0)] = best[enough & (table.max(axis=1) > 0)]
    return labels, names
