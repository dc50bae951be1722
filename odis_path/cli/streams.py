"""stdin, stdout and stderr as commands need them: open, and able to print any name."""

from __future__ import annotations

import io
import os
import sys


def usable_streams() -> None:
    """Put /dev/null in place of streams that are closed (`2>&-`), and print as \\xe9 what a terminal has no letter for.

    A descriptor that is left free would be given to the next file that is opened, which then has all messages written
    into it.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        _occupy(descriptor)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if descriptor else "r", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _occupy(descriptor: int) -> None:
    try:
        os.fstat(descriptor)
    except OSError:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, descriptor)  # for worker processes too
        os.set_inheritable(descriptor, True)
        if null != descriptor:
            os.close(null)
