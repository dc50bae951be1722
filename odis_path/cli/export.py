"""The command `export`."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Annotated

import typer

FORMATS = ("timm", "geojson")


def register(app: typer.Typer) -> None:
    """Add the command to the root application."""
    app.command()(export)


def export(
    source: Annotated[Path, typer.Argument(metavar="CKPT|DIR", help="A checkpoint or run folder; for geojson, slide files.")],
    to: Annotated[
        str, typer.Option(help="timm: safetensors that timm.create_model loads; geojson: objects that QuPath opens.")
    ],
    out: Annotated[Path, typer.Option(help="The file to write, for example encoder.safetensors; for geojson, a folder.")],
    what: Annotated[
        str | None, typer.Option(metavar="PARTS", help="geojson: some of tissue,tiles,boxes,labels.", show_default=False)
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(metavar="CSV", help="geojson: the predictions.csv of evaluate, for labels.", show_default=False),
    ] = None,
    origin: Annotated[
        str, typer.Option(metavar="auto|level0|bounds", help="geojson: what coordinates count from; auto: as QuPath does.")
    ] = "auto",
    workers: Annotated[int | None, typer.Option(min=1, help="geojson: processes.", show_default=False)] = None,
) -> None:
    """Write a trained encoder, or what slide files hold, in the form that other programs read."""
    from annotations.errors import UserError

    if to not in FORMATS:
        raise UserError(f"--to {to}: no such export; there is: {', '.join(FORMATS)}")
    if to == "geojson":
        from odis_path.export_geojson import export_geojson
        from tiling.cohort import finish

        parts = None if what is None else [part.strip() for part in what.split(",") if part.strip()]
        begun = perf_counter()
        outcomes = export_geojson(source, out, parts, predictions, origin, workers)
        columns = parts or ("tissue", "tiles", "boxes", "labels")
        raise typer.Exit(finish(outcomes, "export", out, columns, perf_counter() - begun))
    if what is not None or predictions is not None:
        raise UserError(f"--to {to}: takes no --what and no --predictions, which go with --to geojson")
    from odis_path.export import export as run

    result = run(source, to, out)
    typer.echo(f"{result.weights}: {result.model}, {result.embed_dim} features, from {result.source}")
    typer.echo(f"{result.sidecar}: mean {list(result.mean)}, std {list(result.std)}, mpp {result.mpp or 'unknown'}")
    typer.echo(result.python)
