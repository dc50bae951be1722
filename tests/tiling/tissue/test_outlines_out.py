"""Outlines of the tissue are written like slide files: whole or not at all, and what went wrong is told."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from annotations.errors import UserError
from annotations.geojson_writer import write_geojson
from tiling.jobs.outcome import Outcome
from tiling.storage.atomic import machine
from tiling.tiles.run import tile
from tiling.tissue import outlines_out


def tiled(slides: list[Path], out: Path, outlines: Path) -> list[Outcome]:
    return tile(slides, out, 1.0, 64, workers=1, tissue_out=outlines)


def test_temporary_files_of_killed_runs_are_swept(slide_path: Path, tmp_path: Path) -> None:
    outlines = tmp_path / "outlines"
    outlines.mkdir()
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    (outlines / f".x.geojson.{machine()}-{child.pid}-0.tmp").touch()
    outlines_out._sweep_once.cache_clear()
    assert tiled([slide_path], tmp_path / "out", outlines)[0].ok
    assert [path.name for path in outlines.iterdir()] == ["painted.geojson"]


def test_a_full_disk_is_told_as_such_and_ends_the_run(
    slide_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slides = [tmp_path / f"{i}.svs" for i in range(4)]
    for slide in slides:
        slide.symlink_to(slide_path)
    outlines = tmp_path / "outlines"
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.parent == outlines:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    outcomes = tiled(slides, tmp_path / "out", outlines)
    assert outcomes[0].message.startswith(f"{outlines / '0.geojson'}: cannot be written: No space left on device: make room")
    assert [outcome.message for outcome in outcomes[2:]] == ["not tried: stopped before it"] * 2
    assert list(outlines.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_told_and_nothing_hides_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "open", read_only)
    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(UserError, match=r"a\.geojson: cannot be written: Read-only file system: check the folder"):
        write_geojson(tmp_path / "a.geojson", {})
