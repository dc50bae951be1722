"""A model of timm or a hub folder is pooled as it was trained; weights that lack a token, norm or position are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import timm
import torch
from torch.nn import functional

from annotations.errors import UserError
from odis_path.embedding.encoder import encode_objects, load_encoder
from odis_path.embedding.run import embed
from odis_path.features import read as features
from odis_path.features.read import read_features
from odis_path.model.create import create_vit
from tests.odis_path.hub import hub_folder, own_feature, pixels, random_model
from tests.odis_path.model.test_pretrained import dino, dinov2, ibot, prefixed, transformers_dinov2, transformers_vit
from tiling.slide_file.read import SlideFile

TILES = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
PATCH = {"patch_size": 8}
# What timm builds: architecture, arguments, how it is pooled.
KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "class token": ("vit_tiny_patch16_224", {}, "cls"),
    "classifier of 1000": ("vit_tiny_patch16_224", {"num_classes": 1000}, "cls"),
    "registers": ("vit_small_patch14_reg4_dinov2", {}, "cls"),
    "gap": ("vit_base_patch16_siglip_gap_224", {}, "mean"),
    "gap, registers, norm after": ("vit_betwixt_patch16_reg4_gap_256", {}, "mean"),
    "gap, classifier": ("vit_betwixt_patch16_reg4_gap_256", {"num_classes": 1000}, "mean"),
    "average, class token": ("vit_tiny_patch16_224", {"global_pool": "avg"}, "mean"),
    "average, norm before": ("vit_tiny_patch16_224", {"global_pool": "avg", "fc_norm": False}, "mean"),
    "eva02 of 1000 classes": ("eva02_tiny_patch14_224", {"num_classes": 1000}, "mean"),
    "eva02": ("eva02_tiny_patch14_224", {"num_classes": 0}, "mean"),
    "rope, gap": ("vit_base_patch16_rope_reg1_gap_256", {}, "mean"),
    "rope, registers": ("vit_small_patch16_dinov3", {}, "mean"),
    "attention": ("vit_so400m_patch14_siglip_224", {}, "attention"),
    "layer scale, SwiGLU": ("vit_giant_patch14_dinov2", {}, "cls"),
    "no position of the class token": ("vit_tiny_patch16_224", {"no_embed_class": True, "reg_tokens": 2}, "cls"),
    "norm before the blocks": ("vit_base_patch16_clip_224", {}, "cls"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "weights.pth"])
def test_the_embedding_is_the_models_own_feature(kind: str, file: str, tmp_path: Path) -> None:
    architecture, arguments, pool = KINDS[kind]
    source, model = hub_folder(tmp_path / "model", architecture, file=file, **arguments)
    encoder = load_encoder(source, device="cpu")
    assert encoder.pool == pool
    np.testing.assert_allclose(encoder.encode(TILES), own_feature(model, TILES), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["gap", "eva02", "attention", "registers"])
def test_a_tile_of_another_size_is_seen_as_timm_sees_it(kind: str, tmp_path: Path) -> None:
    architecture, arguments, _ = KINDS[kind]
    source, _ = hub_folder(tmp_path / "model", architecture, **arguments)
    model = timm.create_model(source, pretrained=True, dynamic_img_size=True).eval()
    tiles = np.random.default_rng(1).integers(0, 256, (2, 48, 48, 3), dtype=np.uint8)
    encoder = load_encoder(source, device="cpu")
    np.testing.assert_allclose(encoder.encode(tiles), own_feature(model, tiles), rtol=0, atol=1e-5)
    assert (encoder.size_px(48), encoder.trained_px) == (48, 32)
    assert "tiles of 48 px are seen at 48 px, trained at 32 px: positions are interpolated; --resize 32" in encoder.about(48)
    assert encoder.about(32).endswith("tiles of 32 px are seen at 32 px, as trained")


LAYOUTS = {
    "dino": dino,
    "ibot": ibot,
    "wrapped": lambda s: {"state_dict": prefixed(s, "module.")},
    "dinov2": dinov2,
    "transformers dinov2": transformers_dinov2,
    "transformers vit": transformers_vit,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_may_hold_any_public_layout(layout: str, tmp_path: Path) -> None:
    architecture = "vit_small_patch14_reg4_dinov2" if "dinov2" in layout else "vit_tiny_patch16_224"
    arguments = {"num_classes": 0}
    source, model = hub_folder(tmp_path / "model", architecture, change=LAYOUTS[layout], **arguments)
    np.testing.assert_allclose(load_encoder(source).encode(TILES), own_feature(model, TILES), rtol=0, atol=1e-5)


def test_what_config_says_of_pooling_beside_its_arguments_counts(tmp_path: Path) -> None:
    """timm's `save_for_hf` writes it there, and timm's own loading passes over it."""
    source, model = hub_folder(tmp_path / "model", "vit_tiny_patch16_224", config={"global_pool": "avg"})
    expected = model.forward_features(pixels(TILES))[:, 1:].mean(1).detach().numpy()
    np.testing.assert_allclose(load_encoder(source).encode(TILES), expected, rtol=0, atol=1e-5)


def without(*keys: str) -> Any:
    return lambda state: {key: value for key, value in state.items() if not key.startswith(keys)}


MISSING = [
    ("class token", "cls_token", r"cls_token: missing there"),
    ("class token", "pos_embed", r"pos_embed: missing there"),
    ("class token", "norm.", r"norm\.weight: missing there"),
    ("registers", "reg_token", r"reg_token: missing there"),
    ("registers", "cls_token", r"cls_token: missing there"),
    ("registers", "blocks.1.ls1", r"blocks\.1\.ls1\.gamma: missing there"),
    ("gap", "norm.", r"norm\.weight: missing there"),
    ("gap", "pos_embed", r"pos_embed: missing there"),
    ("gap, registers, norm after", "fc_norm", r"fc_norm\.weight: missing there"),
    ("gap, registers, norm after", "reg_token", r"reg_token: missing there"),
    ("average, class token", "cls_token", r"cls_token: missing there"),
    ("eva02 of 1000 classes", "fc_norm", r"fc_norm\.weight: missing there"),
    ("eva02 of 1000 classes", "cls_token", r"cls_token: missing there"),
    ("eva02", "pos_embed", r"pos_embed: missing there"),
    ("attention", "attn_pool.latent", r"attn_pool\.latent: missing there"),
    ("norm before the blocks", "norm_pre", r"norm_pre\.weight: missing there"),
    ("classifier of 1000", "cls_token", r"cls_token: missing there"),
]


@pytest.mark.parametrize(("kind", "prefix", "words"), MISSING, ids=lambda value: str(value))
def test_weights_that_lack_a_token_norm_or_position_are_refused(kind: str, prefix: str, words: str, tmp_path: Path) -> None:
    architecture, arguments, _ = KINDS[kind]
    source, _ = hub_folder(tmp_path / "model", architecture, change=without(prefix), **arguments)
    with pytest.raises(UserError, match=words) as caught:
        load_encoder(source, device="cpu")
    assert str(caught.value).startswith(str(tmp_path / "model" / "pytorch_model.bin"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("gap", {"cls_token": (1, 1, 32)}),
        ("class token", {"reg_token": (1, 4, 32)}),
        ("class token", {"dist_token": (1, 1, 32)}),
        ("class token", {"blocks.0.ls1.gamma": (32,)}),
        ("class token", {"norm_pre.weight": (32,)}),
    ],
)
def test_weights_with_a_part_that_the_model_lacks_are_refused(kind: str, more: dict[str, Any], tmp_path: Path) -> None:
    architecture, arguments, _ = KINDS[kind]
    extra = {key: torch.ones(*shape) for key, shape in more.items()}
    source, _ = hub_folder(tmp_path / "model", architecture, change=lambda s: {**s, **extra}, **arguments)
    with pytest.raises(UserError, match=f"{next(iter(more))}: .* there, none in the model"):
        load_encoder(source, device="cpu")


def test_a_head_that_config_does_not_count_is_left_aside(tmp_path: Path) -> None:
    head = {"head.weight": torch.ones(5, 32), "head.bias": torch.ones(5)}
    source, model = hub_folder(
        tmp_path / "model", "vit_tiny_patch16_224", change=lambda s: {**s, **head}, num_classes=0, cfg={"num_classes": 1000}
    )
    np.testing.assert_allclose(load_encoder(source).encode(TILES), own_feature(model, TILES), rtol=0, atol=1e-5)


def test_published_weights_of_a_name_are_checked_as_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What timm fetches reaches the same comparison: here from a file that its configuration points to."""
    from timm.models import _builder

    arguments = {**{"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}, **PATCH}
    model = random_model("eva02_tiny_patch14_224")
    torch.save(model.state_dict(), tmp_path / "w.pth")
    monkeypatch.setattr(_builder, "_resolve_pretrained_source", lambda _cfg: ("file", str(tmp_path / "w.pth")))
    start = create_vit("eva02_tiny_patch14_224", arguments, weights="timm", native=True)
    assert (start.pool, start.trained_px) == ("linear", 32)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in start.vit.state_dict().items())
    torch.save(without("fc_norm")(model.state_dict()), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"model eva02_tiny.*fc_norm\.weight: missing"):
        create_vit("eva02_tiny_patch14_224", arguments, weights="timm", native=True)


def tokens_of(model: Any) -> tuple[np.ndarray, np.ndarray]:
    """Class token and mean of patches after the last norm."""
    with torch.no_grad():
        x = model.forward_features(pixels(TILES))
    return x[:, 0].numpy(), x[:, model.num_prefix_tokens :].mean(1).numpy()


@pytest.mark.parametrize("kind", ["class token", "registers", "no position of the class token"])
def test_pool_is_the_users_choice(kind: str, tmp_path: Path) -> None:
    architecture, arguments, _ = KINDS[kind]
    source, model = hub_folder(tmp_path / "model", architecture, **arguments)
    token, mean = tokens_of(model)
    expected = {"cls": token, "mean": mean, "cls+mean": np.concatenate([token, mean], axis=1)}
    for pool, feature in expected.items():
        encoder = load_encoder(source, device="cpu", pool=pool)
        assert (encoder.pool, encoder.dim) == (pool, feature.shape[1])
        np.testing.assert_allclose(encoder.encode(TILES), feature, rtol=0, atol=1e-5)


def test_a_norm_after_pooling_is_taken_by_whatever_is_pooled(tmp_path: Path) -> None:
    source, model = hub_folder(tmp_path / "model", "eva02_tiny_patch14_224")
    token, mean = (model.fc_norm(torch.from_numpy(part)).detach().numpy() for part in tokens_of(model))
    for pool, feature in {"cls": token, "cls+mean": np.concatenate([token, mean], axis=1)}.items():
        np.testing.assert_allclose(load_encoder(source, pool=pool).encode(TILES), feature, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "pool", "words"),
    [
        ("gap", "cls", "has no class token: take --pool mean"),
        ("gap", "cls+mean", "has no class token"),
        ("attention", "cls", "has no class token"),
        ("class token", "max", "--pool max: no such pooling; take one of cls, mean"),
    ],
)
def test_a_pool_that_cannot_be_is_one_line(kind: str, pool: str, words: str, tiny_tiles: Path, tmp_path: Path) -> None:
    architecture, arguments, _ = KINDS[kind]
    source, _ = hub_folder(tmp_path / "model", architecture, **arguments)
    with pytest.raises(UserError, match=words):
        embed(tiny_tiles, source, tmp_path / "out", pool=pool)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pooling", ["max", "avgmax", "prr"])
