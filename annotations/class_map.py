"""Map the class names of many programs and people to the few names of a study, by a YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from annotations.errors import UserError, one_line
from annotations.objects import UNCLASSIFIED, ObjectTable


@dataclass(frozen=True)
class ClassMap:
    """The names of a study, and what else programs and people call them.

    labels: the names of the study, in order. names: what else a class may be called, folded -> one of labels.
    strict: a class that is not named is an error. source: what errors call the map.
    """

    labels: tuple[str, ...]
    names: Mapping[str, str]
    strict: bool = False
    source: str = "classes"

    def name(self, text: str) -> str:
        """Return the name of the study; the text itself where it is not named."""
        return self.names.get(_folded(text), text)

    def unknown(self, labels: tuple[str, ...] | list[str]) -> tuple[str, ...]:
        """Return the class names that the map does not name."""
        return tuple(label for label in labels if _folded(label) not in self.names)

    def applied(self, table: ObjectTable) -> ObjectTable:
        """Return a table under the names of the study, in its order, then the classes that it does not name.

        Raises UserError for the latter where the map is strict.
        """
        labels = table.labels
        unknown = self.unknown(labels)
        if unknown and self.strict:
            raise UserError(f"{', '.join(unknown)}: not named in {self.source}: add them there, or leave out --strict-classes")
        names = {self.name(text) for text in labels}
        kept = (*(name for name in self.labels if name in names), *dict.fromkeys(unknown))
        to = np.array([*(kept.index(self.name(text)) for text in labels), UNCLASSIFIED], dtype=np.int16)
        return replace(table, labels=kept, label=to[table.label], log=table.log.with_class_names(self.name))


def read_classmap(path: Path, *, strict: bool = False) -> ClassMap:
    """Read a YAML of the study's names, each with what else it is called: `Tumour: [tumor, TUM]`, or one name, or nothing.

    Case and blanks around a name do not count. Numbers are read as text (HoVer-Net's classes are numbers).
    Raises UserError where the file is missing or of another form, and where a name belongs to two labels.
    """
    import yaml

    try:
        document: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}: check --classes") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not YAML: {one_line(error)[:200]}") from None
    if not isinstance(document, dict) or not document:
        raise UserError(f"{path}: no class names: write lines such as  Tumour: [tumor, TUM]")
    names: dict[str, str] = {}
    labels = []
    for key, value in document.items():
        label = _text(key, path)
        labels.append(label)
        for alias in [label, *(value if isinstance(value, list) else [] if value is None else [value])]:
            folded = _folded(_text(alias, path))
            if names.setdefault(folded, label) != label:
                raise UserError(f"{path}: {alias} stands under {names[folded]} and {label}: leave it under one")
    return ClassMap(tuple(labels), names, strict, str(path))


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()


def _text(value: Any, path: Path) -> str:
    # YAML reads an unquoted No as false, and a class of that name would be lost.
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise UserError(f"{path}: {value!r} is no class name: put names in quotes, in a list behind the label")
    return " ".join(str(value).split())
