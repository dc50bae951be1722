"""A cohort of slide files with drawn tiles and boxes, and embeddings that know the classes to a degree."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

CLASSES = ("gland", "stroma", "tumour")
TILE_PX, SIDE = 32, 4


@dataclass(frozen=True)
class Cohort:
    """Folders of slide files and of feature files: `good` separates the classes, `noise` does not."""

    tiles: Path
    good: Path
    noise: Path


def write_slide(path: Path, slide_id: str, patient_id: str, rng: np.random.Generator) -> np.ndarray:
    """16 tiles of three classes, one box over each; returns the class of each tile."""
    from tiling.slide_file.write import SlideMeta, write_slide_file
    from tiling.wsi.codec import encode_png

    y, x = np.divmod(np.arange(SIDE**2), SIDE)
    coords = np.stack([x, y], 1) * TILE_PX
    label = np.resize(np.arange(len(CLASSES)), SIDE**2)
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
    boxes = np.tile(np.array([2, 2, 30, 30], np.float32), (n, 1))
    groups = {
        "boxes": {
            "xyxy": boxes,
            "offsets": np.arange(n + 1),
            "object": np.arange(n, dtype=np.int32),
            "visible": np.ones(n, np.float32),
        },
        "objects": {
            "id": [f"o{i}" for i in range(n)],
            "label": label.astype(np.int16),
            "kind": np.zeros(n, np.uint8),
            "area_um2": np.full(n, 28 * 28 * 0.25, np.float32),
            "attrs": {"labels": list(CLASSES)},
        },
    }
    write_slide_file(path, meta=meta, coords=coords, pixels=[encode_png(tile) for tile in tiles], groups=groups)
    return label


@pytest.fixture(scope="session", name="cohort")
def judged_cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    """Six slides of six patients."""
    from odis_path.features.write import write_features
    from tiling.slide_file.read import SlideFile

    root = tmp_path_factory.mktemp("cohort")
    rng = np.random.default_rng(0)
    found = Cohort(root / "tiles", root / "good", root / "noise")
    means = rng.normal(size=(len(CLASSES), 8))
    for i in range(6):
        path = found.tiles / f"s{i}.h5"
        path.parent.mkdir(exist_ok=True)
        label = write_slide(path, f"s{i}", f"p{i}", rng)
        with SlideFile(path) as file:
            for level in ("tile", "object"):
                good = means[label] + 0.7 * rng.normal(size=(len(label), 8))
                noise = rng.normal(size=(len(label), 8))
                write_features(found.good / path.name, level=level, features=good, slide_file=file, encoder="good", mode="full")
                write_features(
                    found.noise / path.name, level=level, features=noise, slide_file=file, encoder="noise", mode="full"
                )
    return found