def test_pooling_that_is_not_ours_is_refused_until_another_is_asked_for(pooling: str, tmp_path: Path) -> None:
    source, _ = hub_folder(tmp_path / "model", "vit_tiny_patch16_224", global_pool=pooling)
    with pytest.raises(UserError, match=f"was trained with {pooling} pooling, .* say --pool cls, mean or cls"):
        load_encoder(source, device="cpu")
    assert load_encoder(source, device="cpu", pool="mean").dim == 32


def test_a_config_without_pooling_takes_the_class_token_and_says_so(tmp_path: Path) -> None:
    source, model = hub_folder(tmp_path / "model", "vit_tiny_patch16_224", global_pool="")
    encoder = load_encoder(source, device="cpu")
    np.testing.assert_allclose(encoder.encode(TILES), tokens_of(model)[0], rtol=0, atol=1e-5)
    assert "pooling cls (its config names none)" in encoder.about(32)


def test_mean_and_std_that_config_does_not_state_are_said_to_be_assumed(tmp_path: Path) -> None:
    source, _ = hub_folder(tmp_path / "model", "vit_tiny_patch16_224")
    assert "ImageNet" not in load_encoder(source, device="cpu").about(32)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "pretrained_cfg": {"num_classes": 1000}}))
    assert "mean and std of ImageNet, as its config.json states none" in load_encoder(source, device="cpu").about(32)


