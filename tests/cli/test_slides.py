"""The commands scan, tile and propose as a user types them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from annotations.errors import UserError
from odis_path.cli.slides import register
from tiling.slide_file.read import SlideFile
from tiling.wsi.backends.tiff_direct import DirectReader
from tiling.wsi.slide import Slide


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)
    register(app)
    return app


def run(app: typer.Typer, *words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_scan_then_tile_the_manifest_then_propose(app: typer.Typer, slide_path: Path, tmp_path: Path) -> None:
    manifest, out = tmp_path / "manifest.csv", tmp_path / "out"
    code, printed = run(app, "scan", slide_path, "--out", manifest)
    assert (code, f"output: {manifest}" in printed) == (0, True)
    code, printed = run(app, "tile", manifest, "--out", out, "--mag", 10, "--size", 96, "--workers", 1)
    assert (code, f"output: {out}" in printed) == (0, True)
    with SlideFile(out / "painted.h5") as file:
        assert (file.mpp, file.patch_size) == (1.0, 96)
    code, printed = run(app, "propose", out, "--workers", 1)
    assert (code, f"output: {out}" in printed) == (0, True)
    with SlideFile(out / "painted.h5") as file:
        assert file.has_boxes
        assert np.isfinite(file.boxes_table()["xyxy"]).all()


def test_a_bad_slide_makes_the_exit_code_1_and_a_line(app: typer.Typer, slide_path: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.svs"
    broken.write_bytes(b"IJrE" * 40)
    for words in (("scan", "--out", tmp_path / "m.csv"), ("tile", "--out", tmp_path / "out", "--mpp", 1, "--workers", 1)):
        code, printed = run(app, words[0], slide_path, broken, *words[1:])
        assert code == 1
        lines = [line for line in printed.splitlines() if "not a readable slide" in line]
        assert len(lines) == 1
        assert str(broken) in lines[0]
    assert (tmp_path / "out" / "painted.h5").is_file()


def test_the_resolution_is_given_once(app: typer.Typer, slide_path: Path, tmp_path: Path) -> None:
    for words in ((), ("--mpp", 1, "--mag", 10), ("--mag", -10)):
        with pytest.raises(UserError, match="--mag"):
            run(app, "tile", slide_path, "--out", tmp_path, *words)


@pytest.mark.parametrize(
    ("words", "stored"),
    [
        (("SLIDE",), "jpeg"),
        (("SLIDE", "--no-pixels"), "none"),
        (("--no-pixels", "SLIDE"), "none"),
        (("--pixels", "copy", "SLIDE"), "copy"),
        (("SLIDE", "--pixels", "copy"), "copy"),
        (("--pixels=copy", "SLIDE"), "copy"),
        (("--pixels", "jpeg", "SLIDE"), "jpeg"),
        (("SLIDE", "--pixels", "copy", "--no-pixels"), "none"),
        (("--pixels", "none", "--", "SLIDE"), "none"),
    ],
)
def test_pixels_are_stored_coded_or_copied_or_not_at_all(
    app: typer.Typer, slide_path: Path, tmp_path: Path, words: tuple, stored: str
) -> None:
    given = [slide_path if word == "SLIDE" else word for word in words]
    options = ("--out", tmp_path, "--mpp", 0.5, "--size", 256, "--tissue", "none", "--workers", 1)
    assert run(app, "tile", *options, *given)[0] == 0
    with Slide.open(slide_path, reader="direct") as slide, SlideFile(tmp_path / "painted.h5") as file:
        assert isinstance(slide.reader, DirectReader)
        own = slide.reader.tile_bytes(0, 1, 2)
        assert len(file) == 12
        storage = "none" if not file.has_pixels else "copy" if file.tile_bytes(6) == own else "jpeg"
    assert storage == stored


def test_another_value_of_pixels_is_one_line(app: typer.Typer, slide_path: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--pixels png: is one of none, jpeg, copy"):
        run(app, "tile", slide_path, "--out", tmp_path, "--mpp", 1, "--pixels=png")


def test_unknown_flags_and_missing_paths(app: typer.Typer, tmp_path: Path) -> None:
    assert run(app, "tile", tmp_path, "--out", tmp_path, "--bogus")[0] == 2
    assert run(app, "tile")[0] == 2
    with pytest.raises(UserError, match="no such file or folder"):
        run(app, "scan", tmp_path / "gone", "--out", tmp_path / "m.csv")
    with pytest.raises(UserError, match="no such folder"):
        run(app, "propose", tmp_path / "gone")


def test_the_module_of_commands_loads_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "h5py", "tiling.tiles.run")
    code = f"import runpy, sys; runpy.run_path('odis_path/cli/slides.py'); print([m for m in {heavy} if m in sys.modules])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True)
    assert done.stdout.strip() == "[]"
