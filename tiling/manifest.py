"""The manifest of a cohort: a CSV with a row for each slide."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path

from annotations.errors import UserError
from tiling.mpp import check_mpp
from tiling.slide import slide_stem
from tiling.urls import absolute, path_of, shown, url_of

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

    Relative paths are taken from the manifest's folder. Raises UserError for a file that is missing or no CSV in UTF-8, a
    missing column, a bad number, a slide_id that no file can have, or one that stands for two slides or two mpps.
    """
    reader = csv.DictReader(io.StringIO(_text(path), newline=""))
    items: dict[str, tuple[int, SlideItem]] = {}
    try:
        if "path" not in (reader.fieldnames or []):
            found = ", ".join(reader.fieldnames or []) or "nothing"
            raise UserError(f"{path}: has no column path (found: {found}): make it with odis-path scan")
        for row in reader:
            item = _item(path, reader.line_num, row)
            line, first = items.setdefault(item.slide_id, (reader.line_num, item))
            if first.path != item.path:
                both = f"{shown(first.path)} and {shown(item.path)}"
                raise UserError(f"{path}: slide_id {item.slide_id} stands for both {both}: rename one")
            if first != item:
                twice = f"slide_id {item.slide_id} stands there twice with other values"
                raise UserError(f"{path}: lines {line} and {reader.line_num}: {twice}: leave one of them")
    except csv.Error as error:
        raise UserError(f"{path}: after line {reader.line_num}: {error}: is a quote left open? Save it as CSV UTF-8") from None
    if not items:
        raise UserError(f"{path}: lists no slide")
    return [item for _, item in items.values()]


def path_from(manifest: Path, slide: Path) -> str:
    """How a manifest names a slide: what was given as a relative path from its own folder if it is below that, else whole."""
    if slide.is_absolute() or url_of(slide):
        return shown(slide)
    whole, folder = absolute(slide), absolute(manifest).parent
    return str(whole.relative_to(folder) if whole.is_relative_to(folder) else whole)


def id_of(slide: Path) -> str:
    """What the files of a slide are called where nobody says: its stem, without leading dots, which would hide them."""
    return slide_stem(slide).lstrip(".") or "slide"


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


def _item(manifest: Path, line: int, row: dict[str, str | None]) -> SlideItem:
    value = {key: (text or "").strip() for key, text in row.items() if key and not isinstance(text, list)}
    if not value.get("path"):
        raise UserError(f"{manifest}: line {line}: column path is empty")
    slide = path_of(value["path"])
    slide = slide if url_of(slide) else manifest.parent / slide
    slide_id = value.get("slide_id") or id_of(slide)
    if NO_FILE_NAME.search(slide_id):
        said = "cannot be a file name: leave out slashes, line ends and a dot in front"
        raise UserError(f"{manifest}: line {line}: slide_id {' '.join(slide_id.split())} {said}")
    if (size := len(slide_id.encode())) > LONGEST_ID:
        said = f"is {size} bytes long: give one of at most {LONGEST_ID} in the column slide_id"
        raise UserError(f"{manifest}: line {line}: slide_id {slide_id[:40]}... {said}")
    mpp = None
    if value.get("mpp"):
        where = f"{manifest}: line {line}: column mpp"
        try:
            mpp = check_mpp(float(value["mpp"]), where)
        except ValueError:
            raise UserError(f"{where}: {value['mpp']}: not a number") from None
    return SlideItem(slide, slide_id, value.get("patient_id") or patient_of(slide_id), mpp)
