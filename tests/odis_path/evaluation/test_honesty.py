"""What a reader must be told: whom the encoder has seen, what was done to features, what in tables is not what it seems."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from annotations.errors import UserError
from odis_path.evaluation.run import evaluate
from odis_path.features.pretraining import FILE, Pretraining, Slide, kept_in_checkpoint, read_note
from tests.odis_path.evaluation.conftest import Cohort


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take most of the time, and are tested elsewhere."""
    monkeypatch.setattr("odis_path.evaluation.write.draw_figures", lambda *_: None)


def run(feats: Path, out: Path, **options: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"labels": "annotations", "probe": "knn", "folds": 3, "out": out, "level": "tile"}
    return evaluate(feats, **{**values, **options})


def note_into(folder: Path, note: str) -> None:
    for path in folder.glob("*.h5"):
        with h5py.File(path, "r+") as file:
            file["features"].attrs["pretraining"] = note


@pytest.fixture
def feats(cohort: Cohort, tmp_path: Path) -> Path:
    """A copy of the good features that a test may change."""
    return Path(shutil.copytree(cohort.good, tmp_path / "feats"))


def trained_on(*patients: str, out: tuple[str, ...] = (), base: str = "") -> Pretraining:
    slides = [Slide(f"s{p[1:]}", p, "train", True) for p in patients] + [Slide(f"s{p[1:]}", p, "test", False) for p in out]
    return Pretraining("run", "run/checkpoint-7.pt", base=base, slides=tuple(slides))


# --- 1. whom the encoder has seen


def test_it_is_said_how_many_tested_patients_the_encoder_was_pretrained_on(feats: Path, tmp_path: Path) -> None:
    pretraining = trained_on("p0", "p1", "p2", "p3", out=("p4", "p5"))
    pretraining.write(feats)
    note_into(feats, pretraining.note())
    results = run(feats, tmp_path / "out")
    seen = results["pretraining"]
    assert (seen["known"], seen["tested"], seen["seen"], seen["held_out"], seen["unit"]) == (True, 6, 4, 2, "patients")
    assert [f["tested"] for f in seen["per_fold"]] == [2, 2, 2]
    rows = list(csv.DictReader((tmp_path / "out" / "predictions.csv").open()))
    for fold in seen["per_fold"]:
        there = {row["patient_id"] for row in rows if int(row["fold"]) in fold["fold"]}
        assert fold["seen"] == len(there & {"p0", "p1", "p2", "p3"})
    assert any("pretrained on 4 of the 6 tested patients" in w and "--split auto" in w for w in results["warnings"])


def test_split_auto_judges_the_patients_that_the_run_held_out(feats: Path, tmp_path: Path) -> None:
    pretraining = trained_on("p0", "p1", "p2", out=("p4", "p5"))
    pretraining.write(feats)
    note_into(feats, pretraining.note())
    results = run(feats, tmp_path / "out", split="auto")
    rows = list(csv.DictReader((tmp_path / "out" / "predictions.csv").open()))
    assert {row["patient_id"] for row in rows} == {"p4", "p5"}
    assert results["pretraining"]["in_words"] == "the encoder was pretrained on 0 of the 2 tested patients"
    assert not any("too high" in w for w in results["warnings"])
    assert any("s3" in w for w in results["warnings"]), "a slide that the run did not have is told"


def test_what_cannot_be_known_is_said_and_split_auto_needs_it(feats: Path, tmp_path: Path) -> None:
    assert "not known" in run(feats, tmp_path / "a")["pretraining"]["in_words"]
    with pytest.raises(UserError, match="--split auto: the run's split is not known"):
        run(feats, tmp_path / "b", split="auto")
    pretraining = trained_on("p0", "p1", "p2", "p3", "p4", "p5")
    pretraining.write(feats)
    note_into(feats, pretraining.note())
    with pytest.raises(UserError, match="held no patient out"):
        run(feats, tmp_path / "b", split="auto")
    (feats / FILE).write_text("slide_id,patient_id,split,seen\n")
    seen = run(feats, tmp_path / "c")["pretraining"]
    assert (seen["known"], seen["seen"]) == (False, None)
    assert "changed" in seen["why"]
    note_into(feats, Pretraining("none", "x").note())
    assert "untrained" in run(feats, tmp_path / "d")["pretraining"]["in_words"]
    note_into(feats, "{torn")
    assert "cannot be read" in run(feats, tmp_path / "f")["pretraining"]["in_words"]
    note_into(feats, Pretraining("unknown", "hub", "ask its authors").note())
    assert "ask its authors" in run(feats, tmp_path / "e")["pretraining"]["in_words"]


