"""The typer application, put together of the groups of commands."""

from __future__ import annotations

from typing import Annotated

import typer

from odis_path import __version__
from odis_path.cli import evaluate, learning, outputs, slides

app = typer.Typer(
    name="odis-path",
    help="Pretrain a pathology vision foundation model on your own whole-slide images with ODIS, then use it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"odis-path {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Scan, tile, annotate, pretrain, embed, evaluate, report."""


for module in (slides, learning, evaluate, outputs):
    module.register(app)
