"""Weights of others: every public key layout loads to the same features, and what does not fit is one line."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor, nn

from annotations.errors import UserError
from odis_path.model.architectures import BASE_KWARGS
from odis_path.model.pretrained import load_weights
from odis_path.model.vit import build_encoder

TINY: dict[str, Any] = {"depth": 2, "num_heads": 2, "embed_dim": 32, "img_size": 32}
State = dict[str, Tensor]


def build(name: str = "vit_tiny_patch16_224", seed: int = 0, **kwargs: Any) -> nn.Module:
    """A tiny timm model with random weights, position and tokens included, in eval mode."""
    torch.manual_seed(seed)
    options = {**BASE_KWARGS, **TINY, **({"patch_size": 8} if "patch16" in name else {}), **kwargs}
    vit = timm.create_model(name, **options)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return vit.eval()


def features(vit: nn.Module, side: int | None = None) -> Tensor:
    """All tokens after the last norm for the same two images."""
    side = side or TINY["img_size"] // vit.patch_embed.patch_size[0] * vit.patch_embed.patch_size[0]
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return vit.forward_features(images)


def save(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def head() -> State:
    return {"mlp.0.weight": torch.ones(4, 32), "last_layer.weight_g": torch.ones(8, 1)}


def dino(state: State) -> dict[str, Any]:
    """facebookresearch/dino, save_dict of main_dino: the student wrapped for many GPUs, the teacher bare."""
    student = {**prefixed({k: v + 1 for k, v in state.items()}, "backbone."), **prefixed(head(), "head.")}
    return {
        "student": prefixed(student, "module."),
        "teacher": {**prefixed(state, "backbone."), **prefixed(head(), "head.")},
        "optimizer": {"state": {0: {"step": 1}}, "param_groups": []},
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_small", patch_size=16, lr=5e-4),
        "dino_loss": {"center": torch.zeros(1, 8)},
    }


def ibot(state: State) -> dict[str, Any]:
    """bytedance/ibot: the same, and a masked_embed (1, D) that its student alone has."""
    content = dino(state)
    content["student"]["module.backbone.masked_embed"] = torch.full((1, 32), 0.5)
    return content


def dinov2(state: State) -> State:
    """facebookresearch/dinov2 as published: the class token has a position, registers and SwiGLU have other names."""
    state = dict(state)
    if "reg_token" in state:
        position = torch.randn(1, 1, 32)
        state["register_tokens"] = state.pop("reg_token")
        state["cls_token"] = state["cls_token"] - position
        state["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
    state["mask_token"] = torch.full((1, 32), 0.5)
    if any(v.shape[0] == 170 for k, v in state.items() if "mlp.fc1.weight" in k):
        state = {k.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): v for k, v in state.items()}
    return state


def dinov2_training(state: State) -> dict[str, Any]:
    """teacher_checkpoint.pth of a DINOv2 run: blocks in chunks, two heads beside the backbone."""
    chunked = {
        (k.replace("blocks.", f"blocks.{k.split('.')[1]}.") if k.startswith("blocks") else k): v for k, v in state.items()
    }
    chunked = {**prefixed(dinov2(chunked), "backbone."), **prefixed(head(), "dino_head."), **prefixed(head(), "ibot_head.")}
    return {"teacher": chunked}


def dinov3(state: State) -> State:
    """facebookresearch/dinov3 as published: storage tokens, a zero bias, the periods of its rotary embedding."""
    names = {"reg_token": "storage_tokens"}
    out = {names.get(k, k).replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma"): v for k, v in state.items()}
    for block in range(2):
        out[f"blocks.{block}.attn.qkv.bias"] = torch.zeros(96)
        out[f"blocks.{block}.attn.qkv.bias_mask"] = torch.ones(96)
    return {**out, "mask_token": torch.full((1, 32), 0.5), "rope_embed.periods": torch.ones(4)}


def transformers_dinov2(state: State) -> State:
    """transformers' Dinov2WithRegisters: the layout of Hibou and of facebook/dinov2-* on the hub."""
    return to_transformers(dinov2(state), norm=("norm1", "norm2"), mlp=("mlp.fc1", "mlp.fc2"))


