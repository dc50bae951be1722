"""A cohort of slide files with drawn tiles and boxes, and embeddings that know the classes to a degree."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from odis_path.features.write import write_features, write_slides_parquet
from tests.png import encode_png
from tiling.slide_file.read import SlideFile
from tiling.slide_file.write import SlideMeta, write_slide_file

CLASSES = ("gland", "stroma", "tumour")
TILE_PX, SIDE, SLIDES = 32, 4, 6
LABEL = np.resize(np.arange(len(CLASSES)), SIDE**2)  # class of each tile
OBJECT_OF_BOX = [*range(15), 14, 15]


@dataclass(frozen=True)
class Cohort:
    """Folders of slide files and of feature files: `good` separates the classes, `noise` does not."""

    tiles: Path
    good: Path
    noise: Path


def write_slide(path: Path, patient_id: str, rng: np.random.Generator, *, plain: bool) -> None:
    """16 tiles, brighter by class. Object i fills tile i.

    Unless plain, half of object 14 is seen in tile 15 too, and object 15 has no class.
    """
    y, x = np.divmod(np.arange(SIDE**2), SIDE)
    coords = np.stack([x, y], 1) * TILE_PX
    tiles = [(rng.integers(0, 60, (TILE_PX, TILE_PX, 3)) + 60 * c).astype(np.uint8) for c in LABEL]
    meta = SlideMeta(
        slide_id=path.stem,
        patient_id=patient_id,
        source=path,
        patch_px=TILE_PX,
        mpp=0.5,
        mpp_level0=0.5,
        width_l0=SIDE * TILE_PX,
        height_l0=SIDE * TILE_PX,
    )
    n = len(LABEL)
    owner = np.arange(n, dtype=np.int32) if plain else np.array(OBJECT_OF_BOX, np.int32)
    groups: dict[str, Any] = {
        "boxes": {
            "xyxy": np.tile(np.array([2, 2, 30, 30], np.float32), (len(owner), 1)),
            "object": owner,
            "offsets": np.array([*range(n), len(owner)], np.int64),
            "visible": np.where(np.arange(len(owner)) == n - 1, 1.0 if plain else 0.5, 1.0).astype(np.float32),
        },
        "objects": {
            "id": [f"o{i}" for i in range(n)],
            "label": np.array([*LABEL[:-1], LABEL[-1] if plain else -1], np.int16),
            "kind": np.zeros(n, np.uint8),
            "area_um2": np.full(n, 28 * 28 * 0.25, np.float32),
            "attrs": {"labels": list(CLASSES)},
        },
    }
    write_slide_file(path, meta=meta, coords=coords, pixels=[encode_png(tile) for tile in tiles], groups=groups)


def write_cohort(root: Path, *, plain: bool = False) -> Cohort:
    """Six slides of six patients with tile and object embeddings, and with slide embeddings unless plain."""
    rng = np.random.default_rng(0)
    cohort = Cohort(root / "tiles", root / "good", root / "noise")
    means = rng.normal(size=(len(CLASSES), 8))
    rows = []
    for i in range(SLIDES):
        path = cohort.tiles / f"s{i}.h5"
        write_slide(path, f"p{i}", rng, plain=plain)
        with SlideFile(path) as file:
            for level, classes in (("tile", LABEL), ("object", LABEL if plain else LABEL[OBJECT_OF_BOX])):
                good = means[classes] + 0.7 * rng.normal(size=(len(classes), 8))
                for folder, x in ((cohort.good, good), (cohort.noise, rng.normal(size=good.shape))):
                    write_features(
                        folder / path.name, level=level, features=x, slide_file=file, encoder=folder.name, mode="full"
                    )
        x = means[i % 2] + 0.1 * rng.normal(size=8)
        names = {"slide_id": f"s{i}", "patient_id": f"p{i}", "encoder": "good", "mode": "full"}
        rows.append({**names, "n_tiles": 16, "features": x})
    if not plain:
        write_slides_parquet(cohort.good / "slides.parquet", rows)
    return cohort


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    """The cohort with an object in two tiles, one without a class, and embeddings of every level."""
    return write_cohort(tmp_path_factory.mktemp("cohort"))
