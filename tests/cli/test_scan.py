"""`scan` as users run it, over and over, on folders as they are."""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path

from tests.cli.conftest import Run
from tests.cli.test_bad_input import leftovers, refused


def test_an_odd_folder_is_scanned_filled_in_scanned_again_and_tiled(run: Run, cohort: Path, tmp_path: Path) -> None:
    slide, *_ = sorted((cohort / "slides").iterdir())
    slides, manifest, out = tmp_path / "slides", tmp_path / "manifest.csv", tmp_path / "out"
    good = ["a/S.svs", "b/S.svs", " lead.svs", "back\\slash.svs", "~$lock.svs"]
    for name in [*good, os.fsdecode(b"caf\xe9.svs")]:
        (slides / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(slide, slides / name)
    (slides / "dead.svs").symlink_to("nowhere")
    message = refused(run("scan", slides, "--out", manifest), "caf\\xe9.svs", "file name is not UTF-8: rename it")
    assert "leads to no file" in message
    with manifest.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["readable"] for row in rows].count("true") == len(good)
    with manifest.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "stain"])
        writer.writeheader()
        writer.writerows(row | {"patient_id": f"P{i}", "stain": "HE"} for i, row in enumerate(rows))
    refused(run("scan", slides, "--out", manifest), "7 of 7 slides were in it and keep slide_id, patient_id")
    with manifest.open(newline="") as file:
        again = list(csv.DictReader(file))
    assert again == [row | {"patient_id": f"P{i}", "stain": "HE"} for i, row in enumerate(rows)]
    tile = ["--out", out, "--mpp", "1", "--size", "64", "--workers", "1"]
    for given in (manifest, slides):
        refused(run("tile", given, *tile), "caf\\xe9.svs", "file name is not UTF-8: rename it")
        assert len(list(out.glob("*.h5"))) == len(good)
    assert leftovers(tmp_path) == []


def test_a_name_of_nobody_with_a_tilde_is_told_in_one_line(run: Run, tmp_path: Path) -> None:
    assert len(refused(run("scan", "~$gone.svs", "--out", tmp_path / "m.csv"), "~$gone.svs: no such file").splitlines()) == 1


def test_a_file_that_is_no_manifest_is_not_written_over(run: Run, cohort: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text("slide_id,label\na,1\n")
    refused(run("scan", cohort / "slides", "--out", labels), "labels.csv: has no column path", "does not write over it")
    assert labels.read_text() == "slide_id,label\na,1\n"
