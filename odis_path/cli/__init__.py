"""The command line `odis-path`: one thin shell per Python verb, imported lazily so that --help is quick."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from annotations.errors import UserError
from odis_path.cli.streams import usable_streams

if TYPE_CHECKING:
    from odis_path.cli.app import app

__all__ = ["app", "main"]

STOPPED = 130  # what shells and typer make of Ctrl-C


def __getattr__(name: str) -> Any:
    if name == "app":  # not before it is asked for: Ctrl-C while it is imported is for main to answer
        from odis_path.cli.app import app

        return app
    raise AttributeError(name)


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 2, never a traceback."""
    # Threads that wait for each other must not spin: on a machine shared with loader workers that costs up to five times.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        usable_streams()
        from odis_path.cli.app import app

        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        _stopped()
    except SystemExit as end:
        if end.code == STOPPED:
            _stopped()
        raise


def _stopped() -> None:
    print("stopped: what was finished is kept; the same command goes on from there", file=sys.stderr)
    sys.exit(STOPPED)
