"""The loss of a training step: [OBJ] across views, masked patches, and what a configuration adds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import sqrt

import torch
from torch import Tensor, nn

from odis_path.config import PretrainConfig, windows_a_tile
from odis_path.loss.dino_ibot import Center, cross_view_loss, entropy, masked_patch_loss, teacher_probabilities
from odis_path.loss.koleo_kde import kde, koleo
from odis_path.loss.sinkhorn import sinkhorn
from odis_path.model.network import Encoded, Views


class Criterion(nn.Module):
    """The weighted sum of the [OBJ] loss, the image-level one, the patch loss and the regularisers, with their centers."""

    def __init__(self, config: PretrainConfig, *, compiled: bool = False) -> None:
        """compiled: fuse what runs over the logits of masked patches, most of the work here."""
        super().__init__()
        self.config = config.loss
        self.windows = windows_a_tile(config)
        self.teacher_probabilities = torch.compile(teacher_probabilities, dynamic=True) if compiled else teacher_probabilities
        self.masked_patch_loss = torch.compile(masked_patch_loss, dynamic=True) if compiled else masked_patch_loss
        self.obj_center = Center(config.head.out_dim, config.loss.center_momentum)
        self.patch_center = Center(config.head.out_dim, config.loss.center_momentum)

    def forward(
        self,
        teacher: Encoded,
        student: Encoded,
        views: Views,
        temperature: float,
        *,
        pairs: Tensor | None = None,
        last: bool = True,
    ) -> dict[str, Tensor]:
        """Compute losses of a micro-batch and figures for the log; after the last of a step the centers move (DINO eq. 4).

        pairs: as in `cross_view_loss`, for a step of several micro-batches.
        """
        c, objects = self.config, views.object_visible.shape[2]
        seen = views.object_visible.flatten(1).to(self.obj_center.value.dtype)
        logits = teacher.obj[:, :, :objects].flatten(1, 2)  # (2, B * K, P)
        weight = seen[: len(logits)]
        if c.tile_center:
            logits = centred_in_tile(logits, weight, objects * self.windows, c.tile_center)
        targets = self.targets(self.obj_center, logits.flatten(0, 1), temperature, weight.flatten()).view_as(logits)
        logits_s = student.obj[:, :, :objects].flatten(1, 2)
        parts = {"obj": cross_view_loss(targets, logits_s, c.student_temperature, seen, pairs)}
        loss = c.obj_weight * parts["obj"]
        if c.image_weight:
            whole = teacher.obj[:, :, objects]
            image_targets = self.targets(self.obj_center, whole.flatten(0, 1), temperature).view_as(whole)
            parts["image"] = cross_view_loss(image_targets, student.obj[:, :, objects], c.student_temperature)
            loss = loss + c.image_weight * parts["image"]
        if c.centering == "center":
            self.obj_center.accumulate(logits.flatten(0, 1), weight.flatten())
        parts["patch"] = self.patch_loss(teacher, student.patches, views, temperature, loss.new_zeros(()))
        loss = loss + c.patch_weight * parts["patch"]
        spread = partial(self.spread, student.token, views.object_visible[:2, :, 0].to(seen.dtype))
        if c.koleo_weight:
            parts["koleo"] = spread(koleo)
            loss = loss + c.koleo_weight * parts["koleo"]
        if c.kde_weight:
            parts["kde"] = spread(partial(kde, concentration=c.kde_concentration))
            loss = loss + c.kde_weight * parts["kde"]
        if last:
            self.obj_center.update()
            self.patch_center.update()
        return {
            "loss": loss,
            **{f"loss_{name}": value.detach() for name, value in parts.items()},
            "teacher_entropy": entropy(targets, weight),
            "token_spread": feature_std(teacher.token),
        }

    def targets(self, center: Center, logits: Tensor, temperature: float, weight: Tensor | None = None) -> Tensor:
        """Compute teacher probabilities of (n, P) logits: centered and sharpened, or by Sinkhorn-Knopp."""
        if self.config.centering == "sinkhorn":
            return sinkhorn(logits, temperature, weight, self.config.sinkhorn_iterations)
        return self.teacher_probabilities(
            logits, center.value, center.value.new_full((), temperature)
        )  # a number would be compiled in

    @staticmethod
    def spread(tokens: Tensor, seen: Tensor, measure: Callable[..., Tensor]) -> Tensor:
        """Compute a regulariser of (2, B, D) tokens with weights (2, B), one view at a time; every rank has B rows."""
        views = zip(tokens, seen, strict=True)
        return torch.stack([measure(token, weight=weight, rows=len(token)) for token, weight in views]).mean()

    def patch_loss(self, encoded: Encoded, student: Tensor | None, views: Views, temperature: float, nothing: Tensor) -> Tensor:
        """Compute L_patch on masked patches, or on those of them that lie in an object; `nothing` where it is off.

        encoded: what the teacher says.
        """
        teacher, mean = encoded.patches, encoded.patch_mean
        if teacher is None or student is None:
            return nothing
        images, patches = views.masked_patches.shape
        rows, counted, keep = views.masked_rows, views.masked_patches, None
        if self.config.patch_in_box_only and views.object_masks_global is not None:
            shown = views.object_visible[:2].flatten(0, 1)[:, :, None]
            inside = (views.object_masks_global[:, : shown.shape[1]] & shown).any(1)
            keep, counted = inside.flatten()[rows], views.masked_patches & inside
        target = self.targets(self.patch_center, teacher, temperature, keep)
        if keep is not None:
            target = target * keep[:, None].to(target.dtype)  # a zero target row adds nothing
        if self.config.centering == "center" and mean is None:
            self.patch_center.accumulate(teacher, keep)
        elif mean is not None:
            self.patch_center.accumulate(mean[None])  # every rank and micro-batch has as many patches
        return self.masked_patch_loss(target, student, rows // patches, images, self.config.student_temperature, counted.sum(1))


def centred_in_tile(logits: Tensor, weight: Tensor, objects: int, share: float) -> Tensor:
    """Subtract from logits (V, B * K, P) a share of their mean over the K objects of their tile and view.

    weight: (V, B * K), 0 where a view lacks its object, which then does not count; a single object of a tile stays as it is.
    """
    grouped = logits.reshape(len(logits), -1, objects, logits.shape[2])
    counted = weight.reshape(len(weight), -1, objects, 1).to(logits.dtype)
    count = counted.sum(2, keepdim=True)
    mean = (grouped * counted).sum(2, keepdim=True) / count.clamp_min(1)
    centred: Tensor = grouped - share * mean * (count > 1)
    return centred.flatten(1, 2)


def feature_std(obj: Tensor) -> Tensor:
    """Measure how [OBJ] embeddings (..., B, D) of B tiles spread: mean standard deviation at unit length times sqrt(D).

    1 for a uniform sphere, 0 when collapsed; the mean over whatever comes before the tiles (the views).
    """
    unit = torch.nn.functional.normalize(obj.detach().float(), dim=-1)
    return unit.std(-2, unbiased=False).mean() * sqrt(unit.shape[-1])
