"""The pages about the code: every path and dotted name in them exists, and the tree has every room."""

from __future__ import annotations

import ast
import inspect
import re
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest

import odis_path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("annotations", "tiling", "odis_path")
ABOUT_THE_CODE = (
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "docs/method.md",
    "docs/training.md",
    *(path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("docs/adr/*.md"))),
)
ALL_PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "experiments/*.md", "configs/*.yaml")
    for path in ROOT.glob(pattern)
)
PATH = re.compile(r"(?<![\w./<>-])[\w.-]+(?:/[\w.-]+)*\.py\b")
FOLDER = re.compile(r"(?<![\w./-])(?:annotations|tiling|odis_path|tests|docs)/(?:[a-z_]+/)*(?![\w.-])")
NAME = re.compile(rf"(?<![\w./-])(?:{'|'.join(PACKAGES)})(?:\.[A-Za-z_]\w*)+(?![\w/-])")


def resolved(name: str) -> Any:
    """The object of a dotted name; of a public name of a package what the package gives, not a folder of that name."""
    package, _, rest = name.partition(".")
    public = getattr(import_module(package), "__all__", [])
    return getattr(import_module(package), rest) if rest in public else resolve_name(name)


def code_of(page: str) -> str:
    """The code of a page: between backticks, and in fenced blocks."""
    text = (ROOT / page).read_text(encoding="utf-8")
    fenced = re.findall(r"^```.*?^```", text, flags=re.DOTALL | re.MULTILINE)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    return "\n".join([*fenced, *spans])


@pytest.mark.parametrize("page", ABOUT_THE_CODE)
def test_every_python_file_and_folder_of_a_page_exists(page: str) -> None:
    code = re.sub(r"^```.*?^```", "", code_of(page), flags=re.DOTALL | re.MULTILINE)  # the tree has a test of its own
    paths = {*PATH.findall(code), *FOLDER.findall(code)}
    assert sorted(path for path in paths if not (ROOT / path).exists()) == []


@pytest.mark.parametrize("page", [page for page in ALL_PAGES if page.endswith(".md")])
def test_every_dotted_name_of_a_page_can_be_imported(page: str) -> None:
    missing = []
    for name in sorted(set(NAME.findall(code_of(page)))):
        try:
            resolved(name)
        except (ImportError, AttributeError):
            if not list((ROOT / "experiments/results").glob(name)):  # annotations.json is a file of results
                missing.append(name)
    assert missing == []


@pytest.mark.parametrize("page", ALL_PAGES)
def test_no_page_or_recipe_names_a_test_or_module_that_is_not_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    paths = set(re.findall(r"(?<![\w./-])(?:annotations|tiling|odis_path|tests|experiments|docs)/[\w/-]+\.py\b", text))
    assert sorted(path for path in paths if not (ROOT / path).is_file()) == []


def test_the_patterns_catch_what_they_are_for() -> None:
    assert PATH.findall("tiling/wsi/mpp.py and loop.py, not a.pyc") == ["tiling/wsi/mpp.py", "loop.py"]
    assert FOLDER.findall("tests/tiling/wsi/ and tiling/wsi/mpp.py") == ["tests/tiling/wsi/"]
    assert NAME.findall("tiling.grid.plan_grid, odis_path/a.py, data.tiles=x") == ["tiling.grid.plan_grid"]
    names = NAME.findall(code_of("ARCHITECTURE.md"))
    assert len(names) > 40
    assert len(NAME.findall(code_of("docs/method.md"))) > 20


def test_the_tree_of_the_architecture_has_every_room_and_no_other() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    tree = re.search(r"^```\n(annotations/.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    assert tree
    rooms, above = set(), [""]
    for line in tree[1].splitlines():
        indent, name = re.match(r"( *)([a-z_]+/)", line).groups()  # type: ignore[union-attr]
        above[len(indent) // 2 :] = [name]
        rooms.add("".join(above))
    packaged = {
        f"{file.parent.relative_to(ROOT).as_posix()}/" for top in PACKAGES for file in (ROOT / top).rglob("__init__.py")
    }
    assert {room for room in rooms if room.partition("/")[0] in PACKAGES} == packaged
    assert all((ROOT / room).is_dir() for room in rooms)


def test_the_reference_has_every_public_name() -> None:
    documented = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs/reference.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(set(odis_path.__all__) - {name.removeprefix("odis_path.") for name in documented}) == []
    for name in documented:
        resolved(name)


def test_python_on_a_page_imports_and_calls_what_there_is() -> None:
    for page in ALL_PAGES:
        for block in re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PACKAGES:
                    for alias in node.names:
                        resolved(f"{node.module}.{alias.name}")
                if isinstance(node, ast.Call) and ast.unparse(node.func).removeprefix("op.") in odis_path.__all__:
                    signature = inspect.signature(getattr(odis_path, ast.unparse(node.func).removeprefix("op.")))
                    signature.bind(*node.args, **{str(word.arg): word.value for word in node.keywords})


def test_every_function_beside_an_equation_can_be_called() -> None:
    names = NAME.findall(code_of("docs/method.md"))
    assert names
    assert [name for name in names if not callable(resolved(name))] == []


def test_the_method_names_the_tests_that_compare_it() -> None:
    files = re.findall(r"`(tests/[\w/]+\.py)`", (ROOT / "docs/method.md").read_text(encoding="utf-8"))
    assert len(files) >= 4
