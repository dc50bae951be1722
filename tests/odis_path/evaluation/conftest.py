"""A cohort of slide files with drawn tiles and boxes, and embeddings that know the classes to a degree."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from odis_path.features.write import write_features, write_slides_parquet
from tiling.slide_file.read import SlideFile
from tiling.slide_file.write import SlideMeta, write_slide_file
from tiling.wsi.codec import encode_png

CLASSES = ("gland", "stroma", "tumour")
TILE_PX, SIDE, SLIDES = 32, 4, 6


@dataclass(frozen=True)
class Cohort:
    """Folders of slide files and of feature files: `good` separates the classes, `noise` does not."""

    tiles: Path
    good: Path
    noise: Path


def write_slide(path: Path, slide_id: str, patient_id: str, rng: np.random.Generator, label: np.ndarray) -> None:
    """16 tiles, brighter by class. Object i fills tile i; half of object 14 is seen in tile 15 too; object 15 has no class."""
    y, x = np.divmod(np.arange(SIDE**2), SIDE)
    coords = np.stack([x, y], 1) * TILE_PX
    tiles = [(rng.integers(0, 60, (TILE_PX, TILE_PX, 3)) + 60 * c).astype(np.uint8) for c in label]
    meta = SlideMeta(
        slide_id=slide_id,
        patient_id=patient_id,
        source=path,
        patch_px=TILE_PX,
        mpp=0.5,
        mpp_level0=0.5,
        width_l0=SIDE * TILE_PX,
        height_l0=SIDE * TILE_PX,
    )
    n = len(label)
    groups: dict[str, Any] = {
        "boxes": {
            "xyxy": np.tile(np.array([2, 2, 30, 30], np.float32), (n + 1, 1)),
            "object": np.array([*range(n - 1), n - 2, n - 1], np.int32),
            "offsets": np.array([*range(n), n + 1], np.int64),
            "visible": np.array([*np.full(n - 1, 1.0), 0.5, 1.0], np.float32),
        },
        "objects": {
            "id": [f"o{i}" for i in range(n)],
            "label": np.array([*label[:-1], -1], np.int16),
            "kind": np.zeros(n, np.uint8),
            "area_um2": np.full(n, 28 * 28 * 0.25, np.float32),
            "attrs": {"labels": list(CLASSES)},
        },
    }
    write_slide_file(path, meta=meta, coords=coords, pixels=[encode_png(tile) for tile in tiles], groups=groups)


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    """Six slides of six patients, tile, object and slide embeddings."""
    root = tmp_path_factory.mktemp("cohort")
    rng = np.random.default_rng(0)
    found = Cohort(root / "tiles", root / "good", root / "noise")
    means = rng.normal(size=(len(CLASSES), 8))
    label = np.resize(np.arange(len(CLASSES)), SIDE**2)
    rows = []
    for i in range(SLIDES):
        path = found.tiles / f"s{i}.h5"
        write_slide(path, f"s{i}", f"p{i}", rng, label)
        with SlideFile(path) as file:
            for level, classes in (("tile", label), ("object", label[[*range(15), 14, 15]])):
                good = means[classes] + 0.7 * rng.normal(size=(len(classes), 8))
                for folder, x in ((found.good, good), (found.noise, rng.normal(size=good.shape))):
                    write_features(
                        folder / path.name, level=level, features=x, slide_file=file, encoder=folder.name, mode="full"
                    )
        rows.append(
            {
                "slide_id": f"s{i}",
                "patient_id": f"p{i}",
                "n_tiles": 16,
                "encoder": "good",
                "mode": "full",
                "features": means[i % 2] + 0.1 * rng.normal(size=8),
            }
        )
    write_slides_parquet(found.good / "slides.parquet", rows)
    return found
