"""The command `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to the root application."""
    app.command()(report)


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with what the other commands wrote.")],
    out: Annotated[Path | None, typer.Option(help="The HTML file; default: report.html in DIR.")] = None,
) -> None:
    """Write one self-contained HTML page about everything found in a folder."""
    from odis_path.report.build import build_report

    made = build_report(folder, out)
    for problem in made.problems:
        typer.echo(f"problem: {problem}")
    typer.echo(f"report: {made.page}")
    raise typer.Exit(1 if made.found.problems or made.cohort.problems else 0)
