"""The tissue of slide files as GeoJSON (--tissue-out), beside what people drew, which stays."""

from __future__ import annotations

from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from annotations.errors import UserError
from tiling.slide_file.read import SlideFile
from tiling.storage.atomic import atomic_path, sweep_temporaries
from tiling.tissue.drawn_regions import outlines_geojson
from tiling.tissue.overview import Overview


def write_tissue(folder: str, slide_file: Path, *, again: bool) -> None:
    """Write the tissue of a slide file as GeoJSON, unless `folder` is empty; a file that is there stays unless `again`."""
    target = _target(folder, slide_file)
    if not folder:
        return
    _sweep_once(folder)
    if target.exists() and not again:
        return
    with SlideFile(slide_file) as file:
        outlines = _stored_outlines(file)
    if outlines is not None:
        with atomic_path(target) as temporary:
            temporary.write_bytes(outlines)


def clear_tissue(folder: str, slide_file: Path, overview: Overview, bounds_xy: tuple[int, int]) -> None:
    """Remove the outlines of a slide that is about to be made anew: a run killed in between leaves none, not old ones.

    overview, bounds_xy: what the new outlines will be made of. Raises UserError for a file that holds neither them nor the
    tissue of the slide file that is there: a person drew or corrected it, or another run wrote it.
    """
    if not folder:
        return
    target, mask = _target(folder, slide_file), overview.tissue_mask
    try:
        present = target.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{target}: cannot be read: {error.strerror}: give another --tissue-out") from None
    is_new = mask is not None and present == outlines_geojson(mask, overview.downsample, bounds_xy)
    if not is_new and present != _old_outlines(slide_file):
        raise UserError(
            f"{target}: is not what this run writes or {slide_file} holds (drawn by hand, or of other settings): move it away, "
            "or give another --tissue-out"
        )
    target.unlink()


@lru_cache
def _sweep_once(folder: str) -> None:
    """Remove what killed runs left in the folder, once a process: listing all of it for every slide would take long."""
    with suppress(OSError):
        sweep_temporaries(Path(folder))


def _target(folder: str, slide_file: Path) -> Path:
    return Path(folder) / f"{slide_file.stem}.geojson"


def _old_outlines(slide_file: Path) -> bytes | None:
    """The outlines of the slide file that is there; None where there is none, or one that is damaged or not ours."""
    with suppress(UserError, OSError, KeyError, RuntimeError), SlideFile(slide_file) as file:
        return _stored_outlines(file)
    return None


def _stored_outlines(file: SlideFile) -> bytes | None:
    mask, thumbnail = file.tissue_mask(), file.thumbnail()
    return None if mask is None or thumbnail is None else outlines_geojson(mask, thumbnail[1], file.bounds_xy)
