"""The encoder's own parts against timm's, and compiled views against plain ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from odis_path.config import PretrainConfig
from odis_path.data.augment import ColourRule, apply_colours, draw_colours
from odis_path.data.crops import Crop, crop_matrices
from odis_path.data.views import cut_views, view_images
from odis_path.distributed import Ranks
from odis_path.model.layers import DropPath, additive, embed_patches
from odis_path.model.vit import attention_mask, build_encoder
from odis_path.training import compile as compiling

TINY: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_patches_by_one_matrix_product_are_timms_convolution_with_gradients(name: str) -> None:
    vit: Any = timm.create_model(name, dynamic_img_size=True, **TINY).double()
    images = torch.randn(2, 3, 24, 40, dtype=torch.float64, requires_grad=True)
    ours, timms = embed_patches(vit.patch_embed, images), vit.patch_embed(images)
    assert ours.shape == (2, 3, 5, 32)
    torch.testing.assert_close(ours, timms, rtol=0, atol=1e-12)
    weight = torch.randn_like(ours)
    wanted = [images, vit.patch_embed.proj.weight, vit.patch_embed.proj.bias]
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), wanted) for y in (ours, timms)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_a_patch_embedding_of_another_kind_is_left_to_timm() -> None:
    class Overlapping(nn.Module):
        patch_size = (8, 8)

        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Conv2d(3, 4, 8, stride=4)

        def forward(self, images: Tensor) -> Tensor:
            return self.proj(images)

    module, images = Overlapping(), torch.randn(1, 3, 16, 16)
    assert torch.equal(embed_patches(module, images), module(images))


def test_drop_path_keeps_the_mean_drops_whole_samples_and_is_off_in_eval() -> None:
    torch.manual_seed(0)
    layer, x = DropPath(0.3), torch.ones(20000, 2, 3)
    dropped = layer.train()(x)
    assert dropped.unique().tolist() == [0.0, pytest.approx(1 / 0.7)]
    assert (dropped.flatten(1).std(1) == 0).all()
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.02)
    assert torch.equal(layer.eval()(x), x)


def test_every_block_of_a_student_drops_with_the_probability_timm_gives_its_depth() -> None:
    vit: Any = build_encoder("vit_tiny_patch16_224", TINY, drop_path=0.2).vit
    keep = [[float(layer.keep) for layer in (block.drop_path1, block.drop_path2)] for block in vit.blocks]
    assert keep == [[1.0, 1.0], [pytest.approx(0.9)] * 2, [pytest.approx(0.8)] * 2]
    assert not any("drop_path" in name for name in vit.state_dict())
    teacher: Any = build_encoder("vit_tiny_patch16_224", TINY).vit
    assert not any(isinstance(module, DropPath) for module in teacher.modules())


def test_the_additive_mask_is_zero_and_minus_infinity_in_the_type_of_attention() -> None:
    mask = attention_mask(torch.tensor([[True, False, True, True], [False, True, False, False]]), 1)
    plain = additive(mask, torch.zeros(1, dtype=torch.float64))
    assert plain.dtype == torch.float64
    assert torch.equal(plain, torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, float("-inf")))
    assert plain.stride(-2) % 8 == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert additive(mask, torch.zeros(1)).dtype == torch.bfloat16


def batch_of_views(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two tiles, three views each: uint8 tiles, affine maps, colours of every kind, hue in HSV."""
    rng = np.random.default_rng(seed)
    tiles = torch.from_numpy(rng.integers(0, 256, (2, 40, 40, 3), dtype=np.uint8))
    views = [Crop(int(x), int(y), 24, 30, int(turn), 16) for x, y, turn in rng.integers(0, 8, (6, 3))]
    theta = torch.from_numpy(crop_matrices(views, 40)).view(3, 2, 2, 3)
    rule = ColourRule(stain_p=0.7, stain_scale=0.3, stain_shift=0.1, solarise_p=0.5, gray_p=0.3, hue_space="hsv")
    colours = torch.from_numpy(draw_colours(rng, (rule,) * 6)).view(3, 2, -1)
    return tiles, theta, colours


def test_views_of_a_tile_are_what_each_alone_would_be() -> None:
    tiles, theta, _ = batch_of_views(0)
    images = tiles.permute(0, 3, 1, 2).double() / 255
    every = cut_views(images, theta, 16, 1.9)
    for view in range(3):
        for tile in range(2):
            alone = cut_views(images[tile : tile + 1], theta[view : view + 1, tile : tile + 1], 16, 1.9)
            torch.testing.assert_close(every[2 * view + tile], alone[0], rtol=0, atol=1e-12)


def test_blurring_every_row_blurs_none_whose_sigma_is_zero() -> None:
    """What is compiled blurs all rows; what is not picks them."""
    tiles, theta, colours = batch_of_views(1)
    packed = colours.flatten(0, 1).clone()
    packed[::2, 22] = 0.0
    images = cut_views(tiles.permute(0, 3, 1, 2).double() / 255, theta, 16)
    rows = packed[:, 22].nonzero()[:, 0]
    torch.testing.assert_close(apply_colours(images, packed, None), apply_colours(images, packed, rows), rtol=0, atol=1e-9)


