"""Tile embeddings of one slide and the grid of its tiles, as every exporter of features takes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from annotations.errors import UserError
from odis_path.features.read import read_index, refuse_bad_rows
from odis_path.features.write import DATASETS, open_features
from tiling.grid import side_l0
from tiling.storage.checked_file import CRC_ATTR

NEEDED_ATTRS = ("patch_size", "patch_size_level0", "overlap", "mpp", "mpp_level0")
DATASET = DATASETS["tile"]


@dataclass(frozen=True)
class ExportedSlide:
    """A slide of an export, for the tables of a cohort. file_id: the name of its files; patient_id: may be empty."""

    slide_id: str
    file_id: str
    patient_id: str


@dataclass(frozen=True)
class TileFeatures:
    """Embeddings of the N tiles of one slide, with their places.

    features: float16 or float32 (N, D), as stored. coords: int64 (N, 2), top-left in level-0 pixels. label: int64 (N,) into
    `labels`, -1 none. attrs: of /coords, as the slide file has them.
    """

    path: Path
    slide: ExportedSlide
    encoder: str
    mode: str
    features: np.ndarray
    coords: np.ndarray
    label: np.ndarray
    labels: tuple[str, ...]
    attrs: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.coords)

    @property
    def patch_px(self) -> int:
        """Side of a tile in target pixels."""
        return int(self.attrs["patch_size"])

    @property
    def stride_px(self) -> int:
        """Distance of neighbouring tiles in target pixels."""
        return self.patch_px - int(self.attrs["overlap"])

    @property
    def mpp(self) -> float:
        """Micrometres per target pixel."""
        return float(self.attrs["mpp"])

    @property
    def mpp_level0(self) -> float:
        """Micrometres per level-0 pixel."""
        return float(self.attrs["mpp_level0"])

    @property
    def size_l0(self) -> float:
        """Exact side of a tile in level-0 pixels."""
        return side_l0(self.patch_px, self.mpp, self.mpp_level0)

    @property
    def features_f32(self) -> np.ndarray:
        """Embeddings as float32 (N, D)."""
        return np.ascontiguousarray(self.features, dtype=np.float32)

    def class_names(self) -> list[str | None]:
        """Return the class of each tile, None where it has none."""
        return [self.labels[i] if i >= 0 else None for i in self.label.tolist()]

    def grid_positions(self) -> np.ndarray:
        """Return column and row of each tile in the grid, int64 (N, 2): neighbours differ by one, whatever the magnification.

        Corners are whole level-0 pixels, a step of the grid need not be. Raises UserError for tiles that lie on no grid.
        """
        step_l0 = side_l0(self.stride_px, self.mpp, self.mpp_level0)
        cells = np.rint(self.coords / step_l0)
        is_off = np.abs(self.coords - cells * step_l0) > 1
        positions = cells.astype(np.int64)
        if is_off.any() or len(np.unique(positions, axis=0)) != len(positions):
            raise UserError(
                f"{self.path}: its tiles lie on no grid with steps of {step_l0:g} level-0 pixels, which their neighbours are "
                "found by: tile the slide again, then embed it"
            )
        return positions


@dataclass(frozen=True)
class Format:
    """How a target writes tile features.

    write_slide: writes a slide below a folder, returns its files (or folders); each appears whole or not at all.
    write_tables: writes tables of the whole cohort. file_id: slide_id -> name of its files. check: raises UserError where
    something that the target needs is missing.
    """

    write_slide: Callable[[TileFeatures, Path], list[Path]]
    write_tables: Callable[[Sequence[ExportedSlide], Path], None] | None = None
    file_id: Callable[[str], str] = str
    check: Callable[[], None] | None = None


def read_tile_features(path: Path, slide: ExportedSlide) -> TileFeatures:
    """Read the tile embeddings of a feature file. Raises UserError for what is missing, damaged, NaN or zero."""
    index = read_index(path, "tile")
    if index is None:
        raise UserError(f"{path}: holds no tile embeddings: run odis-path embed --level tile")
    with open_features(path) as file:
        features, attrs = file.array(DATASET), file.attrs("coords")
    if missing := [name for name in NEEDED_ATTRS if not _is_positive(attrs.get(name), or_zero=name == "overlap")]:
        raise UserError(
            f"{path}: the attribute {missing[0]} of /coords is missing or no number: tile the slide again, then embed it"
        )
    refuse_bad_rows(np.asarray(features, dtype=np.float32), str(path))
    return TileFeatures(
        path=path,
        slide=slide,
        encoder=index.encoder,
        mode=index.mode,
        features=features,
        coords=index.coords,
        label=index.label,
        labels=index.labels,
        attrs=attrs,
    )


def _is_positive(value: Any, *, or_zero: bool) -> bool:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return False
    return bool(np.isfinite(number)) and (number > 0 or (or_zero and number == 0))


def content_digest(path: Path) -> str:
    """Hash what an export takes from a feature file, by its checksums; of a file without these by size and time."""
    facts: list[Any] = []
    with open_features(path) as file:
        root = file.attrs()
        facts += [str(root.get(key, "")) for key in ("slide_id", "patient_id", "tiles_sha256")]
        for name in (DATASET, "coords", "tile_label"):
            if name not in file:
                continue
            with file.reading(name, f"/{name}"):
                stored = file.h5[name].attrs.get(CRC_ATTR)
            stat = path.stat()
            facts.append(int(stored) if stored is not None else [stat.st_size, stat.st_mtime_ns])
            facts.append(sorted((key, str(value)) for key, value in file.attrs(name).items()))
    return sha256(json.dumps(facts).encode()).hexdigest()
