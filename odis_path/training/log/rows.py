"""The rows of a run's log, `train.jsonl`; read without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, float]  # one that a run writes: step, epoch and figures
GROUPINGS = ("class", "patient", "slide", "tile")  # whose share of the embedding variance a run measures
VARIANCE = tuple(f"variance_{name}" for name in GROUPINGS)  # the keys of these shares


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Read the rows of train.jsonl; [] where there is none, lines that are no rows are left out."""
    path = folder / "train.jsonl"
    return read_rows(path)[0] if path.exists() else []


def read_rows(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Read the rows of a train.jsonl, and the numbers (from 1) of lines that are none: cut off, damaged, or no object."""
    rows, wrong = [], []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            wrong.append(number)
    return rows, wrong
