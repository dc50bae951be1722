"""The manifest of a cohort: a CSV with a row for each slide."""

from __future__ import annotations

import math
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from annotations.errors import UserError
from tiling.storage.atomic import atomic_path
from tiling.storage.csv_file import CsvFile, parse_number, read_csv_file
from tiling.storage.paths import absolute, display_path, parse_path, path_key, url_of
from tiling.storage.slide_id import default_id, id_problem
from tiling.wsi.mpp import check_mpp

TCGA_PATIENT = re.compile(r"^TCGA-\w{2}-\w{4}")


@dataclass(frozen=True)
class SlideItem:
    """One line of work: a slide, the name of its files, its patient (may be empty), and the manifest's mpp if given."""

    path: Path
    slide_id: str
    patient_id: str = ""
    mpp: float | None = None

    def __str__(self) -> str:
        return self.slide_id


def read_manifest(path: Path) -> list[SlideItem]:
    """Rows of a manifest CSV: needs the column path; slide_id, patient_id and mpp are used where there are any.

    Relative paths are taken from the manifest's folder. Raises UserError for what `manifest_rows` cannot read, a bad number,
    a slide_id that no file can have, or one that stands for two slides or two mpps.
    """
    items: dict[str, tuple[int, SlideItem]] = {}
    for number, row in manifest_rows(path).rows:
        item = _item(path, number, row)
        line, first = items.setdefault(item.slide_id, (number, item))
        if first.path != item.path:
            both = f"{display_path(first.path)} and {display_path(item.path)}"
            raise UserError(f"{path}: slide_id {item.slide_id} stands for both {both}: rename one")
        if first != item:
            twice = f"slide_id {item.slide_id} stands there twice with other values"
            raise UserError(f"{path}: lines {line} and {number}: {twice}: leave one of them")
    if not items:
        raise UserError(f"{path}: lists no slide")
    return [item for _, item in items.values()]


def manifest_rows(path: Path, column: str = "path", remedy: str = "make it with odis-path scan") -> CsvFile:
    """Read the columns and rows of a manifest. Raises UserError as `read_csv_file`, and where it lacks the column."""
    manifest = read_csv_file(path, (column,), f"no such manifest: {remedy}")
    if column not in manifest.columns:
        raise UserError(f"{path}: has no column {column} (found: {', '.join(manifest.columns) or 'nothing'}): {remedy}")
    return manifest


def slide_of(manifest: Path, row: Mapping[str, str]) -> Path:
    """The slide of a row; relative paths count from the manifest's folder, blanks around one where a file has them."""
    given = row["path"]
    for text in dict.fromkeys([given, given.strip()]):
        slide = parse_path(text)
        slide = slide if url_of(slide) else manifest.parent / slide
        if text == given.strip() or (not url_of(slide) and os.path.lexists(slide)):
            break
    return slide


def mpp_in(manifest: Path, line: int, row: Mapping[str, str]) -> float | None:
    """The mpp of a row, None where it has none. Raises UserError for what is no number above 0."""
    text, where = row.get("mpp", "").strip(), f"{manifest}: line {line}: column mpp"
    try:
        return check_mpp(parse_number(text), where) if text else None
    except ValueError:
        raise UserError(f"{where}: {text}: not a number") from None


def path_from(manifest: Path, slide: Path) -> str:
    """The path of a slide in a manifest: relative where it was given so and lies below the manifest, else absolute."""
    if slide.is_absolute() or url_of(slide):
        return display_path(slide)
    whole, folder = absolute(slide), absolute(manifest).parent
    text = str(whole.relative_to(folder) if whole.is_relative_to(folder) else whole)
    return f"./{text}" if text.startswith("~") else text


def patient_of(name: str) -> str:
    """TCGA-XX-XXXX out of a TCGA barcode, else an empty string."""
    match = TCGA_PATIENT.match(name)
    return match.group(0) if match else ""