BOX = np.array([[0, 8, 16, 32], [8, 8, 24, 16], [0, 0, 32, 32]], dtype=np.float32)  # whole patches of 8 px


def in_box() -> np.ndarray:
    grid = np.zeros((3, 4, 4), dtype=bool)
    for i, (x0, y0, x1, y1) in enumerate((BOX / 8).astype(int)):
        grid[i, y0:y1, x0:x1] = True
    return grid.reshape(3, 16)


@pytest.mark.parametrize("kind", ["gap", "gap, registers, norm after", "eva02", "average, norm before"])
def test_a_box_of_an_averaged_model_is_the_mean_of_its_patches(kind: str, tmp_path: Path) -> None:
    architecture, arguments, _ = KINDS[kind]
    source, model = hub_folder(tmp_path / "model", architecture, **arguments)
    encoder = load_encoder(source, device="cpu")
    with torch.no_grad():
        patches = model.forward_features(pixels(TILES))[:, model.num_prefix_tokens :]
        means = torch.stack([patches[i][torch.from_numpy(mask)].mean(0) for i, mask in enumerate(in_box())])
        expected = model.fc_norm(means).numpy()
    np.testing.assert_allclose(encoder.encode(TILES, BOX, "masked"), expected, rtol=0, atol=1e-5)
    together = encode_objects(encoder, TILES, [BOX[i : i + 1] for i in range(3)])
    np.testing.assert_allclose(together, expected, rtol=0, atol=1e-5)
    cut = np.repeat(
        np.repeat(TILES[:1, 8:16, 8:16], 4, axis=1), 4, axis=2
    )  # any picture: crop is the model's own feature of it
    assert encoder.encode(cut, BOX[2:], "crop").shape == (1, encoder.dim)
    black = TILES.copy()
    black[~np.repeat(np.repeat(in_box().reshape(3, 4, 4), 8, 1), 8, 2)] = 0
    np.testing.assert_allclose(encoder.encode(TILES, BOX, "blackout"), own_feature(model, black), rtol=0, atol=1e-5)
    np.testing.assert_allclose(encoder.encode(TILES, BOX[[2, 2, 2]], "crop"), own_feature(model, TILES), rtol=0, atol=1e-5)


