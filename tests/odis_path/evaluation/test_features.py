"""Feature files: what other readers see, what is kept when a level is added, what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest

from annotations.errors import UserError
from odis_path.features import write as featurefile
from odis_path.features.read import levels_in, read_features, read_slides_parquet
from odis_path.features.write import embedded_already, write_features
from tests.odis_path.evaluation.conftest import CLASSES, Cohort
from tiling.slide_file.read import SlideFile


@pytest.fixture
def folder(cohort: Cohort, tmp_path: Path) -> Path:
    """A copy of the good features that a test may spoil."""
    return Path(shutil.copytree(cohort.good, tmp_path / "feats"))


def test_the_readers_of_clam_and_trident_open_it(cohort: Cohort) -> None:
    with h5py.File(cohort.good / "s0.h5", "r") as file:
        features, coords = file["features"][:], file["coords"][:]
        assert features.shape == (16, 8)
        assert features.dtype == np.float16
        assert coords.shape == (16, 2)
        assert file["coords"].attrs["patch_size_level0"] == 32
        assert file["coords"].attrs["patch_size"] == 32
        assert file["coords"].attrs["name"] == "s0"
        assert dict(file["features"].attrs).items() >= {"encoder": "good", "name": "s0", "mode": "full"}.items()
        assert file.attrs["format"] == "odis-path-features"
        assert file["object_features"].shape[0] == file["boxes/xyxy"].shape[0] == 17
    assert set(pq.read_table(cohort.good / "slides.parquet").column_names) == {
        "slide_id",
        "patient_id",
        "n_tiles",
        "encoder",
        "mode",
        "features",
    }


def test_a_folder_is_read_as_one_table(cohort: Cohort) -> None:
    tiles, objects = read_features(cohort.good, "tile"), read_features(cohort.good, "object")
    assert (tiles.x.shape, objects.x.shape) == ((96, 8), (102, 8))
    assert tiles.x.dtype == np.float32
    assert tiles.slide_id[16] == "s1"
    assert tiles.patient_id[-1] == "p5"
    assert tiles.coords[5].tolist() == [32, 32]
    assert tiles.labels == CLASSES
    assert tiles.label[:3].tolist() == [0, 1, 2]
    assert objects.object[14:17].tolist() == [14, 14, 15]
    assert objects.tile[14:17].tolist() == [14, 15, 15]
    assert objects.label[14:17].tolist() == [2, 2, -1]
    assert objects.xyxy[0].tolist() == [2, 2, 30, 30]
    slides = read_features(cohort.good, "slide")
    assert slides.x.shape == (6, 8)
    assert slides.sources["s3"] == cohort.tiles / "s3.h5"
    assert levels_in(cohort.good) == ["tile", "object", "slide"]


def test_select_reads_some_rows(cohort: Cohort) -> None:
    whole = read_features(cohort.good, "tile")
    rows = np.array([3, 17, 18, 95])
    selected = read_features(cohort.good, "tile", lambda index: rows)
    assert np.array_equal(selected.x, whole.x[rows])
    assert selected.slide_id.tolist() == ["s0", "s1", "s1", "s5"]


def test_a_choice_of_boxes_keeps_them_aligned(cohort: Cohort, tmp_path: Path) -> None:
    rows = np.array([0, 2, 15])
    with SlideFile(cohort.tiles / "s0.h5") as file:
        write_features(
            tmp_path / "s0.h5", level="object", features=np.eye(3), slide_file=file, encoder="e", mode="masked", box_rows=rows
        )
    embedded = read_features(tmp_path, "object")
    assert embedded.tile.tolist() == [0, 2, 15]
    assert embedded.object.tolist() == [0, 2, 14]


def test_levels_share_encoder_and_mode(cohort: Cohort, folder: Path) -> None:
    with (
        SlideFile(cohort.tiles / "s0.h5") as file,
        pytest.raises(UserError, match=r"s0\.h5: holds /object_features of encoder good"),
    ):
        write_features(folder / "s0.h5", level="tile", features=np.eye(16), slide_file=file, encoder="other", mode="full")
    assert read_features(folder / "s0.h5", "object").encoder == "good"


def put(dataset: h5py.Dataset, rows: int | slice, value: float) -> None:
    """Change rows of a dataset on purpose: its checksum goes, as it is of the old ones."""
    dataset[rows] = value
    del dataset.attrs["crc32"]


def test_objects_go_when_the_annotations_change(cohort: Cohort, tmp_path: Path, folder: Path) -> None:
    slide = Path(shutil.copy(cohort.tiles / "s0.h5", tmp_path / "s0.h5"))
    with h5py.File(slide, "r+") as file:
        put(file["objects/label"], 0, 2)
    with SlideFile(slide) as file:
        write_features(folder / "s0.h5", level="tile", features=np.eye(16), slide_file=file, encoder="new", mode="full")
    with h5py.File(folder / "s0.h5") as file:
        assert set(file) == {"coords", "features", "tile_label"}
        assert file["tile_label"][0] == 2


def test_done_is_done_until_something_changes(cohort: Cohort, tmp_path: Path) -> None:
    slide, target = Path(shutil.copy(cohort.tiles / "s0.h5", tmp_path / "s0.h5")), tmp_path / "out" / "s0.h5"
    settings = {"batch": 1}
    assert not embedded_already(target, "tile", slide, settings)
    with SlideFile(slide) as file:
        write_features(
            target, level="tile", features=np.eye(16), slide_file=file, encoder="e", mode="full", parameters=settings
        )
    assert embedded_already(target, "tile", slide, settings)
    assert not embedded_already(target, "tile", slide, {"batch": 2})
    assert not embedded_already(target, "object", slide, settings)
    with h5py.File(slide, "r+") as file:
        put(file["objects/label"], 0, 2)
        file.attrs["patient_id"] = "changed"
    assert embedded_already(target, "tile", slide, settings), "whole tiles do not depend on annotations"
    embedded = read_features(target)
    assert (embedded.label[0], embedded.patient_id[0]) == (2, "changed"), "but their labels follow"
    with h5py.File(slide, "r+") as file:
        put(file["coords"], 0, -1)
    assert not embedded_already(target, "tile", slide, settings)


def test_a_crash_leaves_the_old_file(cohort: Cohort, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / "s0.h5").read_bytes()

    def crash(*args: object, **kwargs: object) -> None:
        raise RuntimeError("power cut")

    monkeypatch.setattr("tiling.slide_file.write.write_group", crash)
    monkeypatch.setattr(featurefile, "write_group", crash)
    with SlideFile(cohort.tiles / "s0.h5") as file, pytest.raises(RuntimeError, match="power cut"):
        write_features(folder / "s0.h5", level="tile", features=np.eye(16), slide_file=file, encoder="good", mode="full")
    assert (folder / "s0.h5").read_bytes() == before
    with SlideFile(cohort.tiles / "s0.h5") as file, pytest.raises(RuntimeError, match="power cut"):
        write_features(folder / "new.h5", level="tile", features=np.eye(16), slide_file=file, encoder="good", mode="full")
    assert not (folder / "new.h5").exists()
    assert not list(folder.glob(".*"))


def test_overflow_of_float16_is_said(cohort: Cohort, tmp_path: Path) -> None:
    with SlideFile(cohort.tiles / "s0.h5") as file:
        values = {"level": "tile", "slide_file": file, "encoder": "e", "mode": "full"}
        with pytest.raises(UserError, match="--dtype float32"):
            write_features(tmp_path / "a.h5", features=np.full((16, 2), 1e6), **values)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="for 16 tiles"):
            write_features(tmp_path / "a.h5", features=np.ones((3, 2)), **values)  # type: ignore[arg-type]


def spoil(path: Path, what: str) -> None:
    if what == "unreadable":
        path.write_bytes(b"no hdf5")
        return
    with h5py.File(path, "r+") as file:
        x = file["features"]
        if what in ("nan", "zero", "constant"):
            value = {"nan": np.nan, "zero": 0.0, "constant": 1.0}[what]
            put(x, slice(None) if what == "constant" else 3, value)
        elif what in ("encoder", "mode"):
            x.attrs[what] = "another"
        elif what == "mpp":
            file["coords"].attrs["mpp"] = 0.25
        elif what == "rows":
            data = x[:-1]
            del file["features"]
            file.create_dataset("features", data=data)
        elif what == "labels":
            del file["tile_label"]
            file.create_dataset("tile_label", data=np.zeros(3, int)).attrs["labels"] = ["a"]
        elif what == "slide":
            file.attrs["slide_id"] = "s1"
        elif what == "format":
            file.attrs["format"] = "other"


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("unreadable", "not a readable"),
        ("nan", "1 embeddings hold NaN"),
        ("zero", "row 3 is all zeros"),
        ("constant", "are the same"),
        ("encoder", "encoder is another"),
        ("mode", "mode is another"),
        ("mpp", "mpp is 0.25"),
        ("rows", "for 16 tiles"),
        ("labels", "3 tile labels for 16 tiles"),
        ("slide", "slide_id s1 is also in"),
        ("format", "format 'other'"),
    ],
)
def test_a_spoilt_file_is_named_in_one_line(folder: Path, what: str, words: str) -> None:
    spoil(folder / "s4.h5", what)
    with pytest.raises(UserError, match=words) as error:
        read_features(folder, "tile")
    assert "s4.h5" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_things_are_one_line(cohort: Cohort, tmp_path: Path) -> None:
    for path, level, words in (
        (tmp_path / "none", "tile", "no such folder"),
        (tmp_path, "tile", "holds no feature file"),
        (tmp_path, "slide", r"slides\.parquet: no such file"),
        (cohort.good, "cell", "--level cell"),
    ):
        with pytest.raises(UserError, match=words):
            read_features(path, level)
    with SlideFile(cohort.tiles / "s0.h5") as file:
        write_features(tmp_path / "s0.h5", level="tile", features=np.eye(16), slide_file=file, encoder="e", mode="full")
    with pytest.raises(UserError, match="no file holds object embeddings"):
        read_features(tmp_path, "object")
    (tmp_path / "slides.parquet").write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a readable parquet"):
        read_slides_parquet(tmp_path)
