"""Nobody is judged by a model that saw the same patient."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from annotations.errors import UserError
from odis_path.evaluation.splits import (
    CrossValidation,
    OuterFold,
    check_cross_validation,
    cross_validation,
    given_split,
    group_codes,
    read_split,
)
from odis_path.tables import alike, is_missing, read_csv


@pytest.mark.parametrize(("patients", "folds"), [(2, 5), (3, 3), (5, 2), (13, 5), (40, 5)])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_patient_is_on_both_sides_of_any_round(patients: int, folds: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    group, y = rng.permutation(np.arange(300) % patients), rng.integers(0, 3, 300)
    cv = cross_validation(y, group, folds, seed, "patient_id")
    check_cross_validation(cv, group)
    for outer in cv.outer_folds:
        test = set(group[cv.rows(outer.test)])
        assert not test & set(group[cv.rows(outer.train)])
        for val, train in outer.inner:
            assert not set(group[cv.rows(val)]) & set(group[cv.rows(train)])
            assert not test & set(group[cv.rows(val + train)])
    predictions = np.concatenate([cv.rows(outer.test) for outer in cv.outer_folds])
    assert sorted(predictions.tolist()) == list(range(300)), "every row is judged once"


def test_few_rows_per_class_and_single_rows_can_be_split() -> None:
    y = np.arange(6) // 2
    check_cross_validation(cross_validation(y, np.arange(6), 5, 0, "none"), np.arange(6))
    cv = cross_validation(y, np.arange(6), 5, 0, "none")
    assert "patients not kept apart" in cv.name


def test_one_patient_or_one_fold_is_refused() -> None:
    with pytest.raises(UserError, match="only one patient"):
        cross_validation(np.array([0, 1]), np.zeros(2, int), 5, 0, "patient_id")
    with pytest.raises(UserError, match="--folds 1"):
        cross_validation(np.array([0, 1]), np.arange(2), 1, 0, "patient_id")


def test_a_leaking_plan_is_noticed() -> None:
    with pytest.raises(ValueError, match="two folds"):
        check_cross_validation(CrossValidation(np.array([0, 1]), (), ""), np.array([7, 7]))
    with pytest.raises(ValueError, match="trains on rows it tests"):
        check_cross_validation(CrossValidation(np.array([0, 1]), (OuterFold((0,), (0, 1), ()),), ""), np.array([7, 8]))
    with pytest.raises(ValueError, match="trains on rows it tests"):
        check_cross_validation(
            CrossValidation(np.array([0, 1]), (OuterFold((0,), (1,), (((0,), (1,)),)),), ""), np.array([7, 8])
        )


IDS = np.array(["p0", "p0", "p1", "p2", "p3", "p4"], dtype=object)
SLIDES = np.array(["a", "b", "c", "d", "e", "f"], dtype=object)
Y = np.array([0, 1, 0, 1, 0, 1])


def split(tmp_path: Path, text: str) -> CrossValidation:
    path = tmp_path / "split.csv"
    path.write_text(text)
    group = np.unique(IDS, return_inverse=True)[1]
    cv = given_split(read_split(path), Y, group, IDS, SLIDES, 0)
    check_cross_validation(cv, group)
    return cv


def test_the_given_split_is_honoured(tmp_path: Path) -> None:
    cv = split(tmp_path, "patient_id,split\np0,train\np1,train\np2,val\np3,test\n")
    (outer,) = cv.outer_folds
    assert cv.rows(outer.test).tolist() == [4]
    assert cv.rows(outer.train).tolist() == [0, 1, 2]
    assert cv.rows(outer.inner[0][0]).tolist() == [3]
    assert cv.fold[5] == -1
    assert "p4" in cv.warnings[0]


def test_without_val_the_choice_is_made_within_train(tmp_path: Path) -> None:
    cv = split(tmp_path, "slide_id,patient_id,split\na,p0,train\nb,p0,train\nc,p1,train\nd,p2,train\ne,p3,test\nf,p4,test\n")
    (outer,) = cv.outer_folds
    assert cv.rows(outer.test).tolist() == [4, 5]
    assert len(outer.inner) == 3
    assert sorted(np.concatenate([cv.rows(val) for val, _ in outer.inner]).tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("slide_id,split\na,train\nb,test\n", "patients on two sides: p0"),
        ("patient_id,split\np0,train\np0,test\n", "two sides: p0"),
        ("slide_id,patient_id,split\na,q7,train\nc,q7,test\n", "patients on two sides: q7"),
        ("slide_id,patient_id,split\nelse,q8,val\na,p0,train\nwhere,q8,test\n", "patients on two sides: q8"),
        ("slide_id,patient_id,split\na,p0,train\na,p1,train\n", "slide a is of patients p0 and p1"),
        ("patient_id,split\np0,train\np1,dev\n", "'dev'"),
        ("patient,split\np0,train\n", "its columns are patient, split"),
        ("patient_id,split\np0,train\n", "side test"),
        ("patient_id,split\nq0,train\nq1,test\n", "side train"),
        ("patient_id,split\n", "no rows"),
    ],
)
def test_a_split_that_leaks_or_lacks_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        split(tmp_path, text)
    assert "\n" not in str(error.value)
    assert "split.csv" in str(error.value)


def test_groups_need_to_be_known() -> None:
    slide, patient = np.array(["a", "b"], object), np.array(["p", ""], object)
    with pytest.raises(UserError, match=r"folder: no patient_id for 1 slides \(b\).*--groups slide_id"):
        group_codes("patient_id", patient, slide, "folder")
    assert group_codes("slide_id", patient, slide, "folder").tolist() == [0, 1]
    assert group_codes("none", patient, slide, "folder").tolist() == [0, 1]
    with pytest.raises(UserError, match="--groups site"):
        group_codes("site", patient, slide, "folder")


def test_near_equal_patients_of_a_split_are_told(tmp_path: Path) -> None:
    path = tmp_path / "split.csv"
    path.write_text("slide_id,patient_id,split\na,P01,train\nb,p1,test\nc,nan,train\nd,nan,test\n")
    split = read_split(path)
    assert "P01 and p1" in split.warnings[0]
    assert split.patient_of == {"a": "P01", "b": "p1"}, "nan is no patient, and so on no two sides"


def test_what_may_be_one_thing() -> None:
    ids = ["P01", "p1", "P-01", "1-12", "11-2", "7", "7.0", "007", "TCGA-AA-0001", "tcga_aa_1", "x"]
    assert alike(ids, ids=True) == [["007", "7", "7.0"], ["P-01", "P01", "p1"], ["TCGA-AA-0001", "tcga_aa_1"]]
    assert alike(["Tumor", "tumor", "HER2+", "HER2-", "1", "01", "non tumor", "Non-Tumor"]) == [
        ["Non-Tumor", "non tumor"],
        ["Tumor", "tumor"],
    ]
    assert [word for word in ("nan", "NA", "N/A", "#N/A", "<NA>", "null", "", "banana", "0", "NAT1") if is_missing(word)] == [
        "nan",
        "NA",
        "N/A",
        "#N/A",
        "<NA>",
        "null",
        "",
    ]


def test_a_csv_of_excel_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("\ufeffslide_id;label\r\n 007 ;a\r\n".encode())
    assert read_csv(path) == [{"slide_id": "007", "label": "a"}]
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        read_csv(path)
