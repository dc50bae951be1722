"""Decide from the file at the output path whether a slide is done, to be tiled, or another run's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from annotations.errors import UserError
from tiling.slide_file.read import SlideFile
from tiling.slide_file.write import check_ours, parameters_hash, source_stamp
from tiling.storage.locks import describe_changes
from tiling.storage.paths import absolute, path_key, url_of
from tiling.storage.touched import was_touched

BLOCKS_COMPARED, BLOCK_BYTES = 17, 65536  # of two slides that may be copies: over all of them
Stamp = tuple[int, int]


@dataclass(frozen=True)
class ExistingFile:
    """A slide file that is there. stamp: size and time of its slide when it was tiled; unreadable: share of its overview."""

    tiles: int
    bad_tiles: int
    unreadable: float
    parameters: dict[str, Any]
    digest: str
    source: Path
    stamp: Stamp
    patient_id: str
    has_boxes: bool
    has_pixels: bool


def read_existing(path: Path) -> ExistingFile | None:
    """Read the slide file at `path`; None where there is none, or a damaged one. UserError where it is no slide file at all.

    All that tile wrote is compared with its checksums where something touched the file since it was written.
    """
    if not path.exists():
        return None
    try:
        with SlideFile(path) as file:
            if was_touched(path):
                file.check(boxes=False)
            return ExistingFile(
                tiles=len(file),
                bad_tiles=len(file.bad_tiles),
                unreadable=float(file.group_attrs("thumbnail").get("undecoded", 0.0)),
                parameters=file.parameters,
                digest=str(file.attrs["parameters_sha256"]),
                source=file.source,
                stamp=(int(file.attrs["source_size"]), int(file.attrs["source_mtime_ns"])),
                patient_id=file.patient_id,
                has_boxes=file.has_boxes,
                has_pixels=file.has_pixels,
            )
    except (UserError, OSError, KeyError, RuntimeError, ValueError, TypeError):
        check_ours(path)
        return None


def check_same_slide(path: Path, source: Path, stamp: Stamp, slide: Path, now: Stamp) -> None:
    """Raise UserError where a slide file holds the tiles of another slide, which is still there.

    source, stamp: what the file says of the slide that it was made of. now: stamp of `slide`. One file may have many URLs
    (signed ones change by the hour), so behind them only another size tells another slide.
    """
    if now[0] == -1 or path_key(source) == path_key(slide):
        return
    old = source_stamp(source)
    unchanged = old == stamp and not url_of(source) and not url_of(slide)
    # Of a slide that is up to date, and has another place now, a stub may be left at the old one.
    may_differ = old[0] != -1 and (unchanged or (stamp != now and old[0] != now[0]))
    if may_differ and not _is_copy(source, slide):
        raise UserError(
            f"{slide}: {path} holds the tiles of another slide of this name, {source}: give one of them another slide_id "
            "in a manifest, or give another --out"
        )


def up_to_date(existing: ExistingFile, parameters: Mapping[str, Any], slide: Path, now: Stamp) -> bool:
    """Tell whether a slide file was made with these parameters from this slide, whose stamp is `now`."""
    moved = not existing.has_pixels and existing.source != absolute(slide)  # the slide itself is read later, where it is
    return existing.digest == parameters_hash(parameters)[1] and existing.stamp == now and not moved


def reason_to_redo(existing: ExistingFile, parameters: Mapping[str, Any], now: Stamp) -> str:
    """Say why a slide file that is not up to date is made anew."""
    if existing.stamp != now:
        return "the slide file changed"
    return describe_changes(existing.parameters, parameters) or "the slide was moved"


def _is_copy(first: Path, second: Path) -> bool:
    """Tell whether two paths lead to one file, or to copies of one, by a sample of their bytes."""
    try:
        if first.samefile(second):
            return True
        size = first.stat().st_size
        if size != second.stat().st_size:
            return False
        with first.open("rb") as one, second.open("rb") as two:
            for i in range(BLOCKS_COMPARED):
                at = max(0, size - BLOCK_BYTES) * i // (BLOCKS_COMPARED - 1)
                if os.pread(one.fileno(), BLOCK_BYTES, at) != os.pread(two.fileno(), BLOCK_BYTES, at):
                    return False
        return True
    except OSError:  # a URL, or gone in this moment
        return False
