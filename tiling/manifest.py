"""The manifest of a cohort: a CSV with a row for each slide."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from annotations.errors import UserError
from tiling.csvfile import CsvFile, number_in, read_csv_file
from tiling.mpp import check_mpp
from tiling.slideid import id_of, id_problem
from tiling.urls import absolute, path_of, shown, url_of

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
            both = f"{shown(first.path)} and {shown(item.path)}"
            raise UserError(f"{path}: slide_id {item.slide_id} stands for both {both}: rename one")
        if first != item:
            twice = f"slide_id {item.slide_id} stands there twice with other values"
            raise UserError(f"{path}: lines {line} and {number}: {twice}: leave one of them")
    if not items:
        raise UserError(f"{path}: lists no slide")
    return [item for _, item in items.values()]


def manifest_rows(path: Path) -> CsvFile:
    """The columns and rows of a manifest. Raises UserError as `read_csv_file` does, and where there is no column path."""
    found = read_csv_file(path, ("path",), "no such manifest: make it with odis-path scan")
    if "path" not in found.columns:
        raise UserError(
            f"{path}: has no column path (found: {', '.join(found.columns) or 'nothing'}): make it with odis-path scan"
        )
    return found


def slide_of(manifest: Path, row: Mapping[str, str]) -> Path:
    """The slide of a row; relative paths count from the manifest's folder, blanks around one where a file has them."""
    given = row["path"]
    for text in dict.fromkeys([given, given.strip()]):
        slide = path_of(text)
        slide = slide if url_of(slide) else manifest.parent / slide
        if text == given.strip() or (not url_of(slide) and os.path.lexists(slide)):
            break
    return slide


def mpp_in(manifest: Path, line: int, row: Mapping[str, str]) -> float | None:
    """The mpp of a row, None where it has none. Raises UserError for what is no number above 0."""
    text, where = row.get("mpp", "").strip(), f"{manifest}: line {line}: column mpp"
    try:
        return check_mpp(number_in(text), where) if text else None
    except ValueError:
        raise UserError(f"{where}: {text}: not a number") from None


def path_from(manifest: Path, slide: Path) -> str:
    """How a manifest names a slide: what was given as a relative path from its own folder if it is below that, else whole."""
    if slide.is_absolute() or url_of(slide):
        return shown(slide)
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
    slide_id = row.get("slide_id", "").strip() or id_of(slide)
    if problem := id_problem(slide_id):
        raise UserError(f"{manifest}: line {line}: {problem}")
    patient_id = row.get("patient_id", "").strip() or patient_of(slide_id)
    return SlideItem(slide, slide_id, patient_id, mpp_in(manifest, line, row))
