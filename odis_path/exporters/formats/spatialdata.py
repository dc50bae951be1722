"""SpatialData as wsidata and LazySlide lay it out: tiles as shapes in level-0 pixels, their features as a table."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from annotations.errors import UserError
from odis_path.exporters.tile_features import Format, TileFeatures
from tiling.storage.atomic import atomic_folder

TILES, TABLE = "tiles", "features_tiles"
MARK = "odis_path"  # attribute of the root of stores that are ours


def check() -> None:
    """Raise UserError where the library that writes the stores is not installed."""
    if missing := [name for name in ("spatialdata", "anndata") if find_spec(name) is None]:
        raise UserError(f"--to spatialdata: the package {missing[0]} is missing: pip install 'odis-path[spatialdata]'")


def write_slide(tiles: TileFeatures, out: Path) -> list[Path]:
    """Write `<id>.zarr`: shapes `tiles`, table `features_tiles`, and `tile_spec` among the attributes.

    Raises UserError where a store of another program has the name.
    """
    import spatialdata

    path = out / f"{tiles.slide.file_id}.zarr"
    if path.exists() and not _is_ours(path):
        raise UserError(f"{path}: exists and is not of odis-path export: give another --out")
    facts = {"encoder": tiles.encoder, "mode": tiles.mode, "slide_id": tiles.slide.slide_id}
    store = spatialdata.SpatialData(
        shapes={TILES: _shapes(tiles)},
        tables={TABLE: _table(tiles)},
        attrs={"tile_spec": {TILES: _tile_spec(tiles)}, MARK: {**facts, "patient_id": tiles.slide.patient_id}},
    )
    with atomic_folder(path) as temporary:
        store.write(temporary)
    return [path]


def _is_ours(path: Path) -> bool:
    try:
        return MARK in json.loads((path / "zarr.json").read_text(encoding="utf-8"))["attributes"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _shapes(tiles: TileFeatures) -> Any:
    import geopandas
    import numpy as np
    import shapely
    from spatialdata.models import ShapesModel

    x, y = tiles.coords.T
    squares = shapely.box(x, y, x + tiles.size_l0, y + tiles.size_l0)
    columns = {"tile_id": np.arange(len(tiles)), "x": x, "y": y, "tissue_id": np.zeros(len(tiles), dtype=np.int64)}
    return ShapesModel.parse(geopandas.GeoDataFrame(columns, geometry=squares))


def _table(tiles: TileFeatures) -> Any:
    import anndata
    import numpy as np
    import pandas as pd
    from spatialdata.models import TableModel

    ids = np.arange(len(tiles))
    library = pd.Categorical([TILES] * len(tiles), categories=[TILES])
    obs = pd.DataFrame({"tile_id": ids, "library_id": library}, index=ids.astype(str))
    if tiles.labels:
        obs["label"] = pd.Categorical(tiles.class_names(), categories=list(tiles.labels))
    data = anndata.AnnData(X=tiles.features_f32, obs=obs)
    return TableModel.parse(data, region=TILES, region_key="library_id", instance_key="tile_id")


def _tile_spec(tiles: TileFeatures) -> dict[str, Any]:
    """Return the fields of wsidata's TileSpec: tiles in target pixels, read from level 0."""
    side, stride, downsample = tiles.patch_px, tiles.stride_px, tiles.mpp / tiles.mpp_level0
    sides = {"height": side, "width": side, "stride_height": stride, "stride_width": stride}
    levels = {"ops_level": 0, "ops_downsample": downsample, "base_level": 0, "base_downsample": downsample}
    return {**sides, "mpp": tiles.mpp, **levels, "tissue_name": None}


FORMAT = Format(write_slide, check=check)
