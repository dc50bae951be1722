"""The settings of `import`, and what is at the output path already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from annotations.errors import UserError
from tiling.images.boxes import stored_result
from tiling.images.fit import QUALITY
from tiling.jobs.outcome import ItemResult
from tiling.slide_file.read import SlideFile
from tiling.slide_file.write import FORMAT_VERSION, check_ours, parameters_hash
from tiling.storage.touched import was_touched

NOMINAL_MPP = 1.0  # what a file says where there is no scale; its parameters and /images say so too


@dataclass(frozen=True)
class ImportSettings:
    """Settings of `import`, the same for every image.

    fit: tiles, crop or squash. size_px: side of a tile. mpp: micrometres per pixel of every image, None to look further.
    nominal: the images have no scale. coco: hash of the COCO file, empty without one. boxes: folder of XML files.
    polygons: store the outlines of the boxes.
    """

    fit: str
    size_px: int
    mpp: float | None = None
    nominal: bool = False
    coco: str = ""
    boxes: Path | None = None
    polygons: bool = False

    @property
    def has_boxes(self) -> bool:
        """Tell whether the images come with boxes."""
        return self.boxes is not None or bool(self.coco)

    def parameters(self, mpp: float, source: Mapping[str, Any]) -> dict[str, Any]:
        """All that changes a slide file; the hash of it tells whether it is up to date. source: the part of its images."""
        return {
            "format_version": FORMAT_VERSION,
            "import": 1,
            "mpp": mpp,
            "size_px": self.size_px,
            "quality": QUALITY,
            "coco_sha256": self.coco,
            **({"polygons": True} if self.polygons else {}),
            **source,
        }


@dataclass(frozen=True)
class ExistingImport:
    """A slide file that is there. result: of its import. source, stamp: its image, and size and time of that when imported.

    failed: images of a shard that could not be read.
    """

    result: ItemResult
    digest: str
    source: Path
    stamp: tuple[int, int]
    patient_id: str
    coords: np.ndarray
    failed: int
    has_boxes: bool

    def has_parameters(self, parameters: Mapping[str, Any]) -> bool:
        """Tell whether the file was made with these parameters."""
        return self.digest == parameters_hash(parameters)[1]


def read_import(path: Path) -> ExistingImport | None:
    """Read the slide file at `path`; None where there is none, or a damaged one. UserError where it is no slide file."""
    if not path.exists():
        return None
    try:
        with SlideFile(path) as file:
            if was_touched(path):
                file.check()
            return ExistingImport(
                result=stored_result(file),
                digest=str(file.attrs["parameters_sha256"]),
                source=file.source,
                stamp=(int(file.attrs["source_size"]), int(file.attrs["source_mtime_ns"])),
                patient_id=file.patient_id,
                coords=file.coords,
                failed=int(file.group_attrs("images").get("failed", 0)),
                has_boxes=file.has_boxes,
            )
    except (UserError, OSError, KeyError, RuntimeError):
        check_ours(path)
        return None
