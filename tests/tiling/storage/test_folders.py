"""A folder appears under its name when it is complete, and not before; what killed writers left of one is swept up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from annotations.errors import UserError
from tiling.storage.atomic import atomic_folder
from tiling.storage.locks import sweep

KILLED = """
import os, signal, sys
from pathlib import Path
from tiling.storage.atomic import atomic_folder
with atomic_folder(Path(sys.argv[1])) as folder:
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a.txt").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def fill(final: Path, text: str) -> None:
    with atomic_folder(final) as folder:
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "a.txt").write_text(text)
        assert not final.exists() or (final / "deep" / "a.txt").read_text() != text


def test_a_folder_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    for text in ("old", "new"):
        fill(tmp_path / "store", text)
        assert (tmp_path / "store" / "deep" / "a.txt").read_text() == text
        assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_writer_that_fails_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "store", "old")
    with pytest.raises(UnicodeEncodeError):
        fill(tmp_path / "store", "\udfff")
    rename, calls = os.rename, []

    def second_fails(*names: Path) -> None:
        calls.append(names)
        if len(calls) == 2:
            raise PermissionError(13, "Permission denied")
        rename(*names)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(UserError, match="store: cannot be written: Permission denied"):
        fill(tmp_path / "store", "new")
    assert (tmp_path / "store" / "deep" / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_half_a_folder_of_a_killed_writer_is_swept(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "store")], check=False)
    assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"]
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []
