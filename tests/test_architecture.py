"""The house: packages, rooms and floors of ARCHITECTURE.md, held by the imports that stand in the code."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("annotations", "tiling", "odis_path")  # bottom up
MOST_LINES, MOST_FUNCTION_LINES, MOST_MODULES = 420, 60, 12

# Floors of each package, from the ground up. A room imports rooms of its own floor only where no circle closes, and none above.
FLOORS = {
    "annotations": (
        ("errors", "lazy_names"),
        ("objects", "readers.xml.tree", "readers.detect", "readers.slide_context"),
        ("geometry",),
        ("readers", "slide_groups", "class_map", "geojson_writer"),
        ("__init__",),
    ),
    "tiling": (
        ("storage", "grid"),
        ("wsi", "jobs"),
        ("slide_file", "cohort"),
        ("tissue", "boxes"),
        ("tiles", "proposals"),
        ("images",),
        ("__init__",),
    ),
    "odis_path": (
        ("config", "distributed", "tensor_file", "tables", "versions", "figures", "synthetic"),
        ("model", "loss", "data", "checkpoint"),
        ("features",),
        ("evaluation",),
        ("embedding", "exporters", "chain"),
        ("training", "reporting"),
        ("diagnostics", "verification"),
        ("cli",),
        ("__init__", "__main__"),
    ),
}


@cache
def modules() -> dict[str, Path]:
    """Every module of the three packages: dotted name -> file."""
    files = (file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py")))
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imported(module: str) -> Iterator[str]:
    """The modules that one imports anywhere in its text: at the top, inside functions, for types only."""
    for node in ast.walk(tree(modules()[module])):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield from (target for target in _candidates(name) if target in modules() and target != module)


def _candidates(name: str) -> tuple[str, ...]:
    """`a.b.c` may be a module, a package, or a name in module or package a.b."""
    as_module = tuple(target for target in (name, f"{name}.__init__") if target in modules())
    parent = name.rpartition(".")[0]
    return as_module or (parent, f"{parent}.__init__")


def floor_of(module: str) -> int:
    """The floor of a module inside its package, from 0; the longest name in FLOORS that fits it counts."""
    package, _, inside = module.partition(".")
    floors = {room: number for number, rooms in enumerate(FLOORS[package]) for room in rooms}
    fitting = [room for room in floors if inside == room or inside.startswith(f"{room}.")]
    assert fitting, f"{module} stands in no room of FLOORS"
    return floors[max(fitting, key=len)]


@pytest.mark.parametrize("package", PACKAGES)
def test_modules_import_only_from_their_floor_and_below(package: str) -> None:
    upward = []
    for module in modules():
        if module.partition(".")[0] != package:
            continue
        for target in imported(module):
            other = target.partition(".")[0]
            if other != package:
                if PACKAGES.index(other) > PACKAGES.index(package):
                    upward.append(f"{module} imports {target}")
            elif target != f"{package}.__init__" and floor_of(target) > floor_of(module):
                upward.append(f"{module} imports {target}")
    assert not upward


def test_no_imports_run_in_a_circle_between_files() -> None:
    _assert_no_circle({module: {t for t in imported(module) if not t.endswith("__init__")} for module in modules()})


def test_no_imports_run_in_a_circle_between_rooms() -> None:
    graph: dict[str, set[str]] = {}
    for module in modules():
        targets = {_room(target) for target in imported(module) if not target.endswith("__init__")}
        graph.setdefault(_room(module), set()).update(targets - {_room(module)})
    _assert_no_circle(graph)


def _room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def _assert_no_circle(graph: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("imports run in a circle: " + " -> ".join(reversed(error.args[1])))


@pytest.mark.parametrize("package", ["annotations", "tiling"])
def test_the_lower_packages_do_without_torch(package: str) -> None:
    rooms = [name.removesuffix(".__init__") for name in modules() if name.startswith(f"{package}.")]
    code = f"import sys, {', '.join(rooms)}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.strip() == "False", done.stderr


def test_no_folder_is_flat() -> None:
    folders = {file.parent for file in modules().values()}
    counts = {folder: sum(file.name != "__init__.py" for file in folder.glob("*.py")) for folder in folders}
    assert not [f"{folder.relative_to(ROOT)}: {count} modules" for folder, count in counts.items() if count > MOST_MODULES]


def test_files_and_functions_can_be_read_in_one_sitting() -> None:
    long = []
    for module, file in modules().items():
        if (lines := len(file.read_text(encoding="utf-8").splitlines())) > MOST_LINES:
            long.append(f"{module}: {lines} lines")
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                length = node.end_lineno - node.lineno + 1
                if length > MOST_FUNCTION_LINES:
                    long.append(f"{module}.{node.name}: {length} lines")
    assert not long


def test_every_folder_of_the_tests_is_a_room() -> None:
    """tests/ mirrors the house: a folder of tests is named after the room that it tests."""
    rooms = {file.parent.relative_to(ROOT) for file in modules().values()}
    tests = {file.parent.relative_to(ROOT / "tests") for file in (ROOT / "tests").rglob("test_*.py")} - {Path(".")}
    own = {Path("cli"), Path("docs"), Path("examples"), Path("experiments")}  # commands as typed, pages, notebooks, studies
    assert not sorted(str(folder) for folder in tests - rooms - own)
