"""Find slides, read their headers, write and read the manifest of a cohort."""

from __future__ import annotations

import csv
import glob
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from annotations.errors import UserError
from tiling.atomic import atomic_path
from tiling.cohort import Outcome, run_cohort
from tiling.grid import FINEST_SHARE
from tiling.mpp import check_mpp, missing_mpp
from tiling.slide import Slide, slide_stem
from tiling.urls import absolute, file_name, path_of, shown, url_of, urls_under

SLIDE_EXTENSIONS = frozenset(
    [".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide", ".dcm", ".qptiff", ".btf"]
)
COLUMNS = (
    *("slide_id", "path", "patient_id", "width_l0", "height_l0", "levels"),
    *("mpp", "mpp_source", "vendor", "reader", "why", "readable", "problem"),
)
TCGA_PATIENT = re.compile(r"^TCGA-\w{2}-\w{4}")
POOL_FROM = 64  # headers are read in milliseconds: fewer slides than this are not worth starting processes for


@dataclass(frozen=True)
class SlideItem:
    """One line of work: a slide, the name of its files, its patient (may be empty), and the manifest's mpp if given."""

    path: Path
    slide_id: str
    patient_id: str = ""
    mpp: float | None = None

    def __str__(self) -> str:
        return self.slide_id


def scan_slides(
    slides: Sequence[Path | str],
    out: Path | str,
    mpp: float | None = None,
    assume_mpp: float | None = None,
    workers: int | None = None,
    timeout: float | None = None,
) -> list[Outcome]:
    """Read the headers of slides (files, folders searched recursively, globs) and write the manifest CSV `out`.

    One row per slide: what it is, which reader reads it and why that one, and what is wrong with it. An unreadable or cut
    off one has readable=false and its outcome is a failure; one that tile will refuse says why under `problem`.
    mpp: the one meant for tile, which no slide may be coarser than. assume_mpp: for slides that have none. workers None:
    one per CPU where there are many slides. timeout: seconds after which a slide is given up.
    Raises UserError for a path that does not exist or holds no slide.
    """
    check_mpp(mpp, "--mpp")
    check_mpp(assume_mpp, "--assume-mpp")
    out = Path(out)
    if out.is_dir():
        raise UserError(f"{out}: is a folder: give the manifest a file name, for instance {out / 'manifest.csv'}")
    items = find_slides(slides)
    if workers is None and len(items) < POOL_FROM:
        workers = 1
    work = partial(header_row, mpp=mpp, assume_mpp=assume_mpp)
    outcomes = run_cohort(items, work, title="scan", workers=workers, timeout=timeout)
    rows = []
    for item, outcome in zip(items, outcomes, strict=True):
        row = dict.fromkeys(COLUMNS, "") | {"slide_id": item.slide_id, "path": shown(item.path)}
        row |= {"patient_id": item.patient_id, "readable": "true" if outcome.ok else "false"}
        rows.append(row | outcome.info.get("row", {}) | ({} if outcome.ok else {"problem": outcome.message}))
    with atomic_path(out) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return outcomes


def header_row(item: SlideItem, mpp: float | None = None, assume_mpp: float | None = None) -> dict[str, Any]:
    """What a slide's headers say, as columns of the manifest (under the key `row`), and `will_fail`, 0 or 1."""
    with Slide.open(item.path) as slide:
        info = slide.info
    if cut := cut_off(item.path):
        raise UserError(f"{item.path}: {cut}: copy it again")
    own = info.mpp if info.mpp is not None else assume_mpp
    problem, will_fail = "; ".join(note for note in (info.mpp_note, info.note) if note), True
    if own is None:
        problem = missing_mpp(info.mpp_found)
    elif mpp is not None and mpp < own * FINEST_SHARE:
        problem = f"--mpp {mpp:g} is finer than the slide's {own:g}: tile will refuse it"
    else:
        will_fail = False
    row = {
        "width_l0": info.width_l0,
        "height_l0": info.height_l0,
        "levels": len(info.level_downsamples),
        "mpp": "" if info.mpp is None else repr(info.mpp),
        "mpp_source": info.mpp_source,
        "vendor": info.vendor,
        "reader": info.reader,
        "why": info.reader_why,
        "problem": problem,
    }
    return {"row": row, "message": problem, "no_mpp": int(info.mpp is None), "will_fail": int(will_fail)}


def cut_off(path: Path) -> str:
    """What of a TIFF's stored pixels lies beyond its end, in words; empty where all is there, or where it is no TIFF."""
    from tiling.direct import tiff_pages

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


def slide_items(inputs: Sequence[Path | str]) -> list[SlideItem]:
    """The work list of a cohort: one manifest (a .csv file), or slides as files, folders and globs."""
    paths = [Path(value) for value in inputs]
    manifests = [path for path in paths if path.suffix.lower() == ".csv"]
    if not manifests:
        return find_slides(inputs)
    if len(paths) > 1:
        raise UserError(f"{manifests[0]}: a manifest is given alone, without other slides or manifests")
    return read_manifest(paths[0])


