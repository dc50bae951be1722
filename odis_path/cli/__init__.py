"""The command line `odis-path`: one thin shell per Python verb, imported lazily so that --help is quick."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from annotations.errors import UserError
from odis_path import __version__
from odis_path.cli import evaluate, export, learning, reports, slides

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


for module in (slides, learning, evaluate, export, reports):
    module.register(app)


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 2, never a traceback."""
    # Threads that wait for each other must not spin: on a machine shared with loader workers that costs up to five times.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped: what was finished is kept; the same command goes on from there", file=sys.stderr)
        sys.exit(130)
