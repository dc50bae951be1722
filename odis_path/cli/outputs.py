"""Commands that turn outputs into what others read: export, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from odis_path.cli.slides import exit_with
from odis_path.exporters.targets import NAMES, describe_targets


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the application."""
    app.command()(export)
    app.command()(report)


def export(
    source: Annotated[
        Path,
        typer.Argument(metavar="CKPT|DIR", help="timm: a checkpoint or run folder; geojson: slide files; else feature files."),
    ],
    to: Annotated[str, typer.Option(metavar="|".join(NAMES), help=describe_targets())],
    out: Annotated[Path, typer.Option(help="The folder to write into; for timm a file, for example encoder.safetensors.")],
    what: Annotated[
        str | None,
        typer.Option(metavar="PARTS", help="geojson: the parts to write, of tissue,tiles,boxes,labels.", show_default=False),
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(metavar="CSV", help="geojson: the predictions.csv of evaluate, for labels.", show_default=False),
    ] = None,
    origin: Annotated[
        str, typer.Option(metavar="auto|level0|bounds", help="geojson: what coordinates count from; auto: as QuPath does.")
    ] = "auto",
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; not for timm.", show_default=False)] = None,
) -> None:
    """Write a trained encoder, what slide files hold, or tile features, in the form that other programs read."""
    from odis_path.exporters.run import export as run

    parts = None if what is None else [part.strip() for part in what.split(",") if part.strip()]
    exit_with(run(source, to, out, what=parts, predictions=predictions, origin=origin, workers=workers))


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with what the other commands wrote.")],
    out: Annotated[Path | None, typer.Option(help="The HTML file; default: report.html in DIR.")] = None,
) -> None:
    """Write one self-contained HTML page about the contents of a folder."""
    from odis_path.reporting.build import report as run

    exit_with(run(folder, out))