def read_manifest(path: Path) -> list[SlideItem]:
    """Rows of a manifest CSV: needs the column path; slide_id, patient_id and mpp are used where there are any.

    Relative paths are taken from the manifest's folder. Raises UserError for a missing file or column, a bad number,
    or a slide_id that occurs twice.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such manifest: make it with odis-path scan")
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if "path" not in (reader.fieldnames or []):
            found = ", ".join(reader.fieldnames or []) or "nothing"
            raise UserError(f"{path}: has no column path (found: {found}): make it with odis-path scan")
        items = [_manifest_item(path, number, row) for number, row in enumerate(reader, 2)]
    if not items:
        raise UserError(f"{path}: lists no slide")
    names = Counter(item.slide_id for item in items)
    twice = [item for item in items if names[item.slide_id] > 1]
    if twice and any(str(item.path) != str(twice[0].path) for item in twice):
        first, second = [item.path for item in twice if item.slide_id == twice[0].slide_id][:2]
        raise UserError(f"{path}: slide_id {twice[0].slide_id} stands for both {shown(first)} and {shown(second)}: rename one")
    return list({item.slide_id: item for item in items}.values())


def _manifest_item(manifest: Path, line: int, row: dict[str, str | None]) -> SlideItem:
    value = {key: (text or "").strip() for key, text in row.items() if key and not isinstance(text, list)}
    if not value.get("path"):
        raise UserError(f"{manifest}: line {line}: column path is empty")
    slide = path_of(value["path"])
    slide = slide if url_of(slide) else manifest.parent / slide
    slide_id = value.get("slide_id") or slide_stem(slide)
    if "/" in slide_id or "\\" in slide_id or slide_id.startswith("."):
        raise UserError(f"{manifest}: line {line}: slide_id {slide_id} cannot be a file name: leave out slashes")
    mpp = None
    if value.get("mpp"):
        where = f"{manifest}: line {line}: column mpp"
        try:
            mpp = check_mpp(float(value["mpp"]), where)
        except ValueError:
            raise UserError(f"{where}: {value['mpp']}: not a number") from None
    return SlideItem(slide, slide_id, value.get("patient_id") or patient_of(slide_id), mpp)


def find_slides(inputs: Iterable[Path | str]) -> list[SlideItem]:
    """Slides among files, folders (searched recursively by extension), globs and URLs, each once, in order of their paths.

    Slides of equal stems in different folders get their folder's name in front. Raises UserError for a path that does
    not exist and for one that holds no slide.
    """
    found: dict[Path, None] = {}
    inputs = list(inputs)
    for value in inputs:
        for path in _expanded(path_of(value)):
            found[path] = None
    if not found:
        raise UserError("no slides given: name files, folders or a manifest.csv")
    return _with_unique_ids([SlideItem(path, slide_stem(path), patient_of(file_name(path))) for path in found])


def patient_of(name: str) -> str:
    """TCGA-XX-XXXX out of a TCGA barcode, else an empty string."""
    match = TCGA_PATIENT.match(name)
    return match.group(0) if match else ""


def _expanded(path: Path) -> list[Path]:
    if url := url_of(path):
        named = Path(file_name(path)).suffix.lower() in SLIDE_EXTENSIONS and "*" not in url
        return [path] if named else urls_under(url, SLIDE_EXTENSIONS)
    if path.is_dir():
        slides = sorted(each for each in path.rglob("*") if each.suffix.lower() in SLIDE_EXTENSIONS and each.is_file())
        slides = [each for each in slides if not any(part.startswith(".") for part in each.relative_to(path).parts)]
        if not slides:
            known = " ".join(sorted(SLIDE_EXTENSIONS))
            raise UserError(f"{path}: holds no slide (looked for {known}, in its folders too)")
        return slides
    if path.exists():
        return [path]
    matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
    if not matches:
        raise UserError(f"{path}: no such file or folder")
    return [slide for match in matches for slide in (_expanded(match) if match.is_dir() else [match])]


def _with_unique_ids(items: list[SlideItem]) -> list[SlideItem]:
    """Put folder names in front of ids that occur more than once, as many as it takes, or the extension behind."""
    clashes: dict[str, list[SlideItem]] = {}
    for item in items:
        clashes.setdefault(item.slide_id, []).append(item)
    new_id = {group[0].path: slide_id for slide_id, group in clashes.items() if len(group) == 1}
    for group in clashes.values():
        if len(group) > 1:
            new_id |= dict(zip((item.path for item in group), _told_apart(group), strict=True))
    owner: dict[str, Path] = {}
    for path, slide_id in new_id.items():
        if slide_id in owner:
            raise UserError(f"{shown(path)}, {shown(owner[slide_id])}: both would be named {slide_id}: name them in a manifest")
        owner[slide_id] = path
    return [replace(item, slide_id=new_id[item.path]) for item in items]


def _told_apart(group: list[SlideItem]) -> list[str]:
    folders = [absolute(item.path).parts[1:-1] for item in group]
    names = [item.slide_id for item in group]
    for depth in range(1, max(len(parts) for parts in folders) + 1):
        longer = ["_".join([*parts[-depth:], name]) for parts, name in zip(folders, names, strict=True)]
        if len(set(longer)) == len(group):
            return longer
    return [f"{name}_{Path(file_name(item.path)).suffix[1:]}" for name, item in zip(names, group, strict=True)]