def test_a_box_of_a_model_with_attention_pooling_is_pooled_over_its_patches(tmp_path: Path) -> None:
    source, model = hub_folder(tmp_path / "model", "vit_so400m_patch14_siglip_224")
    encoder = load_encoder(source, device="cpu")
    with torch.no_grad():
        patches = model.forward_features(pixels(TILES))
        expected = torch.cat([model.attn_pool(patches[i : i + 1, torch.from_numpy(mask)]) for i, mask in enumerate(in_box())])
    np.testing.assert_allclose(encoder.encode(TILES, BOX, "masked"), expected.numpy(), rtol=0, atol=1e-5)
    together = encode_objects(encoder, TILES, [BOX[i : i + 1] for i in range(3)])
    np.testing.assert_allclose(together, expected.numpy(), rtol=0, atol=1e-5)


def test_class_token_and_mean_of_a_box_are_of_one_masked_pass(tmp_path: Path) -> None:
    source, _ = hub_folder(tmp_path / "model", "vit_tiny_patch16_224")
    both, token = (load_encoder(source, device="cpu", pool=pool) for pool in ("cls+mean", "cls"))
    embeddings = both.encode(TILES, BOX, "masked")
    np.testing.assert_allclose(embeddings[:, :32], token.encode(TILES, BOX, "masked"), rtol=0, atol=1e-6)
    with torch.no_grad():
        patches = token.module(pixels(TILES), torch.from_numpy(in_box())).patches
    means = [patches[i][torch.from_numpy(mask)].mean(0).numpy() for i, mask in enumerate(in_box())]
    np.testing.assert_allclose(embeddings[:, 32:], np.stack(means), rtol=0, atol=1e-5)


def test_resize_shows_tiles_at_the_models_size_with_their_boxes(tmp_path: Path) -> None:
    source, model = hub_folder(tmp_path / "model", "vit_tiny_patch16_224")
    encoder = load_encoder(source, device="cpu", resize=32)
    plain = load_encoder(source, device="cpu")
    tiles = np.random.default_rng(2).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    small = functional.interpolate(pixels(tiles), size=(32, 32), mode="bilinear", antialias=True, align_corners=False)
    with torch.no_grad():
        whole = model.forward_head(model.forward_features(small), pre_logits=True)
        masked = plain.module(small, torch.from_numpy(in_box())).obj
    np.testing.assert_allclose(encoder.encode(tiles), whole, rtol=0, atol=1e-5)
    np.testing.assert_allclose(encoder.encode(tiles, 2 * BOX, "masked"), masked, rtol=0, atol=1e-5)
    assert encoder.encode(tiles, 2 * BOX, "crop").shape == (3, 32)
    assert (encoder.size_px(64), plain.size_px(64)) == (32, 64)
    with pytest.raises(UserError, match=r"--resize 30: no multiple of the patch of .*, 8 px; take 24 or 32"):
        load_encoder(source, device="cpu", resize=30)


