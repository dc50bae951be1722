"""Parquet for Arrow, pandas, Polars, DuckDB and vector stores: a row a tile, a file a slide, a folder one data set."""

from __future__ import annotations

from pathlib import Path

from odis_path.exporters.tile_features import Format, TileFeatures
from tiling.storage.atomic import atomic_path

METADATA = ("patch_size", "overlap", "mpp", "mpp_level0")  # attributes of the tiles that the schema names


def write_slide(tiles: TileFeatures, out: Path) -> list[Path]:
    """Write `<id>.parquet`, a row a tile.

    patient_id (null: unknown), slide_id, x, y (level-0 pixels), label (class or null), embedding (float32, D wide).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, count, features = out / f"{tiles.slide.file_id}.parquet", len(tiles), tiles.features_f32
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), features.shape[1])
    metadata = {"encoder": tiles.encoder, "mode": tiles.mode} | {key: str(tiles.attrs[key]) for key in METADATA}
    table = pa.table(
        {
            "patient_id": pa.array([tiles.slide.patient_id or None] * count, pa.string()),
            "slide_id": pa.array([tiles.slide.slide_id] * count, pa.string()),
            "x": pa.array(tiles.coords[:, 0], pa.int64()),
            "y": pa.array(tiles.coords[:, 1], pa.int64()),
            "label": pa.array(tiles.class_names(), pa.string()),
            "embedding": embedding,
        }
    ).replace_schema_metadata(metadata)
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, write_page_checksum=True)
    return [path]


FORMAT = Format(write_slide)
