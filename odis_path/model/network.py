"""Backbone and projection head as one network: tokens and logits of a batch of views."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from odis_path.config import PretrainConfig, windows_a_tile
from odis_path.model.head import DinoHead
from odis_path.model.vit import ObjViT, build_encoder


class Views(NamedTuple):
    """A batch on the device: images normalised, view-major (view * B + tile); K objects a tile.

    Where there is an image-level term, the masks have K + 1 rows, the last of them the whole image.
    """

    globals_: Tensor  # float (2B, 3, g, g)
    locals_: Tensor  # float (LB, 3, l, l), L may be 0
    object_masks_global: Tensor | None  # bool (2B, K, N)
    object_masks_local: Tensor | None  # bool (LB, K, N')
    masked_patches: Tensor  # bool (2B, N)
    masked_rows: Tensor  # int64 (n,), rows of the flattened masked_patches
    object_visible: Tensor  # bool (2 + L, B, K)


class Encoded(NamedTuple):
    """Head outputs: obj (V, B, K) [OBJ] logits, patches (n,) logits of the masked patches (None without patch loss).

    token: (2, B, D) embeddings of the first [OBJ] of the global views, before the head. patch_mean: (P,) mean logits of all
    patches of the global views, where asked for.
    """

    obj: Tensor
    patches: Tensor | None
    token: Tensor
    patch_mean: Tensor | None = None


class Network(nn.Module):
    """Encoder and head(s); the student is wrapped in DistributedDataParallel whole, so a step is one wrapped forward."""

    def __init__(self, encoder: ObjViT, head: DinoHead, patch_head: DinoHead | None) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.patch_head = patch_head  # None: shared with [OBJ]

    def forward(self, views: Views, *, with_locals: bool, mask_patches: bool, patches: bool, mean: bool = False) -> Encoded:
        """Encode the views of a batch and project their [OBJ].

        mask_patches: replace masked patches by the mask token (the student). patches: project those of the global views too;
        mean: and return the mean logits of all of their patches.
        """
        batch = views.object_visible.shape[1]
        tokens = self.encoder(views.globals_, views.object_masks_global, views.masked_patches if mask_patches else None)
        objects = [by_object(tokens.obj)]
        if with_locals and len(views.locals_):
            objects.append(by_object(self.encoder(views.locals_, views.object_masks_local).obj))
        rows = torch.cat(objects)
        embeddings = rows.reshape(-1, batch, *rows.shape[1:])  # (V, B, K, D)
        logits, first = self.head(embeddings), embeddings[:2, :, 0]
        if not patches:
            return Encoded(logits, None, first)
        head, flat = self.patch_head or self.head, tokens.patches.flatten(0, 1)
        if not mean:
            return Encoded(logits, head(flat[views.masked_rows]), first)
        embedded = head.embed(flat)
        masked = head.last_layer(embedded[views.masked_rows])
        with torch.autocast(flat.device.type, enabled=False):  # the last layer is linear: the mean goes through it once
            average = head.last_layer(embedded.to(head.last_layer.weight.dtype).mean(0))
        return Encoded(logits, masked, first, average)


def by_object(obj: Tensor) -> Tensor:
    """View [OBJ] embeddings as (B, K, D): K = 1 where the encoder was given no mask an object."""
    return obj if obj.ndim == 3 else obj[:, None]


def obj_tokens(config: PretrainConfig) -> int:
    """Count learned [OBJ] tokens: one an object, one for the whole image; read-only or with linear pooling one serves all."""
    if config.model.read_only or config.model.pool == "linear":
        return 1
    return config.target.objects // windows_a_tile(config) + (config.loss.image_weight > 0)


def build_network(
    config: PretrainConfig, *, student: bool, weights: bool = False, like: Mapping[str, Tensor] | None = None
) -> Network:
    """Build the student (drop path on) or teacher of a configuration.

    weights: load those the configuration starts from. like: a state dict of such a network that it is to take; with neither,
    the network is that of an [OBJ] model.
    """
    m, h = config.model, config.head
    prefix = "encoder.vit."
    encoder = build_encoder(
        m.name,
        m.kwargs,
        weights=m.weights if weights else None,
        drop_path=m.drop_path if student else 0.0,
        pool=m.pool if weights or m.pool == "linear" else "obj",
        tokens=obj_tokens(config),
        read_only=m.read_only,
        image_token=config.loss.image_weight > 0,
        checkpoint_blocks=m.checkpoint_blocks and student,
        like=None if like is None else {key[len(prefix) :]: like[key] for key in like if key.startswith(prefix)},
    )

    def head() -> DinoHead:
        return DinoHead(
            encoder.embed_dim,
            h.out_dim,
            hidden_dim=h.hidden_dim,
            bottleneck_dim=h.bottleneck_dim,
            layers=h.layers,
            norm_last_layer=h.norm_last_layer,
            prototype_init=h.prototype_init,
        )

    network = Network(encoder, head(), head() if config.loss.patch_weight and not h.shared else None)
    if not config.loss.patch_weight:
        network.encoder.mask_token.requires_grad_(False)  # unused in a step, it would stop DistributedDataParallel
    return network
