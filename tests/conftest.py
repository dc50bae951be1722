"""Fixtures that every room's tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples every time; HYPOTHESIS_PROFILE=default looks for new ones.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real slides and tile sets; a test that needs it is skipped where it is missing."""
    folder = Path(os.environ.get("ODIS_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "slides").is_dir():
        pytest.skip(f"real test data not found at {folder} (set ODIS_TEST_DATA)")
    return folder