def _item(manifest: Path, line: int, row: dict[str, str]) -> SlideItem:
    if not row["path"].strip():
        raise UserError(f"{manifest}: line {line}: column path is empty")
    slide = slide_of(manifest, row)
    slide_id = row.get("slide_id", "").strip() or default_id(slide)
    if problem := id_problem(slide_id):
        raise UserError(f"{manifest}: line {line}: {problem}")
    patient_id = row.get("patient_id", "").strip() or patient_of(slide_id)
    return SlideItem(slide, slide_id, patient_id, mpp_in(manifest, line, row))


@dataclass(frozen=True)
class PreviousManifest:
    """The manifest at the output path. rows, mpps: by place of the slide. count: all its rows, also those of no slide."""

    columns: tuple[str, ...] = ()
    rows: dict[str, dict[str, str]] = field(default_factory=dict)
    mpps: dict[str, float | None] = field(default_factory=dict)
    count: int = 0

    @property
    def slide_ids(self) -> dict[str, str]:
        """place -> slide_id, where it is valid; of slides that share one the first has it."""
        first: dict[str, str] = {}
        for key, row in self.rows.items():
            first.setdefault(row.get("slide_id", "").strip(), key)
        return {key: slide_id for slide_id, key in first.items() if slide_id and not id_problem(slide_id)}

    def with_previous_values(self, item: SlideItem) -> SlideItem:
        """The slide with the patient and the mpp it has in the manifest."""
        key = path_key(item.path)
        patient_id = self.rows.get(key, {}).get("patient_id", "").strip() or item.patient_id
        return replace(item, patient_id=patient_id, mpp=self.mpps.get(key))


def read_previous(out: Path) -> PreviousManifest:
    """Read the manifest at `out`. Raises UserError for another file or one that cannot be read: it is not written over."""
    if not out.exists() or not out.stat().st_size:
        return PreviousManifest()
    try:
        manifest = manifest_rows(out)
        by_place: dict[str, tuple[int, dict[str, str]]] = {}
        for line, row in manifest.rows:
            if row["path"].strip():
                by_place.setdefault(path_key(slide_of(out, row)), (line, row))
        mpps = {key: _user_mpp(out, line, row) for key, (line, row) in by_place.items()}
    except UserError as error:
        raise UserError(f"{error}; scan does not write over it: put it right, or give another --out") from None
    return PreviousManifest(tuple(manifest.columns), {key: row for key, (_, row) in by_place.items()}, mpps, len(manifest.rows))


def _user_mpp(out: Path, line: int, row: dict[str, str]) -> float | None:
    """The mpp of a row, None where scan wrote it: the slide may have been replaced, and state another one now."""
    mpp = mpp_in(out, line, row)
    try:
        headers = parse_number(row.get("mpp_headers") or "nan")
    except ValueError:
        headers = math.nan
    return mpp if is_user_value(mpp, None if math.isnan(headers) else headers) else None


def is_user_value(mpp: float | None, headers_mpp: float | None) -> bool:
    """Tell whether a person gave a manifest's mpp: it differs from that of the slide's headers by more than rounding."""
    return mpp is not None and (headers_mpp is None or not math.isclose(mpp, headers_mpp, rel_tol=1e-6))


def report_kept_rows(out: Path, previous: PreviousManifest, items: Sequence[SlideItem]) -> None:
    """Report on stderr what the new manifest keeps of the previous one; rows of other slides go to a file beside it."""
    kept = sum(path_key(item.path) in previous.rows for item in items)
    lines = []
    if kept:
        lines.append(
            f"{kept} of {len(items)} slides were in it and keep slide_id, patient_id, further columns and an mpp given by hand"
        )
    if gone := previous.count - kept:
        names = (out.with_name(f"{out.name}.before{number or ''}") for number in (0, *range(2, 10_000)))
        aside = next(name for name in names if not name.exists())
        with atomic_path(aside) as temporary:
            shutil.copyfile(out, temporary)
        lines.append(f"{gone} rows of other slides are left out of it and stay in {aside}")
    if lines:
        print(f"{out}: {'; '.join(lines)}", file=sys.stderr, flush=True)
