"""`export`: write an encoder, the contents of slide files or tile features in the formats of other programs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from annotations.errors import UserError
from odis_path.exporters.targets import NAMES, targets_of

if TYPE_CHECKING:
    from odis_path.exporters.timm import TimmExport
    from tiling.jobs.summary import Outcomes


def export(
    source: str | os.PathLike[str],
    to: str,
    out: Path | str,
    what: Sequence[str] | None = None,
    predictions: Path | str | None = None,
    origin: str = "auto",
    workers: int | None = None,
) -> TimmExport | Outcomes:
    """Write a trained encoder, what slide files hold, or tile features, in the form that other programs read.

    to "timm": source is a checkpoint or run folder, out a .safetensors file that timm.create_model loads (`export_timm`).
    to "geojson": source is a folder of slide files (or of features), out a folder of GeoJSON that QuPath opens; what,
    predictions and origin are for it (`export_geojson`). Any other of `exporters.targets`: source is a folder of feature
    files, out a folder (`export_features`). Raises UserError for a form that does not exist, or that source cannot be put in.
    """
    if to not in NAMES:
        raise UserError(f"--to {to}: no such export; there is: {', '.join(NAMES)}")
    if to == "geojson":
        from odis_path.exporters.geojson import export_geojson

        return export_geojson(Path(source), out, what, predictions, origin, workers)
    if what is not None or predictions is not None or origin != "auto":
        raise UserError(f"--to {to}: takes no --what, --predictions and --origin, which go with --to geojson")
    if to in targets_of("tile features"):
        from odis_path.exporters.cohort import export_features

        return export_features(Path(source), to, out, workers)
    from odis_path.exporters.timm import export_timm

    return export_timm(Path(source), Path(out))
