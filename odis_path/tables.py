"""Read CSV files of labels and splits as people save them: spellings of missing values, and near-identical names."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from annotations.errors import UserError
from tiling.storage.csv_file import read_csv_file

# What spreadsheets, R and pandas write for a cell without a value; compared without regard to case.
MISSING = frozenset({"", "nan", "-nan", "na", "n/a", "#n/a", "#na", "<na>", "nat", "null", "none"})


def is_missing(text: str) -> bool:
    """Tell whether a cell is empty or holds a word for an empty one."""
    return text.strip().casefold() in MISSING


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV with a header, every value stripped. Raises UserError where it cannot be read."""
    return [row for _, row in numbered_rows(path)]


def numbered_rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Read the same with the line of each row (`tiling.storage.csv_file`)."""
    rows = [(line, {name: text.strip() for name, text in row.items()}) for line, row in read_csv_file(Path(path)).rows]
    if not rows:
        raise UserError(f"{path}: holds no rows: a header line and one line per item are needed")
    return rows


def alike(names: Iterable[str], *, ids: bool = False) -> list[list[str]]:
    """Group names that may mean one thing: they differ in case, spaces, hyphens and underscores only.

    ids: leading zeros and a trailing ".0" make no difference either (P01 and p1, 7 and 7.0), as spreadsheets change them.
    """
    same: dict[tuple[str, ...], set[str]] = {}
    for name in names:
        plain = unicodedata.normalize("NFKC", name).casefold().strip()
        if ids:
            plain = re.sub(r"(?<=\d)\.0+$", "", plain)
            key = tuple(
                part.lstrip("0") or "0" if part.isdecimal() else part for part in re.findall(r"\d+|[^\W\d_]+|[^\w\s-]", plain)
            )
        else:
            key = tuple(re.split(r"[\s_-]+", plain))
        same.setdefault(key, set()).add(name)
    return sorted(sorted(group) for group in same.values() if len(group) > 1)


def spell_alike(groups: list[list[str]], limit: int = 5) -> str:
    """Write "P01 and p1; P02 and p2", the first few and the number of the rest."""
    rest = f" and {len(groups) - limit} more" if len(groups) > limit else ""
    return "; ".join(" and ".join(group) for group in groups[:limit]) + rest
