"""Raster: open slides, find tissue, plan the grid, read pixels, write and read the slide file. Imports no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tiling.cohort import Outcome, Outcomes, run_cohort
    from tiling.grid import GridPlan, plan_grid
    from tiling.importer import import_images
    from tiling.slide import Slide, SlideInfo
    from tiling.slidefile import SlideFile, list_slide_files, tile_labels
    from tiling.slidewrite import SlideMeta, replace_groups, write_slide_file
    from tiling.tissue import tissue_mask, tissue_outlines

_HOME = {
    "GridPlan": "grid",
    "Outcome": "cohort",
    "Outcomes": "cohort",
    "Slide": "slide",
    "SlideFile": "slidefile",
    "SlideInfo": "slide",
    "SlideMeta": "slidewrite",
    "import_images": "importer",
    "list_slide_files": "slidefile",
    "plan_grid": "grid",
    "replace_groups": "slidewrite",
    "run_cohort": "cohort",
    "tile_labels": "slidefile",
    "tissue_mask": "tissue",
    "tissue_outlines": "tissue",
    "write_slide_file": "slidewrite",
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
