"""Parts of the encoder in forms that a GPU computes fast, equal to timm's: stochastic depth, patch embedding, row mask."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# Below this many tokens a GPU's memory-efficient attention beats the others, with a mask and without (experiments/RESULTS.md).
FEW_TOKENS = 64


class DropPath(nn.Module):
    """Leaves out a branch for a random share of the samples (stochastic depth, arXiv 1603.09382): (B, ...) -> (B, ...).

    The same as timm's, but the probability is a tensor: compiled blocks are told apart by numbers in Python, and every depth
    has a probability of its own.
    """

    keep: Tensor

    def __init__(self, drop: float) -> None:
        super().__init__()
        self.register_buffer("keep", torch.tensor(1.0 - drop), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        drawn = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) < self.keep
        return x * (drawn / self.keep).to(x.dtype)


def replace_drop_paths(module: nn.Module) -> None:
    """Put `DropPath` in the place of timm's, in place; where blocks have any, the first one too, whose probability is 0."""
    from timm.layers.drop import DropPath as TimmDropPath

    if not any(isinstance(child, TimmDropPath) for child in module.modules()):
        return
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if name.startswith("drop_path") or isinstance(child, TimmDropPath):
                setattr(parent, name, DropPath(float(getattr(child, "drop_prob", None) or 0.0)))


def embed_patches(patch_embed: Any, images: Tensor) -> Tensor:
    """Compute timm's patch embedding of (B, 3, H, W) as one matrix product, (B, h, w, D): on a GPU faster than a convolution.

    Anything but a convolution whose patches lie side by side is left to timm.
    """
    conv, p = patch_embed.proj, patch_embed.patch_size[0]
    plain = isinstance(conv, nn.Conv2d) and conv.kernel_size == conv.stride == (p, p) and conv.padding == (0, 0)
    batch, channels, h, w = images.shape
    patches: Tensor
    if not plain or h % p or w % p:
        patches = patch_embed(images)
    else:
        pixels = images.reshape(batch, channels, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).flatten(-3)
        patches = patch_embed.norm(F.linear(pixels, conv.weight.flatten(1), conv.bias))
    return patches


def additive(mask: Tensor, like: Tensor) -> Tensor:
    """Turn a mask into what attention adds to its scores, 0 where True, else -inf: bool (B, 1, T, T) -> float (B, 1, T, T).

    Made once a forward pass, in the type that attention runs in (autocast's, or that of the tokens `like`): a bool one is
    turned into this anew by every layer. Rows start at multiples of 8 numbers, as the attention kernels of a GPU ask for.
    """
    kind = like.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype
    total = mask.shape[-1]
    padded = mask.new_zeros(*mask.shape[:-1], -(-total // 8) * 8, dtype=dtype)
    return padded[..., :total].masked_fill_(~mask, float("-inf"))


def attention_kernels(tokens: Tensor) -> AbstractContextManager[Any]:
    """Context for attention over (B, T, D): on a GPU the kernel that suits few tokens, else torch's choice."""
    if not tokens.is_cuda or tokens.shape[1] >= FEW_TOKENS:
        return nullcontext()
    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
