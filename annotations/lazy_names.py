"""Names of a package that import their modules on first use."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pkgutil import resolve_name
from typing import Any


def lazy_names(package: str, imports: Mapping[str, str]) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__all__`, `__getattr__` and `__dir__` of a package, so that importing it stays quick.

    imports: module -> the names it has, as behind `import` in an import line: "tile, Slide.open as open_slide".
    """
    home = {}
    for module, names in imports.items():
        for name in names.split(", "):
            path, _, alias = name.partition(" as ")
            home[alias or path] = f"{module}:{path}"

    def import_on_use(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return resolve_name(home[name])

    return sorted(home), import_on_use, lambda: sorted({*home, *vars(sys.modules[package])})
