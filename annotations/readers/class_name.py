"""Class names as programs write them: text, QuPath's {"name": ..., "names": [...]}, and either as JSON inside a text."""

from __future__ import annotations

import ast
import json
from functools import lru_cache
from typing import Any

PACKED = ("{", "[", '"')  # what JSON inside a text begins with
PRINTED = ("{'", "['")  # what a Python dict or list, printed, begins with
MAX_PRINTED = 1 << 16
JOINT = ": "  # between the names of a derived class, as QuPath shows them


def unpacked(value: Any) -> Any:
    """Unpack a text that holds JSON (or a Python dict printed), as geopandas and GDAL write nested fields.

    Anything else is returned as it is, a text that only begins like JSON too.
    """
    for _ in range(2):  # a text that was packed twice is JSON of a text
        if not isinstance(value, str) or not value.lstrip().startswith(PACKED):
            return value
        inside = _parsed(value)
        if not isinstance(inside, dict | list | str) or (isinstance(inside, str) and not inside.lstrip().startswith(PACKED)):
            return value
        value = inside
    return value


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    text = text.strip()
    if not text.startswith(PRINTED) or len(text) > MAX_PRINTED:
        return None
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return None


def class_of(value: Any) -> str | None:
    """Return the class that a value names; derived classes joined; None where it names none."""
    if isinstance(value, str):
        return _class_of_text(value)
    if isinstance(value, dict):
        return _plain(value.get("name")) or joined(value.get("names"))
    return _plain(value)


@lru_cache(maxsize=4096)
def _class_of_text(text: str) -> str | None:
    start = text.lstrip()
    if start.startswith(PACKED):
        inside = unpacked(text)
        if isinstance(inside, dict):
            return class_of(inside)
        if isinstance(inside, list) and all(isinstance(name, str) for name in inside):
            return joined(inside)
    return None if start.rstrip() == "null" else _plain(text)


def joined(names: Any) -> str | None:
    """Return the names of a derived class as one; None where there are none."""
    names = unpacked(names)
    return _plain(JOINT.join(map(str, names)) if isinstance(names, list) else names)


def _plain(value: Any) -> str | None:
    """Return a value as text that can be stored: half a pair of surrogates, which JSON can hold, cannot."""
    if value is None or isinstance(value, dict | list) or value != value:
        return None
    return str(value).encode("utf-8", "replace").decode() or None