def transformers_vit(state: State) -> State:
    """transformers' ViT, the layout of Phikon; its pooler is no part of the backbone."""
    out = to_transformers(state, norm=("layernorm_before", "layernorm_after"), mlp=("intermediate.dense", "output.dense"))
    return prefixed({**out, "pooler.dense.weight": torch.ones(32, 32)}, "vit.")


def to_transformers(state: State, *, norm: tuple[str, str], mlp: tuple[str, str]) -> State:
    out: State = {}
    for key, value in state.items():
        if key.startswith("blocks."):
            key = "encoder.layer." + key.removeprefix("blocks.")
            for old, new in (("mlp.fc1", mlp[0]), ("mlp.fc2", mlp[1]), ("norm1", norm[0]), ("norm2", norm[1])):
                key = key.replace(old, new)
            key = key.replace("mlp.w12", "mlp.weights_in").replace("mlp.w3", "mlp.weights_out")
            key = key.replace("ls1.gamma", "layer_scale1.lambda1").replace("ls2.gamma", "layer_scale2.lambda1")
            key = key.replace("attn.proj", "attention.output.dense")
            if "attn.qkv" in key:
                for name, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    out[key.replace("attn.qkv", f"attention.attention.{name}")] = part
                continue
        elif key.startswith("norm."):
            key = "layernorm." + key.removeprefix("norm.")
        else:
            key = key.replace("patch_embed.proj", "patch_embeddings.projection").replace("pos_embed", "position_embeddings")
            key = "embeddings." + key
        out[key] = value
    return out


def own(state: State) -> dict[str, Any]:
    """A checkpoint of `odis-path pretrain`."""
    teacher = {
        **prefixed(state, "encoder.vit."),
        "encoder.mask_token": torch.full((1, 1, 32), 0.5),
        **prefixed(head(), "head."),
    }
    return {"format": "odis-path-checkpoint", "student": {k: v + 1 for k, v in teacher.items()}, "teacher": teacher, "step": 2}


