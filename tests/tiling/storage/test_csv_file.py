"""CSV files as people save them: semicolons, tabs, decimal commas, quotes, line ends; one reading for every command."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from annotations.errors import UserError
from odis_path.evaluation.labels import read_labels
from odis_path.evaluation.splits import read_split
from odis_path.exporters.geojson import read_predictions
from tiling import SlideFile, import_images
from tiling.cohort.manifest import read_manifest
from tiling.cohort.scan import scan
from tiling.storage.csv_file import parse_number, parse_whole_number, read_csv_file
from tiling.tiles.run import tile

TABLE = [["slide_id", "path", "patient_id", "mpp"], ["A", "a.tif", "P1", "0,5"], ["B", "b.tif", "P2", "0,25"]]
AS_SAVED = {
    "semicolons": "\n".join(";".join(row) for row in TABLE),
    "tabs": "\n".join("\t".join(row) for row in TABLE),
    "quoted": "\n".join(",".join(f'"{cell}"' for cell in row) for row in TABLE),
    "points": "\n".join(",".join(cell.replace(",", ".") for cell in row) for row in TABLE),
    "hinted": "sep=;\n" + "\n".join(";".join(row) for row in TABLE),
    "blank lines": "\n\n".join(";".join(row) for row in TABLE) + "\n;;;\n\n",
}


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("form", AS_SAVED)
def test_a_manifest_is_read_however_a_spreadsheet_saved_it(form: str, mark: str, line_end: str, tmp_path: Path) -> None:
    if form == "hinted" and line_end == "\r":
        pytest.skip("no program writes the hint so")
    path = tmp_path / "m.csv"
    path.write_bytes((mark + AS_SAVED[form].replace("\n", line_end)).encode())
    slides = [(item.slide_id, item.path.name, item.patient_id, item.mpp) for item in read_manifest(path)]
    assert slides == [("A", "a.tif", "P1", 0.5), ("B", "b.tif", "P2", 0.25)]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("path\na;b.tif\n", "a;b.tif"),
        ("path,patient_id\na;b;c;d.tif,P\n", "a;b;c;d.tif"),
        ('path,patient_id\n"a,b.tif",P\n', "a,b.tif"),
        ("path;patient_id\na,b.tif;P\n", "a,b.tif"),
        ('path;patient_id\n"a;b.tif";P\n', "a;b.tif"),
        ('path,"a;long;column;name"\na;b.tif,x\n', "a;b.tif"),
        ("path,a;long;column;name\na;b.tif,x\n", "a;b.tif"),
        ("path\tpatient_id\na,b;c.tif\tP\n", "a,b;c.tif"),
    ],
)
def test_separators_in_the_name_of_a_slide_stay_part_of_it(text: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text(text)
    (item,) = read_manifest(tmp_path / "m.csv")
    assert item.path.name == name


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("path,mpp\na.tif,0,25\n", "line 2: has 3 values for 2 columns: is there a decimal comma"),
        ("path;mpp\n\na;b.tif;0,25\n", "line 3: has 3 values for 2 columns: is one without quotes?"),
        ("path;mpp\na.tif;0,2,5\n", "line 2: column mpp: 0,2,5: not a number"),
        ("path;mpp\na.tif;1.000,5\n", "line 2: column mpp: 1.000,5: not a number"),
        ("path;mpp;mpp\na.tif;1;2\n", "has the column mpp twice"),
        ("slide;file\na;a.tif\n", "has no column path (found: slide, file)"),
    ],
)
def test_what_cannot_be_read_is_one_line_with_its_place(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(UserError) as raised:
        read_manifest(tmp_path / "m.csv")
    assert str(raised.value).startswith(f"{tmp_path / 'm.csv'}: ")
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_numbers_have_a_point_or_a_comma() -> None:
    assert [parse_number(text) for text in ("0.25", "0,25", " 0,5 ", ",5", "2", "-1,5", "1,5e-1")] == [
        0.25,
        0.25,
        0.5,
        0.5,
        2,
        -1.5,
        0.15,
    ]
    assert [parse_whole_number(text) for text in ("512", "512.0", "512,0", "0", "-3")] == [512, 512, 512, 0, -3]
    for text in ("1,024", "12,345,678", "0,5", "512.5", "inf", "", "x"):
        with pytest.raises(ValueError, match=r"whole number|convert"):
            parse_whole_number(text)


def test_a_manifest_of_semicolons_and_decimal_commas_is_tiled(
    make_slide: Callable[..., Path], picture: np.ndarray, tmp_path: Path
) -> None:
    make_slide(tmp_path / "with, comma; and more.svs", picture, levels=1, mpp=None)
    (tmp_path / "m.tsv").write_text("slide_id\tpath\tmpp\tpatient_id\r\nA\twith, comma; and more.svs\t0,5\tP1\r\n")
    (outcome,) = tile([tmp_path / "m.tsv"], tmp_path / "out", mpp=1.0, size=64, workers=1)
    assert outcome.ok, outcome.message
    with SlideFile(tmp_path / "out" / "A.h5") as file:
        assert (file.mpp_level0, file.patient_id, file.source.name) == (0.5, "P1", "with, comma; and more.svs")


def test_scan_keeps_what_people_wrote_into_a_manifest_saved_with_semicolons(
    make_slide: Callable[..., Path], picture: np.ndarray, tmp_path: Path
) -> None:
    first = make_slide(tmp_path / "cohort" / "a, one.svs", picture, levels=1)
    shutil.copy(first, tmp_path / "cohort" / "b; two.svs")
    manifest = tmp_path / "manifest.csv"
    scan([tmp_path / "cohort"], manifest)
    with manifest.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row, patient, mpp in zip(rows, ("P1", "P2"), ("0,25", "0,5"), strict=True):
        row |= {"patient_id": patient, "mpp": mpp, "mpp_headers": "0,5", "stain": "H;E, restained", "dose": "1,5"}
    with manifest.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=";")
        writer.writeheader()
        writer.writerows(rows)
    for _ in range(2):
        scan([tmp_path / "cohort"], manifest)
        again = [row for _, row in read_csv_file(manifest).rows]
        assert [row["patient_id"] for row in again] == ["P1", "P2"]
        assert [row["mpp"] for row in again] == ["0.25", "0.5"]
        assert [row["mpp_source"] for row in again] == ["manifest", "openslide.mpp-x"]
        assert {row["stain"] for row in again} == {"H;E, restained"}
        assert {row["dose"] for row in again} == {"1,5"}


def test_labels_splits_predictions_and_the_manifest_of_an_import_are_read_alike(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("slide_id;x;y;label;patient_id\r\n\r\nA;512,0;0;tumour, dense;P1\r\nA;0;0;stroma;P1\r\n")
    labels = read_labels(path)
    assert labels.name_of == {("A", 512, 0): "tumour, dense", ("A", 0, 0): "stroma"}
    path.write_text("slide_id;x;y;label\r\n\r\nA;1,024;0;tumour\r\n")
    with pytest.raises(UserError, match=r"labels\.csv: line 3: x '1,024' is not a whole number"):
        read_labels(path)
    path.write_text("slide_id,label\nA,tumour, dense\n")
    with pytest.raises(UserError, match=r"line 2: has 3 values for 2 columns"):
        read_labels(path)
    split = tmp_path / "split.csv"
    split.write_text("slide_id\tsplit\nA\ttrain\nB\ttest\n")
    sides = read_split(split)
    assert (sides.key, sides.side) == ("slide_id", {"A": "train", "B": "test"})
    predictions = tmp_path / "predictions.csv"
    predictions.write_text("slide_id;x;y;object;label;predicted;score a\nS;64;0;-1;a;a;0,75\n")
    assert read_predictions(predictions)["S"].scores == [{"score a": 0.75}]


def test_the_manifest_of_an_import_may_have_semicolons(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "in").mkdir()
    Image.fromarray(np.full((64, 64, 3), 99, np.uint8)).save(tmp_path / "in" / "a;b,c.png")
    (tmp_path / "m.csv").write_text('image;patient_id;mpp\n"a;b,c.png";P7;0,3\n')
    (outcome,) = import_images(tmp_path / "in", tmp_path / "out", manifest=tmp_path / "m.csv")
    assert outcome.ok, outcome.message
    with SlideFile(tmp_path / "out" / "a;b,c.h5") as file:
        assert (file.patient_id, file.mpp) == ("P7", 0.3)
