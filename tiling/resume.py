"""What a run finds where it is to write a slide file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from annotations.errors import UserError
from tiling.claim import changes
from tiling.slidefile import SlideFile
from tiling.slidewrite import source_stamp
from tiling.urls import absolute, url_of


def before(path: Path, parameters: Mapping[str, Any], slide: Path) -> tuple[str, bool]:
    """Why the file of a slide that is not up to date is made anew ("" where there is none), and whether it has boxes.

    Raises UserError where it holds the tiles of another slide, which is still there.
    """
    if not path.exists():
        return "", False
    try:
        with SlideFile(path) as file:
            source, old, has_boxes = file.source, file.parameters, file.has_boxes
            stamp = (int(file.attrs["source_size"]), int(file.attrs["source_mtime_ns"]))
    except (UserError, OSError, KeyError, RuntimeError, ValueError):
        return "the file was damaged, or not made by odis-path", False
    now = source_stamp(slide)
    if source_stamp(source)[0] not in (-1, now[0]) and not _same(source, slide):
        raise UserError(
            f"{slide}: {path} holds the tiles of another slide of this name, {source}: give one of them another slide_id "
            "in a manifest, or give another --out"
        )
    if stamp != now:
        return "the slide file changed", has_boxes
    return changes(old, parameters) or "the slide was moved", has_boxes


def _same(one: Path, other: Path) -> bool:
    return absolute(one) == absolute(other) if url_of(one) or url_of(other) else one.samefile(other)
