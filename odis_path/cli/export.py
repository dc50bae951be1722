"""The command `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to the root application."""
    app.command()(export)


def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint, or a run folder (its newest).")],
    to: Annotated[str, typer.Option(help="timm: safetensors that timm.create_model loads.")],
    out: Annotated[Path, typer.Option(help="The file to write, for example encoder.safetensors.")],
) -> None:
    """Write a trained encoder in the form that other programs read."""
    from odis_path.export import export as run

    result = run(checkpoint, to, out)
    typer.echo(f"{result.weights}: {result.model}, {result.embed_dim} features, from {result.source}")
    typer.echo(f"{result.sidecar}: mean {list(result.mean)}, std {list(result.std)}, mpp {result.mpp or 'unknown'}")
    typer.echo(result.python)
