"""The whole command: files, honesty, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from annotations.errors import UserError
from odis_path.evaluation.run import evaluate
from tests.odis_path.evaluation.conftest import CLASSES, Cohort, write_cohort

KEYS = {
    "format",
    "probe",
    "level",
    "mode",
    "encoder",
    "labels",
    "n",
    "n_patients",
    "groups",
    "split",
    "headline",
    "baselines",
    "confusion",
    "per_class",
    "warnings",
    "settings",
    "data_sha256",
    "software",
}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    """One object in each tile, all with a class."""
    return write_cohort(tmp_path_factory.mktemp("plain"), plain=True)


def run(cohort: Cohort, out: Path, **options: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"labels": "annotations", "probe": "knn", "bootstrap": 50, "folds": 3, "out": out}
    return evaluate(cohort.good, **{**values, **options})


@pytest.mark.parametrize("probe", ["knn", "linear", "prototype", "retrieval"])
def test_every_probe_writes_a_whole_result(cohort: Cohort, tmp_path: Path, probe: str) -> None:
    results = run(cohort, tmp_path, probe=probe, level="tile", baseline={"noise": cohort.noise})
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert set(results) >= KEYS
    assert results["n"] == 96
    assert results["n_patients"] == 6
    assert results["labels"] == list(CLASSES)
    score = results["headline"]["balanced_accuracy"]
    assert score["low"] <= score["point"] <= score["high"]
    assert score["point"] > 0.7
    assert set(results["baselines"]) == {"majority", "rgb_mean", "texture", "noise"}
    assert results["baselines"]["majority"]["balanced_accuracy"]["point"] == pytest.approx(1 / 3)
    noise = results["baselines"]["noise"]
    assert noise["difference"]["point"] == pytest.approx(score["point"] - noise["balanced_accuracy"]["point"])
    assert noise["difference"]["low"] > 0
    assert np.sum(results["confusion"]) == pytest.approx(96, abs=0.1)
    figures = {"confusion.png", "roc.png"} | {
        "knn": {"k_curve.png"},
        "linear": {"c_curve.png"},
        "prototype": {"shots.png"},
    }.get(probe, set())
    assert {p.name for p in tmp_path.iterdir()} == {"results.json", "predictions.csv", "table.csv", *figures}
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 97


def test_predictions_agree_with_the_headline(cohort: Cohort, tmp_path: Path) -> None:
    results = run(cohort, tmp_path, level="tile")
    rows = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    recall = [np.mean([r["predicted"] == c for r in rows if r["label"] == c]) for c in CLASSES]
    assert results["headline"]["balanced_accuracy"]["point"] == pytest.approx(np.mean(recall))
    folds = {(r["patient_id"], r["fold"]) for r in rows}
    assert len(folds) == 6, "a patient is in two folds"
    assert sum(recall["n"] for recall in results["per_class"]) == 96
    assert set(results["per_k"]) == {"1", "5", "10", "20", "50"}
    assert results["chosen_k"] in (1, 5, 10, 20, 50)
    assert results["split"] == "3-fold by patient_id"
    assert results["headline"]["auroc"]["point"] > 0.8


def test_the_same_seed_gives_the_same_result(cohort: Cohort, tmp_path: Path) -> None:
    first, second = (run(cohort, tmp_path / name, level="object") for name in "ab")
    assert first == second


def test_objects_are_judged_once_beside_the_size_of_their_box(cohort: Cohort, tmp_path: Path) -> None:
    results = run(cohort, tmp_path, level="object")
    assert results["level"] == "object"
    assert set(results["baselines"]) == {"majority", "rgb_mean", "texture", "box_size"}
    assert results["baselines"]["rgb_mean"]["balanced_accuracy"]["point"] > 0.9, "the tiles differ in brightness"
    assert results["baselines"]["box_size"]["balanced_accuracy"]["point"] < 0.6, "all boxes are of one size"


def test_a_given_split_is_kept(cohort: Cohort, tmp_path: Path) -> None:
    split = tmp_path / "split.csv"
    split.write_text("patient_id,split\np0,train\np1,train\np2,val\np3,test\np4,test\n")
    results = run(cohort, tmp_path / "out", level="tile", split=split)
    rows = list(csv.DictReader((tmp_path / "out" / "predictions.csv").open()))
    assert {r["patient_id"] for r in rows} == {"p3", "p4"}
    assert results["split"] == str(split)
    assert any("p5" in warning for warning in results["warnings"]), "a patient left out is told"


def test_retrieval_with_a_split_asks_the_other_sides_only(cohort: Cohort, tmp_path: Path) -> None:
    split = tmp_path / "split.csv"
    split.write_text("slide_id,split\ns0,train\ns1,train\ns2,test\n")
    results = run(cohort, tmp_path / "out", level="tile", split=split, probe="retrieval", k=[1, 10])
    assert results["n"] == 16
    assert set(results["retrieval"]) == {"other groups", "same slide"}
    assert results["headline"]["precision@10"]["low"] is None, "one patient has no interval"


def test_missing_pixels_are_said(cohort: Cohort, tmp_path: Path) -> None:
    from shutil import copytree

    import h5py

    gone = Cohort(cohort.tiles, Path(copytree(cohort.good, tmp_path / "good")), cohort.noise)
    for path in gone.good.glob("*.h5"):
        with h5py.File(path, "r+") as file:
            file.attrs["source"] = str(tmp_path / "gone.h5")
    results = run(gone, tmp_path / "out", level="tile")
    assert set(results["baselines"]) == {"majority"}
    assert any("gone.h5" in warning for warning in results["warnings"])


def test_labels_of_slides_tiles_and_sites_from_a_csv(cohort: Cohort, tmp_path: Path) -> None:
    slides = tmp_path / "slides.csv"
    slides.write_text("slide_id,label,patient_id,site\n" + "".join(f"s{i},{'ab'[i % 2]},q{i},x{i // 2}\n" for i in range(6)))
    results = run(cohort, tmp_path / "a", labels=slides, probe="retrieval", k=[3])
    assert (results["level"], results["n"]) == ("tile", 96)
    assert "other sites" in results["retrieval"]
    assert any("another patient_id" in warning for warning in results["warnings"])
    tiles = tmp_path / "tiles.csv"
    tiles.write_text("slide_id;x;y;label\n" + "".join(f"s{i};{32 * x};0;{'ab'[x % 2]}\n" for i in range(6) for x in range(4)))
    results = run(cohort, tmp_path / "b", labels=tiles, max_rows=20)
    assert (results["level"], results["n"]) == ("tile", 20)
    assert any("--max-rows" in warning for warning in results["warnings"])


BAD = {
    "no such file": ("nowhere.csv", None, {}, "nowhere.csv: no such file"),
    "no label column": ("l.csv", "slide_id,klass\ns0,a\n", {}, "no column label"),
    "one class": ("l.csv", "slide_id,label\ns0,a\ns1,a\n", {}, "two classes"),
    "unknown slides": ("l.csv", "slide_id,label\nt0,a\nt1,b\n", {}, "none of its slides"),
    "two labels": ("l.csv", "slide_id,label\ns0,a\ns0,b\n", {}, "line 3"),
    "no number": ("l.csv", "slide_id,x,y,label\ns0,one,0,a\n", {}, "x 'one'"),
    "x alone": ("l.csv", "slide_id,x,label\ns0,1,a\n", {}, "without the other"),
    "one patient": ("l.csv", "slide_id,x,y,label\ns0,0,0,a\ns0,32,0,b\n", {}, "only one patient"),
    "two patients": ("l.csv", "slide_id,label,patient_id\ns0,a,p\ns0,a,q\n", {}, "two values of patient_id"),
    "probe": ("annotations", None, {"probe": "svm"}, "--probe svm"),
    "groups": ("annotations", None, {"groups": "site"}, "--groups site"),
    "level": ("annotations", None, {"level": "cell"}, "--level cell"),
    "slides without labels": ("annotations", None, {"level": "slide"}, "slide"),
    "k": ("annotations", None, {"k": [0]}, "--k 0"),
    "folds": ("annotations", None, {"folds": 1}, "--folds 1"),
    "weights": ("annotations", None, {"weights": "uniform"}, "--weights uniform"),
    "baseline name": ("annotations", None, {"baseline": {"texture": Path("x")}}, "--baseline texture"),
    "baseline folder": ("annotations", None, {"baseline": {"x": Path("nowhere")}}, "nowhere"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_what_would_void_a_result_is_one_line(cohort: Cohort, tmp_path: Path, name: str) -> None:
    labels, text, options, expected = BAD[name]
    if text is not None:
        (tmp_path / labels).write_text(text)
    given = labels if labels == "annotations" else tmp_path / labels
    with pytest.raises(UserError, match=expected) as error:
        run(cohort, tmp_path / "out", labels=given, **options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_patient_on_two_sides_is_named(cohort: Cohort, tmp_path: Path) -> None:
    labels, split = tmp_path / "labels.csv", tmp_path / "split.csv"
    labels.write_text("slide_id,label,patient_id\n" + "".join(f"s{i},{'ab'[i % 2]},q{i // 2}\n" for i in range(6)))
    split.write_text("slide_id,split\ns0,train\ns1,test\ns2,train\ns3,train\n")
    for groups in ("patient_id", "slide_id", "none"):
        with pytest.raises(UserError, match="q0"):
            run(cohort, tmp_path / "out", labels=labels, split=split, groups=groups)


def test_unknown_patients_need_a_word(cohort: Cohort, tmp_path: Path) -> None:
    from shutil import copytree

    import h5py

    bare = Cohort(cohort.tiles, Path(copytree(cohort.good, tmp_path / "good")), cohort.noise)
    with h5py.File(bare.good / "s3.h5", "r+") as file:
        file.attrs["patient_id"] = ""
    with pytest.raises(UserError, match=r"s3.*--groups slide_id"):
        run(bare, tmp_path / "out", level="tile")
    results = run(bare, tmp_path / "out", level="tile", groups="slide_id")
    assert (results["groups"], results["n_patients"]) == ("slide_id", 5)
    assert any("--groups slide_id" in warning for warning in results["warnings"])
    results = run(bare, tmp_path / "out", level="tile", groups="none")
    assert "patients not kept apart" in results["split"]


def test_the_command_prints_a_table(cohort: Cohort, tmp_path: Path) -> None:
    import typer
    from typer.testing import CliRunner

    from odis_path.cli.evaluate import register

    app = typer.Typer()
    register(app)
    arguments = [
        str(cohort.good),
        "--labels",
        "annotations",
        "--probe",
        "knn",
        "--k",
        "1,3",
        "--level",
        "tile",
        "--out",
        str(tmp_path / "out"),
        "--baseline",
        f"random={cohort.noise}",
    ]
    done = CliRunner().invoke(app, arguments, terminal_width=200)
    assert done.exit_code == 0, done.output
    for word in ("majority", "random", "texture", str(tmp_path / "out")):
        assert word in done.output.replace("\n", "")
    for wrong in (["--k", "a"], ["--baseline", "folder"], ["--baseline", "a=b", "--baseline", "a=c"]):
        assert isinstance(CliRunner().invoke(app, [*arguments, *wrong]).exception, UserError)