def test_patients_are_compared_by_slide_where_they_have_no_name_or_another(feats: Path, tmp_path: Path) -> None:
    pretraining = trained_on("p0", "p1", out=("p5",))
    pretraining.write(feats)
    note_into(feats, pretraining.note())
    labels = tmp_path / "labels.csv"
    labels.write_text("slide_id,label,patient_id\n" + "".join(f"s{i},{'ab'[i % 2]},q{i}\n" for i in range(6)))
    assert run(feats, tmp_path / "a", labels=labels)["pretraining"]["seen"] == 2, "their slides are the same"
    for path in feats.glob("*.h5"):
        with h5py.File(path, "r+") as file:
            file.attrs["patient_id"] = ""
    overlap = run(feats, tmp_path / "b", groups="slide_id")["pretraining"]
    assert (overlap["unit"], overlap["tested"], overlap["seen"]) == ("slides", 6, 2)


def test_near_equal_patients_of_the_pretraining_are_told(feats: Path, tmp_path: Path) -> None:
    pretraining = Pretraining("run", "x", slides=(Slide("other", "P00", "train", True),))
    pretraining.write(feats)
    note_into(feats, pretraining.note())
    results = run(feats, tmp_path / "out")
    assert results["pretraining"]["seen"] == 0
    assert any("P00 and p0" in w for w in results["warnings"])


def test_each_baselines_encoder_has_its_own_count(cohort: Cohort, feats: Path, tmp_path: Path) -> None:
    pretraining = trained_on("p0", base="hub-model.pth")
    pretraining.write(feats)
    note_into(feats, pretraining.note())
    results = run(cohort.noise, tmp_path / "out", baseline={"other": feats})
    assert results["baselines"]["other"]["pretraining"]["seen"] == 1
    assert "began from hub-model.pth" in results["baselines"]["other"]["pretraining"]["in_words"]
    assert not results["pretraining"]["known"]


def test_older_feature_files_are_looked_up_in_the_run_folder(feats: Path, tmp_path: Path) -> None:
    """They name their checkpoint only; the run folder has the split.csv."""
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    (run_folder / "split.csv").write_text("slide_id,patient_id,split\ns0,p0,train\ns1,p1,test\n")
    (run_folder / "checkpoint-7.pt").write_bytes(b"x")
    for path in feats.glob("*.h5"):
        with h5py.File(path, "r+") as file:
            file["features"].attrs["parameters"] = json.dumps({"checkpoint": f"{run_folder}/checkpoint-7.pt:1:2"})
    assert run(feats, tmp_path / "a")["pretraining"]["seen"] == 1
    shutil.move(run_folder, tmp_path / "gone")
    assert "gone or changed" in run(feats, tmp_path / "b")["pretraining"]["why"]


def test_weights_that_a_run_began_from_count_too(tmp_path: Path) -> None:
    import torch

    data = {"pretrained_on": {"slides": [["a", "p0", "train", True], ["b", "p1", "test", False]], "base": "timm"}}
    torch.save({"format": "odis-path-checkpoint", "data": data}, tmp_path / "first.pt")
    slides = [Slide("a", "p0", "test", False), Slide("c", "p2", "train", True)]
    kept = kept_in_checkpoint(slides, str(tmp_path / "first.pt"))
    assert kept == {"slides": [["a", "p0", "test", True], ["c", "p2", "train", True]], "base": "timm"}
    assert kept_in_checkpoint(slides, "timm")["base"] == "timm"
    assert kept_in_checkpoint(slides, None)["base"] == ""
    torch.save({"format": "odis-path-checkpoint", "data": {"pretrained_on": kept}}, tmp_path / "second.pt")
    pretraining = read_note("", tmp_path, f"{tmp_path}/second.pt:1:2")
    assert pretraining.kind == "unknown", "an older feature file is answered by the run folder only"


# --- 2. one preprocessing for all


@pytest.mark.parametrize("method", ["none", "zscore", "whiten", "centre-slide"])
@pytest.mark.parametrize("probe", ["knn", "prototype", "retrieval"])
def test_the_model_and_every_baseline_get_the_same(cohort: Cohort, tmp_path: Path, probe: str, method: str) -> None:
    results = run(cohort.good, tmp_path, probe=probe, standardise=method, baseline={"noise": cohort.noise}, k=[5])
    assert results["standardise"]["chosen"] == method
    assert {name: values["standardise"] for name, values in results["baselines"].items()} == {
        "majority": None,
        "rgb_mean": method,
        "texture": method,
        "noise": method,
    }
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert {row["standardise"] for row in rows if row["what"] in ("model", "texture", "noise")} == {method}
    assert any("slide's own rows" in w for w in results["warnings"]) == (method == "centre-slide")


