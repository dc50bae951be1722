"""The command `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from odis_path.cli.slides import end


def register(app: typer.Typer) -> None:
    """Add the command to the root application."""
    app.command()(report)


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with what the other commands wrote.")],
    out: Annotated[Path | None, typer.Option(help="The HTML file; default: report.html in DIR.")] = None,
) -> None:
    """Write one self-contained HTML page about everything found in a folder."""
    from odis_path.reporting.build import report as run

    end(run(folder, out))
