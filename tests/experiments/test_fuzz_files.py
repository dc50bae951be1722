"""Damaged files of every kind that is read are refused or as they were: the short form of experiments/fuzz_files.py."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def fuzzer() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "experiments" / "fuzz_files.py"))


@pytest.fixture(scope="module")
def kinds(fuzzer: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return list(fuzzer["make_kinds"](tmp_path_factory.mktemp("sound")))


def test_no_damage_ends_in_a_traceback_or_in_other_values(fuzzer: dict[str, Any], kinds: list[Any], tmp_path: Path) -> None:
    wrong, refused = [], 0
    for kind in kinds:
        folder = tmp_path / kind.name.replace(" ", "-")
        folder.mkdir()
        counts = fuzzer["fuzz"](kind, 24, 7, folder)
        wrong += [f"{kind.name}: {what}" for what in counts if what not in fuzzer["FINE"]]
        refused += counts["refused"] if kind.guarded else 0
    assert not wrong
    assert refused > 100
