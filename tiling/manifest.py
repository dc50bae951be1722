"""The manifest of a cohort: a CSV with a row for each slide."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from annotations.errors import UserError
from tiling.mpp import check_mpp
from tiling.slide import slide_stem
from tiling.urls import absolute, path_of, printable, shown, url_of

TCGA_PATIENT = re.compile(r"^TCGA-\w{2}-\w{4}")
NO_FILE_NAME = re.compile(r"^\.|[/\\\x00-\x1f\x7f]")
LONGEST_ID = 200  # bytes: of the 255 that file systems allow, what is left is for temporary names and locks


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
    for number, row in manifest_rows(path)[1]:
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


def manifest_rows(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """The columns of a manifest and its rows, each with the number of its line; rows of blanks, as Excel leaves them, are none.

    Raises UserError for a file that is missing or no CSV in UTF-8, without the column path or with one twice, and for a row
    with more values than columns, which a decimal comma makes.
    """
    reader = csv.reader(io.StringIO(_text(path), newline=""))
    rows: list[tuple[int, dict[str, str]]] = []
    line = 0
    try:
        columns, line = _columns(path, next(reader, [])), reader.line_num
        for values in reader:
            line = reader.line_num
            if not values or (len(values) > 1 and not any(value.strip() for value in values)):
                continue
            if any(value.strip() for value in values[len(columns) :]):
                said = (
                    f"has {len(values)} values for {len(columns)} columns: is there a decimal comma, or a comma without quotes?"
                )
                raise UserError(f"{path}: line {line}: {said}")
            row = dict(zip(columns, values + [""] * len(columns), strict=False))
            rows.append((line, {name: value for name, value in row.items() if name}))
    except csv.Error as error:
        raise UserError(f"{path}: after line {line}: {error}: is a quote left open? Save it as CSV UTF-8") from None
    return [name for name in columns if name], rows


def _columns(path: Path, header: list[str]) -> list[str]:
    """The names in a header, without the nameless ones at its end."""
    columns = [name.strip() for name in header]
    while columns and not columns[-1]:
        columns.pop()
    if "path" not in columns:
        raise UserError(f"{path}: has no column path (found: {', '.join(columns) or 'nothing'}): make it with odis-path scan")
    if twice := [name for i, name in enumerate(columns) if name and name in columns[:i]]:
        raise UserError(f"{path}: has the column {twice[0]} twice: rename or remove one")
    return columns


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
        return check_mpp(float(text), where) if text else None
    except ValueError:
        raise UserError(f"{where}: {text}: not a number") from None


def path_from(manifest: Path, slide: Path) -> str:
    """How a manifest names a slide: what was given as a relative path from its own folder if it is below that, else whole."""
    if slide.is_absolute() or url_of(slide):
        return shown(slide)
    whole, folder = absolute(slide), absolute(manifest).parent
    text = str(whole.relative_to(folder) if whole.is_relative_to(folder) else whole)
    return f"./{text}" if text.startswith("~") else text


def id_of(slide: Path) -> str:
    """What the files of a slide are called where nobody says: its stem, as far as a file may be called so."""
    return safe_id(printable(slide_stem(slide))) or "slide"


def safe_id(text: str) -> str:
    """A text as the name of files: no blanks around it, no dot in front, which would hide it, no slashes or line ends.

    What is too long is cut, and ends in eight hex digits that the whole text decides.
    """
    name = NO_FILE_NAME.sub("_", text.lstrip(".").strip())
    if len(name.encode()) <= LONGEST_ID:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name.encode()[: LONGEST_ID - 9].decode(errors='ignore')}_{digest}"


def id_problem(slide_id: str) -> str:
    """Why a slide_id that somebody gave cannot be one; empty where it can."""
    if NO_FILE_NAME.search(slide_id):
        return f"slide_id {' '.join(slide_id.split())} cannot be a file name: leave out slashes, line ends and a dot in front"
    if (size := len(slide_id.encode())) > LONGEST_ID:
        said = f"is {size} bytes long: give one of at most {LONGEST_ID} in the column slide_id"
        return f"slide_id {slide_id[:40]}... {said}"
    return ""


def patient_of(name: str) -> str:
    """TCGA-XX-XXXX out of a TCGA barcode, else an empty string."""
    match = TCGA_PATIENT.match(name)
    return match.group(0) if match else ""


def _text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such manifest: make it with odis-path scan") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}: make it with odis-path scan") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}: line {line}: is not UTF-8: save it as CSV UTF-8") from None
    if "\0" in text:
        raise UserError(f"{path}: line {text[: text.index(chr(0))].count(chr(10)) + 1}: holds a NUL: save it as CSV UTF-8")
    return text


def _item(manifest: Path, line: int, row: dict[str, str]) -> SlideItem:
    if not row["path"].strip():
        raise UserError(f"{manifest}: line {line}: column path is empty")
    slide = slide_of(manifest, row)
    slide_id = row.get("slide_id", "").strip() or id_of(slide)
    if problem := id_problem(slide_id):
        raise UserError(f"{manifest}: line {line}: {problem}")
    patient_id = row.get("patient_id", "").strip() or patient_of(slide_id)
    return SlideItem(slide, slide_id, patient_id, mpp_in(manifest, line, row))
