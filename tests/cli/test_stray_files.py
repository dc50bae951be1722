"""A stray .h5 among the files of a cohort: each is a failure by name, the rest is done, the table shown, the exit not zero."""

from __future__ import annotations

import os
from pathlib import Path

import h5py
import pytest

from tests.cli.conftest import Run

STRAYS = {
    "junk": "not a readable HDF5 file",
    "empty": "not a readable HDF5 file",
    "truncated": "not a readable HDF5 file",
    "foreign": "not a slide file",
    "folder": "not a readable HDF5 file",
    "forbidden": "cannot be read",
}


def put_strays(folder: Path, names: list[str]) -> None:
    """Write files that are no slide files beside those of a folder."""
    own = sorted(folder.glob("*.h5"))[0].read_bytes()
    for name in names:
        path = folder / f"{name}.h5"
        if name == "junk":
            path.write_bytes(b"II*\0" + bytes(4000))
        elif name == "empty":
            path.touch()
        elif name == "truncated":
            path.write_bytes(own[: len(own) // 2])
        elif name == "foreign":
            with h5py.File(path, "w") as file:
                file["features"] = [1.0]
        elif name == "folder":
            path.mkdir()
        else:
            path.write_bytes(own)
            path.chmod(0)


@pytest.fixture
def strays(tiles: Path) -> list[str]:
    """What lies among the slide files of `tiles`; root may read everything."""
    names = [name for name in STRAYS if name != "forbidden" or os.geteuid() != 0]
    put_strays(tiles, names)
    return names


@pytest.mark.parametrize("command", ["annotate", "propose", "embed", "export"])
def test_strays_are_rows_of_failures_and_the_rest_is_done(
    run: Run, cohort: Path, tiles: Path, strays: list[str], tmp_path: Path, command: str
) -> None:
    words = {
        "annotate": ["annotate", tiles, "--annotations", cohort / "annotations", "--polygons", "--workers", "1"],
        "propose": ["propose", tiles, "--replace", "--workers", "1"],
        "embed": ["embed", tiles, "--checkpoint", "vit_tiny_patch16_224", "--random-weights", "--out", tmp_path / "out"],
        "export": ["export", tiles, "--to", "geojson", "--out", tmp_path / "out", "--workers", "1"],
    }
    done = run(*words[command])
    text = done.stdout + done.stderr
    assert (done.returncode, "Traceback" in text) == (1, False), text
    lines = done.stdout.splitlines()
    sums = next(lines[i + 2] for i, line in enumerate(lines) if "worker seconds" in line)
    assert [cell.strip() for cell in sums.split("│")[1:4]] == ["4", "0", str(len(strays))], text
    for name in strays:
        assert any(f"{name}.h5" in line and STRAYS[name] in line for line in lines), f"{name} in {text}"
    if command in ("embed", "export"):
        assert len(list((tmp_path / "out").iterdir())) == 4
    if command == "annotate":
        assert "annotated, by class" in done.stdout


def test_one_file_of_any_name_is_still_the_only_slides(run: Run, tiles: Path, cohort: Path, tmp_path: Path) -> None:
    own = sorted(tiles.glob("*.h5"))
    for path in own[1:]:
        path.unlink()
    put_strays(tiles, ["junk", "foreign"])
    drawn = tmp_path / "drawn by hand.geojson"
    drawn.write_bytes((cohort / "annotations" / f"{own[0].stem}.geojson").read_bytes())
    done = run("annotate", tiles, "--annotations", drawn, "--workers", "1", "--polygons")
    assert done.returncode == 1
    note = (
        f"note: {own[0].stem}: drawn by hand.geojson is not named after it, and was taken as the only file for the only slide"
    )
    assert any(line.startswith(note) for line in done.stdout.splitlines()), done.stdout
    assert "annotated, by class" in done.stdout


def test_pretrain_refuses_a_folder_with_a_stray_in_one_line(run: Run, tiles: Path, tmp_path: Path) -> None:
    put_strays(tiles, ["foreign"])
    words = ["pretrain", "demo", "optim.epochs=0.1", f"data.tiles={tiles}", f"run.out={tmp_path / 'run'}"]
    for name in ("foreign", "truncated"):
        if name == "truncated":
            (tiles / "foreign.h5").unlink()
            put_strays(tiles, [name])
        done = run(*words)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {tiles / name}.h5: ")
        assert STRAYS[name] in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_the_report_tells_of_strays_and_is_written(run: Run, tiles: Path, tmp_path: Path) -> None:
    put_strays(tiles, ["junk", "truncated", "empty"])
    done = run("report", tiles, "--out", tmp_path / "r.html")
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    for name in ("junk", "truncated", "empty"):
        assert f"problem: {name}.h5: not a readable HDF5 file" in done.stdout
        assert f"{name}.h5" in (tmp_path / "r.html").read_text()


def test_evaluate_and_export_name_a_stray_among_features(run: Run, tiles: Path, tmp_path: Path) -> None:
    feats = tmp_path / "f"
    assert run("embed", tiles, "--checkpoint", "vit_tiny_patch16_224", "--random-weights", "--out", feats).returncode == 0
    put_strays(feats, ["junk"])
    judged = run("evaluate", feats, "--labels", "annotations", "--probe", "knn", "--out", tmp_path / "e")
    assert judged.returncode == 2
    assert f"error: {feats / 'junk.h5'}: not a readable feature file" in judged.stderr
    assert len(judged.stderr.splitlines()) == 1
    done = run("export", feats, "--to", "geojson", "--out", tmp_path / "g", "--workers", "1")
    assert done.returncode == 1
    assert len(list((tmp_path / "g").iterdir())) == 4
    assert any("junk.h5" in line and STRAYS["junk"] in line for line in done.stdout.splitlines())
