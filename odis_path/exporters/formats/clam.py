"""CLAM: float32 tensors in pt_files, float32 features and int32 level-0 coordinates in h5_files, ids without a suffix."""

from __future__ import annotations

from collections.abc import Sequence
from os.path import splitext
from pathlib import Path

from odis_path.exporters.tile_features import ExportedSlide, Format, TileFeatures
from tiling.cohort.find_slides import SLIDE_EXTENSIONS
from tiling.slide_file.write import write_group
from tiling.storage.atomic import atomic_path
from tiling.storage.csv_file import write_csv_file
from tiling.storage.hdf5 import new_h5


def write_slide(tiles: TileFeatures, out: Path) -> list[Path]:
    """Write `pt_files/<id>.pt`, a float32 tensor (N, D), and `h5_files/<id>.h5`."""
    import torch

    name, features = tiles.slide.file_id, tiles.features_f32
    h5, pt = out / "h5_files" / f"{name}.h5", out / "pt_files" / f"{name}.pt"
    with new_h5(h5) as file:
        write_group(file, "features", features)
        write_group(file, "coords", (tiles.coords.astype("int32"), {**tiles.attrs, "name": name}))
    with atomic_path(pt) as temporary, temporary.open("wb") as stream:
        torch.save(torch.from_numpy(features), stream)
    return [h5, pt]


def write_tables(slides: Sequence[ExportedSlide], out: Path) -> None:
    """Write slides.csv: case_id (the slide where no patient is known), slide_id. CLAM wants a column label beside them."""
    rows = [(slide.patient_id or slide.file_id, slide.file_id) for slide in slides]
    write_csv_file(out / "slides.csv", [("case_id", "slide_id"), *rows])


def bare_id(slide_id: str) -> str:
    """Return a slide's id without the suffix of a slide: `a.svs` is `a`."""
    stem, extension = splitext(slide_id)
    return stem if extension.lower() in SLIDE_EXTENSIONS else slide_id


FORMAT = Format(write_slide, write_tables, bare_id)
