"""One self-contained HTML page about everything a folder holds: slides, runs, embeddings, evaluations."""

from __future__ import annotations

from pathlib import Path

__all__ = ["write_report"]


def write_report(folder: Path | str, out: Path | str | None = None) -> Path:
    """Write the report of `folder` to `out` (default `<folder>/report.html`) and return its path.

    Pictures and numbers also go to `<out without .html>_files/`. Raises UserError where there is nothing to report.
    """
    from odis_path.report.build import build_report

    return build_report(Path(folder), None if out is None else Path(out)).page
