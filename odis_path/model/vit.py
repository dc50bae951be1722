"""A timm vision transformer whose first token is [OBJ]: masked attention in every layer.

Source: the ODIS post. The [OBJ] row of the attention attends only to itself and to in-box patches; patch rows stay
unmasked and see [OBJ]. Register tokens sit between: patches see them, an [OBJ] with a box does not (they pool from the whole
image); an [OBJ] whose object is the whole image does, so that a full mask is exactly no mask, and timm's own forward.

Several [OBJ] tokens share one pass over the patches. They never see each other. In the paper's form each is a learned
token of its own and patches see them all; read-only ones are one learned token asked K times, and nothing sees them, so
that K objects in one pass are exactly K passes.

A model that was trained to be averaged is pooled by the mean of the in-box patches of an unmasked pass, and has no [OBJ] unless
it has a class token. Its last norm may come after pooling (timm's fc_norm), and then does so here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from annotations.errors import UserError
from odis_path.model.architectures import TimmArguments
from odis_path.model.create import EncoderPool, Start, create_vit, start_pool
from odis_path.model.layers import additive, attention_kernels, embed_patches, replace_drop_paths
from odis_path.model.pretrained import LoadReport
from odis_path.model.published import RGB


class Tokens(NamedTuple):
    """Output of the encoder after the last norm: obj (B, D), or (B, K, D) for K masks an image, and patches (B, N, D).

    obj has 2 D columns where the encoder puts the mean of patches beside [OBJ].
    """

    obj: Tensor
    patches: Tensor


def attention_mask(obj_mask: Tensor, registers: int, *, read_only: bool = False) -> Tensor:
    """Build the row mask of masked attention: bool (B, N) or (B, K, N) in-box patches -> bool (B, 1, T, T), True = may attend.

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

    pool "obj": the token; "linear": the mean of in-box patch embeddings of an unmasked pass (the post's failed variant);
    "obj+linear": both side by side, of the one pass of [OBJ]; "map": the model's own attention pooling, over in-box patches.
    tokens: learned [OBJ] tokens (the post's failed 2 and 4); read_only: patches do not see [OBJ], any number of objects a pass.
    image_token: the last of the tokens is that of the image-level term, which always sees the whole image.
    """

    vit: Any  # timm's, whose attributes nn.Module does not know

    def __init__(
        self,
        vit: Any,
        *,
        pool: EncoderPool = "obj",
        tokens: int = 1,
        read_only: bool = False,
        image_token: bool = False,
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        if read_only and tokens != 1:
            raise ValueError("a read-only [OBJ] is one learned token, asked for each object")
        if vit.cls_token is None and "obj" in pool:
            raise ValueError("a model without a class token has no [OBJ]")
        self.vit = vit
        self.pool = pool
        self.tokens = tokens
        self.read_only = read_only
        self.image_token = image_token and tokens > 1
        self.checkpoint_blocks = checkpoint_blocks
        self.embed_dim: int = vit.embed_dim
        self.has_obj = vit.cls_token is not None
        self.registers: int = vit.num_prefix_tokens - self.has_obj
        self.patch_px: int = vit.patch_embed.patch_size[0]
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
        self.trained_px: int | None = None  # side of the images that its weights were trained on, where something says it
        self.norm: tuple[RGB, RGB] | None = None  # mean and std of pixels that its weights want, where something says it
        self.loaded: LoadReport | None = None
        # Offsets of the further [OBJ] tokens from the first; drawn at random, since equal tokens would get equal gradients.
        self.more_obj = nn.Parameter(0.02 * torch.randn(tokens - 1, self.embed_dim)) if tokens > 1 else None

    @property
    def out_dim(self) -> int:
        """Columns of `Tokens.obj`."""
        return self.embed_dim * (2 if self.pool == "obj+linear" else 1)

    @property
    def has_positions(self) -> bool:
        """Tell whether it has learned positions, which other sizes of image interpolate."""
        return self.vit.pos_embed is not None

    def adapted(self) -> str:
        """Describe weights that were resampled when loaded, as the end of a line; empty where none were."""
        grid: Any = self.vit.patch_embed.grid_size
        if self.loaded is None or not self.loaded.resampled:
            return ""
        patches = f"{grid[0]} x {grid[1]} patches of {self.patch_px} px"
        return f"; its weights, of another grid or patch, are resampled to {patches}"

    @property
    def masks_attention(self) -> bool:
        """Tell whether a box restricts the attention of [OBJ]; else it restricts what is pooled after a pass that is plain."""
        return "obj" in self.pool

    @property
    def shares_passes(self) -> bool:
        """Tell whether any number of objects of an image take one pass, and come out as they would alone."""
        return self.read_only or not self.masks_attention

    def forward(self, images: Tensor, obj_mask: Tensor | None = None, masked_patches: Tensor | None = None) -> Tokens:
        """Encode a batch.

        images: float (B, 3, H, W), normalised. obj_mask: bool, True = in the box; (B, N) one box an image, for several
        learned tokens of objects their mean; (B, K, N) one box a token; None = the whole image. masked_patches: bool (B, N), to
        be replaced by the mask token before position embedding.
        """
        if obj_mask is not None and obj_mask.ndim == 3:
            return self._encode(images, obj_mask, masked_patches)
        if not self.masks_attention or (self.tokens == 1 and not self.read_only):
            tokens = self._encode(images, None if obj_mask is None else obj_mask[:, None], masked_patches)
        else:
            if obj_mask is None:
                patches = images.shape[-2] // self.patch_px * (images.shape[-1] // self.patch_px)
                obj_mask = torch.ones(len(images), patches, dtype=torch.bool, device=images.device)
            masks = obj_mask[:, None].expand(-1, self.tokens, -1)
            if self.image_token:  # it never saw a box, and is no object's
                masks = torch.cat([masks[:, :-1], torch.ones_like(masks[:, :1])], dim=1)
            tokens = self._encode(images, masks, masked_patches)
        objects = self.tokens - 1 if self.image_token else None
        return Tokens(tokens.obj[:, :objects].mean(1), tokens.patches)

    def _encode(self, images: Tensor, obj_mask: Tensor | None, masked_patches: Tensor | None) -> Tokens:
        """Run one pass with masks (B, K, N), or None: plain attention with one [OBJ]."""
        vit = self.vit
        objects = obj_mask.shape[1] if obj_mask is not None and self.masks_attention else int(self.has_obj)
        x, rope = self._embed(images, objects, masked_patches)
        mask = None
        if obj_mask is not None and self.masks_attention:
            mask = additive(attention_mask(obj_mask, self.registers, read_only=self.read_only), x)
        for i, block in enumerate(vit.blocks):
            x = self._block(block, x, mask, rope[i] if getattr(vit, "rope_mixed", False) and rope is not None else rope)
        x = vit.norm(x)
        obj = self._pooled(x, objects, obj_mask)
        patches = x[:, objects + self.registers :]
        # Where the last norm comes after pooling, the loss on patches takes each of them through it as well.
        return Tokens(obj, vit.fc_norm(patches) if isinstance(vit.norm, nn.Identity) else patches)

    def _pooled(self, x: Tensor, objects: int, obj_mask: Tensor | None) -> Tensor:
        """Pool tokens (B, T, D) after the last block, of which the first `objects` are [OBJ]: (B, K, D)."""
        vit = self.vit
        patches = x[:, objects + self.registers :]
        if self.pool == "map":
            return attention_pooled(vit, x, objects + self.registers, obj_mask)
        parts = [x[:, :objects]] if self.masks_attention else []
        if "linear" in self.pool:
            parts.append(mean_in_box(patches, obj_mask).expand(-1, objects if parts else -1, -1))
        return torch.cat([vit.fc_norm(part) for part in parts], dim=-1)

    def _embed(self, images: Tensor, objects: int, masked_patches: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Embed images: tokens (B, objects + registers + N, D) before the first block, and rotary positions if there are any.

        objects: 0 for a model without a class token.
        """
        vit = self.vit
        # (B, h, w, D): the model is built with dynamic_img_size
        x = embed_patches(vit.patch_embed, images) if images.is_cuda else vit.patch_embed(images)
        if masked_patches is not None:
            x = torch.where(masked_patches.reshape(*x.shape[:3], 1), self.mask_token.to(x.dtype), x)
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
        rope_argument = {} if rope is None else {"rope": rope}

        def masked(x: Tensor) -> Tensor:
            with attention_kernels(x):  # here, so that a checkpointed block takes the same kernel when it is run again
                tokens: Tensor = block(x, attn_mask=mask, **rope_argument)
                return tokens

        if self.checkpoint_blocks and self.training:
            return checkpoint(masked, x, use_reentrant=False)
        return masked(x)

    def obj_attention(self, images: Tensor, obj_mask: Tensor | None = None) -> Tensor:
        """Return the (first) [OBJ]'s attention over patches in the last layer, mean over heads: float (B, N), rows sum to <= 1.

        Of a model without one: the weight of each patch in the mean.
        """
        vit = self.vit
        if not self.has_obj:
            patches = images.shape[-2] // self.patch_px * (images.shape[-1] // self.patch_px)
            weight = images.new_ones(len(images), patches) if obj_mask is None else obj_mask.to(images.dtype)
            return weight / weight.sum(1, keepdim=True).clamp_min(1)
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
    """Average in-box patch embeddings: (B, N, D), bool (B, K, N) -> (B, K, D); None: all patches, K = 1."""
    if obj_mask is None:
        return patches.mean(1, keepdim=True)
    weight = obj_mask.to(patches.dtype)
    return torch.einsum("bkn,bnd->bkd", weight, patches) / weight.sum(2, keepdim=True).clamp_min(1)


def attention_pooled(vit: Any, x: Tensor, prefix: int, obj_mask: Tensor | None) -> Tensor:
    """Pool tokens (B, T, D) by timm's attention over the in-box patches of masks (B, K, N): (B, K, D); None: all, K = 1.

    A pooling that takes in the prefix tokens does so for a whole image alone, as they are of the whole image.
    """
    from timm.models.eva import Eva

    if not (isinstance(vit, Eva) or vit.pool_include_prefix):
        x, prefix = x[:, prefix:], 0
    embeddings: Tensor
    if obj_mask is None:
        embeddings = vit.fc_norm(vit.attn_pool(x))[:, None]
        return embeddings
    objects = obj_mask.shape[1]
    allowed = torch.cat([obj_mask.all(2, keepdim=True).expand(-1, -1, prefix), obj_mask], dim=2).flatten(0, 1)[:, None, None]
    pooled = vit.attn_pool(x.repeat_interleave(objects, 0), attn_mask=additive(allowed, x))
    embeddings = vit.fc_norm(pooled).unflatten(0, (-1, objects))
    return embeddings


def build_encoder(
    name: str,
    kwargs: TimmArguments | None = None,
    *,
    weights: str | None = None,
    drop_path: float = 0.0,
    pool: Literal["auto", "obj", "linear"] = "obj",
    tokens: int = 1,
    read_only: bool = False,
    image_token: bool = False,
    checkpoint_blocks: bool = False,
    like: Mapping[str, Tensor] | None = None,
) -> ObjViT:
    """Build an [OBJ] ViT from a timm name or a short one such as S/16, to be trained or to take a checkpoint's weights.

    weights: None (random), "timm" (the published weights), or a local file (see `pretrained`). pool "auto": as the
    weights were trained. tokens: of "linear" pooling one, whatever is given. like: as in `create_vit`.
    Raises UserError where timm has no such model, it is no plain ViT, or the weights do not fit or have no class token.
    """
    start = create_vit(name, kwargs, weights=weights, drop_path=drop_path, like=like)
    if pool == "auto":
        pool = start_pool(start, name)
    if pool == "obj" and start.vit.cls_token is None:
        raise UserError(f"model.name={name}: has no class token that [OBJ] could go on from: set model.pool=linear (or auto)")
    return wrapped(
        start,
        pool,
        source=weights or name,
        tokens=1 if pool == "linear" else tokens,
        read_only=read_only,
        image_token=image_token,
        checkpoint_blocks=checkpoint_blocks,
    )


def wrapped(start: Start, pool: EncoderPool, *, source: str, tokens: int = 1, **form: bool) -> ObjViT:
    """Wrap a vision transformer, with what its weights have beside it: the mask token, further [OBJ] tokens."""
    if pool != "map":
        start.vit.attn_pool = None
    replace_drop_paths(start.vit)
    encoder = ObjViT(start.vit, pool=pool, tokens=tokens, **form)
    report = start.report
    if report is not None and report.mask_token is not None:
        encoder.mask_token.data.copy_(report.mask_token)
    if report is not None and report.more_obj is not None and encoder.more_obj is not None:
        if report.more_obj.shape != encoder.more_obj.shape:
            raise UserError(
                f"{source}: has {1 + len(report.more_obj)} [OBJ] tokens, the model {tokens}; set target.objects as there"
            )
        encoder.more_obj.data.copy_(report.more_obj)
    encoder.trained_px, encoder.norm, encoder.loaded = start.trained_px, start.norm, report
    return encoder
