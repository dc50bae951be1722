"""Names of slides that are odd, equal, dead or linked: each is tiled or told in a row of its own, and stops nobody."""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path

import pytest

from annotations.errors import UserError
from tiling.boxes.match_files import annotation_files
from tiling.cohort.find_slides import find_slides
from tiling.cohort.manifest import SlideItem, read_manifest
from tiling.cohort.scan import scan
from tiling.images.listing import find_images
from tiling.jobs.outcome import Outcome
from tiling.storage.paths import parse_path
from tiling.storage.slide_id import LONGEST_ID, default_id, safe_id
from tiling.tiles.run import tile

OPTIONS = {"mpp": 1.0, "size": 64, "workers": 1}
LATIN = os.fsdecode(b"caf\xe9.svs")


def touched(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def ids(*inputs: Path | str, below: Path) -> dict[str, str]:
    return {os.path.relpath(item.path, below): item.slide_id for item in find_slides(inputs)}


def by_name(outcomes: list[Outcome]) -> dict[str, str]:
    return {outcome.item: outcome.message if not outcome.ok else "" for outcome in outcomes}


def rows_of(manifest: Path) -> list[dict[str, str]]:
    with manifest.open(newline="") as file:
        return list(csv.DictReader(file))


# --- not UTF-8


def test_a_name_that_is_not_utf8_is_one_row_that_says_so(slide_path: Path, tmp_path: Path) -> None:
    cohort = tmp_path / "cohort"
    for name in ("A.svs", LATIN, os.fsdecode(b"d\xe9/B.svs")):
        (cohort / name).parent.mkdir(exist_ok=True)
        shutil.copy(slide_path, cohort / name)
    scanned = by_name(scan([cohort], tmp_path / "m.csv"))
    assert scanned["A"] == ""
    assert scanned["caf_xe9"].startswith(f"{cohort}/caf\\xe9.svs (file name is not UTF-8: rename it)")
    assert scanned["B"].startswith(f"{cohort}/d\\xe9/B.svs (folder name is not UTF-8: rename it)")
    assert [row["readable"] for row in rows_of(tmp_path / "m.csv")] == ["true", "false", "false"]
    for slides in (cohort, tmp_path / "m.csv"):
        assert by_name(tile([slides], tmp_path / "out", **OPTIONS)) == scanned
    assert [path.name for path in (tmp_path / "out").glob("*.h5")] == ["A.h5"]


# --- a tilde in front


def test_names_with_a_tilde_are_names_and_only_homes_are_homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    touched(tmp_path, "~$lock.svs", "~nobody-of-this-name/a.png", "~$b.geojson", "home/x.svs")
    monkeypatch.chdir(tmp_path)
    assert parse_path("~/x.svs") == tmp_path / "home" / "x.svs"
    assert parse_path("~") == tmp_path / "home"
    assert [item.path for item in find_slides(["~$lock.svs", "~/x.svs"])] == [Path("~$lock.svs"), tmp_path / "home" / "x.svs"]
    assert [item.path.name for item in find_images("~nobody-of-this-name")] == ["a.png"]
    assert annotation_files("~$b.geojson") == [tmp_path / "~$b.geojson"]


# --- equal names


def test_equal_names_in_one_folder_and_in_others_are_told_apart(tmp_path: Path) -> None:
    touched(tmp_path, "a/S.svs", "a/S.tif", "b/S.svs", "T.svs", " T.svs")
    slide_ids = ids(tmp_path / "a", tmp_path / "b", below=tmp_path)
    assert slide_ids == {"a/S.svs": "a_S_svs", "a/S.tif": "a_S_tif", "b/S.svs": "b_S_svs"}
    assert ids(tmp_path / "a" / "S.svs", tmp_path / "b" / "S.svs", below=tmp_path) == {"a/S.svs": "a_S", "b/S.svs": "b_S"}
    same = ids(tmp_path / "T.svs", tmp_path / " T.svs", below=tmp_path)
    assert len(set(same.values())) == 2
    assert all(slide_id.startswith("T_") for slide_id in same.values())


def test_a_name_with_a_folder_in_front_may_be_that_of_another(tmp_path: Path) -> None:
    touched(tmp_path, "a/S.svs", "b/S.svs", "c/a_S.svs")
    slide_ids = ids(tmp_path, below=tmp_path)
    assert slide_ids["c/a_S.svs"] == "a_S"
    assert len(set(slide_ids.values())) == 3


# --- names that no file of ours can have


def test_ids_are_such_as_manifests_take(slide_path: Path, tmp_path: Path) -> None:
    cohort = touched(tmp_path / "cohort")
    names = ["back\\slash.svs", "new\nline.svs", "a\ttab.svs", f"{'n' * 230}.svs", " lead.svs", "trail .svs", "A.svs"]
    cohort.mkdir()
    for name in names:
        shutil.copy(slide_path, cohort / name)
    assert not any(by_name(scan([cohort], tmp_path / "m.csv")).values())
    items = read_manifest(tmp_path / "m.csv")
    assert {item.path.name for item in items} == set(names)
    assert {item.path.name: item.slide_id for item in find_slides([cohort])} == {i.path.name: i.slide_id for i in items}
    assert all(outcome.ok for outcome in tile([tmp_path / "m.csv"], tmp_path / "out", **OPTIONS))
    assert len(list((tmp_path / "out").glob("*.h5"))) == len(names)


@pytest.mark.parametrize("text", ["a", "a b", "..a", " a\n", "a/b\\c\td", "ä" * 150, "x" * 300, "", "."])
def test_a_safe_id_can_be_a_file_name_and_stays_itself(text: str) -> None:
    made = safe_id(text)
    assert safe_id(made) == made == made.strip()
    assert not set(made) & set("/\\\t\n")
    assert not made.startswith(".")
    assert len(made.encode()) <= LONGEST_ID
    assert default_id(Path("/x/.svs")) == "svs"


def test_blanks_around_a_path_are_its_own_only_where_there_is_such_a_file(tmp_path: Path) -> None:
    touched(tmp_path, " lead.svs", "plain.svs")
    (tmp_path / "m.csv").write_text("path,slide_id\n lead.svs,a\n plain.svs ,b\n gone.svs,c\n")
    assert [item.path.name for item in read_manifest(tmp_path / "m.csv")] == [" lead.svs", "plain.svs", "gone.svs"]


# --- links


def test_dead_links_are_rows_and_linked_folders_are_looked_into_once(slide_path: Path, tmp_path: Path) -> None:
    cohort, other = tmp_path / "cohort", tmp_path / "other"
    for folder in (cohort / "sub", other):
        folder.mkdir(parents=True)
        shutil.copy(slide_path, folder / f"{folder.name}.svs")
    links = {
        "dead.svs": "nowhere.svs",
        "loop.svs": "loop.svs",
        "linked": other,
        "again": other,
        "self": ".",
        "up": "..",
        "asub": "sub",
        "sub/back": "..",
    }
    for name, target in links.items():
        (cohort / name).symlink_to(target)
    slide_ids = {os.path.relpath(item.path, cohort) for item in find_slides([cohort, cohort / "linked", other])}
    assert slide_ids == {"again/other.svs", "dead.svs", "loop.svs", "sub/sub.svs"}
    problems = by_name(scan([cohort], tmp_path / "m.csv"))
    assert {name for name, problem in problems.items() if problem} == {"dead", "loop"}
    assert problems["dead"] == f"{cohort / 'dead.svs'}: is a link to nowhere.svs, which leads to no file: mend the link"
    assert [row["readable"] for row in rows_of(tmp_path / "m.csv")].count("false") == 2


def test_a_folder_below_that_may_not_be_looked_into_is_told_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    touched(tmp_path, "a.svs", "secret/b.svs")
    scandir = os.scandir

    def guarded(path: Path) -> object:
        if Path(path).name == "secret":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("tiling.cohort.find_slides.os.scandir", guarded)
    assert ids(tmp_path, below=tmp_path) == {"a.svs": "a"}
    assert capsys.readouterr().err == f"{tmp_path / 'secret'}: left out: cannot be looked into: Permission denied\n"
    with pytest.raises(UserError, match="secret: cannot be looked into: Permission denied"):
        find_slides([tmp_path / "secret"])


# --- manifests as spreadsheets leave them


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("path,mpp\nA.svs,0.5\nB.svs,1,5\n", "line 3: has 3 values for 2 columns: is there a decimal comma"),
        ("path,mpp,,\nA.svs,1,5,\n", "line 2: has 4 values for 2 columns"),
        ("path,mpp,path\nA.svs,1,B.svs\n", "has the column path twice"),
        ("path,mpp\n,0.5\n", "line 2: column path is empty"),
        ("path,mpp\n,\n", "lists no slide"),
    ],
)
def test_rows_that_would_be_read_wrongly_are_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(UserError) as error:
        read_manifest(tmp_path / "m.csv")
    assert str(error.value).startswith(f"{tmp_path / 'm.csv'}: {says}")


def test_blank_rows_and_columns_are_none(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text(",path , mpp,,\n0,A.svs,0.5,,\n,,,,\n1,B.svs\n , ,,,\n,,\n")
    assert read_manifest(tmp_path / "m.csv") == [
        SlideItem(tmp_path / "A.svs", "A", "", 0.5),
        SlideItem(tmp_path / "B.svs", "B"),
    ]
