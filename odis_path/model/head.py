"""The projection head of DINO (arXiv 2104.14294, section 3) and iBOT (arXiv 2111.07832)."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PrototypeInit = Literal["normal", "uniform"]


class PrototypeLayer(nn.Module):
    """A linear layer with rows of unit length times a gain: (.., d) -> (.., K) cosines when the input has unit length."""

    def __init__(self, in_dim: int, out_dim: int, *, fixed_gain: bool = True, init: PrototypeInit = "normal") -> None:
        """init: see `odis_path.config.HeadConfig`; shorter rows turn faster under the same learning rate."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim))
        if init == "uniform":
            nn.init.uniform_(self.weight, -(in_dim**-0.5), in_dim**-0.5)  # rows of length 1 / sqrt(3)
        else:
            nn.init.trunc_normal_(self.weight, std=0.02)  # rows of length 0.02 sqrt(in_dim)
        self.gain = nn.Parameter(torch.ones(out_dim), requires_grad=not fixed_gain)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight, dim=-1)) * self.gain


class DinoHead(nn.Module):
    """MLP with GELU and no norm, L2 normalisation, prototype layer: float (.., D) -> logits (.., out_dim)."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        layers: int = 3,
        norm_last_layer: bool = True,
        prototype_init: PrototypeInit = "normal",
    ) -> None:
        super().__init__()
        sizes = [in_dim, *[hidden_dim] * (layers - 1), bottleneck_dim]
        steps: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise(sizes)):
            linear = nn.Linear(a, b)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            steps += [linear] if i == layers - 1 else [linear, nn.GELU()]
        self.mlp = nn.Sequential(*steps)
        self.last_layer = PrototypeLayer(bottleneck_dim, out_dim, fixed_gain=norm_last_layer, init=prototype_init)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last_layer(self.embed(x))
        return logits

    def embed(self, x: Tensor) -> Tensor:
        """Project to the bottleneck that prototypes are compared with: float (.., D) -> unit vectors (.., bottleneck_dim)."""
        return F.normalize(self.mlp(x), dim=-1)
