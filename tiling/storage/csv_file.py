"""CSV files that people write and save again: one reading of separators, quotes and decimal commas for every command."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from annotations.errors import UserError
from tiling.storage.atomic import atomic_path

SEPARATORS = ",;\t"
SUFFIXES = (".csv", ".tsv")
_HINT = re.compile(r"\Asep=(.)\r?\n", re.IGNORECASE)  # what Excel understands, and some programs write for it
_DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+(?:[eE][+-]?\d+)?")
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(?:,\d{3})+")


@dataclass(frozen=True)
class CsvFile:
    """The names in the header, and each row by them with the number of its last line; values as they stand there."""

    columns: list[str]
    rows: list[tuple[int, dict[str, str]]]


def read_csv_file(path: Path, needed: Sequence[str] = (), missing: str = "no such file") -> CsvFile:
    """Read a CSV in UTF-8 with commas, semicolons or tabs between values, as its header tells; rows of blanks are none.

    needed: columns by which the separator is chosen where the header leaves a doubt; whether they are there is the
    caller's to say. missing: what is said of a file that does not exist. Raises UserError for one that cannot be read, that
    has a column twice, and for a row with more values than columns, which an unquoted comma makes.
    """
    text = _text(path, missing)
    hint = _HINT.match(text)
    separator = hint[1] if hint else _separator(text, needed)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    rows: list[tuple[int, dict[str, str]]] = []
    line = 0
    try:
        if hint:
            next(reader)
        columns, line = _columns(path, next(reader, [])), reader.line_num
        for values in reader:
            line = reader.line_num
            if not values or (len(values) > 1 and not any(value.strip() for value in values)):
                continue
            if any(value.strip() for value in values[len(columns) :]):
                count = f"has {len(values)} values for {len(columns)} columns"
                why = "is there a decimal comma, or a comma without quotes?" if separator == "," else "is one without quotes?"
                raise UserError(f"{path}: line {line}: {count}: {why}")
            row = dict(zip(columns, values + [""] * len(columns), strict=False))
            rows.append((line, {name: value for name, value in row.items() if name}))
    except csv.Error as error:
        raise UserError(f"{path}: after line {line}: {error}: is a quote left open? Save it as CSV UTF-8") from None
    return CsvFile([name for name in columns if name], rows)


def write_csv_file(path: Path, lines: Iterable[Iterable[Any]]) -> None:
    """Write lines of values as CSV in UTF-8, whole or not at all; what is not UTF-8 in file names is escaped."""
    encoding, errors = "utf-8", "backslashreplace"
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding=encoding, errors=errors) as file:
        csv.writer(file).writerows(lines)


def parse_number(text: str) -> float:
    """Parse a number with a point or a comma before its decimals: "0.25" and "0,25". Raises ValueError for anything else."""
    text = text.strip()
    return float(text.replace(",", ".") if _DECIMAL_COMMA.fullmatch(text) else text)


def parse_whole_number(text: str) -> int:
    """Parse a whole number, "512,0" too. Raises ValueError for others, and for "1,024", where the comma may part thousands."""
    value = parse_number(text)
    if _THOUSANDS.fullmatch(text.strip()) or not value.is_integer():
        raise ValueError(f"{text!r} is not a whole number")
    return int(value)


def _separator(text: str, needed: Sequence[str]) -> str:
    """Choose the separator that splits the header into the most columns with the needed names among them; else a comma."""

    def fits(separator: str) -> tuple[int, int]:
        try:
            names = [name.strip() for name in next(csv.reader(io.StringIO(text, newline=""), delimiter=separator), [])]
        except csv.Error:
            return 0, 0
        return len(set(needed) & set(names)), len(names)

    return max(SEPARATORS, key=fits)


def _columns(path: Path, header: list[str]) -> list[str]:
    """Return the names in a header, without the nameless ones at its end."""
    columns = [name.strip() for name in header]
    while columns and not columns[-1]:
        columns.pop()
    if twice := [name for i, name in enumerate(columns) if name and name in columns[:i]]:
        raise UserError(f"{path}: has the column {twice[0]} twice: rename or remove one")
    return columns


def _text(path: Path, missing: str) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: {missing}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}: is it the CSV that was meant?") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}: line {line}: is not UTF-8: save it as CSV UTF-8") from None
    if "\0" in text:
        raise UserError(f"{path}: line {text[: text.index(chr(0))].count(chr(10)) + 1}: holds a NUL: save it as CSV UTF-8")
    return text
