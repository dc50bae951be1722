"""A timm vision transformer whose first token is [OBJ]: masked attention in every layer.

Source: the ODIS post. The [OBJ] row of the attention attends only to itself and to in-box patches; patch rows stay
unmasked and see [OBJ]. Register tokens sit between: patches see them, an [OBJ] with a box does not (they pool from the whole
image); an [OBJ] whose object is the whole image does, so that a full mask is exactly no mask, and timm's own forward.

Several [OBJ] tokens share one pass over the patches. They never see each other. In the paper's form each is a learned
token of its own and patches see them all; read-only ones are one learned token asked K times, and nothing sees them, so
that K objects in one pass are exactly K passes.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from annotations.errors import UserError
from odis_path.model.layers import additive, attention_kernels, embed_patches, replace_drop_paths
from odis_path.model.names import BASE_KWARGS, resolve_model
from odis_path.model.weights import load_weights


class Tokens(NamedTuple):
    """What the encoder returns after the last norm: obj (B, D), or (B, K, D) for K masks an image, and patches (B, N, D)."""

    obj: Tensor
    patches: Tensor


def attention_mask(obj_mask: Tensor, registers: int, *, read_only: bool = False) -> Tensor:
    """The row mask of masked attention: bool (B, N) or (B, K, N) in-box patches -> bool (B, 1, T, T), True = may attend.

    T = K + registers + N. An [OBJ] row is restricted to itself and its patches; all other rows see everything, but for the
    [OBJ] columns where these are read-only. A mask of shape (B, 1, 1, T) would hit every query.
    """
    if obj_mask.ndim == 2:
        obj_mask = obj_mask[:, None]
    batch, objects, patches = obj_mask.shape
    total = objects + registers + patches
    mask = obj_mask.new_ones(batch, 1, total, total)
    if read_only:
        mask[:, :, :, :objects] = False
    mask[:, :, :objects, :objects] = torch.eye(objects, dtype=torch.bool, device=mask.device)
    mask[:, 0, :objects, objects : objects + registers] = obj_mask.all(2, keepdim=True)
    mask[:, 0, :objects, objects + registers :] = obj_mask
    return mask


class ObjViT(nn.Module):
    """Wrap a timm VisionTransformer or Eva (rope): [OBJ] for [CLS], masked attention, masked-image token.

    pool "obj": the token; "linear": the mean of in-box patch embeddings of an unmasked pass (the post's failed variant).
    tokens: learned [OBJ] tokens (the post's failed 2 and 4); read_only: patches do not see [OBJ], any number of objects a pass.
    image_token: the last of the tokens is that of the image-level term, which always sees the whole image.
    """

    def __init__(
        self,
        vit: nn.Module,
        *,
        pool: Literal["obj", "linear"] = "obj",
        tokens: int = 1,
        read_only: bool = False,
        image_token: bool = False,
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        if read_only and tokens != 1:
            raise ValueError("a read-only [OBJ] is one learned token, asked for each object")
        self.vit = vit
        self.pool = pool
        self.tokens = tokens
        self.read_only = read_only
        self.image_token = image_token and tokens > 1
        self.checkpoint_blocks = checkpoint_blocks
        self.embed_dim: int = vit.embed_dim  # type: ignore[assignment]
        self.registers: int = vit.num_prefix_tokens - 1  # type: ignore[operator,assignment]
        self.patch_px: int = vit.patch_embed.patch_size[0]  # type: ignore[union-attr,index,assignment]
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
        # What tells the further [OBJ] tokens from the first; drawn apart, or they would never part.
        self.more_obj = nn.Parameter(0.02 * torch.randn(tokens - 1, self.embed_dim)) if tokens > 1 else None

    def forward(self, images: Tensor, obj_mask: Tensor | None = None, hidden: Tensor | None = None) -> Tokens:
        """Encode a batch.

        images: float (B, 3, H, W), normalised. obj_mask: bool, True = in the box; (B, N) one box an image, for several
        learned tokens of objects their mean; (B, K, N) one box a token; None = the whole image. hidden: bool (B, N), patches
        replaced by the mask token before position embedding.
        """
        if obj_mask is not None and obj_mask.ndim == 3:
            return self._encode(images, obj_mask, hidden)
        if self.pool == "linear" or (self.tokens == 1 and not self.read_only):
            tokens = self._encode(images, None if obj_mask is None else obj_mask[:, None], hidden)
        else:
            if obj_mask is None:
                patches = images.shape[-2] // self.patch_px * (images.shape[-1] // self.patch_px)
                obj_mask = torch.ones(len(images), patches, dtype=torch.bool, device=images.device)
            masks = obj_mask[:, None].expand(-1, self.tokens, -1)
            if self.image_token:  # it never saw a box, and is no object's
                masks = torch.cat([masks[:, :-1], torch.ones_like(masks[:, :1])], dim=1)
            tokens = self._encode(images, masks, hidden)
        objects = self.tokens - 1 if self.image_token else None
        return Tokens(tokens.obj[:, :objects].mean(1), tokens.patches)

    def _encode(self, images: Tensor, obj_mask: Tensor | None, hidden: Tensor | None) -> Tokens:
        """One pass with masks (B, K, N), or None: plain attention with one [OBJ]."""
        vit: Any = self.vit
        objects = 1 if obj_mask is None or self.pool == "linear" else obj_mask.shape[1]
        x, rope = self._embed(images, objects, hidden)
        mask = None
        if obj_mask is not None and self.pool == "obj":
            mask = additive(attention_mask(obj_mask, self.registers, read_only=self.read_only), x)
        for i, block in enumerate(vit.blocks):
            x = self._block(block, x, mask, rope[i] if getattr(vit, "rope_mixed", False) and rope is not None else rope)
        x = vit.norm(x)
        patches = x[:, objects + self.registers :]
        if self.pool == "linear":
            return Tokens(mean_in_box(patches, obj_mask), patches)
        return Tokens(x[:, :objects], patches)

    def _embed(self, images: Tensor, objects: int, hidden: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, objects + registers + N, D) before the first block, and the rotary position embedding if there is one."""
        vit: Any = self.vit
        # (B, h, w, D): the model is built with dynamic_img_size
        x = embed_patches(vit.patch_embed, images) if images.is_cuda else vit.patch_embed(images)
        if hidden is not None:
            x = torch.where(hidden.reshape(*x.shape[:3], 1), self.mask_token.to(x.dtype), x)
        placed, rope = vit._pos_embed(x), None
        if isinstance(placed, tuple):
            placed, rope = placed
            for block in vit.blocks:  # rope turns patches alone
                block.attn.num_prefix_tokens = objects + self.registers
        x = vit.norm_pre(placed)
        if objects > 1 or self.more_obj is not None:
            first = x[:, :1]
            obj = first.expand(-1, objects, -1)
            if self.more_obj is not None:
                if objects != self.tokens:
                    raise ValueError(f"{objects} masks an image for {self.tokens} learned [OBJ] tokens")
                obj = torch.cat([first, first + self.more_obj.to(x.dtype)], dim=1)
            elif not self.read_only:
                raise ValueError(f"{objects} masks an image need read_only=True or tokens={objects}")
            x = torch.cat([obj, x[:, 1:]], dim=1)
        return x, rope

    def _block(self, block: nn.Module, x: Tensor, mask: Tensor | None, rope: Tensor | None) -> Tensor:
        more = {} if rope is None else {"rope": rope}

        def masked(x: Tensor) -> Tensor:
            with attention_kernels(x):  # here, so that a checkpointed block takes the same kernel when it is run again
                return block(x, attn_mask=mask, **more)

        if self.checkpoint_blocks and self.training:
            return checkpoint(masked, x, use_reentrant=False)
        return masked(x)

    def obj_attention(self, images: Tensor, obj_mask: Tensor | None = None) -> Tensor:
        """Attention of the (first) [OBJ] over patches in the last layer, mean over heads: float (B, N), rows sum to <= 1."""
        vit: Any = self.vit
        kept: list[Tensor] = []
        attention = vit.blocks[-1].attn
        handle = attention.attn_drop.register_forward_pre_hook(lambda _module, args: kept.append(args[0]))
        fused, attention.fused_attn = attention.fused_attn, False  # only then are the weights ever laid out
        try:
            patches = self.forward(images, obj_mask).patches.shape[1]
        finally:
            handle.remove()
            attention.fused_attn = fused
        return kept[0][:, :, 0, -patches:].mean(1)


def mean_in_box(patches: Tensor, obj_mask: Tensor | None) -> Tensor:
    """Mean of in-box patch embeddings: (B, N, D), bool (B, K, N) -> (B, K, D); None: of all patches, K = 1."""
    if obj_mask is None:
        return patches.mean(1, keepdim=True)
    weight = obj_mask.to(patches.dtype)
    return torch.einsum("bkn,bnd->bkd", weight, patches) / weight.sum(2, keepdim=True).clamp_min(1)


def build_encoder(
    name: str,
    kwargs: dict[str, Any] | None = None,
    *,
    weights: str | None = None,
    drop_path: float = 0.0,
    pool: Literal["obj", "linear"] = "obj",
    tokens: int = 1,
    read_only: bool = False,
    image_token: bool = False,
    checkpoint_blocks: bool = False,
) -> ObjViT:
    """An [OBJ] ViT from a timm name, or a short one such as S/16.

    weights: None (random), "timm" (the published weights), or a local file (see `odis_path.model.weights`).
    Raises UserError where timm has no such model, it is no plain ViT, or the weights do not fit.
    """
    import timm

    for key, value in (kwargs or {}).items():
        if value != BASE_KWARGS.get(key, value) or (key == "patch_drop_rate" and value):
            raise UserError(f"model.kwargs.{key}={value} cannot be set: odis-path needs {BASE_KWARGS.get(key, 0)} there")
    name, resolved = resolve_model(name, kwargs or {})
    options: dict[str, Any] = {**BASE_KWARGS, "drop_path_rate": drop_path, **resolved, "pretrained": weights == "timm"}
    try:
        vit = timm.create_model(name, **options)
    except UserError:
        raise
    except Exception as error:  # timm raises whatever its constructors raise; the user needs one line
        line = " ".join(str(error).split())[:300]
        raise UserError(f"model {name}: timm cannot build it with {options}: {line}") from None
    if not _is_plain(vit):
        raise UserError(
            f"model {name}: not a plain vision transformer with a class token; take a vit_* or eva02_* name of timm"
        )
    replace_drop_paths(vit)
    form: dict[str, Any] = {"pool": pool, "tokens": tokens, "read_only": read_only, "image_token": image_token}
    encoder = ObjViT(vit, **form, checkpoint_blocks=checkpoint_blocks)
    if weights is not None and weights != "timm":
        found = load_weights(vit, weights)
        if found.mask_token is not None:
            encoder.mask_token.data.copy_(found.mask_token)
        if found.more_obj is not None and encoder.more_obj is not None:
            if found.more_obj.shape != encoder.more_obj.shape:
                raise UserError(
                    f"{weights}: has {1 + len(found.more_obj)} [OBJ] tokens, the model {tokens}; set target.objects as there"
                )
            encoder.more_obj.data.copy_(found.more_obj)
    return encoder


def _is_plain(vit: Any) -> bool:
    """Whether a timm model is what `ObjViT` wraps: patches cut by one convolution, a class token and no second one, blocks."""
    from timm.layers import PatchEmbed

    if not hasattr(vit, "blocks") or not hasattr(vit, "_pos_embed") or getattr(vit, "cls_token", None) is None:
        return False
    return isinstance(vit.patch_embed, PatchEmbed) and getattr(vit, "dist_token", None) is None
