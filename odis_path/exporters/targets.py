"""The table of what `export --to` writes: the command, `op.export` and the docs take it from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Source = Literal["checkpoint", "slide files", "tile features"]


@dataclass(frozen=True)
class Target:
    """A form that `export` writes. name: of --to. source: what it is made of; writes, readers: for the help and the docs.

    A target of tile features has a module of its name in `odis_path.exporters.formats`.
    """

    name: str
    source: Source
    writes: str
    readers: str


TARGETS = (
    Target("timm", "checkpoint", "one .safetensors of the encoder and a .json beside it", "timm.create_model"),
    Target("geojson", "slide files", "<slide_id>.geojson: tissue, tiles, boxes, predicted classes", "QuPath"),
    Target("trident", "tile features", "<mag>x_<px>px_<overlap>px_overlap/patches and features_<encoder>, h5", "TRIDENT"),
    Target("clam", "tile features", "pt_files and h5_files, float32; slides.csv: case_id, slide_id", "CLAM"),
    Target("stamp", "tile features", "<slide_id>.h5, coordinates in micrometres; slides.csv: PATIENT, FILENAME", "STAMP"),
    Target("torchmil", "tile features", "features (float32) and coords (steps of the grid), .npy", "torchmil"),
    Target("pathobench", "tile features", "<slide_id>.h5: features, coords in level-0 pixels", "Patho-Bench"),
    Target("spatialdata", "tile features", "<slide_id>.zarr: shapes tiles and a table of features", "SpatialData, LazySlide"),
    Target("arrow", "tile features", "<slide_id>.parquet: patient, slide, x, y, label, embedding", "Arrow, pandas, DuckDB"),
)
NAMES = tuple(target.name for target in TARGETS)


def targets_of(source: Source) -> tuple[str, ...]:
    """Return the names of the targets that are made of a source."""
    return tuple(target.name for target in TARGETS if target.source == source)


def describe_targets() -> str:
    """Describe every target in a few words, for the help of the command."""
    return "; ".join(f"{target.name}: {target.writes}" for target in TARGETS) + "."
