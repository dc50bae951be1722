"""Feature files of drawn slides: any magnification, overlap, holes in the tissue, with or without classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from odis_path.features.write import write_features
from tiling.grid import plan_grid
from tiling.slide_file.read import SlideFile
from tiling.slide_file.write import SlideMeta, write_slide_file

WriteSlide = Callable[..., Path]
DIM = 8


@pytest.fixture
def write_slide(tmp_path: Path) -> WriteSlide:
    """Writes a slide file into `tiles` and its features into `features`; returns the feature file."""

    def write(
        slide_id: str = "a",
        *,
        mpp: float = 0.5,
        mpp_l0: float = 0.25,
        side_px: int = 32,
        overlap_px: int = 0,
        columns: int = 5,
        rows: int = 4,
        drop: tuple[int, ...] = (3, 7),
        patient: str = "P1",
        encoder: str = "vit_tiny (step 10)",
        seed: int = 0,
        dim: int = DIM,
        dtype: str = "float16",
        labelled: bool = False,
        folder: str = "features",
    ) -> Path:
        stride = (side_px - overlap_px) * mpp / mpp_l0
        width, height = (int(np.ceil(count * stride + side_px * mpp / mpp_l0)) for count in (columns - 1, rows - 1))
        coords = np.delete(plan_grid(width, height, mpp_l0, mpp, side_px, overlap_px).coords, list(drop), axis=0)
        source = tmp_path / f"{slide_id}.svs"
        meta = SlideMeta(slide_id, source, width, height, mpp, mpp_l0, side_px, overlap_px=overlap_px, patient_id=patient)
        path = tmp_path / "tiles" / f"{slide_id}.h5"
        write_slide_file(path, meta=meta, coords=coords, groups=classes(len(coords), side_px) if labelled else None)
        x = np.random.default_rng(seed).normal(size=(len(coords), dim))
        target = tmp_path / folder / path.name
        with SlideFile(path) as file:
            write_features(target, level="tile", features=x, slide_file=file, encoder=encoder, mode="full", dtype=dtype)
        return target

    return write


def classes(count: int, side_px: int) -> dict[str, Any]:
    """A whole-tile region of class gland or stroma for every tile but the last."""
    boxes = np.tile(np.array([0, 0, side_px, side_px], np.float32), (count - 1, 1))
    return {
        "boxes": {
            "xyxy": boxes,
            "object": np.arange(count - 1, dtype=np.int32),
            "offsets": np.array([*range(count), count - 1], np.int64),
            "visible": np.ones(count - 1, np.float32),
        },
        "objects": {
            "id": [f"o{i}" for i in range(count - 1)],
            "label": np.arange(count - 1, dtype=np.int16) % 2,
            "kind": np.zeros(count - 1, np.uint8),
            "area_um2": np.full(count - 1, (side_px * 0.5) ** 2, np.float32),
            "attrs": {"labels": ["gland", "stroma"]},
        },
    }