def test_auto_chooses_for_each_by_the_same_rule(cohort: Cohort, tmp_path: Path) -> None:
    results = run(cohort.good, tmp_path)
    assert results["standardise"]["asked"] == "auto"
    assert set(results["standardise"]["inner_scores"]) == {"none", "zscore", "whiten"}
    best = max(results["standardise"]["inner_scores"].values())
    assert results["standardise"]["inner_scores"][results["standardise"]["chosen"]] > best - 0.1
    assert results["baselines"]["texture"]["standardise"] in ("none", "zscore", "whiten")


def test_the_linear_probe_standardises_in_any_case(cohort: Cohort, tmp_path: Path) -> None:
    a, b = (run(cohort.good, tmp_path / method, probe="linear", standardise=method) for method in ("auto", "none"))
    assert a["standardise"]["chosen"] == b["standardise"]["chosen"] == "zscore"
    assert a["headline"] == b["headline"]
    assert any("all the same" in w for w in b["warnings"])
    assert run(cohort.good, tmp_path / "w", probe="linear", standardise="whiten")["standardise"]["chosen"] == "whiten"


def test_a_shift_of_each_slide_is_taken_out_by_centring(feats: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for path in feats.glob("*.h5"):
        with h5py.File(path, "r+") as file:
            file["features"][...] = file["features"][...] + 6 * rng.normal(size=8).astype("float16")
            del file["features"].attrs["crc32"]  # changed on purpose
    plain, centred = (run(feats, tmp_path / method, standardise=method) for method in ("none", "centre-slide"))
    gain = centred["headline"]["balanced_accuracy"]["point"] - plain["headline"]["balanced_accuracy"]["point"]
    assert gain > 0.2


def test_centring_that_leaves_nothing_is_refused(cohort: Cohort, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text("slide_id,x,y,label\n" + "".join(f"s{i},0,0,{'ab'[i % 2]}\n" for i in range(6)))
    with pytest.raises(UserError, match="one judged row"):
        run(cohort.good, tmp_path / "out", labels=labels, standardise="centre-slide")
    with pytest.raises(UserError, match="--standardise minmax"):
        run(cohort.good, tmp_path / "out", standardise="minmax")


# --- 3. tables that are not what they seem


def csv_of(path: Path, header: str, lines: list[str]) -> Path:
    path.write_text(header + "\n" + "".join(line + "\n" for line in lines))
    return path


def test_words_for_a_missing_label_are_left_out_and_told(cohort: Cohort, tmp_path: Path) -> None:
    lines = [f"s{i},{'ab'[i % 2]}" for i in range(4)] + ["s4,nan", "s5,NA"]
    results = run(cohort.good, tmp_path / "out", labels=csv_of(tmp_path / "l.csv", "slide_id,label", lines))
    assert results["labels"] == ["a", "b"]
    assert any("NA (1), nan (1)" in w for w in results["warnings"])


def test_classes_that_differ_in_case_only_are_told(cohort: Cohort, tmp_path: Path) -> None:
    lines = [f"s{i},{('Tumor', 'tumor', 'stroma')[i % 3]}" for i in range(6)]
    results = run(cohort.good, tmp_path / "out", labels=csv_of(tmp_path / "l.csv", "slide_id,label", lines))
    assert results["labels"] == ["Tumor", "stroma", "tumor"]
    assert any("Tumor and tumor" in w for w in results["warnings"])


def test_near_equal_and_missing_patients_are_told(cohort: Cohort, tmp_path: Path) -> None:
    patients = ["P01", "p1", "q2", "nan", "q4", "q5"]
    lines = [f"s{i},{'ab'[i % 2]},{patients[i]}" for i in range(6)]
    labels = csv_of(tmp_path / "l.csv", "slide_id,label,patient_id", lines)
    results = run(cohort.good, tmp_path / "out", labels=labels)
    assert any("P01 and p1" in w for w in results["warnings"])
    assert any("patient_id of 1 slides is a word for none" in w and "s3" in w for w in results["warnings"])
    rows = list(csv.DictReader((tmp_path / "out" / "predictions.csv").open()))
    assert {row["patient_id"] for row in rows if row["slide_id"] == "s3"} == {"p3"}, "its file's patient is taken"


def test_a_patient_called_nan_in_the_files_is_not_known(feats: Path, tmp_path: Path) -> None:
    for name in ("s1", "s2"):
        with h5py.File(feats / f"{name}.h5", "r+") as file:
            file.attrs["patient_id"] = "nan"
    with pytest.raises(UserError, match="no patient_id for 2 slides"):
        run(feats, tmp_path / "out")
    results = run(feats, tmp_path / "out", groups="slide_id")
    assert any("s1, s2" in w and "not known" in w for w in results["warnings"])


def test_a_slide_without_a_site_is_told(cohort: Cohort, tmp_path: Path) -> None:
    lines = [f"s{i},{'ab'[i % 2]},{'' if i == 5 else f'x{i // 2}'}" for i in range(6)]
    labels = csv_of(tmp_path / "l.csv", "slide_id,label,site", lines)
    results = run(cohort.good, tmp_path / "out", labels=labels, probe="retrieval", k=[3])
    assert "other sites" not in results["retrieval"]
    assert any("1 slides have no site (s5)" in w for w in results["warnings"])


def test_a_split_whose_own_patients_are_on_two_sides_is_refused(cohort: Cohort, tmp_path: Path) -> None:
    """Its slides are of several patients in the feature files, so that these would not tell."""
    lines = ["s0,same,train", "s1,b,train", "s2,same,test", "s3,d,test"]
    split = csv_of(tmp_path / "split.csv", "slide_id,patient_id,split", lines)
    with pytest.raises(UserError, match="patients on two sides: same"):
        run(cohort.good, tmp_path / "out", split=split)


def test_files_of_another_width_are_named_in_one_line(feats: Path, tmp_path: Path) -> None:
    with h5py.File(feats / "s4.h5", "r+") as file:
        attrs = dict(file["features"].attrs)
        del file["features"]
        file.create_dataset("features", data=np.ones((16, 5), "f2")).attrs.update(attrs)
    options = ["--labels", "annotations", "--probe", "knn", "--level", "tile", "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-m", "odis_path", "evaluate", str(feats), *options], capture_output=True, text=True)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "s4.h5: its embeddings are 5 wide, but 8 in s0.h5" in done.stderr


def test_a_result_of_another_encoder_is_kept_unless_told(cohort: Cohort, tmp_path: Path) -> None:
    run(cohort.good, tmp_path)
    before = (tmp_path / "results.json").read_text()
    with pytest.raises(UserError, match=r"is of another encoder, good, not noise.*--overwrite"):
        run(cohort.noise, tmp_path)
    assert (tmp_path / "results.json").read_text() == before
    assert run(cohort.noise, tmp_path, overwrite=True)["encoder"] == "noise"


# --- 4. intervals


def test_a_class_of_one_patient_is_flagged_and_has_no_interval(cohort: Cohort, tmp_path: Path) -> None:
    lines = [f"s{i},{32 * x},0,{'rare' if (i, x) == (2, 0) else 'ab'[x % 2]}" for i in range(6) for x in range(4)]
    labels = csv_of(tmp_path / "l.csv", "slide_id,x,y,label", lines)
    results = run(cohort.good, tmp_path / "out", labels=labels)
    assert results["headline"]["balanced_accuracy"]["low"] is None
    assert "one patient alone has the class rare" in results["headline"]["balanced_accuracy"]["why"]
    assert results["headline"]["accuracy"]["low"] is not None
    rare = next(row for row in results["per_class"] if row["label"] == "rare")
    assert (rare["groups"], rare["recall_interval"]["low"]) == (1, None)
    assert "one patient" in rare["no_interval"]
    assert any("judged on one group alone: rare" in w for w in results["warnings"])
    rows = list(csv.DictReader((tmp_path / "out" / "table.csv").open()))
    assert next(row for row in rows if row["what"] == "model, class rare")["no_interval"]
    assert next(row for row in rows if row["what"] == "model, class a")["low"]


def test_patients_of_one_class_are_sampled_within_it(cohort: Cohort, tmp_path: Path) -> None:
    lines = [f"s{i},{'ab'[i % 2]}" for i in range(6)]
    results = run(cohort.good, tmp_path / "out", labels=csv_of(tmp_path / "l.csv", "slide_id,label", lines))
    assert "within their class" in results["settings"]["interval"]
    assert results["settings"]["samples_lacking_a_class"] == 0
