"""Damaged checkpoints and weight files are told in one line, and never used."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from annotations.errors import UserError
from odis_path.checkpoint import load_checkpoint
from odis_path.embedding.run import embed
from odis_path.exporters.timm import export_timm
from odis_path.features.read import read_features, read_slides_parquet
from odis_path.features.write import write_slides_parquet
from odis_path.model.pretrained import load_weights
from odis_path.model.vit import build_encoder
from odis_path.tensor_file import check_zip
from odis_path.training import loop
from tests.odis_path.conftest import tiny_config

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def checkpoint(tiny_tiles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(tiny_tiles, tmp_path_factory.mktemp("run"), optim={"epochs": 1}, eval={"every_epochs": 0})
    return loop.pretrain(config)


def flipped(path: Path, out: Path, at: int, bit: int = 0) -> Path:
    """A copy with one bit another."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    out.write_bytes(data)
    return out


def same(a: Any, b: Any) -> bool:
    """Whether two loaded contents are equal, tensor by tensor."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    return bool(a == b)


def outcome(path: Path) -> tuple[Any, str]:
    """What is loaded, or what is said."""
    try:
        return vars(load_checkpoint(path).state), ""
    except UserError as error:
        return None, str(error)


def test_no_flipped_bit_of_a_checkpoint_changes_what_is_loaded(checkpoint: Path, tmp_path: Path) -> None:
    whole = vars(load_checkpoint(checkpoint).state)
    rng = np.random.default_rng(0)
    refused = 0
    for number, at in enumerate(rng.integers(0, checkpoint.stat().st_size, 64)):
        path = flipped(checkpoint, tmp_path / "checkpoint-00000001.pt", int(at), number % 8)
        state, error = outcome(path)
        if error:
            refused += 1
            assert error.startswith(f"{path}: ")
            assert "\n" not in error
        else:
            assert same(state, whole)  # what is between the members means nothing
    assert refused > 32


def test_a_damaged_tensor_is_named_with_what_to_do(checkpoint: Path, tmp_path: Path) -> None:
    data = checkpoint.read_bytes()
    path = flipped(checkpoint, tmp_path / "c.pt", len(data) // 2)
    with pytest.raises(UserError, match=r"c\.pt: damaged: .*data/\d+ does not match its checksum: .*older checkpoint"):
        load_checkpoint(path)


def test_a_run_does_not_go_on_from_damaged_numbers(checkpoint: Path, tiny_tiles: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    flipped(checkpoint, tmp_path / "run" / checkpoint.name, checkpoint.stat().st_size // 2)
    config = tiny_config(tiny_tiles, tmp_path / "run", optim={"epochs": 2}, eval={"every_epochs": 0})
    with pytest.raises(UserError, match="does not match its checksum"):
        loop.pretrain(config)


@pytest.mark.parametrize("use", [lambda path, out: export_timm(path, out / "w.safetensors"), load_weights])
def test_export_and_start_weights_refuse_a_damaged_checkpoint(
    use: Callable[[Any, Path], Any], checkpoint: Path, tmp_path: Path
) -> None:
    path = flipped(checkpoint, tmp_path / "c.pt", checkpoint.stat().st_size // 2)
    vit: Any = build_encoder("Ti/16", TINY).vit
    first = (vit, path) if use is load_weights else (path, tmp_path)
    with pytest.raises(UserError, match=r"c\.pt: damaged"):
        use(*first)
    assert not (tmp_path / "w.safetensors").exists()


def test_a_file_written_without_checksums_is_read_and_said_to_be_unchecked(tmp_path: Path) -> None:
    vit: Any = build_encoder("Ti/16", TINY).vit
    torch.save(vit.state_dict(), tmp_path / "with.pth")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(vit.state_dict(), tmp_path / "without.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    torch.save(vit.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(vit.state_dict(), tmp_path / "w.safetensors")
    checked = {
        name: load_weights(vit, tmp_path / name).checked for name in ("with.pth", "without.pth", "old.pth", "w.safetensors")
    }
    assert checked == {"with.pth": True, "without.pth": False, "old.pth": False, "w.safetensors": False}


def test_a_zip_that_is_packed_is_checked_too(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", bytes(range(256)) * 50)
    assert check_zip(tmp_path / "a.zip", "", "")
    data = (tmp_path / "a.zip").read_bytes()
    for at in range(35, len(data) - 80, 7):
        with pytest.raises(UserError, match="damaged"):
            check_zip(flipped(tmp_path / "a.zip", tmp_path / "b.zip", at), "", "")


def test_exported_tensors_are_checked_when_they_are_read(checkpoint: Path, tmp_path: Path) -> None:
    export_timm(checkpoint, tmp_path / "w.safetensors")
    vit: Any = build_encoder("vit_tiny_patch16_224", {**TINY, "img_size": 32}).vit
    size = (tmp_path / "w.safetensors").stat().st_size
    path = flipped(tmp_path / "w.safetensors", tmp_path / "d.safetensors", size - 1000)
    with pytest.raises(
        UserError, match=r"d\.safetensors: damaged: its tensors do not match their checksum: copy or fetch it again"
    ):
        load_weights(vit, path)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_stops_at_a_damaged_file_with_one_line(workers: int, tiny_tiles: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_tiles, tmp_path / "tiles")
    path = tmp_path / "tiles" / "S1.h5"
    with h5py.File(path) as file:
        at = int(file["boxes/xyxy"].id.get_offset())
    flipped(path, path, at + 3)
    config = tiny_config(tmp_path / "tiles", tmp_path / "run", data={"workers": workers}, eval={"every_epochs": 0})
    with pytest.raises(UserError, match=r"^\S*S1\.h5: damaged \(/boxes/xyxy does not match its checksum\): run .* annotate"):
        loop.pretrain(config)


def test_embed_has_a_row_for_a_damaged_slide_and_makes_damaged_features_anew(
    tiny_tiles: Path, checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_tiles, tmp_path / "tiles")
    out = tmp_path / "f"
    assert all(outcome.ok for outcome in embed(tmp_path / "tiles", str(checkpoint), out))
    before = read_features(out).x
    with h5py.File(out / "S2.h5") as file:
        at = int(file["features"].id.get_offset())
    flipped(out / "S2.h5", out / "S2.h5", at + 100)
    with pytest.raises(UserError, match=r"S2\.h5: damaged \(/features does not .*: run odis-path embed again"):
        read_features(out)
    outcomes = {outcome.item: outcome for outcome in embed(tmp_path / "tiles", str(checkpoint), out)}
    assert outcomes["S2"].redone == "the file was damaged"
    assert all(outcome.skipped for name, outcome in outcomes.items() if name != "S2")
    assert np.array_equal(read_features(out).x, before)
    slide = tmp_path / "tiles" / "S3.h5"
    with h5py.File(slide) as file:
        at = int(file["pixels/data"].id.get_chunk_info(0).byte_offset)
    flipped(slide, slide, at + 700)
    (out / "S3.h5").unlink()
    (outcome,) = [outcome for outcome in embed(tmp_path / "tiles", str(checkpoint), out) if not outcome.ok]
    assert (outcome.item, "run odis-path tile again" in outcome.message) == ("S3", True)


def test_slide_embeddings_are_checked(tmp_path: Path) -> None:
    row: dict[str, Any] = {"patient_id": "p", "n_tiles": 1, "encoder": "e", "mode": "full"}
    rng = np.random.default_rng(0)
    rows = [{**row, "slide_id": f"s{i}", "features": rng.normal(size=64)} for i in range(9)]
    path = write_slides_parquet(tmp_path / "slides.parquet", rows)
    whole = read_slides_parquet(path).x
    refused = 0
    for at in range(20, path.stat().st_size, 41):
        try:
            changed = read_slides_parquet(flipped(path, tmp_path / "d.parquet", at)).x
        except UserError:
            refused += 1
        else:
            assert np.array_equal(changed, whole)
    assert refused > 20
