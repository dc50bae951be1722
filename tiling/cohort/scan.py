"""Read the headers of slides and write the manifest of a cohort, the work list of later commands."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from annotations.errors import UserError
from tiling.cohort.find_slides import find_slides
from tiling.cohort.manifest import (
    PreviousManifest,
    SlideItem,
    is_user_value,
    path_from,
    read_manifest,
    read_previous,
    report_kept_rows,
)
from tiling.grid import FINEST_SHARE
from tiling.jobs.outcome import ItemResult, Outcome, joined, notes_of
from tiling.jobs.run import run_cohort
from tiling.jobs.summary import Outcomes
from tiling.storage.atomic import check_writable
from tiling.storage.csv_file import SUFFIXES, write_csv_file
from tiling.storage.paths import path_key, printable
from tiling.wsi.level_alignment import describe_placements
from tiling.wsi.mpp import check_mpp, missing_mpp
from tiling.wsi.slide import Slide

COLUMNS = (
    *("slide_id", "path", "patient_id", "width_l0", "height_l0", "levels"),
    *("mpp", "mpp_source", "mpp_headers", "vendor", "reader", "why", "readable", "problem"),
)
POOL_FROM = 64  # headers are read in milliseconds: fewer slides than this are not worth starting processes for


def scan(
    slides: Path | str | Sequence[Path | str],
    out: Path | str = "manifest.csv",
    mpp: float | None = None,
    assume_mpp: float | None = None,
    workers: int | None = None,
    timeout: float | None = None,
) -> Outcomes:
    """Read the headers of slides (files, folders searched recursively, globs) and write the manifest CSV `out`.

    One row per slide: what it is, which reader reads it and why that one, and what is wrong with it. An unreadable or cut
    off one has readable=false and its outcome is a failure; one that tile will refuse says why under `problem`. What people
    added to a manifest that is there stays, by the path of the slide: ids, patients, columns, an mpp given by hand.
    mpp: the one meant for tile, which no slide may be coarser than. assume_mpp: for slides that have none. workers None:
    one per CPU where there are many slides. timeout: seconds after which a slide is given up.
    Raises UserError for a path that does not exist or holds no slide, and where `out` cannot be written or is no manifest.
    """
    begun = perf_counter()
    check_mpp(mpp, "--mpp")
    check_mpp(assume_mpp, "--assume-mpp")
    out = Path(out)
    if os.path.isdir(out):
        raise UserError(f"{out}: is a folder: give the manifest a file name, for instance {out / 'manifest.csv'}")
    previous = read_previous(out)
    items = [previous.with_previous_values(item) for item in find_slides(listed(slides), previous.slide_ids)]
    check_writable(out)
    if workers is None and len(items) < POOL_FROM:
        workers = 1
    work = partial(header_row, mpp=mpp, assume_mpp=assume_mpp)
    outcomes = run_cohort(items, work, title="scan", workers=workers, timeout=timeout, folder=out.parent)
    report_kept_rows(out, previous, items)
    rows = [_row(out, previous, item, outcome) for item, outcome in zip(items, outcomes, strict=True)]
    columns = list(dict.fromkeys((*COLUMNS, *previous.columns)))
    write_csv_file(out, [columns, *([row[column] for column in columns] for row in rows)])
    return Outcomes(outcomes, "scan", out, ("no_mpp", "will_fail"), perf_counter() - begun)


def _row(out: Path, previous: PreviousManifest, item: SlideItem, outcome: Outcome) -> dict[str, Any]:
    """The row of a slide: the user's columns of the previous manifest, and those of scan."""
    old = previous.rows.get(path_key(item.path), {})
    row: dict[str, Any] = {name: "" if name in COLUMNS else old.get(name, "") for name in (*COLUMNS, *previous.columns)}
    row |= {"slide_id": item.slide_id, "path": path_from(out, item.path), "patient_id": item.patient_id}
    if outcome.ok:
        row |= {"readable": "true", **outcome.info.get("row", {})}
    else:
        row |= {name: old.get(name, "") for name in ("mpp", "mpp_source", "mpp_headers")}
        row |= {"readable": "false", "problem": outcome.error}
    return row


def header_row(item: SlideItem, mpp: float | None = None, assume_mpp: float | None = None) -> ItemResult:
    """Read the headers of a slide; info: `row`, columns of the manifest, and `no_mpp` and `will_fail`, 0 or 1."""
    if item.path.is_symlink() and not item.path.exists():
        raise UserError(f"{item.path}: is a link to {printable(os.readlink(item.path))}, which leads to no file: mend the link")
    with Slide.open(item.path) as slide:
        info = slide.info
        levels = describe_placements(slide, odd=True)
    if cut := cut_off(item.path):
        raise UserError(f"{item.path}: {cut}: copy it again")
    users = is_user_value(item.mpp, info.mpp)
    known = item.mpp if users else info.mpp
    own = known if known is not None else assume_mpp
    mpp_note = info.mpp_note
    if users:
        mpp_note = "" if info.mpp is None else f"mpp {item.mpp:g} is the manifest's: the slide itself says {info.mpp:g}"
    refusal = ""
    if own is None:
        refusal = missing_mpp(info.stated_mpp)
    elif mpp is not None and mpp < own * FINEST_SHARE:
        refusal = f"--mpp {mpp:g} is finer than the slide's {own:g}: tile will refuse it"
    notes = notes_of(refusal) or notes_of(mpp_note, info.note, levels)
    row = {
        "width_l0": info.width_l0,
        "height_l0": info.height_l0,
        "levels": len(info.level_downsamples),
        "mpp": "" if known is None else repr(known),
        "mpp_source": "manifest" if users else info.mpp_source,
        "mpp_headers": "" if info.mpp is None else repr(info.mpp),
        "vendor": info.vendor,
        "reader": info.reader,
        "why": info.reader_why,
        "problem": joined(notes),
    }
    return ItemResult({"row": row, "no_mpp": int(known is None), "will_fail": int(bool(refusal))}, notes)


def cut_off(path: Path) -> str:
    """Describe the stored pixels of a TIFF that lie beyond its end; empty where none do, or where it is no TIFF."""
    from tiling.wsi.backends.tiff_pages import tiff_pages

    try:
        stat = path.stat()
        with path.open("rb") as file:
            if file.read(2) not in (b"II", b"MM"):
                return ""
        pages = [(page.dataoffsets, page.databytecounts) for page in tiff_pages(path, stat.st_size, stat.st_mtime_ns)]
    except Exception:  # tifffile has many errors of its own, and reads not all that others do
        return ""
    size = stat.st_size
    ends = [np.asarray(offsets, np.uint64) + np.asarray(counts, np.uint64) for offsets, counts in pages]
    beyond, stored = sum(int((end > size).sum()) for end in ends), sum(map(len, ends))
    return f"{beyond} of its {stored} stored tiles lie beyond its end at {size:,} bytes" if beyond else ""


def listed(paths: Path | str | Sequence[Path | str]) -> Sequence[Path | str]:
    """One path, or several, as several."""
    return [paths] if isinstance(paths, Path | str) else paths


def slide_items(inputs: Path | str | Sequence[Path | str]) -> list[SlideItem]:
    """The work list of a cohort: one manifest (a .csv or .tsv file), or slides as files, folders and globs."""
    inputs = listed(inputs)
    paths = [Path(value) for value in inputs]
    manifests = [path for path in paths if path.suffix.lower() in SUFFIXES]
    if not manifests:
        return find_slides(inputs)
    if len(paths) > 1:
        raise UserError(f"{manifests[0]}: a manifest is given alone, without other slides or manifests")
    return read_manifest(paths[0])