def test_feature_files_name_pool_size_used_and_size_trained_at(
    tiny_tiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, model = hub_folder(tmp_path / "model", "vit_betwixt_patch16_reg4_gap_256")
    embed(tiny_tiles, source, tmp_path / "a", dtype="float32", device="cpu")
    line = [text for text in capsys.readouterr().err.splitlines() if text.startswith("embed: local-dir:")]
    assert len(line) == 1
    assert "pooling mean (as trained); tiles of 64 px are seen at 64 px, trained at 32 px" in line[0]
    embed(tiny_tiles, source, tmp_path / "b", dtype="float32", device="cpu", resize=32)
    for folder, size in (("a", 64), ("b", 32)):
        with h5py.File(tmp_path / folder / "S0.h5") as file:
            attrs = file["features"].attrs
            assert (attrs["pool"], attrs["size_px"], attrs["trained_px"]) == ("mean", size, 32)
    with SlideFile(tiny_tiles / "S1.h5") as slide:
        tiles = np.stack([slide.tile(i) for i in range(12)])
    encoder = load_encoder(source, device="cpu", resize=32)
    assert np.allclose(read_features(tmp_path / "b" / "S1.h5").x, encoder.encode(tiles), atol=1e-5)
    assert model.num_prefix_tokens == 4


def test_another_pool_or_size_is_embedded_again_and_never_mixed(tiny_tiles: Path, tmp_path: Path) -> None:
    source, _ = hub_folder(tmp_path / "model", "vit_tiny_patch16_224")

    def skipped(out: str, **options: Any) -> set[bool]:
        return {o.skipped for o in embed(tiny_tiles, source, tmp_path / out, device="cpu", **options)}

    assert skipped("a") == {False}
    assert skipped("a") == {True}
    with pytest.raises(UserError, match="--overwrite"):
        skipped("a", pool="mean")
    assert skipped("a", pool="mean", overwrite=True) == {False}
    assert skipped("a", pool="mean") == {True}
    assert skipped("a", pool="mean", resize=32, overwrite=True) == {False}
    with pytest.raises(UserError, match="holds embeddings of another encoder"):
        embed(tiny_tiles, source, tmp_path / "a", level="object", pool="cls", device="cpu")
    embed(tiny_tiles, source, tmp_path / "other", device="cpu")
    (tmp_path / "a" / "S0.h5").unlink()
    (tmp_path / "other" / "S0.h5").rename(tmp_path / "a" / "S0.h5")
    with pytest.raises(UserError, match=r"encoder is .*pool mean"):
        features.read_features(tmp_path / "a")


def test_other_weights_or_config_in_the_folder_are_embedded_again(tiny_tiles: Path, tmp_path: Path) -> None:
    source, _ = hub_folder(tmp_path / "model", "vit_tiny_patch16_224")
    embed(tiny_tiles, source, tmp_path / "out", device="cpu")
    assert all(o.skipped for o in embed(tiny_tiles, str(tmp_path / "model"), tmp_path / "out", device="cpu"))
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "global_pool": "avg"}))
    assert not any(o.skipped for o in embed(tiny_tiles, source, tmp_path / "out", device="cpu", overwrite=True))
    hub_folder(tmp_path / "model", "vit_tiny_patch16_224", change=lambda s: {k: v + 0.1 for k, v in s.items()})
    assert not any(o.skipped for o in embed(tiny_tiles, source, tmp_path / "out", device="cpu", overwrite=True))


def test_random_weights_are_of_the_same_architecture_and_pooled_alike(tmp_path: Path) -> None:
    source, model = hub_folder(tmp_path / "model", "eva02_tiny_patch14_224")
    encoder = load_encoder(source, device="cpu", random_weights=True)
    assert (encoder.pool, encoder.name) == ("mean", f"random:{source}")
    shapes = {key: value.shape for key, value in model.state_dict().items() if not key.startswith("head.")}
    assert {key: value.shape for key, value in encoder.module.vit.state_dict().items()} == shapes
