"""Raster: open slides, find tissue, plan the grid, read pixels, write and read the slide file. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from annotations.lazy_names import lazy_names

if TYPE_CHECKING:
    from tiling.grid import GridPlan as GridPlan
    from tiling.grid import plan_grid as plan_grid
    from tiling.images.run import import_images as import_images
    from tiling.jobs.outcome import ItemResult as ItemResult
    from tiling.jobs.outcome import Note as Note
    from tiling.jobs.outcome import Outcome as Outcome
    from tiling.jobs.run import run_cohort as run_cohort
    from tiling.jobs.summary import Outcomes as Outcomes
    from tiling.slide_file.read import SlideFile as SlideFile
    from tiling.slide_file.read import list_slide_files as list_slide_files
    from tiling.slide_file.tile_labels import tile_labels as tile_labels
    from tiling.slide_file.write import SlideMeta as SlideMeta
    from tiling.slide_file.write import replace_groups as replace_groups
    from tiling.slide_file.write import write_slide_file as write_slide_file
    from tiling.tissue.mask import tissue_mask as tissue_mask
    from tiling.tissue.mask import tissue_outlines as tissue_outlines
    from tiling.wsi.level_view import SlideInfo as SlideInfo
    from tiling.wsi.slide import Slide as Slide

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "tiling.grid": "GridPlan, plan_grid",
        "tiling.images.run": "import_images",
        "tiling.jobs.outcome": "ItemResult, Note, Outcome",
        "tiling.jobs.run": "run_cohort",
        "tiling.jobs.summary": "Outcomes",
        "tiling.slide_file.read": "SlideFile, list_slide_files",
        "tiling.slide_file.tile_labels": "tile_labels",
        "tiling.slide_file.write": "SlideMeta, replace_groups, write_slide_file",
        "tiling.tissue.mask": "tissue_mask, tissue_outlines",
        "tiling.wsi.level_view": "SlideInfo",
        "tiling.wsi.slide": "Slide",
    },
)
