"""A manifest that people filled in is not lost where scan writes it again."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from annotations.errors import UserError
from tiling.cohort.manifest import read_manifest
from tiling.cohort.scan import COLUMNS, scan


def rows_of(manifest: Path) -> dict[str, dict[str, str]]:
    with manifest.open(newline="") as file:
        return {Path(row["path"]).as_posix(): row for row in csv.DictReader(file)}


@pytest.fixture
def cohort(make_slide: Callable[..., Path], picture: np.ndarray, tmp_path: Path) -> Path:
    """Slides a and b at 0.5 mpp, and one without mpp."""
    folder = tmp_path / "cohort"
    first = make_slide(folder / "a.svs", picture, levels=1)
    shutil.copy(first, folder / "b.svs")
    make_slide(folder / "silent.svs", picture, levels=1, mpp=None)
    return folder


def filled_in(manifest: Path, cohort: Path) -> dict[str, dict[str, str]]:
    """What a person adds: patients, a name, an mpp, a column; and in the way of a spreadsheet, no other."""
    rows = rows_of(manifest)
    rows[str(cohort / "a.svs")] |= {"patient_id": "P1", "slide_id": "first", "mpp": "0.25", "stain": "HE"}
    rows[str(cohort / "silent.svs")] |= {"patient_id": "P3", "mpp": "0.4"}
    with manifest.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, "stain"], restval="")
        writer.writeheader()
        writer.writerows(rows.values())
    return rows


def test_what_people_filled_in_stays(cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = tmp_path / "manifest.csv"
    scan([cohort], manifest)
    assert "keep" not in capsys.readouterr().err
    filled_in(manifest, cohort)
    for _ in range(2):
        outcomes = scan([cohort], manifest)
        assert f"{manifest}: 3 of 3 slides were in it and keep slide_id, patient_id" in capsys.readouterr().err
        rows = rows_of(manifest)
        a, b, silent = (rows[str(cohort / f"{name}.svs")] for name in ("a", "b", "silent"))
        wanted = ("slide_id", "patient_id", "mpp", "mpp_source", "stain")
        assert [a[name] for name in wanted] == ["first", "P1", "0.25", "manifest", "HE"]
        assert [b[name] for name in wanted] == ["b", "", "0.5", "openslide.mpp-x", ""]
        assert [silent[name] for name in wanted] == ["silent", "P3", "0.4", "manifest", ""]
        assert a["problem"] == "mpp 0.25 is the manifest's: the slide itself says 0.5"
        assert (silent["problem"], a["width_l0"]) == ("", "1024")
        assert [outcome.info["will_fail"] for outcome in outcomes] == [0, 0, 0]
    assert [(item.slide_id, item.patient_id, item.mpp) for item in read_manifest(manifest)] == [
        ("first", "P1", 0.25),
        ("b", "", 0.5),
        ("silent", "P3", 0.4),
    ]


def test_an_mpp_that_scan_wrote_itself_is_not_kept_for_a_slide_that_says_another_now(
    cohort: Path, tmp_path: Path, make_slide: Callable[..., Path], picture: np.ndarray
) -> None:
    manifest = tmp_path / "manifest.csv"
    scan([cohort], manifest)
    filled_in(manifest, cohort)
    for name in ("a", "b", "silent"):
        make_slide(cohort / f"{name}.svs", picture, levels=1, mpp=0.3)
    for _ in range(2):
        scan([cohort], manifest)
        rows = rows_of(manifest)
        mpps = [[rows[str(cohort / f"{name}.svs")][key] for key in ("mpp", "mpp_source")] for name in ("a", "b", "silent")]
        assert mpps == [["0.25", "manifest"], ["0.3", "openslide.mpp-x"], ["0.4", "manifest"]]


def test_rows_of_other_slides_are_kept_beside_it_each_time(cohort: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.csv"
    for name in ("a", "b", "a"):
        scan([cohort / f"{name}.svs"], manifest)
    kept = [tmp_path / f"manifest.csv.before{end}" for end in ("", "2")]
    assert [list(rows_of(path)) for path in kept] == [[str(cohort / "a.svs")], [str(cohort / "b.svs")]]


def test_a_slide_that_cannot_be_read_for_now_keeps_its_row(cohort: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.csv"
    scan([cohort], manifest)
    filled_in(manifest, cohort)
    whole = (cohort / "a.svs").read_bytes()
    (cohort / "a.svs").write_bytes(b"broken")
    scan([cohort], manifest)
    (cohort / "a.svs").write_bytes(whole)
    scan([cohort], manifest)
    a = rows_of(manifest)[str(cohort / "a.svs")]
    assert [a[name] for name in ("slide_id", "patient_id", "mpp", "stain", "readable")] == ["first", "P1", "0.25", "HE", "true"]


def test_an_id_that_was_given_is_made_way_for(cohort: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("path,slide_id\ncohort/a.svs,b\n")  # the name that b.svs would have; and a name b.svs had alone
    scan([cohort], manifest)
    assert [item.slide_id for item in read_manifest(manifest)] == ["b", "cohort_b", "silent"]
    (cohort / "more").mkdir()
    shutil.copy(cohort / "a.svs", cohort / "more" / "silent.svs")
    scan([cohort], manifest)
    assert [item.slide_id for item in read_manifest(manifest)] == ["b", "cohort_b", "more_silent", "silent"]


def test_rows_of_other_slides_are_set_aside(cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = tmp_path / "manifest.csv"
    scan([cohort], manifest)
    filled_in(manifest, cohort)
    before = manifest.read_bytes()
    scan([cohort / "a.svs"], manifest)
    aside = tmp_path / "manifest.csv.before"
    assert f"2 rows of other slides are left out of it and stay in {aside}" in capsys.readouterr().err
    assert aside.read_bytes() == before
    assert list(rows_of(manifest)) == [str(cohort / "a.svs")]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"slide,label\na,1\n", "has no column path (found: slide, label)"),
        (b"II*\0\xff\xfe", "line 1: is not UTF-8"),
        (b"path,mpp\na.svs,0,5\n", "line 2: has 3 values for 2 columns"),
        (b"path,mpp\na.svs,half\n", "line 2: column mpp: half: not a number"),
    ],
)
def test_what_is_no_manifest_is_not_written_over(cohort: Path, tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "m.csv").write_bytes(content)
    with pytest.raises(UserError) as error:
        scan([cohort], tmp_path / "m.csv")
    assert str(error.value).startswith(f"{tmp_path / 'm.csv'}: {says}")
    assert str(error.value).endswith("scan does not write over it: put it right, or give another --out")
    assert (tmp_path / "m.csv").read_bytes() == content


def test_an_empty_file_is_written_over(cohort: Path, tmp_path: Path) -> None:
    (tmp_path / "m.csv").touch()
    scan([cohort], tmp_path / "m.csv")
    assert len(rows_of(tmp_path / "m.csv")) == 3
