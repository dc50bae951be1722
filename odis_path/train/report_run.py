"""The rows of a run's log, and the closing lines of `odis-path pretrain`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The rows of train.jsonl; [] where there is none, lines that are no rows are left out."""
    path = folder / "train.jsonl"
    return read_rows(path)[0] if path.exists() else []


def read_rows(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows of a train.jsonl, and the numbers (from 1) of lines that are none: cut off, damaged, or no object."""
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


def print_run(checkpoint: Path) -> None:
    """A table of the last figures, and where the run lies (rank 0 only)."""
    if os.environ.get("RANK", "0") != "0":
        return
    from rich.console import Console
    from rich.table import Table

    rows = read_log(checkpoint.parent)
    last: dict[str, Any] = {}
    for row in rows:
        last.update(row)
    table = Table(title="pretrain")
    table.add_column("figure")
    table.add_column("last value", justify="right")
    parts = sorted(key for key in last if key.startswith("loss_"))
    after = ("knn_balanced_accuracy", "token_spread", "identity_pairs", "images_per_s", "data_wait_share")
    for key in ("step", "epoch", "loss", *parts, *after):
        if key in last:
            table.add_row(key.replace("_", " "), f"{last[key]:.4g}")
    console = Console()
    console.print(table)
    console.print(f"checkpoint: {checkpoint}", soft_wrap=True, highlight=False)
    console.print(f"log: {checkpoint.parent / 'train.jsonl'}", soft_wrap=True, highlight=False)
