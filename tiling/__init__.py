"""Raster: open slides, find tissue, plan the grid, read pixels, write and read the slide file. Imports no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tiling.grid import GridPlan, plan_grid
    from tiling.images.run import import_images
    from tiling.jobs.outcome import Outcome
    from tiling.jobs.run import run_cohort
    from tiling.jobs.summary import Outcomes
    from tiling.slide_file.read import SlideFile, list_slide_files
    from tiling.slide_file.tile_labels import tile_labels
    from tiling.slide_file.write import SlideMeta, replace_groups, write_slide_file
    from tiling.tissue.mask import tissue_mask, tissue_outlines
    from tiling.wsi.level_view import SlideInfo
    from tiling.wsi.slide import Slide

_HOME = {
    "GridPlan": "grid",
    "Outcome": "jobs.outcome",
    "Outcomes": "jobs.summary",
    "Slide": "wsi.slide",
    "SlideFile": "slide_file.read",
    "SlideInfo": "wsi.level_view",
    "SlideMeta": "slide_file.write",
    "import_images": "images.run",
    "list_slide_files": "slide_file.read",
    "plan_grid": "grid",
    "replace_groups": "slide_file.write",
    "run_cohort": "jobs.run",
    "tile_labels": "slide_file.tile_labels",
    "tissue_mask": "tissue.mask",
    "tissue_outlines": "tissue.mask",
    "write_slide_file": "slide_file.write",
}

__all__ = [
    "GridPlan",
    "Outcome",
    "Outcomes",
    "Slide",
    "SlideFile",
    "SlideInfo",
    "SlideMeta",
    "import_images",
    "list_slide_files",
    "plan_grid",
    "replace_groups",
    "run_cohort",
    "tile_labels",
    "tissue_mask",
    "tissue_outlines",
    "write_slide_file",
]


def __getattr__(name: str) -> Any:
    """Import a name's module on first use, so that `import tiling` stays quick in every worker."""
    if name not in _HOME:
        raise AttributeError(f"module 'tiling' has no attribute {name!r}")
    return getattr(import_module(f"tiling.{_HOME[name]}"), name)
