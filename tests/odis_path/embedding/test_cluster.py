"""Which encoder `embed` uses, and on what: new checkpoints, clusters, several runs at once, runs that must fail."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch

from annotations.errors import UserError
from odis_path.checkpoint import latest_checkpoint
from odis_path.embedding.encoder import FrozenEncoder, load_encoder
from odis_path.embedding.request import EncoderRequest
from odis_path.embedding.run import checkpoint_file, checkpoint_stamp, embed, shared_encoder
from odis_path.features.read import read_features, read_slides_parquet
from odis_path.training import loop
from tests.odis_path.conftest import tiny_config, write_tiny_slide
from tiling.slide_file.read import SlideFile
from tiling.storage.locks import is_locked, lock_settings


@pytest.fixture(scope="module")
def trained(tiny_tiles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    loop.pretrain(tiny_config(tiny_tiles, folder, optim={"epochs": 0.34}, eval={"every_epochs": 0}))
    return folder


@pytest.fixture
def run_folder(trained: Path, tmp_path: Path) -> Path:
    """A run folder of one's own, `run` in tmp_path."""
    return copytree(trained, tmp_path / "run")


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A cluster of one worker with four threads, which runs in a folder of its own."""
    distributed = pytest.importorskip("distributed")
    here, there = Path.cwd(), tmp_path_factory.mktemp("elsewhere")
    os.chdir(there)
    try:
        cluster = distributed.LocalCluster(
            n_workers=1, threads_per_worker=4, dashboard_address=":0", local_directory=str(there), host="127.0.0.1"
        )
    finally:
        os.chdir(here)
    yield cluster.scheduler_address
    cluster.close()


def train_on(run: Path) -> Path:
    """Put a newer checkpoint, of other weights, into a run folder."""
    path = latest_checkpoint(run)
    assert path is not None
    content = torch.load(path, weights_only=True)
    content["teacher"] = {
        key: value * 1.5 if value.dtype.is_floating_point else value for key, value in content["teacher"].items()
    }
    content["step"] += 1
    newer = run / f"checkpoint-{content['step']:08d}.pt"
    torch.save(content, newer)
    return newer


def features_of(checkpoint: Path, tiles: Path, *, random_weights: bool = False) -> np.ndarray:
    """What the first slide's tiles become with a checkpoint, loaded here and now."""
    with SlideFile(tiles / "S0.h5") as slide:
        pixels = np.stack([slide.tile(i) for i in range(len(slide))])
    return load_encoder(str(checkpoint), device="cpu", random_weights=random_weights).encode(pixels)


def forbid_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(*_: object) -> np.ndarray:
        raise AssertionError("embedded before it was known that nothing can be written")

    monkeypatch.setattr(FrozenEncoder, "encode", encode)


def test_a_run_folder_that_trained_on_is_embedded_with_its_new_weights(
    tiny_tiles: Path, run_folder: Path, tmp_path: Path
) -> None:
    for name in ("before", "after"):
        assert all(o.ok for o in embed(tiny_tiles, str(run_folder), tmp_path / name, dtype="float32", device="cpu"))
        expected = features_of(run_folder, tiny_tiles)
        assert np.allclose(read_features(tmp_path / name / "S0.h5").x, expected, atol=1e-5)
        train_on(run_folder)


