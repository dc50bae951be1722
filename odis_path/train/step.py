"""One training step: views to tokens to losses, student against teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from math import sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from odis_path.centering import sinkhorn
from odis_path.data.views import compiled_view_images, view_images
from odis_path.losses import Center, cross_view_loss, entropy, masked_patch_loss, sharpened
from odis_path.model.head import DinoHead
from odis_path.model.vit import ObjViT, build_encoder
from odis_path.spread import kde, koleo
from odis_path.train.checkpoint import Checkpoint
from odis_path.train.config import PretrainConfig
from odis_path.train.schedule import StepValues


class Views(NamedTuple):
    """A batch on the device: images normalised, view-major (view * B + tile); K objects a tile.

    Where there is an image-level term, the masks have K + 1 rows, the last of them the whole image.
    """

    globals_: Tensor  # float (2B, 3, g, g)
    locals_: Tensor  # float (LB, 3, l, l), L may be 0
    mask_global: Tensor | None  # bool (2B, K, N)
    mask_local: Tensor | None  # bool (LB, K, N')
    hidden: Tensor  # bool (2B, N)
    hidden_rows: Tensor  # int64 (n,), rows of the flattened hidden
    seen: Tensor  # bool (2 + L, B, K)


class Encoded(NamedTuple):
    """Head outputs: obj (V, B, K) [OBJ] logits, patches (n,) logits of the hidden patches (None without patch loss).

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

    def forward(self, views: Views, *, with_locals: bool, hide: bool, patches: bool, mean: bool = False) -> Encoded:
        """hide: replace hidden patches by the mask token (the student); patches: project the hidden patches; mean: of all."""
        batch = views.seen.shape[1]
        tokens = self.encoder(views.globals_, views.mask_global, views.hidden if hide else None)
        objects = [by_object(tokens.obj)]
        if with_locals and len(views.locals_):
            objects.append(by_object(self.encoder(views.locals_, views.mask_local).obj))
        every = torch.cat(objects).unflatten(0, (-1, batch))  # (V, B, K, D)
        logits = self.head(every)
        if not patches:
            return Encoded(logits, None, every[:2, :, 0])
        head, flat = self.patch_head or self.head, tokens.patches.flatten(0, 1)
        if not mean:
            return Encoded(logits, head(flat[views.hidden_rows]), every[:2, :, 0])
        embedded = head.embed(flat)
        hidden = head.last_layer(embedded[views.hidden_rows])
        with torch.autocast(flat.device.type, enabled=False):  # the last layer is linear: the mean goes through it once
            average = head.last_layer(embedded.to(head.last_layer.weight.dtype).mean(0))
        return Encoded(logits, hidden, every[:2, :, 0], average)


def by_object(obj: Tensor) -> Tensor:
    """[OBJ] embeddings as (B, K, D): K = 1 where the encoder was given no mask an object."""
    return obj if obj.ndim == 3 else obj[:, None]


def obj_tokens(config: PretrainConfig) -> int:
    """Learned [OBJ] tokens: one an object, and one for the whole image; a read-only [OBJ], or linear pooling, serves all."""
    return (
        1 if config.model.read_only or config.model.pool == "linear" else config.target.objects + (config.loss.image_weight > 0)
    )


