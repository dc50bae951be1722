"""The tissue of slide files as GeoJSON (--tissue-out), beside what people drew, which stays."""

from __future__ import annotations

from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from annotations.errors import UserError
from tiling.slide_file.read import SlideFile
from tiling.storage.atomic import atomic_path, sweep_temporaries
from tiling.tissue.drawn_regions import write_outlines
from tiling.tissue.overview import Overview

Drawing = tuple[np.ndarray, float, tuple[int, int]]  # what write_outlines takes: mask, downsample, bounds_xy


def write_tissue(folder: str, slide_file: Path, *, again: bool) -> None:
    """The tissue of a slide file as GeoJSON, where a folder for it was asked for; one that is there stays unless `again`."""
    target = _target(folder, slide_file)
    if not folder:
        return
    _sweep_once(folder)
    if target.exists() and not again:
        return
    with SlideFile(slide_file) as file:
        drawing = _drawing(file)
    if drawing:
        outlines = _geojson(drawing)
        with atomic_path(target) as temporary:
            temporary.write_bytes(outlines)


def clear_tissue(folder: str, slide_file: Path, overview: Overview, bounds_xy: tuple[int, int]) -> None:
    """Remove the outlines of a slide that is about to be made anew: a run killed in between leaves none, not old ones.

    overview, bounds_xy: what will be written comes of them. Raises UserError for a file that holds neither this nor the
    tissue of the slide file that is there: a person drew or corrected it, or another run wrote it.
    """
    if not folder:
        return
    target = _target(folder, slide_file)
    now = None if overview.tissue_mask is None else (overview.tissue_mask, overview.downsample, bounds_xy)
    try:
        found = target.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{target}: cannot be read: {error.strerror}: give another --tissue-out") from None
    if found not in (_geojson(drawing) for drawing in (now, _stored(slide_file)) if drawing):
        raise UserError(
            f"{target}: is not what this run writes or {slide_file} holds (drawn by hand, or of other settings): move it away, "
            "or give another --tissue-out"
        )
    target.unlink()


@lru_cache
def _sweep_once(folder: str) -> None:
    """Remove what killed runs left in the folder, once a process: a look at all of it for every slide would take long."""
    with suppress(OSError):
        sweep_temporaries(Path(folder))


def _target(folder: str, slide_file: Path) -> Path:
    return Path(folder) / f"{slide_file.stem}.geojson"


def _geojson(drawing: Drawing) -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "tissue.geojson"
        write_outlines(path, *drawing)
        return path.read_bytes()


def _stored(slide_file: Path) -> Drawing | None:
    try:
        with SlideFile(slide_file) as file:
            return _drawing(file)
    except (UserError, OSError, KeyError, RuntimeError):  # none there, damaged, or not ours
        return None


def _drawing(file: SlideFile) -> Drawing | None:
    mask, overview = file.tissue_mask(), file.thumbnail()
    return None if mask is None or overview is None else (mask, overview[1], file.bounds_xy)