REGISTERS = {"name": "vit_small_patch14_reg4_dinov2", "img_size": 28}
SWIGLU = {**REGISTERS, "mlp_ratio": 2.66667 * 2, "mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU}
EVA = {"name": "eva02_tiny_patch14_224", "img_size": 28}
DINOV3 = {"name": "vit_small_patch16_dinov3"}
LAYOUTS: list[tuple[str, dict[str, Any], Callable[[State], Any], bool]] = [
    ("timm", {}, dict, False),
    ("timm", REGISTERS, dict, False),
    ("timm", EVA, dict, False),
    ("timm", DINOV3, dict, False),
    ("timm", {"reg_tokens": 4}, dict, False),  # Virchow2's form: registers have positions
    ("timm", {}, lambda s: {"state_dict": {**s, "head.weight": torch.ones(5, 32)}}, False),
    ("timm", {}, lambda s: {"model": prefixed(s, "module."), "optimizer": {}}, False),
    ("timm", {}, lambda s: {"model_state": s}, False),
    ("timm", {}, lambda s: {"model": {k: v + 1 for k, v in s.items()}, "model_ema": s}, False),
    ("timm", {}, lambda s: {"state_dict": {**prefixed(s, "teacher.model."), **prefixed(s, "student.model.")}}, False),
    ("odis-path, teacher", {}, own, True),
    ("odis-path, teacher", EVA, own, True),
    ("DINO or iBOT, teacher", {}, dino, False),
    ("DINO or iBOT, teacher", {}, ibot, True),
    ("DINOv2", REGISTERS, dinov2, True),
    ("DINOv2", SWIGLU, dinov2, True),
    ("DINOv2, teacher", REGISTERS, dinov2_training, True),
    ("DINOv3", DINOV3, dinov3, True),
    ("transformers", REGISTERS, transformers_dinov2, True),
    ("transformers", SWIGLU, transformers_dinov2, True),
    ("transformers", {}, transformers_vit, False),
]


@pytest.mark.parametrize(("layout", "kwargs", "write", "token"), LAYOUTS)
def test_every_layout_gives_the_same_features(
    layout: str, kwargs: dict[str, Any], write: Callable[[State], Any], token: bool, tmp_path: Path
) -> None:
    source, target = build(seed=1, **kwargs), build(seed=2, **kwargs)
    if "mlp_layer" in kwargs:  # the SwiGLU layers have other names there, or this proves nothing
        assert not any("mlp.fc1" in key for key in write(source.state_dict()))
    assert not torch.allclose(features(source), features(target), atol=1e-2)
    report = load_weights(target, save(write(source.state_dict()), tmp_path / "weights.pth"))
    torch.testing.assert_close(features(target), features(source), rtol=0, atol=1e-5)
    assert (report.layout, report.loaded, report.resampled) == (layout, len(target.state_dict()), False)
    assert (report.mask_token is not None) == token
    if report.mask_token is not None:
        assert torch.equal(report.mask_token, torch.full((1, 1, 32), 0.5))


def test_safetensors_and_heads(tmp_path: Path) -> None:
    source, target = build(seed=1), build(seed=2)
    save_file({**source.state_dict(), "head.weight": torch.ones(5, 32)}, tmp_path / "model.safetensors")
    report = load_weights(target, tmp_path / "model.safetensors")
    assert torch.equal(features(target), features(source))
    assert report.dropped == ("head.weight",)


def test_heads_stay_where_the_model_has_one(tmp_path: Path) -> None:
    source, target = build(seed=1, num_classes=5), build(seed=2, num_classes=5)
    assert load_weights(target, save(source.state_dict(), tmp_path / "a.pt")).dropped == ()
    assert torch.equal(target.head.weight, source.head.weight)


@pytest.mark.parametrize("kwargs", [{}, {"reg_tokens": 4}, REGISTERS, EVA])
def test_another_grid_is_resampled_as_timm_does(kwargs: dict[str, Any], tmp_path: Path) -> None:
    big = kwargs.get("img_size", 32) * 2
    source, target = build(seed=1, **kwargs), build(seed=2, **{**kwargs, "img_size": big})
    report = load_weights(target, save(source.state_dict(), tmp_path / "a.pt"))
    prefix = 0 if target.no_embed_class else target.num_prefix_tokens
    expected = resample_abs_pos_embed(source.pos_embed, new_size=list(target.patch_embed.grid_size), num_prefix_tokens=prefix)
    assert report.resampled
    assert source.pos_embed.shape != target.pos_embed.shape
    torch.testing.assert_close(target.pos_embed, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(target.blocks[0].attn.proj.weight, source.blocks[0].attn.proj.weight)


def test_dinov2_is_resampled_without_the_class_position(tmp_path: Path) -> None:
    source, target = build(seed=1, **{**REGISTERS, "img_size": 70}), build(seed=2, **REGISTERS)
    report = load_weights(target, save(dinov2(source.state_dict()), tmp_path / "a.pt"))
    expected = resample_abs_pos_embed(source.pos_embed, new_size=[2, 2], num_prefix_tokens=0)
    assert report.resampled
    torch.testing.assert_close(target.pos_embed, expected, rtol=0, atol=1e-6)


def test_another_patch_size_is_resampled(tmp_path: Path) -> None:
    source, target = build(seed=1), build(seed=2, patch_size=16, img_size=64)
    report = load_weights(target, save(source.state_dict(), tmp_path / "a.pt"))
    expected = resample_patch_embed(source.patch_embed.proj.weight, [16, 16])
    assert report.resampled
    torch.testing.assert_close(target.patch_embed.proj.weight, expected)


def test_a_class_position_folds_into_a_model_that_keeps_none(tmp_path: Path) -> None:
    source, target = build(seed=1), build(seed=2, no_embed_class=True)
    assert source.pos_embed.shape[1] == target.pos_embed.shape[1] + 1
    report = load_weights(target, save(source.state_dict(), tmp_path / "a.pt"))
    torch.testing.assert_close(features(target), features(source), rtol=0, atol=1e-6)
    assert not report.resampled


def test_a_bias_that_is_not_zero_is_not_lost(tmp_path: Path) -> None:
    state = dinov3(build(seed=1, **DINOV3).state_dict())
    state["blocks.1.attn.qkv.bias"][3] = 0.1
    with pytest.raises(UserError, match=r"blocks\.1\.attn\.qkv\.bias is not zero.*_qkvb") as caught:
        load_weights(build(seed=2, **DINOV3), save(state, tmp_path / "a.pt"))
    assert "\n" not in str(caught.value)
    target, source = build("vit_small_patch16_dinov3_qkvb", seed=2), build("vit_small_patch16_dinov3_qkvb", seed=1)
    plain = {k: v for k, v in source.state_dict().items() if not k.endswith(("q_bias", "v_bias"))}
    state = dinov3(plain)
    for i, block in enumerate(source.blocks):
        state[f"blocks.{i}.attn.qkv.bias"] = torch.cat([block.attn.q_bias, torch.zeros(32), block.attn.v_bias]).detach()
    load_weights(target, save(state, tmp_path / "b.pt"))
    torch.testing.assert_close(features(target), features(source), rtol=0, atol=1e-5)


def test_half_precision_files_load(tmp_path: Path) -> None:
    source, target = build(seed=1), build(seed=2, img_size=64)
    half = {k: v.half() for k, v in source.state_dict().items()}
    load_weights(target, save(half, tmp_path / "a.pt"))
    expected = resample_abs_pos_embed(half["pos_embed"].float(), new_size=[8, 8], num_prefix_tokens=1)
    torch.testing.assert_close(target.pos_embed, expected)
    assert target.norm.weight.dtype == torch.float32


class Foreign:
    """A class of someone else, in a pickle."""


class Runs:
    """A pickle that would run a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran"),))


def damaged(kind: str, folder: Path) -> Path:
    """A weight file with one thing wrong."""
    state = build(seed=1).state_dict()
    path = folder / "w.pth"
    if kind == "torn":
        save(state, path)
        path.write_bytes(path.read_bytes()[:3000])
    elif kind == "torn safetensors":
        path = folder / "w.safetensors"
        save_file(state, path)
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
    elif kind == "folder":
        path.mkdir()
    elif kind == "foreign class":
        save({**state, "args": Foreign()}, path)
    elif kind == "runs":
        save({**state, "args": Runs()}, path)
    elif kind == "plain pickle":
        path.write_bytes(pickle.dumps({"a": Foreign()}, protocol=2))
    elif kind == "list":
        save([1, 2], path)
    elif kind == "no vit":
        save({"conv1.weight": torch.ones(2), "epoch": 3}, path)
    elif kind == "wrong width":
        save(build(seed=1, embed_dim=48).state_dict(), path)
    elif kind == "deeper":
        save(build(seed=1, depth=3).state_dict(), path)
    elif kind == "missing key":
        save({k: v for k, v in state.items() if k != "blocks.1.norm2.bias"}, path)
    elif kind == "extra key":
        save({**state, "dist_token": torch.ones(1, 1, 32)}, path)
    elif kind == "odd grid":
        save({**state, "pos_embed": torch.ones(1, 14, 32)}, path)
    elif kind == "two backbones":
        save({**prefixed(state, "a."), **prefixed(state, "b.")}, path)
    return path


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("gone", "no such file"),
        ("folder", "a folder"),
        ("torn", "not readable"),
        ("torn safetensors", "not readable"),
        ("empty", "not readable"),
        ("text", "not readable"),
        ("foreign class", "Foreign"),
        ("runs", "pathlib"),
        ("plain pickle", "not readable"),
        ("list", "holds list"),
        ("no vit", "conv1.weight"),
        ("wrong width", r"cls_token: \(1, 1, 48\) there, \(1, 1, 32\) in the model \(\d+ differences\)"),
        ("deeper", r"blocks\.2\.norm1\.weight: \(32,\) there, none in the model \(12 differences\)"),
        ("missing key", r"blocks\.1\.norm2\.bias: missing there, \(32,\) in the model \(1 differences\)"),
        ("extra key", "dist_token"),
        ("odd grid", "fit"),
        ("two backbones", r"2 backbones \(a\., b\.\)"),
    ],
)
def test_what_does_not_fit_is_one_line(kind: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    vit = build(seed=2)
    before = features(vit)
    path = damaged(kind, tmp_path)
    with pytest.raises(UserError, match=says) as caught:
        load_weights(vit, path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert torch.equal(features(vit), before)
    assert not (tmp_path / "ran").exists()


def test_an_encoder_starts_from_a_file_with_its_mask_token(tmp_path: Path) -> None:
    kwargs = {**TINY, "patch_size": 8}
    source = build(seed=1)
    path = save(ibot(source.state_dict()), tmp_path / "ibot.pth")
    encoder = build_encoder("Ti/16", kwargs, weights=str(path)).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images).obj, source(images), rtol=0, atol=1e-6)
    assert torch.equal(encoder.mask_token.detach(), torch.full((1, 1, 32), 0.5))
    assert encoder.mask_token.requires_grad