def build_network(
    config: PretrainConfig, *, student: bool, weights: bool = False, like: Mapping[str, Tensor] | None = None
) -> Network:
    """Student (drop path on) or teacher of a configuration.

    weights: load those the configuration starts from. like: a state dict of such a network that it is to take; with neither,
    the network is that of an [OBJ] model.
    """
    m, h = config.model, config.head
    prefix = "encoder.vit."
    encoder = build_encoder(
        m.name, m.kwargs, weights=m.weights if weights else None, drop_path=m.drop_path if student else 0.0,
        pool=m.pool if weights or m.pool == "linear" else "obj",
        tokens=obj_tokens(config), read_only=m.read_only, image_token=config.loss.image_weight > 0,
        checkpoint_blocks=m.checkpoint_blocks and student,
        like=None if like is None else {key[len(prefix) :]: like[key] for key in like if key.startswith(prefix)},
    )  # fmt: skip

    def head() -> DinoHead:
        return DinoHead(
            encoder.embed_dim, h.out_dim, hidden_dim=h.hidden_dim, bottleneck_dim=h.bottleneck_dim, layers=h.layers,
            norm_last_layer=h.norm_last_layer, prototype_init=h.prototype_init,
        )  # fmt: skip

    network = Network(encoder, head(), head() if config.loss.patch_weight and not h.shared else None)
    if not config.loss.patch_weight:
        network.encoder.mask_token.requires_grad_(False)  # unused in a step, it would stop DistributedDataParallel
    return network


def build_student(config: PretrainConfig, checkpoint: Checkpoint | None) -> tuple[PretrainConfig, Network]:
    """The student, with the weights it starts from, or shaped as in the checkpoint that it is to take; and how it pools.

    The configuration comes back with model.pool settled: `auto` is what the weights, or the checkpoint, were trained with.
    """
    if checkpoint is None:
        student = build_network(config, student=True, weights=True)
    else:
        if config.model.pool == "auto":
            config = with_pool(config, checkpoint.config.model.pool)
        student = build_network(config, student=True, like=checkpoint.state["student"])
    return with_pool(config, student.encoder.pool), student


def with_pool(config: PretrainConfig, pool: str) -> PretrainConfig:
    """The configuration with this model.pool."""
    return config.model_copy(update={"model": config.model.model_copy(update={"pool": pool})})


def start_line(config: PretrainConfig, encoder: ObjViT) -> str:
    """What a run starts from, in a line: the layout of its weights, how they pool, the size they were trained at."""
    loaded, m = encoder.loaded, config.model
    assert loaded is not None
    obj = encoder.pool == "obj"
    parts = [f"{loaded.layout} layout, {loaded.loaded} tensors"]
    parts.append("[OBJ] goes on from the class token" if obj else "pooled by the mean of in-box patches (model.pool=linear)")
    size, other = config.views.global_size, ", positions are interpolated" if encoder.has_positions else ""
    if encoder.trained_px is not None:
        same = size == encoder.trained_px
        parts.append(f"views.global_size={size}, " + ("as trained" if same else f"trained at {encoder.trained_px} px{other}"))
    if encoder.norm is not None and encoder.norm != (config.data.mean, config.data.std):
        mean, std = (list(values) for values in encoder.norm)
        parts.append(f"trained with another mean and std: set data.mean={mean} data.std={std}")
    source = m.name if m.weights == "timm" else m.weights
    return f"start weights {source}: {'; '.join(parts)}{encoder.adapted()}"


def make_views(
    batch: dict[str, Tensor], config: PretrainConfig, tile_px: int, device: torch.device, *, compiled: bool = False
) -> Views:
    """Cut, colour and normalise all views of a collated batch, on the device; compiled: by kernels made for their sizes."""
    v, d = config.views, config.data
    moved = {key: value.to(device, non_blocking=True) for key, value in batch.items() if key not in ("target", "rects", "lost")}

    def images_of(kind: str, colours: Tensor, size_px: int, scale: tuple[float, float]) -> Tensor:
        draw = compiled_view_images() if compiled else view_images
        blurred = None if compiled else moved[f"blurred_{kind}"]
        shrink = sqrt(scale[1]) * tile_px / size_px
        return draw(moved["tile"], moved[f"theta_{kind}"], colours, blurred, size_px, shrink, d.mean, d.std)

    images = images_of("global", moved["colours"][:2], v.global_size, v.global_scale)
    local = images.new_zeros(0, 3, v.local_size, v.local_size)
    if v.local_count:
        local = images_of("local", moved["colours"][2:], v.local_size, v.local_scale)
    mask_global = mask_local = None
    seen = moved["seen"]
    if config.target.mask:
        mask_global = moved["mask_global"].flatten(0, 1)
        mask_local = moved["mask_local"].flatten(0, 1) if v.local_count else None
        if config.loss.image_weight:
            mask_global, mask_local = whole_too(mask_global), None if mask_local is None else whole_too(mask_local)
    return Views(images, local, mask_global, mask_local, moved["hidden"].flatten(0, 1), moved["hidden_rows"], seen)