def test_the_form_for_the_compiler_gives_the_same_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spelled-out products and blur, as a GPU's compiler sees them, against the plain ones."""
    tiles, theta, colours = batch_of_views(2)
    options: dict[str, Any] = {"size_px": 16, "max_shrink": 1.9, "mean": (0.5,) * 3, "std": (0.2,) * 3}
    plain = view_images(tiles, theta, colours, None, **options)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(view_images(tiles, theta, colours, None, **options), plain, rtol=0, atol=2e-5)


STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])


def test_stain_changes_scale_and_shift_each_stain_and_nothing_else() -> None:
    """Ruifrok: a pixel is amounts times stains; amounts come out times a gain plus a shift, within their bounds."""
    stains = STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True)
    rule = ColourRule(jitter_p=0, gray_p=0, blur_p=0, stain_p=1, stain_scale=0.3, stain_shift=0.05)
    packed = draw_colours(np.random.default_rng(0), (rule,) * 400).astype(np.float64)
    assert np.allclose(packed[:, 12:21].reshape(-1, 3, 3), np.eye(3))
    density = packed[:, :12].reshape(-1, 3, 4)
    base = density[:, :, 3] @ np.linalg.inv(stains)  # amounts of a pixel that had none
    amounts_by_stain = [(density[:, :, :3] @ stain) @ np.linalg.inv(stains) for stain in stains]
    gains = np.stack([amounts[:, i] for i, amounts in enumerate(amounts_by_stain)], axis=1)
    assert all(np.abs(np.delete(amounts, i, axis=1)).max() < 1e-5 for i, amounts in enumerate(amounts_by_stain))
    for drawn, low, high in ((gains, 0.7, 1.3), (base, -0.05, 0.05)):
        assert drawn.min() >= low - 1e-5
        assert drawn.max() <= high + 1e-5
        assert np.ptp(drawn, axis=0).min() > 0.9 * (high - low)
        assert np.abs(np.corrcoef(drawn.T) - np.eye(3)).max() < 0.2  # each stain by itself


def test_chances_and_strengths_are_those_of_each_views_own_rule() -> None:
    never = ColourRule(jitter_p=0, gray_p=0, blur_p=0, solarise_p=0)
    always = ColourRule(jitter_p=1, gray_p=1, blur_p=1, solarise_p=1, blur_sigma=(0.5, 0.7))
    half = ColourRule(jitter_p=0.5, gray_p=0, blur_p=0.5, solarise_p=0.5)
    packed = draw_colours(np.random.default_rng(1), (never,) * 50 + (always,) * 50 + (half,) * 2000)
    still = np.concatenate([np.eye(3, 4).ravel(), np.eye(3).ravel(), [1, 0, 0]])
    assert np.allclose(packed[:50], still)
    gray = packed[50:100, 12:21].reshape(-1, 3, 3)
    assert np.allclose(gray, gray[:, :1])  # every channel is the same mixture
    assert ((packed[50:100, 22] >= 0.5) & (packed[50:100, 22] <= 0.7)).all()
    assert (packed[50:100, 23] == 1).all()
    for column in ((packed[100:, 21] != 1), packed[100:, 22] > 0, packed[100:, 23] == 1):
        assert 0.45 < column.mean() < 0.55
    assert np.abs(packed[100:, 21] - 1).max() <= 0.4


def test_a_change_of_hue_keeps_greys_and_luma_and_saturation_alone_pulls_towards_grey() -> None:
    luma = np.array([0.299, 0.587, 0.114])
    rule = ColourRule(jitter_p=1, gray_p=0, brightness=0, contrast=0, saturation=0.5, hue=0.5)
    matrices = draw_colours(np.random.default_rng(2), (rule,) * 100)[:, 12:21].reshape(-1, 3, 3).astype(np.float64)
    assert np.abs(matrices @ np.full(3, 0.4) - 0.4).max() < 1e-3
    assert np.abs(luma @ matrices - luma).max() < 2e-3  # YIQ's published matrix has three decimals


@pytest.mark.parametrize(
    ("wanted", "device", "lacks", "compiled"),
    [
        ("auto", "cpu", "", False),
        ("auto", "cuda", "", True),
        ("auto", "cuda", "a C compiler", False),
        (True, "cpu", "", True),
        (False, "cuda", "", False),
    ],
)
def test_auto_compiles_on_a_gpu_and_says_what_is_missing_there(
    wanted: Any, device: str, lacks: str, compiled: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiling, "missing_for_compiling", lambda: lacks)
    config = PretrainConfig.model_validate({"model": {"compile_blocks": wanted}})
    assert compiling.compiles(config, Ranks(0, 1, torch.device(device))) is compiled
    assert (lacks in capsys.readouterr().err) if lacks else capsys.readouterr().err == ""


def test_a_machine_without_a_compiler_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "find_spec", lambda _name: object())
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert "C compiler" in compiling.missing_for_compiling()
