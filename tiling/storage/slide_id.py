"""Check slide ids: an id names files, so one that is read from a file must not lead outside its folder."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from annotations.errors import UserError
from tiling.storage.paths import file_name, printable

NO_FILE_NAME = re.compile(r"^\.|[/\\\x00-\x1f\x7f\ud800-\udfff]")
LONGEST_ID = 200  # bytes: of the 255 that file systems allow, what is left is for temporary names and locks


def slide_stem(path: Path) -> str:
    """Return the file name without its extension, and without `.ome` before it."""
    stem = Path(file_name(path)).stem
    return stem[:-4] if stem.lower().endswith(".ome") else stem


def default_id(slide: Path) -> str:
    """Derive the default id of a slide: the stem of its path, without characters that a file name may not have."""
    return safe_id(printable(slide_stem(slide))) or "slide"


def safe_id(text: str) -> str:
    """Turn a text into the name of files: no blanks around it, no dot in front, which would hide it, no slashes or line ends.

    What is too long is cut, and ends in eight hex digits that the whole text decides.
    """
    name = NO_FILE_NAME.sub("_", text.lstrip(".").strip())
    if len(name.encode()) <= LONGEST_ID:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name.encode()[: LONGEST_ID - 9].decode(errors='ignore')}_{digest}"


def id_problem(slide_id: str) -> str:
    """Say why a given slide_id is not allowed; empty where it is."""
    if not slide_id.strip():
        return "slide_id is empty: give one"
    if NO_FILE_NAME.search(slide_id):
        letters = " ".join(slide_id.split())
        shown = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in letters)
        return f"slide_id {shown} cannot be a file name: leave out slashes, line ends and a dot in front"
    if (size := len(slide_id.encode())) > LONGEST_ID:
        limit = f"give one of at most {LONGEST_ID} in the column slide_id"
        return f"slide_id {slide_id[:40]}... is {size} bytes long: {limit}"
    return ""


def checked_id(slide_id: str, where: object) -> str:
    """Return a slide_id that stands in the file `where`. Raises UserError, which names both, where it cannot name files."""
    if problem := id_problem(slide_id):
        raise UserError(f"{where}: {problem}")
    return slide_id
