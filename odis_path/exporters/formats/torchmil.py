"""torchmil: the bags of a `ProcessedMILDataset`, an array a file.

Its models need float32, its adjacency needs neighbours that are one apart.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from odis_path.exporters.tile_features import Format, TileFeatures
from tiling.storage.atomic import atomic_path


def write_slide(tiles: TileFeatures, out: Path) -> list[Path]:
    """Write `features/<id>.npy`, float32 (N, D), and `coords/<id>.npy`, int64 (N, 2): column and row in the grid of tiles.

    At torchmil's distance of 1.5 the neighbours of a tile are the eight around it, at any magnification and overlap.
    """
    paths = []
    for folder, array in (("features", tiles.features_f32), ("coords", tiles.grid_positions())):
        path = out / folder / f"{tiles.slide.file_id}.npy"
        with atomic_path(path) as temporary, temporary.open("wb") as stream:
            np.save(stream, array, allow_pickle=False)
        paths.append(path)
    return paths


FORMAT = Format(write_slide)