def test_a_cluster_takes_the_commands_checkpoint_each_time(
    scheduler: str, tiny_tiles: Path, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("before", "after"):
        outcomes = embed(tiny_tiles, "run", Path(name), dtype="float32", device="cpu", scheduler=scheduler)
        assert [o.message for o in outcomes if not o.ok] == []
        expected = features_of(run_folder, tiny_tiles)
        assert np.allclose(read_features(tmp_path / name / "S0.h5").x, expected, atol=1e-5)
        train_on(run_folder)


def test_random_weights_are_the_same_on_a_worker_with_threads(
    scheduler: str, tiny_tiles: Path, run_folder: Path, tmp_path: Path
) -> None:
    for turn in range(3):
        out, run = tmp_path / f"out{turn}", copytree(run_folder, tmp_path / f"run{turn}")  # loaded anew each time
        options = {"dtype": "float32", "device": "cpu", "random_weights": True, "scheduler": scheduler}
        assert all(o.ok for o in embed(tiny_tiles, str(run), out, **options))  # type: ignore[arg-type]
        expected = features_of(run, tiny_tiles, random_weights=True)
        assert np.allclose(read_features(out / "S0.h5").x, expected, atol=1e-5)


def test_threads_that_load_at_once_get_one_seeded_network(run_folder: Path) -> None:
    path = checkpoint_file(str(run_folder))
    with ThreadPoolExecutor(4) as pool:
        encoders = list(pool.map(lambda _: shared_encoder(EncoderRequest(path, checkpoint_stamp(path), "cpu", True)), range(4)))
    assert len({id(encoder) for encoder in encoders}) == 1
    alone = load_encoder(path, device="cpu", random_weights=True).module.state_dict()
    assert all(torch.equal(value, alone[key]) for key, value in encoders[0].module.state_dict().items())


def test_threads_pass_through_an_encoder_one_at_a_time(run_folder: Path) -> None:
    """A rotary model is told in each pass how many of its tokens are [OBJ]."""
    encoder = load_encoder(str(run_folder), device="cpu")
    inside, most = [], []

    def slow(*_: object) -> None:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.02)
        inside.pop()

    handle = encoder.module.register_forward_pre_hook(slow)
    tiles = np.zeros((2, 32, 32, 3), np.uint8)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: encoder.encode(tiles), range(8)))
    handle.remove()
    assert most == [1] * 8


