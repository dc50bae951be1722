"""Masked attention against the post's formula in float64, and what it promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from annotations.errors import UserError
from odis_path.embedding.encoder import box_masks
from odis_path.model.vit import ObjViT, attention_mask, build_encoder

TINY: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("vit_tiny_patch16_224", TINY),
    "registers": ("vit_small_patch14_reg4_dinov2", {**TINY, "patch_size": 14, "img_size": 56}),
    "rope": ("eva02_tiny_patch14_224", {**TINY, "patch_size": 14, "img_size": 56}),
    "rope, registers": ("vit_small_patch16_dinov3", {**TINY, "num_heads": 2}),
}


@pytest.fixture(params=sorted(KINDS))
def encoder(request: pytest.FixtureRequest) -> ObjViT:
    torch.manual_seed(0)
    name, kwargs = KINDS[request.param]
    return shaken(build_encoder(name, kwargs))


def shaken(model: ObjViT) -> ObjViT:
    """In float64, with every parameter moved: layer scale and zero tokens would hide mistakes."""
    for parameter in model.double().eval().parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def images_for(encoder: ObjViT, count: int = 3) -> Tensor:
    side = 4 * encoder.patch_px
    return torch.randn(count, 3, side, side, dtype=torch.float64)


def masks_for(count: int, patches: int = 16) -> Tensor:
    mask = torch.zeros(count, patches, dtype=torch.bool)
    for i in range(count):
        mask[i, 3 * i + 1 : 3 * i + 5] = True
    return mask


def attention_by_hand(attention: Any, x: Tensor, mask: Tensor, registers: int, rope: Tensor | None) -> Tensor:
    """The post's formula, row by row: scores of [OBJ] outside the box are -inf before the softmax."""
    batch, total, width = x.shape
    heads = attention.num_heads
    if attention.qkv is None:
        parts = [project(x) for project in (attention.q_proj, attention.k_proj, attention.v_proj)]
    else:
        parts = list(attention.qkv(x).chunk(3, -1))
        if getattr(attention, "q_bias", None) is not None:  # eva: no bias of k
            parts = [parts[0] + attention.q_bias, parts[1], parts[2] + attention.v_bias]
    q, k, v = (part.reshape(batch, total, heads, width // heads).transpose(1, 2) for part in parts)
    if rope is not None:
        q, k = rotated(q, rope, 1 + registers, attention.rotate_half), rotated(k, rope, 1 + registers, attention.rotate_half)
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / (width // heads) ** 0.5
    for b in range(batch):
        for j in range(1, total):
            if j <= registers or not mask[b, j - 1 - registers]:
                scores[b, :, 0, j] = float("-inf")
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    out = torch.einsum("bhqk,bhkd->bqhd", weights, v).reshape(batch, total, width)
    return attention.proj(attention.norm(out))


def rotated(x: Tensor, rope: Tensor, first: int, half: bool) -> Tensor:
    """Pairs of features of each patch turned by its angles; [OBJ] and registers as they are."""
    sin, cos = rope.chunk(2, -1)
    patches = x[:, :, first:]
    if half:
        a, b = patches.chunk(2, -1)
        turned = torch.cat([-b, a], -1)
    else:
        turned = torch.stack([-patches[..., 1::2], patches[..., ::2]], -1).flatten(-2)
    return torch.cat([x[:, :, :first], patches * cos + turned * sin], dim=2)


def test_masked_attention_is_the_formula_in_float64_with_gradients(encoder: ObjViT) -> None:
    torch.manual_seed(1)
    attention: Any = encoder.vit.blocks[0].attn  # type: ignore[index]
    total = 1 + encoder.registers + 16
    x = torch.randn(3, total, 32, dtype=torch.float64, requires_grad=True)
    mask = masks_for(3)
    _, rope = encoder._embed(images_for(encoder), 1, None)
    more = {} if rope is None else {"rope": rope}
    ours = attention(x, attn_mask=attention_mask(mask, encoder.registers), **more)
    hand = attention_by_hand(attention, x, mask, encoder.registers, rope)
    assert torch.allclose(ours, hand, atol=1e-10, rtol=0)
    weight = torch.randn_like(ours)
    gradients = [torch.autograd.grad((y * weight).sum(), x, retain_graph=True)[0] for y in (ours, hand)]
    assert torch.allclose(gradients[0], gradients[1], atol=1e-10, rtol=0)


def test_every_layer_is_masked(encoder: ObjViT, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    for block in encoder.vit.blocks:  # type: ignore[union-attr]
        plain = block.attn.forward

        def spy(x: Tensor, attn_mask: Tensor | None = None, plain: Any = plain, **more: Any) -> Tensor:
            assert attn_mask is not None
            seen.append(attn_mask)
            return plain(x, attn_mask=attn_mask, **more)

        monkeypatch.setattr(block.attn, "forward", spy)
    mask = masks_for(3)
    encoder(images_for(encoder), mask)
    assert len(seen) == 3
    allowed = attention_mask(mask, encoder.registers)
    assert all(m.dtype == torch.float64 and torch.equal(m == 0, allowed) and torch.equal(m.isneginf(), ~allowed) for m in seen)


def test_one_layer_of_obj_is_bit_identical_whatever_lies_outside_the_box(encoder: ObjViT) -> None:
    encoder.vit.blocks = encoder.vit.blocks[:1]  # type: ignore[index]
    images, mask = images_for(encoder), masks_for(3)
    p = encoder.patch_px
    grid = mask.reshape(3, 1, 4, 4).repeat_interleave(p, 2).repeat_interleave(p, 3)
    other = torch.where(grid, images, torch.randn_like(images))
    a, b = encoder(images, mask), encoder(other, mask)
    assert torch.equal(a.obj, b.obj)
    inside = mask[..., None].expand_as(a.patches)
    assert (a.patches[inside] != b.patches[inside]).any()  # in-box patches see their context


def test_the_mask_changes_the_token_and_a_full_mask_does_not(encoder: ObjViT) -> None:
    images = images_for(encoder)
    full = torch.ones(3, 16, dtype=torch.bool)
    assert torch.allclose(encoder(images).obj, encoder(images, full).obj, atol=1e-12)
    assert not torch.allclose(encoder(images).obj, encoder(images, masks_for(3)).obj)


def test_unmasked_tokens_are_timms_own(encoder: ObjViT) -> None:
    images = images_for(encoder)
    vit: Any = encoder.vit
    assert torch.allclose(encoder(images).obj, vit.forward_features(images)[:, 0], atol=1e-12)


def test_hidden_patches_are_replaced_before_the_position_embedding(encoder: ObjViT) -> None:
    images = images_for(encoder, 1)
    hidden = torch.ones(1, 16, dtype=torch.bool)
    first = encoder(images, None, hidden)
    assert torch.equal(first.patches, encoder(torch.randn_like(images), None, hidden).patches)
    assert not torch.allclose(first.patches[0, 0], first.patches[0, 1])  # positions still tell them apart


def test_linear_pooling_is_the_mean_of_in_box_patches(encoder: ObjViT) -> None:
    images, mask = images_for(encoder), masks_for(3)
    patches = encoder(images).patches
    encoder.pool = "linear"
    by_hand = torch.stack([patches[i][mask[i]].mean(0) for i in range(3)])
    assert torch.allclose(encoder(images, mask).obj, by_hand, atol=1e-12)


def test_checkpointed_blocks_give_the_same_gradients(encoder: ObjViT) -> None:
    images, mask = images_for(encoder), masks_for(3)
    gradients = []
    for on in (False, True):
        encoder.train().checkpoint_blocks = on
        encoder.zero_grad()
        encoder(images, mask).obj.square().sum().backward()
        gradients.append([p.grad.clone() for p in encoder.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_obj_attention_stays_in_the_box_and_is_the_models_own(encoder: ObjViT) -> None:
    images, mask = images_for(encoder), masks_for(3)
    attention = encoder.obj_attention(images, mask)
    assert attention.shape == (3, 16)
    assert (attention[~mask] == 0).all()
    assert (attention[mask] > 0).all()
    assert (attention.sum(1) <= 1 + 1e-12).all()


def read_only_encoder(kind: str) -> ObjViT:
    torch.manual_seed(0)
    name, kwargs = KINDS[kind]
    return shaken(build_encoder(name, kwargs, read_only=True))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_k_read_only_objects_in_one_pass_are_k_passes(kind: str) -> None:
    encoder = read_only_encoder(kind)
    images = images_for(encoder, 2).requires_grad_(True)
    masks = torch.rand(2, 5, 16) < 0.4
    masks[..., 3] = True
    masks[1, 4] = True  # one object is the whole image
    together = encoder(images, masks)
    assert together.obj.shape == (2, 5, 32)
    alone = [encoder(images, masks[:, k]) for k in range(5)]
    assert torch.allclose(together.obj, torch.stack([one.obj for one in alone], dim=1), atol=1e-10, rtol=0)
    weight = torch.randn_like(together.obj)
    one = torch.autograd.grad((together.obj * weight).sum(), images)[0]
    separate = torch.autograd.grad(sum((a.obj * weight[:, k]).sum() for k, a in enumerate(alone)), images)[0]  # type: ignore[arg-type,union-attr]
    assert torch.allclose(one, separate, atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_patches_do_not_depend_on_the_boxes_of_read_only_objects(kind: str) -> None:
    encoder = read_only_encoder(kind)
    images = images_for(encoder)
    patches = [encoder(images, mask).patches for mask in (None, masks_for(3), masks_for(3).flip(0), torch.rand(3, 7, 16) < 0.5)]
    assert all(torch.allclose(patches[0], other, atol=1e-10, rtol=0) for other in patches[1:])
    seen = build_encoder(*KINDS[kind])
    seen.load_state_dict(encoder.state_dict())
    seen.double().eval()
    assert not torch.allclose(seen(images, masks_for(3)).patches, seen(images, masks_for(3).flip(0)).patches)  # the paper's do


def test_learned_tokens_have_a_box_each_and_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    encoder = shaken(build_encoder(*KINDS["registers"], tokens=2))
    encoder.vit.blocks = encoder.vit.blocks[:1]  # type: ignore[index]
    images, mask = images_for(encoder), torch.stack([masks_for(3), masks_for(3).flip(0)], dim=1)
    both = encoder(images, mask).obj
    other = mask.clone()
    other[:, 1] = True
    assert torch.equal(encoder(images, other).obj[:, 0], both[:, 0])
    assert not torch.allclose(encoder(images, other).obj[:, 1], both[:, 1])
    assert torch.allclose(
        encoder(images, masks_for(3)).obj, encoder(images, masks_for(3)[:, None].expand(-1, 2, -1)).obj.mean(1)
    )
    with pytest.raises(ValueError, match="3 masks an image for 2"):
        encoder(images, mask[:, [0, 1, 0]])


def test_the_attention_that_is_shown_is_the_one_that_is_used(encoder: ObjViT) -> None:
    """Fused and laid-out attention agree, and the switch is put back."""
    images, mask = images_for(encoder), masks_for(3)
    before = encoder(images, mask).obj
    encoder.obj_attention(images, mask)
    assert torch.equal(encoder(images, mask).obj, before)
    attention: Any = encoder.vit.blocks[-1].attn  # type: ignore[index]
    attention.fused_attn = False
    assert torch.allclose(encoder(images, mask).obj, before, atol=1e-12)


def test_another_input_size_gets_resampled_positions(encoder: ObjViT) -> None:
    side = 6 * encoder.patch_px
    assert encoder(torch.randn(1, 3, side, side, dtype=torch.float64)).patches.shape == (1, 36, 32)


def test_an_empty_box_is_refused_at_construction() -> None:
    import numpy as np

    with pytest.raises(ValueError, match="covers no patch"):
        box_masks(np.array([[70.0, 70.0, 80.0, 80.0]]), 64, 4)


@pytest.mark.parametrize(
    ("name", "kwargs", "weights", "words"),
    [
        ("vit_nonsense", {}, None, "vit_nonsense"),
        ("resnet18", {}, None, "resnet18"),
        ("vit_tiny_patch16_224", {"depht": 3}, None, "depht"),
        ("vit_tiny_patch16_224", {}, "missing.pth", "missing.pth"),
    ],
)
def test_a_model_that_cannot_be_built_is_one_line(name: str, kwargs: dict[str, Any], weights: str | None, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        build_encoder(name, kwargs, weights=weights)
    assert "\n" not in str(caught.value)


def test_local_weights_are_loaded_whole(tmp_path: Path) -> None:
    """A timm state dict in a file becomes the encoder's weights; one that does not fit is one line."""
    torch.manual_seed(3)
    source: Any = build_encoder("vit_tiny_patch16_224", TINY).vit
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    loaded = build_encoder("vit_tiny_patch16_224", TINY, weights=str(tmp_path / "weights.pth"))
    images = torch.randn(2, 3, 32, 32)
    source.eval(), loaded.eval()
    assert torch.equal(loaded(images).obj, source.forward_features(images)[:, 0])
    with pytest.raises(UserError, match="does not fit the model"):
        build_encoder("vit_tiny_patch16_224", {**TINY, "embed_dim": 64}, weights=str(tmp_path / "weights.pth"))
