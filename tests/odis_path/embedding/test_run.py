"""Embeddings: the four modes, the feature files, what is done twice."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from annotations.errors import UserError
from odis_path.embedding.encoder import load_encoder
from odis_path.embedding.run import embed
from odis_path.exporters.run import export
from odis_path.features import read as features
from odis_path.training import loop
from odis_path.training.run import TrainedRun
from tests.odis_path.conftest import tiny_config
from tiling.slide_file.read import SlideFile


@pytest.fixture(scope="module")
def run_folder(tiny_tiles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    loop.pretrain(tiny_config(tiny_tiles, folder, optim={"epochs": 0.34}, eval={"every_epochs": 0}))
    return folder


def test_tile_features_are_what_trident_and_clam_read(tiny_tiles: Path, run_folder: Path, tmp_path: Path) -> None:
    outcomes = embed(tiny_tiles, str(run_folder), tmp_path)
    assert [o.ok for o in outcomes] == [True] * 6
    with h5py.File(tmp_path / "S0.h5") as file, SlideFile(tiny_tiles / "S0.h5") as slide:
        assert file["features"].shape == (12, 32)
        assert file["features"].dtype == np.float16
        assert np.array_equal(file["coords"][:], slide.coords)
        assert dict(file["coords"].attrs).items() >= slide.coords_attrs.items()
        assert file["coords"].attrs["patch_size_level0"] == 64
        assert file["features"].attrs["encoder"].startswith("odis:vit_tiny")
        assert (file["features"].attrs["name"], file["features"].attrs["mode"]) == ("S0", "full")
        assert file["tile_label"][:].tolist() == [0, 1] * 6


def test_what_pretrain_returned_is_a_checkpoint_wherever_one_is_asked_for(
    tiny_tiles: Path, run_folder: Path, tmp_path: Path
) -> None:
    (checkpoint,) = run_folder.glob("checkpoint-*.pt")
    run = TrainedRun(checkpoint)
    embed(tiny_tiles, run, tmp_path / "features")
    assert features.read_features(tmp_path / "features").parameters["checkpoint"].startswith(str(checkpoint))
    assert load_encoder(run, device="cpu").name == load_encoder(checkpoint, device="cpu").name
    export(run, "timm", tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").is_file()


def test_full_features_are_the_encoders_on_the_tiles(tiny_tiles: Path, run_folder: Path, tmp_path: Path) -> None:
    embed(tiny_tiles, str(run_folder), tmp_path, dtype="float32", batch=5)
    with SlideFile(tiny_tiles / "S1.h5") as slide:
        tiles = np.stack([slide.tile(i) for i in range(12)])
    expected = load_encoder(str(run_folder), device="cpu").encode(tiles)
    assert np.allclose(features.read_features(tmp_path / "S1.h5").x, expected, atol=1e-5)


@pytest.mark.parametrize("mode", ["full", "masked", "crop", "blackout"])
def test_object_features_follow_the_boxes(tiny_tiles: Path, run_folder: Path, tmp_path: Path, mode: str) -> None:
    embed(tiny_tiles, str(run_folder), tmp_path, level="object", mode=mode, dtype="float32", batch=7)
    embedded = features.read_features(tmp_path / "S2.h5", "object")
    with SlideFile(tiny_tiles / "S2.h5") as slide:
        table = slide.boxes_table()
        assert np.array_equal(embedded.xyxy, table["xyxy"])
        single = load_encoder(str(run_folder), device="cpu").encode(slide.tile(3)[None], table["xyxy"][7:8], mode)  # type: ignore[arg-type]
    assert np.allclose(embedded.x[7], single[0], atol=1e-5)
    assert embedded.label[7] == 1
    assert embedded.tile[7] == 3


def test_the_modes_differ_for_a_small_box_and_agree_for_the_whole_tile(tiny_tiles: Path, run_folder: Path) -> None:
    encoder = load_encoder(str(run_folder), device="cpu")
    with SlideFile(tiny_tiles / "S0.h5") as slide:
        tile, boxes = slide.tile(0)[None], slide.boxes(0)
    rows = {mode: encoder.encode(tile, boxes[1:2], mode) for mode in ("full", "masked", "crop", "blackout")}  # type: ignore[arg-type]
    values = list(rows.values())
    assert all(not np.allclose(values[i], values[j], atol=1e-4) for i in range(4) for j in range(i))
    whole = [encoder.encode(tile, boxes[:1], mode) for mode in ("full", "masked", "crop", "blackout")]  # type: ignore[arg-type]
    assert all(np.allclose(whole[0], other, atol=1e-4) for other in whole[1:])


def test_masked_tile_features_are_the_mean_over_boxes(tiny_tiles: Path, run_folder: Path, tmp_path: Path) -> None:
    embed(tiny_tiles, str(run_folder), tmp_path, mode="masked", dtype="float32")
    embed(tiny_tiles, str(run_folder), tmp_path, level="object", mode="masked", dtype="float32")
    tiles = features.read_features(tmp_path / "S3.h5", "tile").x
    objects = features.read_features(tmp_path / "S3.h5", "object").x
    assert np.allclose(tiles, objects.reshape(12, 2, -1).mean(1), atol=1e-5)


def test_slide_rows_are_means_over_tiles(tiny_tiles: Path, run_folder: Path, tmp_path: Path) -> None:
    embed(tiny_tiles, str(run_folder), tmp_path, level="slide", dtype="float32")
    slides = features.read_slides_parquet(tmp_path)
    assert slides.slide_id.tolist() == [f"S{i}" for i in range(6)]
    assert slides.patient_id.tolist() == ["P0", "P0", "P1", "P1", "P2", "P2"]
    assert np.allclose(slides.x[4], features.read_features(tmp_path / "S4.h5").x.mean(0), atol=1e-5)


def test_what_is_done_is_skipped_and_other_settings_are_not(tiny_tiles: Path, run_folder: Path, tmp_path: Path) -> None:
    assert not any(o.skipped for o in embed(tiny_tiles, str(run_folder), tmp_path))
    assert all(o.skipped for o in embed(tiny_tiles, str(run_folder), tmp_path))
    assert not any(o.skipped for o in embed(tiny_tiles, str(run_folder), tmp_path, dtype="float32"))


def test_a_choice_of_kinds_keeps_its_own_boxes(tiny_tiles: Path, run_folder: Path, tmp_path: Path) -> None:
    embed(tiny_tiles, str(run_folder), tmp_path, level="object", mode="masked", kinds="cell")
    embedded = features.read_features(tmp_path / "S0.h5", "object")
    assert len(embedded) == 12
    with SlideFile(tiny_tiles / "S0.h5") as slide:
        assert np.array_equal(embedded.xyxy, slide.boxes_table()["xyxy"][1::2])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"level": "patch"}, "--level patch"),
        ({"mode": "halo"}, "--mode halo"),
        ({"kinds": "nerve"}, "--kinds nerve"),
        ({"dtype": "int8"}, "--dtype int8"),
    ],
)
def test_a_wrong_option_is_one_line(
    options: dict[str, str], words: str, tiny_tiles: Path, run_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        embed(tiny_tiles, str(run_folder), tmp_path, **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_missing_checkpoint_or_folder_is_one_line(tiny_tiles: Path, run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such checkpoint"):
        embed(tiny_tiles, str(tmp_path / "no.pt"), tmp_path)
    with pytest.raises(UserError, match="timm cannot build"):
        embed(tiny_tiles, "vit_nothing", tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        embed(tmp_path / "none", str(run_folder), tmp_path)


def test_broken_feature_files_are_refused(tiny_tiles: Path, run_folder: Path, tmp_path: Path) -> None:
    embed(tiny_tiles, str(run_folder), tmp_path)
    with h5py.File(tmp_path / "S0.h5", "r+") as file:
        file["features"][3] = np.nan
    with pytest.raises(UserError, match=r"S0\.h5: damaged \(/features does not match its checksum\): run .*embed again"):
        features.read_features(tmp_path)
    with h5py.File(tmp_path / "S0.h5", "r+") as file:
        del file["features"].attrs["crc32"]  # changed on purpose
    with pytest.raises(UserError, match=r"S0\.h5: 1 embeddings hold NaN"):
        features.read_features(tmp_path)
    with h5py.File(tmp_path / "S0.h5", "r+") as file:
        file["features"][3] = 0
    with pytest.raises(UserError, match="row 3 is all zeros"):
        features.read_features(tmp_path)
    with h5py.File(tmp_path / "S0.h5", "r+") as file:
        file["features"][3] = 1
        file["features"].attrs["mode"] = "crop"
    with pytest.raises(UserError, match="mode is"):
        features.read_features(tmp_path)