def whole_too(mask: Tensor) -> Tensor:
    """Masks (B, K, N) with one more object that is the whole image."""
    return torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)


class Criterion(nn.Module):
    """The weighted sum of the [OBJ] loss, the image-level one, the patch loss and the regularisers, with their centers."""

    def __init__(self, config: PretrainConfig, *, compiled: bool = False) -> None:
        """compiled: fuse what runs over the logits of hidden patches, most of the work here."""
        super().__init__()
        self.config = config.loss
        self.sharpened = torch.compile(sharpened, dynamic=True) if compiled else sharpened
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
        """Losses of a micro-batch and figures for the log; after the last of a step the centers move (DINO eq. 4).

        pairs: as in `cross_view_loss`, for a step of several micro-batches.
        """
        c, objects = self.config, views.seen.shape[2]
        seen = views.seen.flatten(1).to(self.obj_center.value.dtype)
        logits = teacher.obj[:, :, :objects].flatten(1, 2)  # (2, B * K, P)
        weight = seen[: len(logits)]
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
            self.obj_center.add(logits.flatten(0, 1), weight.flatten())
        parts["patch"] = self.patch_loss(teacher, student.patches, views, temperature, loss.new_zeros(()))
        loss = loss + c.patch_weight * parts["patch"]
        spread = partial(self.spread, student.token, views.seen[:2, :, 0].to(seen.dtype))
        if c.koleo_weight:
            parts["koleo"] = spread(koleo)
            loss = loss + c.koleo_weight * parts["koleo"]
        if c.kde_weight:
            parts["kde"] = spread(partial(kde, concentration=c.kde_concentration))
            loss = loss + c.kde_weight * parts["kde"]
        if last:
            self.obj_center.move()
            self.patch_center.move()
        return {
            "loss": loss, **{f"loss_{name}": value.detach() for name, value in parts.items()},
            "teacher_entropy": entropy(targets, weight), "token_spread": token_spread(teacher.token),
        }  # fmt: skip

    def targets(self, center: Center, logits: Tensor, temperature: float, weight: Tensor | None = None) -> Tensor:
        """Teacher probabilities of (n, P) logits: centered and sharpened, or by Sinkhorn-Knopp."""
        if self.config.centering == "sinkhorn":
            return sinkhorn(logits, temperature, weight, self.config.sinkhorn_iterations)
        return self.sharpened(logits, center.value, center.value.new_full((), temperature))  # a number would be compiled in

    @staticmethod
    def spread(tokens: Tensor, seen: Tensor, measure: Callable[..., Tensor]) -> Tensor:
        """A regulariser of (2, B, D) tokens with weights (2, B), one view at a time; every rank has B rows."""
        views = zip(tokens, seen, strict=True)
        return torch.stack([measure(token, weight=weight, rows=len(token)) for token, weight in views]).mean()

    def patch_loss(self, encoded: Encoded, student: Tensor | None, views: Views, temperature: float, nothing: Tensor) -> Tensor:
        """L_patch on hidden patches, or on those of them that lie in an object; `nothing` where it is off.

        encoded: what the teacher says.
        """
        teacher, mean = encoded.patches, encoded.patch_mean
        if teacher is None or student is None:
            return nothing
        images, patches = views.hidden.shape
        rows, counted, keep = views.hidden_rows, views.hidden, None
        if self.config.patch_in_box_only and views.mask_global is not None:
            shown = views.seen[:2].flatten(0, 1)[:, :, None]
            inside = (views.mask_global[:, : shown.shape[1]] & shown).any(1)
            keep, counted = inside.flatten()[rows], views.hidden & inside
        target = self.targets(self.patch_center, teacher, temperature, keep)
        if keep is not None:
            target = target * keep[:, None].to(target.dtype)  # a zero target row adds nothing
        if self.config.centering == "center" and mean is None:
            self.patch_center.add(teacher, keep)
        elif mean is not None:
            self.patch_center.add(mean[None])  # every rank and micro-batch has as many patches
        return self.masked_patch_loss(target, student, rows // patches, images, self.config.student_temperature, counted.sum(1))


def token_spread(obj: Tensor) -> Tensor:
    """How far unit [OBJ] embeddings (..., B, D) of B tiles lie apart: mean standard deviation over the tiles times sqrt(D).

    1 for a uniform sphere, 0 when collapsed; the mean over whatever comes before the tiles (the views).
    """
    unit = torch.nn.functional.normalize(obj.detach().float(), dim=-1)
    return unit.std(-2, unbiased=False).mean() * sqrt(unit.shape[-1])


def parameter_groups(network: Network, layer_decay: float = 1.0, *, decay_gain: bool = False) -> list[dict[str, Any]]:
    """AdamW groups: no weight decay on biases and 1-D parameters as in iBOT; layer-wise learning rates as in BEiT.

    decay_gain: the gain of the last layer decays too; iBOT's is a column, and so not 1-D.

    A block's rate is layer_decay times the next one's; heads, [OBJ] extras and the last norm have the full rate, tokens,
    position and patch embedding that of a block before the first.
    """
    depth = len(network.encoder.vit.blocks)  # type: ignore[arg-type]
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            decays = (parameter.ndim > 1 and not name.endswith(".bias")) or (decay_gain and name.endswith("last_layer.gain"))
            groups.setdefault((decays, layer_decay ** (depth + 1 - layer_of(name, depth))), []).append(parameter)
    return [{"params": found, "decays": decays, "lr_scale": scale} for (decays, scale), found in groups.items()]


def layer_of(name: str, depth: int) -> int:
    """Where a parameter lies: 0 for what comes before the first block, i + 1 for block i, depth + 1 for what comes after."""
    if name.startswith("encoder.vit.blocks."):
        return int(name.split(".")[3]) + 1
    early = ("patch_embed.", "cls_token", "reg_token", "pos_embed", "norm_pre.", "rope.")
    return 0 if name.removeprefix("encoder.vit.").startswith(early) else depth + 1


def set_schedule(optimizer: torch.optim.Optimizer, values: StepValues) -> None:
    """Write this step's learning rate and weight decay into the optimizer."""
    for group in optimizer.param_groups:
        group["lr"] = values.lr * group["lr_scale"]
        group["weight_decay"] = values.weight_decay if group["decays"] else 0.0


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], limit: float, mode: str) -> None:
    """Scale gradients down to `limit`: each parameter's norm (iBOT's recipe) or the norm of all together. 0: off."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if not limit or not grads:
        return
    norms = torch.stack(torch._foreach_norm(grads))
    if mode == "global":
        norms = norms.norm().expand(len(grads))
    factors = (limit / (norms + 1e-6)).clamp_max(1.0)
    torch._foreach_mul_(grads, list(factors.unbind()))


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """EMA by name over parameters (teacher <- m teacher + (1 - m) student); buffers are copied."""
    mine, theirs = dict(teacher.named_parameters()), dict(student.named_parameters())
    torch._foreach_lerp_(list(mine.values()), [theirs[name] for name in mine], 1.0 - momentum)
    source = dict(student.named_buffers())
    for name, buffer in teacher.named_buffers():
        buffer.copy_(source[name])
