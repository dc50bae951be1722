"""A checkpoint knows its slides, embeddings say so, and the run need not be there when they are judged."""

from __future__ import annotations

import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from annotations.errors import UserError
from odis_path.checkpoint import latest_checkpoint
from odis_path.distributed import start_ranks
from odis_path.embedding.run import embed
from odis_path.features.pretraining import FILE, of_encoder
from odis_path.features.read import read_features
from odis_path.training import loop
from odis_path.training.setup import prepare
from tests.odis_path.conftest import tiny_config


@pytest.fixture(scope="module")
def run_folder(tiny_tiles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    settings = {"optim": {"epochs": 0.34}, "eval": {"every_epochs": 0}, "data": {"holdout": 0.34}}
    loop.pretrain(tiny_config(tiny_tiles, folder, **settings))
    return folder


def seen_slides(folder: Path) -> dict[str, str]:
    """slide_id -> train or test, of the run's split.csv."""
    lines = (folder / "split.csv").read_text().split()[1:]
    return {line.split(",")[0]: line.split(",")[2] for line in lines}


@pytest.mark.parametrize("level", ["tile", "object", "slide"])
def test_embeddings_say_whom_their_encoder_saw(tiny_tiles: Path, run_folder: Path, tmp_path: Path, level: str) -> None:
    copy = Path(shutil.copytree(run_folder, tmp_path / "run"))
    mode = "masked" if level == "object" else "full"
    embed(tiny_tiles, str(copy), tmp_path / "feats", level=level, mode=mode)
    shutil.move(copy, tmp_path / "elsewhere")
    pretraining = read_features(tmp_path / "feats", level).pretraining_in(tmp_path / "feats")
    assert pretraining.kind == "run"
    assert {slide.slide_id: slide.split for slide in pretraining.slides} == seen_slides(run_folder)
    assert all(slide.seen == (slide.split == "train") for slide in pretraining.slides)
    assert {slide.split for slide in pretraining.slides} == {"train", "test"}
    shutil.copytree(tmp_path / "feats", tmp_path / "copy")
    assert read_features(tmp_path / "copy", level).pretraining_in(tmp_path / "copy") == pretraining, "it goes with the folder"
    (tmp_path / "feats" / FILE).unlink()
    assert read_features(tmp_path / "feats", level).pretraining_in(tmp_path / "feats").kind == "unknown"


def test_a_checkpoint_alone_is_enough_and_a_resumed_one_too(tiny_tiles: Path, run_folder: Path, tmp_path: Path) -> None:
    checkpoint = latest_checkpoint(run_folder)
    assert checkpoint is not None
    alone = Path(shutil.copy(checkpoint, tmp_path / "model.pt"))
    assert {s.slide_id for s in of_encoder(str(alone), random_weights=False).slides} == set(seen_slides(run_folder))
    copy = Path(shutil.copytree(run_folder, tmp_path / "run"))
    settings = {"optim": {"epochs": 0.34}, "eval": {"every_epochs": 0}, "data": {"holdout": 0.34}}
    config = tiny_config(tiny_tiles, copy, **settings)
    resumed = prepare(config, start_ranks("cpu"))
    assert resumed.data["pretrained_on"] == torch.load(checkpoint, weights_only=True)["data"]["pretrained_on"]


def test_older_checkpoints_are_answered_by_their_run_folder(run_folder: Path, tmp_path: Path) -> None:
    checkpoint = latest_checkpoint(run_folder)
    assert checkpoint is not None
    content = torch.load(checkpoint, weights_only=True)
    del content["data"]["pretrained_on"]
    torch.save(content, tmp_path / "old.pt")
    assert of_encoder(str(tmp_path / "old.pt"), random_weights=False).kind == "unknown"
    shutil.copy(run_folder / "split.csv", tmp_path)
    pretraining = of_encoder(str(tmp_path / "old.pt"), random_weights=False)
    assert {s.slide_id: s.split for s in pretraining.slides} == seen_slides(run_folder)


def test_others_are_not_known_and_the_untrained_saw_nobody(tiny_tiles: Path, run_folder: Path, tmp_path: Path) -> None:
    assert of_encoder("vit_tiny_patch16_224", random_weights=False).kind == "unknown"
    embed(tiny_tiles, str(run_folder), tmp_path, random_weights=True)
    assert read_features(tmp_path).pretraining_in(tmp_path).kind == "none"
    assert not (tmp_path / FILE).exists()


def test_another_encoder_into_the_same_folder_needs_overwrite(tiny_tiles: Path, run_folder: Path, tmp_path: Path) -> None:
    feats = tmp_path / "feats"
    embed(tiny_tiles, str(run_folder), feats, level="slide")
    embed(tiny_tiles, str(run_folder), feats, level="object")
    before = {path.name: path.read_bytes() for path in feats.iterdir() if not path.name.startswith(".")}
    with pytest.raises(UserError, match=r"S0\.h5: holds embeddings of another encoder, odis:.*--overwrite") as error:
        embed(tiny_tiles, str(run_folder), feats, random_weights=True)
    assert "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in feats.iterdir() if not path.name.startswith(".")} == before
    assert all(o.ok for o in embed(tiny_tiles, str(run_folder), feats, random_weights=True, overwrite=True))
    with h5py.File(feats / "S0.h5") as file:
        assert file["features"].attrs["encoder"].startswith("random:")
        assert "object_features" not in file, "the other level of the other encoder is gone"
    assert not (feats / "slides.parquet").exists()


def test_a_checkpoint_that_only_moved_is_the_same(tiny_tiles: Path, run_folder: Path, tmp_path: Path) -> None:
    first = Path(shutil.copytree(run_folder, tmp_path / "first"))
    embed(tiny_tiles, str(first), tmp_path / "feats", dtype="float32")
    x = read_features(tmp_path / "feats").x
    shutil.move(first, tmp_path / "second")
    assert all(o.ok for o in embed(tiny_tiles, str(tmp_path / "second"), tmp_path / "feats", dtype="float32"))
    assert np.allclose(read_features(tmp_path / "feats").x, x)
