"""A timm vision transformer whose first token is [OBJ]: masked attention in every layer.

Source: the ODIS post. The [OBJ] row of the attention attends only to itself and to in-box patches; patch rows stay
unmasked and see [OBJ]. Register tokens sit between: patches see them, a masked [OBJ] does not (they pool from the whole image).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from annotations.errors import UserError


class Tokens(NamedTuple):
    """What the encoder returns: obj (B, D) and patches (B, N, D), after the last norm."""

    obj: Tensor
    patches: Tensor


def attention_mask(obj_mask: Tensor, registers: int) -> Tensor:
    """The row mask of masked attention: bool (B, N) in-box patches -> bool (B, 1, T, T), True = may attend.

    T = 1 + registers + N. Only the [OBJ] row is restricted; a mask of shape (B, 1, 1, T) would hit every query.
    """
    batch, patches = obj_mask.shape
    total = 1 + registers + patches
    mask = obj_mask.new_ones(batch, 1, total, total)
    mask[:, 0, 0, 1 : 1 + registers] = False
    mask[:, 0, 0, 1 + registers :] = obj_mask
    return mask


class ObjViT(nn.Module):
    """Wrap a timm VisionTransformer: [OBJ] for [CLS], masked attention, masked-image token.

    pool "obj": the token; "linear": the mean of in-box patch embeddings of an unmasked pass (the post's failed variant).
    """

    def __init__(self, vit: nn.Module, *, pool: Literal["obj", "linear"] = "obj", checkpoint_blocks: bool = False) -> None:
        super().__init__()
        self.vit = vit
        self.pool = pool
        self.checkpoint_blocks = checkpoint_blocks
        self.embed_dim: int = vit.embed_dim  # type: ignore[assignment]
        self.registers: int = vit.num_prefix_tokens - 1  # type: ignore[operator,assignment]
        self.patch_px: int = vit.patch_embed.patch_size[0]  # type: ignore[union-attr,index,assignment]
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))

    def forward(self, images: Tensor, obj_mask: Tensor | None = None, hidden: Tensor | None = None) -> Tokens:
        """Encode a batch.

        images: float (B, 3, H, W), normalised; obj_mask: bool (B, N), True = in the box, None = the whole image;
        hidden: bool (B, N), patches replaced by the mask token before position embedding.
        """
        vit: Any = self.vit
        x = vit.patch_embed(images)  # (B, h, w, D): the model is built with dynamic_img_size
        if hidden is not None:
            token = self.mask_token.to(x.dtype)
            x = torch.where(hidden.reshape(*x.shape[:3], 1), token, x)
        x = vit.norm_pre(vit._pos_embed(x))
        mask = None
        if obj_mask is not None and self.pool == "obj":
            mask = attention_mask(obj_mask, self.registers)
        for block in vit.blocks:
            x = self._block(block, x, mask)
        x = vit.norm(x)
        patches = x[:, 1 + self.registers :]
        if self.pool == "linear":
            return Tokens(mean_in_box(patches, obj_mask), patches)
        return Tokens(x[:, 0], patches)

    def _block(self, block: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
        if self.checkpoint_blocks and self.training:
            return checkpoint(block, x, mask, use_reentrant=False)
        return block(x, attn_mask=mask)

    def obj_attention(self, images: Tensor, obj_mask: Tensor | None = None) -> Tensor:
        """Attention of [OBJ] over patches in the last layer, mean over heads: float (B, N), rows sum to at most 1."""
        vit: Any = self.vit
        kept: list[Tensor] = []
        attention = vit.blocks[-1].attn
        handle = attention.register_forward_pre_hook(lambda _module, args: kept.append(args[0]))
        try:
            self.forward(images, obj_mask)
        finally:
            handle.remove()
        x = kept[0]
        batch, total, width = x.shape
        qkv = attention.qkv(x).reshape(batch, total, 3, attention.num_heads, width // attention.num_heads)
        q, k, _ = qkv.permute(2, 0, 3, 1, 4)
        q, k = attention.q_norm(q), attention.k_norm(k)
        scores = (q[:, :, :1] @ k.transpose(-2, -1)) * attention.scale
        if obj_mask is not None and self.pool == "obj":
            scores = scores.masked_fill(~attention_mask(obj_mask, self.registers)[:, :, :1], float("-inf"))
        return scores.softmax(-1).mean(1)[:, 0, 1 + self.registers :]


def mean_in_box(patches: Tensor, obj_mask: Tensor | None) -> Tensor:
    """Mean of in-box patch embeddings: (B, N, D), bool (B, N) -> (B, D)."""
    if obj_mask is None:
        return patches.mean(1)
    weight = obj_mask.to(patches.dtype)
    return torch.einsum("bn,bnd->bd", weight, patches) / weight.sum(1, keepdim=True).clamp_min(1)


def build_encoder(
    name: str,
    kwargs: dict[str, Any] | None = None,
    *,
    weights: str | None = None,
    drop_path: float = 0.0,
    pool: Literal["obj", "linear"] = "obj",
    checkpoint_blocks: bool = False,
) -> ObjViT:
    """An [OBJ] ViT from a timm name.

    weights: None (random), "timm" (the published weights), or a local file (.safetensors, .pth, .pt) that timm can read.
    Raises UserError where timm has no such model, it is no plain ViT, or the weights do not fit.
    """
    import timm

    options: dict[str, Any] = {
        "num_classes": 0, "global_pool": "token", "class_token": True, "dynamic_img_size": True, "drop_path_rate": drop_path,
    }  # fmt: skip
    options.update(kwargs or {})
    if weights == "timm":
        options["pretrained"] = True
    elif weights:
        if not Path(weights).is_file():
            raise UserError(f"{weights}: no such weight file; give a local file, or 'timm' for the published weights")
        options["pretrained"] = True
        options["pretrained_cfg_overlay"] = {"file": str(weights)}
    try:
        vit = timm.create_model(name, **options)
    except UserError:
        raise
    except Exception as error:  # timm raises whatever its constructors raise; the user needs one line
        line = " ".join(str(error).split())[:300]
        raise UserError(f"model {name}: timm cannot build it with {options}: {line}") from None
    if not hasattr(vit, "blocks") or not hasattr(vit, "_pos_embed") or getattr(vit, "cls_token", None) is None:
        raise UserError(f"model {name}: not a plain vision transformer with a class token; take a vit_* name of timm")
    return ObjViT(vit, pool=pool, checkpoint_blocks=checkpoint_blocks)