def test_loading_leaves_the_random_numbers_of_others_alone(run_folder: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    load_encoder(str(run_folder), device="cpu", random_weights=True)
    assert torch.equal(torch.rand(3), expected)


def test_a_checkpoint_replaced_in_mid_run_fails_the_slides_after_it(
    tiny_tiles: Path, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replaced_then_loaded(request: EncoderRequest) -> object:
        os.utime(checkpoint_file(str(run_folder)), (1, 1))
        return shared_encoder(request)

    (tmp_path / "out").mkdir()
    calls = iter([lambda *_: None])  # what the command itself loads
    monkeypatch.setattr("odis_path.embedding.run.shared_encoder", lambda request: next(calls, replaced_then_loaded)(request))
    outcomes = embed(tiny_tiles, str(run_folder), tmp_path / "out", device="cpu")
    assert not any(o.ok for o in outcomes)
    assert all("is not the file that this run began with" in o.message for o in outcomes)


def test_a_model_deleted_in_mid_run_is_used_where_it_is_loaded(run_folder: Path) -> None:
    path = checkpoint_file(str(run_folder))
    request = EncoderRequest(path, checkpoint_stamp(path), "cpu", False)
    encoder = shared_encoder(request)
    Path(path).unlink()  # training keeps the newest few
    assert shared_encoder(request) is encoder


def test_however_a_model_is_named_it_is_the_same_one(
    tiny_tiles: Path, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    embed(tiny_tiles, "run", tmp_path / "out")
    for name in (str(run_folder), checkpoint_file("run"), os.path.relpath(checkpoint_file("run"))):
        again = embed(tiny_tiles, name, tmp_path / "out")
        assert [(o.skipped, o.info["tiles"]) for o in again] == [(True, 12)] * 6
    assert checkpoint_file("vit_tiny_patch16_224") == "vit_tiny_patch16_224"


def test_a_missing_checkpoint_is_one_line_on_a_cluster_too(tiny_tiles: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, words in ((tmp_path / "none.pt", "no such checkpoint"), (tmp_path / "empty", "no checkpoint-")):
        with pytest.raises(UserError, match=words):
            embed(tiny_tiles, str(name), tmp_path / "out", scheduler="tcp://127.0.0.1:1")


def test_a_run_with_other_settings_is_refused_while_one_is_at_work(
    tiny_tiles: Path, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = {"model": "run/checkpoint-00000099.pt", "mode": "crop"}
    words = r"another run of odis-path embed .*mode crop, now full; model run/checkpoint-00000099\.pt, now run/checkpoint-0"
    with lock_settings(tmp_path / "out", "embed", other), pytest.raises(UserError, match=words):
        embed(tiny_tiles, str(run_folder), tmp_path / "out")
    held = []
    monkeypatch.setattr(
        "odis_path.embedding.run.write_slides_parquet",
        lambda path, *_: held.append(is_locked(path.parent / ".embed.odis-lock")),
    )
    embed(tiny_tiles, str(run_folder), tmp_path / "out", level="slide")
    assert held == [True]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [*(f"S{i}.h5" for i in range(6)), "pretraining.csv"]


def test_equal_runs_at_once_share_the_work(tiny_tiles: Path, run_folder: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(embed, tiny_tiles, str(run_folder), tmp_path / "out", level="slide") for _ in range(2)]
        first, second = (run.result(120) for run in runs)
    assert all(o.ok for o in [*first, *second])
    assert [a.skipped + b.skipped for a, b in zip(first, second, strict=True)] == [1] * 6
    assert len(read_slides_parquet(tmp_path / "out")) == 6


def test_slides_that_all_fail_are_told_at_level_slide(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tiles").mkdir()
    (tmp_path / "tiles" / "S0.h5").write_bytes(b"torn")
    (failed,) = embed(tmp_path / "tiles", str(run_folder), tmp_path / "out", level="slide")
    assert not failed.ok
    assert "S0.h5" in failed.message
    assert not (tmp_path / "out" / "slides.parquet").exists()


def test_only_slides_without_tiles_are_told_so(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tiles").mkdir()
    write_tiny_slide(tmp_path / "tiles", "S0", "P0", 0, 0, polygons=False)
    with pytest.raises(UserError, match="no slide has a tile"):
        embed(tmp_path / "tiles", str(run_folder), tmp_path / "out", level="slide")


def test_a_slide_whose_embeddings_are_bad_fails_alone_at_level_slide(
    tiny_tiles: Path, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path, level: str) -> object:
        if path.stem == "S2":
            raise UserError(f"{path}: all 12 embeddings are the same")
        return read_features(path, level)

    monkeypatch.setattr("odis_path.embedding.run.read_features", read)
    outcomes = embed(tiny_tiles, str(run_folder), tmp_path, level="slide")
    assert {o.item: o.message for o in outcomes if not o.ok} == {"S2": f"{tmp_path / 'S2.h5'}: all 12 embeddings are the same"}
    assert len(read_slides_parquet(tmp_path)) == 5


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_embedded(
    tiny_tiles: Path, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_passes(monkeypatch)
    (tmp_path / "file").touch()
    outcomes = embed(tiny_tiles, str(run_folder), tmp_path / "file" / "out")
    assert all("S" in o.message and "cannot be written: Not a directory" in o.message for o in outcomes)
    with pytest.raises(UserError, match=r"slides\.parquet: cannot be written: Not a directory"):
        embed(tiny_tiles, str(run_folder), tmp_path / "file" / "out", level="slide")


def test_a_folder_of_another_encoder_is_refused_before_anything_is_embedded(
    tiny_tiles: Path, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed(tiny_tiles, str(run_folder), tmp_path / "out", level="object", mode="masked")
    forbid_passes(monkeypatch)
    outcomes = embed(tiny_tiles, str(run_folder), tmp_path / "out", mode="full")
    assert all("one folder holds one encoder and mode" in o.message for o in outcomes)
    (tmp_path / "out" / "S0.h5").write_bytes((tiny_tiles / "S0.h5").read_bytes())
    assert "is not a feature file" in embed(tiny_tiles, str(run_folder), tmp_path / "out", mode="full")[0].message


def test_skipped_slides_are_counted_with_their_rows(tiny_tiles: Path, run_folder: Path, tmp_path: Path) -> None:
    for level, name, count in (("tile", "tiles", 12), ("object", "objects", 24)):
        for skipped in (False, True):
            outcomes = embed(tiny_tiles, str(run_folder), tmp_path, level=level)
            assert [(o.skipped, o.info[name]) for o in outcomes] == [(skipped, count)] * 6
