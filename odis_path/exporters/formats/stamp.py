"""STAMP: one h5 of tile features a slide, coordinates in micrometres, and the slide table.

STAMP refuses files of a newer `stamp_version` than its own, and tells tiles by `feat_type`: no version is written, and the
encoder is called `extractor`, as `encoder` stands for features of whole patients.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from odis_path.exporters.tile_features import ExportedSlide, Format, TileFeatures
from tiling.slide_file.write import write_group
from tiling.storage.csv_file import write_csv_file
from tiling.storage.hdf5 import new_h5


def write_slide(tiles: TileFeatures, out: Path) -> list[Path]:
    """Write `<id>.h5`: feats (N, D), coords float32 (N, 2), the top-left of each tile in micrometres."""
    path = out / f"{tiles.slide.file_id}.h5"
    with new_h5(path) as file:
        file.attrs["unit"] = "um"
        file.attrs["tile_size_um"] = tiles.patch_px * tiles.mpp
        file.attrs["tile_size_px"] = tiles.patch_px
        file.attrs["feat_type"] = "tile"
        file.attrs["extractor"] = tiles.encoder
        write_group(file, "feats", tiles.features)
        write_group(file, "coords", (tiles.coords * tiles.mpp_level0).astype("float32"))
    return [path]


def write_tables(slides: Sequence[ExportedSlide], out: Path) -> None:
    """Write slides.csv: PATIENT (the slide where no patient is known), FILENAME with its suffix, as STAMP joins them."""
    rows = [(slide.patient_id or slide.slide_id, f"{slide.file_id}.h5") for slide in slides]
    write_csv_file(out / "slides.csv", [("PATIENT", "FILENAME"), *rows])


FORMAT = Format(write_slide, write_tables)
