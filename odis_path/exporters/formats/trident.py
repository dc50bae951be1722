"""TRIDENT: a job folder with the patches and the features of an encoder, coordinates in level-0 pixels."""

from __future__ import annotations

import re
from pathlib import Path

from odis_path.exporters.tile_features import Format, TileFeatures
from tiling.slide_file.write import write_group
from tiling.storage.hdf5 import new_h5


def write_slide(tiles: TileFeatures, out: Path) -> list[Path]:
    """Write `<grid>/patches/<id>_patches.h5` and `<grid>/features_<encoder>/<id>.h5`."""
    name, overlap = tiles.slide.file_id, tiles.patch_px - tiles.stride_px
    grid = f"{10 / tiles.mpp:g}x_{tiles.patch_px}px_{overlap}px_overlap"
    patches = out / grid / "patches" / f"{name}_patches.h5"
    with new_h5(patches) as file:
        write_group(file, "coords", (tiles.coords, {**tiles.attrs, "name": name, "savetodir": f"{grid}/patches"}))
    encoder = re.sub(r"[^\w.+-]+", "_", tiles.encoder) or "encoder"
    features = out / grid / f"features_{encoder}" / f"{name}.h5"
    write_features_h5(tiles, features)
    return [patches, features]


def write_features_h5(tiles: TileFeatures, path: Path) -> None:
    """Write `features` (N, D) and `coords` (N, 2) with the attributes that TRIDENT and Patho-Bench read."""
    name = tiles.slide.file_id
    with new_h5(path) as file:
        write_group(file, "features", (tiles.features, {"encoder": tiles.encoder, "name": name}))
        write_group(file, "coords", (tiles.coords, {**tiles.attrs, "name": name}))


FORMAT = Format(write_slide)
