"""The command line `odis-path`: one thin shell per Python verb, imported lazily so that --help is quick."""

from __future__ import annotations

import os
import sys

from annotations.errors import UserError
from odis_path.cli.streams import usable_streams

STOPPED = 130  # what shells and typer make of Ctrl-C


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 2, never a traceback."""
    # Threads that wait for each other must not spin: on a machine shared with loader workers that costs up to five times.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        usable_streams()
        from odis_path.cli.app import app  # here, so that Ctrl-C while it is imported is answered too

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
