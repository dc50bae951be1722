"""What the docs name exists."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(odis_path(?:\.\w+)+)`", (DOCS / "method.md").read_text()))))
def test_every_function_beside_an_equation_exists(name: str) -> None:
    module, attribute = name.rsplit(".", 1)
    assert callable(getattr(importlib.import_module(module), attribute))


def test_every_test_file_that_the_method_names_exists() -> None:
    files = re.findall(r"`(tests/[\w/]+\.py)`", (DOCS / "method.md").read_text())
    assert len(files) >= 4
    assert all((DOCS.parent / file).is_file() for file in files)
