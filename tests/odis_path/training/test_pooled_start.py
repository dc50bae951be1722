"""Published models are used as their authors do, and pretraining goes on from weights as they were trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from annotations.errors import UserError
from odis_path.checkpoint import load_checkpoint
from odis_path.embedding.encoder import load_encoder
from odis_path.exporters.timm import export_timm
from odis_path.model.published import PUBLISHED, published
from odis_path.model.vit import build_encoder
from odis_path.training import loop
from tests.odis_path.conftest import tiny_config
from tests.odis_path.hub import SMALL, hub_folder, own_feature, pixels, random_model
from tests.odis_path.model.test_create import KINDS, TILES, tokens_of, without


@pytest.mark.parametrize(
    ("name", "pool"),
    [
        ("Virchow2", "cls+mean"),
        ("virchow", "cls+mean"),
        ("H0-mini", "cls+mean"),
        ("UNI2-h", "cls"),
        ("H-optimus-1", "cls"),
        ("models--paige-ai--Virchow2/snapshots/0a1b", "cls+mean"),
        ("other", "cls"),
    ],
)
def test_a_published_model_is_pooled_as_its_authors_do(name: str, pool: str, tmp_path: Path) -> None:
    arguments = {"reg_tokens": 4, "global_pool": ""}
    source, model = hub_folder(tmp_path / name, "vit_tiny_patch16_224", **arguments)
    token, mean = tokens_of(model)
    encoder = load_encoder(source, device="cpu")
    assert encoder.pool == pool
    expected = {"cls": token, "cls+mean": np.concatenate([token, mean], axis=1)}[pool]
    np.testing.assert_allclose(encoder.encode(TILES), expected, rtol=0, atol=1e-5)
    assert load_encoder(source, device="cpu", pool="mean").pool == "mean"


def test_a_published_model_has_the_layers_and_colours_that_its_config_does_not_hold(tmp_path: Path) -> None:
    layers = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU}
    model = random_model("vit_tiny_patch16_224", seed=1, reg_tokens=4, mlp_ratio=5.3375, **layers)
    source, _ = hub_folder(tmp_path / "H0-mini", "vit_tiny_patch16_224", reg_tokens=4, mlp_ratio=5.3375)
    config = json.loads((tmp_path / "H0-mini" / "config.json").read_text())
    config["pretrained_cfg"] = {"num_classes": 1000}
    (tmp_path / "H0-mini" / "config.json").write_text(json.dumps(config))
    torch.save(model.state_dict(), tmp_path / "H0-mini" / "pytorch_model.bin")
    encoder = load_encoder(source, device="cpu")
    assert (encoder.mean, encoder.std) == ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        x = model.forward_features(images)
        embeddings = encoder.module(images).obj
    torch.testing.assert_close(embeddings, torch.cat([x[:, 0], x[:, 5:].mean(1)], dim=1), rtol=0, atol=1e-5)
    assert "as H0-mini is used" in encoder.about(224)
    config["model_args"] |= {"mlp_layer": "SwiGLUPacked", "act_layer": "SiLU"}  # any other folder says it in words
    (tmp_path / "H0-mini" / "config.json").write_text(json.dumps(config))
    (tmp_path / "H0-mini").rename(tmp_path / "mine")
    with torch.no_grad():
        same = load_encoder(f"local-dir:{tmp_path / 'mine'}", device="cpu", pool="cls+mean").module(images).obj
    torch.testing.assert_close(same, embeddings, rtol=0, atol=1e-5)


def test_names_of_published_models_are_told_apart() -> None:
    for one in PUBLISHED:
        hub = one.hub.replace("*", "small_patch16_224")
        assert published(f"hf-hub:{hub}") is one
        assert published(f"local-dir:/models/{hub.rpartition('/')[2]}") is one
        assert published(f"hf-hub:{hub}@0123abc") is one
    assert published("vit_small_patch16_224") is None
    assert published("local-dir:/uni/other") is None
    with pytest.raises(UserError, match="CTransPath is a Swin transformer"):
        published("hf-hub:owner/CTransPath")


def test_every_published_model_is_in_the_table_of_the_docs() -> None:
    text = (Path(__file__).resolve().parents[3] / "docs" / "weights.md").read_text(encoding="utf-8")
    for one in PUBLISHED:
        assert f"\n| {one.name} | {one.hub} | `{one.pool}` | {one.size_px} |" in text, one.name


def train(tiles: Path, out: Path, source: str, pool: str | None = None, **model: Any) -> Path:
    more = {} if pool is None else {"pool": pool}
    values = {"name": source, "weights": "timm", "kwargs": {}, "drop_path": 0.0, **more, **model}
    sizes = {"global_size": 32, "local_size": 16}
    return loop.pretrain(tiny_config(tiles, out, model=values, views=sizes, optim={"epochs": 0.17}, eval={"every_epochs": 0}))


@pytest.mark.parametrize("kind", ["gap", "gap, registers, norm after", "eva02", "average, class token"])
def test_pretraining_goes_on_from_an_averaged_model_by_the_mean(
    kind: str, tiny_tiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    architecture, arguments, _ = KINDS[kind]
    source, _ = hub_folder(tmp_path / "model", architecture, **arguments)
    path = train(tiny_tiles, tmp_path / "run", source)
    messages = capsys.readouterr().err
    assert "pooled by the mean of in-box patches (model.pool=linear)" in messages
    assert "views.global_size=32, as trained; trained with another mean and std: set data.mean=[0.5, 0.4, 0.6]" in messages
    assert load_checkpoint(path).config.model.pool == "linear"
    encoder = load_encoder(str(path), device="cpu")
    assert encoder.pool == "mean"
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 32)
    result = export_timm(path, tmp_path / "e.safetensors")  # compares with plain timm
    vit = timm.create_model(result.model, checkpoint_path=result.weights, **result.kwargs).eval()
    with torch.no_grad():
        torch.testing.assert_close(vit(images), encoder.module(images).obj, rtol=0, atol=1e-5)
    assert train(tiny_tiles, tmp_path / "run", source) == path  # goes on from its own checkpoint


def test_the_first_step_starts_from_the_models_own_feature(tiny_tiles: Path, tmp_path: Path) -> None:
    source, model = hub_folder(tmp_path / "model", "eva02_tiny_patch14_224", num_classes=1000)
    encoder = build_encoder(source, weights="timm", pool="auto").eval()
    with torch.no_grad():
        tokens = encoder(pixels(TILES))
    np.testing.assert_allclose(tokens.obj.numpy(), own_feature(model, TILES), rtol=0, atol=1e-5)
    assert tokens.patches.shape == (3, 16, 32)


def test_pretraining_from_a_class_token_is_as_it_was(
    tiny_tiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, _ = hub_folder(tmp_path / "Virchow2", "vit_tiny_patch16_224", reg_tokens=4, global_pool="")
    path = train(tiny_tiles, tmp_path / "run", source)
    assert "[OBJ] goes on from the class token; views.global_size=32, as trained" in capsys.readouterr().err
    assert load_checkpoint(path).config.model.pool == "obj"


def test_dinov3_goes_on_from_its_class_token_though_timm_averages_it(tmp_path: Path) -> None:
    source, model = hub_folder(tmp_path / "model", "vit_small_patch16_dinov3")
    encoder = build_encoder(source, weights="timm", pool="auto").eval()
    assert encoder.pool == "obj"
    with torch.no_grad():
        np.testing.assert_allclose(encoder(pixels(TILES)).obj.numpy(), tokens_of(model)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "pool", "words"),
    [
        ("gap", "obj", "has no class token that .OBJ. could go on from: set model.pool=linear"),
        ("attention", None, "was trained with attention pooling: to go on with the mean of patches set model.pool=linear"),
    ],
)
def test_pretraining_does_not_make_up_a_token(
    kind: str, pool: str | None, words: str, tiny_tiles: Path, tmp_path: Path
) -> None:
    architecture, arguments, _ = KINDS[kind]
    source, _ = hub_folder(tmp_path / "model", architecture, **arguments)
    with pytest.raises(UserError, match=words):
        train(tiny_tiles, tmp_path / "run", source, pool)
    train(tiny_tiles, tmp_path / "run", source, "linear")


@pytest.mark.parametrize("kind", ["gap", "gap, registers, norm after", "eva02", "average, class token"])
def test_a_file_of_an_averaged_model_is_averaged(kind: str, tmp_path: Path) -> None:
    architecture, arguments, _ = KINDS[kind]
    _, model = hub_folder(tmp_path / "model", architecture, **arguments)
    kwargs = {key: value for key, value in {**SMALL, **arguments}.items() if key not in ("num_classes", "global_pool")}
    file = str(tmp_path / "model" / "pytorch_model.bin")
    encoder = build_encoder(architecture, kwargs, weights=file, pool="auto").eval()
    assert encoder.pool == "linear"
    with torch.no_grad():
        np.testing.assert_allclose(encoder(pixels(TILES)).obj.numpy(), own_feature(model, TILES), rtol=0, atol=1e-5)


@pytest.mark.parametrize("prefix", ["cls_token", "pos_embed", "norm.", "reg_token", "blocks.0.ls2"])
def test_a_file_that_lacks_a_part_does_not_start_a_run(prefix: str, tmp_path: Path) -> None:
    model = random_model("vit_small_patch14_reg4_dinov2")
    torch.save(without(prefix)(model.state_dict()), tmp_path / "w.pth")
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    with pytest.raises(UserError, match=f"{prefix}.*: missing there"):
        build_encoder("vit_small_patch14_reg4_dinov2", kwargs, weights=str(tmp_path / "w.pth"), pool="auto")
