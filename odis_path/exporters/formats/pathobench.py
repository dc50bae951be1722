"""Patho-Bench: one h5 of patch features a slide, in one folder; `patch_size_level0` is an attribute of its coordinates."""

from __future__ import annotations

from pathlib import Path

from odis_path.exporters.formats.trident import write_features_h5
from odis_path.exporters.tile_features import Format, TileFeatures


def write_slide(tiles: TileFeatures, out: Path) -> list[Path]:
    """Write `<id>.h5`."""
    path = out / f"{tiles.slide.file_id}.h5"
    write_features_h5(tiles, path)
    return [path]


FORMAT = Format(write_slide)
