"""timm's vision transformers, with or without weights: the tokens, norm and pooling are those the weights were trained with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from annotations.errors import UserError, one_line
from odis_path.model.architectures import BASE_KWARGS, TimmArguments, resolve_model
from odis_path.model.pretrained import Backbone, LoadReport, find_backbone, is_gated, load_backbone, read_backbone
from odis_path.model.published import RGB, Published, published
from odis_path.model.source import HubFolder, hub_folder

# How an encoder pools: [OBJ] (or the class token), the mean of patches, both side by side, or by attention of the model's own.
EncoderPool = Literal["obj", "linear", "obj+linear", "map"]
TRAINED_POOLS: dict[str, EncoderPool] = {"token": "obj", "avg": "linear", "map": "map"}
POOL_WORDS: dict[str, EncoderPool] = {"cls": "obj", "mean": "linear", "cls+mean": "obj+linear"}  # of --pool
WORDS_OF_POOL = {pool: word for word, pool in POOL_WORDS.items()} | {"map": "attention"}


@dataclass(frozen=True)
class Start:
    """A timm VisionTransformer or Eva, and how its weights want to be used.

    vit: on the CPU. pool: as the model was trained, or as its authors pool it; a word of timm that odis-path has no equal of
    (max, avgmax, prr, or "" where nothing says it) stays as it is. trained_px: side of the images trained on, None where
    nothing says it. norm: mean and std of pixels that the model wants, None where nothing says it. report: what was loaded.
    published: what is known of the model by its name. norm_assumed: norm is ImageNet's, for want of a word in config.json.
    """

    vit: Any
    pool: str
    trained_px: int | None
    norm: tuple[RGB, RGB] | None = None
    report: LoadReport | None = None
    published: Published | None = None
    norm_assumed: bool = False


def create_vit(
    name: str,
    kwargs: TimmArguments | None = None,
    *,
    weights: str | None = None,
    drop_path: float = 0.0,
    like: Mapping[str, Tensor] | None = None,
    native: bool = False,
) -> Start:
    """Build a vision transformer of timm.

    weights: None (random), "timm" (those that timm, the hub or a `local-dir:` folder has under the name), or a local file.
    Without weights it is built for [OBJ], with a class token and a norm before it; like: with the tokens and the norm of this
    state dict of a ViT; native: as timm builds the name. With weights, the tokens and the norm are theirs.
    Raises UserError where timm has no such model, it is no plain ViT, or the weights do not fit, strictly: no token, norm or
    position may be missing.
    """
    for key, value in (kwargs or {}).items():
        if value != BASE_KWARGS.get(key, value) or (key == "patch_drop_rate" and value):
            raise UserError(f"model.kwargs.{key}={value} cannot be set: odis-path needs {BASE_KWARGS.get(key, 0)} there")
    name, resolved = resolve_model(name, kwargs or {})
    known, folder = published(name), hub_folder(name)
    options = _own_options(known, folder, resolved) | {"drop_path_rate": drop_path}
    if weights is None and not native:
        form = ("cls_token" in like, "fc_norm.weight" in like) if like is not None else (True, False)
        options = options | BASE_KWARGS
        options = _layers(known, folder is None if like is None else is_gated(like)) | options
        if form != (True, False) or folder is not None:
            options |= tokens_and_norm(_sketch(name, options), *form)
        return Start(_build(name, options), "obj" if form[0] else "linear", None)
    sketch = _sketch(name, options)
    backbone = _backbone_of(name, folder, sketch, weights)
    if backbone is not None and known is not None and known.kwargs:  # a folder of its name need not be what its authors publish
        plain_options = _own_options(None, folder, resolved) | {"drop_path_rate": drop_path}
        plain = _sketch(name, plain_options)
        if _differences(plain, backbone) < _differences(sketch, backbone):
            sketch, options = plain, plain_options
    if backbone is not None:
        options |= _fitting(backbone, sketch, from_file=weights not in (None, "timm"))
    options = _layers(known, folder is None if backbone is None else is_gated(backbone.state)) | options
    vit = _build(name, options)
    report = None if backbone is None or weights is None else load_backbone(vit, backbone)
    pool = TRAINED_POOLS.get(vit.global_pool, vit.global_pool)
    if known is not None and vit.cls_token is not None and vit.global_pool in ("token", ""):
        pool = POOL_WORDS[known.pool]
    norm = None if weights not in (None, "timm") and known is None else _norm_of_pixels(vit, folder, known)
    assumed = folder is not None and known is None and not folder.states_norm
    return Start(vit, pool, _trained_px(vit, report, known), norm, report, known, assumed)


def _layers(known: Published | None, gated: bool) -> TimmArguments:
    """Return the classes of layers that a model is known to have beside a gated MLP."""
    return resolve_model("", dict(known.layers))[1] if known is not None and gated else {}


def _own_options(known: Published | None, folder: HubFolder | None, resolved: TimmArguments) -> TimmArguments:
    """Return what a name is built with where its own tokens and pooling stay; its folder's come before its authors'."""
    stated: TimmArguments = {}
    if folder is not None:
        stated = resolve_model(folder.architecture, dict(folder.arguments))[1]
        if folder.global_pool is not None:
            stated["global_pool"] = folder.global_pool
    asked = {key: BASE_KWARGS[key] for key in ("num_classes", "dynamic_img_size")}
    return {**(known.kwargs if known is not None else {}), **stated, **resolved, **asked}


def _build(name: str, options: TimmArguments) -> Any:
    """Build timm's model; refuse one that is not plain."""
    import timm

    try:
        vit = timm.create_model(name, **options)
    except Exception as error:  # timm raises whatever its constructors raise; the user needs one line
        line = one_line(error)[:300]
        raise UserError(f"model {name}: timm cannot build it with {options}: {line}") from None
    if not is_plain(vit):
        raise UserError(
            f"model {name}: not a plain vision transformer with a class token or average pooling; take a vit_* or eva02_* "
            "name of timm"
        )
    return vit


def _sketch(name: str, options: TimmArguments) -> Any:
    """Build the same without memory for its tensors."""
    with torch.device("meta"):
        return _build(name, options)


def is_plain(vit: Any) -> bool:
    """Tell whether `ObjViT` can wrap a timm model: patches cut by one convolution, no second class token, blocks."""
    from timm.layers.patch_embed import PatchEmbed
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    return (
        isinstance(vit, (VisionTransformer, Eva))
        and isinstance(vit.patch_embed, PatchEmbed)
        and getattr(vit, "dist_token", None) is None
    )


def _backbone_of(name: str, folder: HubFolder | None, sketch: Any, weights: str | None) -> Backbone | None:
    """Read the weights to load, or those of a folder to be built like; None where there are none at hand."""
    if weights not in (None, "timm"):
        return read_backbone(Path(weights))
    if folder is not None:
        return read_backbone(folder.weights)
    return find_backbone(_fetched(name, sketch), f"model {name}") if weights == "timm" else None


class _FetchedWeights(Exception):  # noqa: N818 - it carries what was asked for
    """End timm's loading once the weights are there."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        super().__init__()
        self.state = state


def _fetched(name: str, sketch: Any) -> Mapping[str, Any]:
    """Fetch the weights that timm or the hub has of a model, as they are there: timm itself would load them leniently."""
    from timm.models import load_pretrained

    def keep(state: Mapping[str, Any], _model: Any = None) -> Mapping[str, Any]:
        raise _FetchedWeights(state)

    try:
        load_pretrained(sketch, num_classes=sketch.pretrained_cfg.get("num_classes", 0), filter_fn=keep)
    except _FetchedWeights as fetched:
        return fetched.state
    except Exception as error:
        line = one_line(error)[:300]
        raise UserError(f"model {name}: its weights cannot be fetched: {line}") from None
    raise UserError(f"model {name}: published in a form of its own, not as a dict of tensors that can be checked")


def _differences(sketch: Any, backbone: Backbone) -> int:
    """Count the tensors in which a backbone differs from a model, but for grid and size of its patches."""
    model, loaded = sketch.state_dict(), backbone.state
    unequal = [key for key in model.keys() & loaded.keys() if model[key].shape[-1:] != loaded[key].shape[-1:]]
    return len(model.keys() ^ loaded.keys()) + len([key for key in unequal if not key.startswith("patch_embed.")])


def _fitting(backbone: Backbone, sketch: Any, *, from_file: bool) -> TimmArguments:
    """Choose arguments that give timm's model the tokens and last norm that the weights have, where they allow a choice.

    What a name is by itself and what its weights lack is not made up: the strict comparison says it. A file, which says
    nothing of pooling, is taken for one with a trained class token where it has that token and a norm before pooling.
    """
    after = backbone.norm_after_pool
    if from_file and backbone.class_token and after is False:
        return tokens_and_norm(sketch, token=True, norm_after_pool=False)
    if from_file and backbone.class_token and after:
        return {**tokens_and_norm(sketch, token=True, norm_after_pool=True), "global_pool": "avg"}
    if after is None or sketch.global_pool in ("token", "map", ""):
        return {}
    return _norm(sketch, after)


def tokens_and_norm(vit: Any, token: bool, norm_after_pool: bool) -> TimmArguments:
    """Return timm's arguments for a model with or without a class token, its last norm before or after pooling."""
    pool = {"class_token": token, "global_pool": "token" if token else "avg"}
    return {**pool, **_norm(vit, norm_after_pool)}


def _norm(vit: Any, after_pool: bool) -> TimmArguments:
    from timm.models.eva import Eva

    if isinstance(vit, Eva):
        return {"use_fc_norm": after_pool, "use_post_transformer_norm": not after_pool}
    return {"fc_norm": after_pool}


def _trained_px(vit: Any, report: LoadReport | None, known: Published | None) -> int | None:
    """Find the side of the images trained on: as the authors state it, by the positions alone, or the model's own."""
    positions_px = report.trained_px if report is not None else None
    if known is not None and positions_px in (None, known.size_px, known.positions_px):
        return known.size_px
    return positions_px or int(vit.patch_embed.img_size[0])


def _norm_of_pixels(vit: Any, folder: HubFolder | None, known: Published | None) -> tuple[RGB, RGB]:
    """Find mean and std of pixels: as config.json states them, else as the model's authors do, else timm's."""
    cfg = vit.pretrained_cfg
    if known is not None and not (folder is not None and folder.states_norm):
        return known.norm
    return tuple(cfg["mean"]), tuple(cfg["std"])


def start_pool(start: Start, name: str) -> Literal["obj", "linear"]:
    """Choose the pooling to train on with: [OBJ] replaces a class token that was trained to be the embedding.

    DINOv3's was, though timm averages its patches. Raises UserError for pooling that cannot be gone on with.
    """
    if start.vit.cls_token is not None and (
        start.pool in ("obj", "obj+linear", "") or "dinov3" in str(start.vit.pretrained_cfg.get("architecture"))
    ):
        return "obj"
    if start.pool == "linear":
        return "linear"
    own = "attention" if start.pool == "map" else start.pool or "no"
    raise UserError(
        f"model.name={name}: was trained with {own} pooling: to go on with the mean of patches set model.pool=linear"
    )


def embedding_pool(start: Start, source: str, asked: str | None) -> EncoderPool:
    """Choose the pooling of `embed`: as asked (a word of --pool), or as the model was trained. UserError where it cannot."""
    pool = POOL_WORDS[asked] if asked is not None else start.pool
    if pool == "" and start.vit.cls_token is not None:
        pool = "obj"
    if "obj" in pool and start.vit.cls_token is None:
        raise UserError(f"--pool {asked or 'cls'}: {source} has no class token: take --pool mean")
    if asked is None and getattr(start.vit, "pool_include_prefix", False) and pool == "linear":
        raise UserError(
            f"{source}: was trained with a mean that takes in its class token and registers: say --pool mean or cls"
        )
    if pool not in WORDS_OF_POOL:
        words = "mean" if start.vit.cls_token is None else "cls, mean or cls+mean"
        own = f"was trained with {pool} pooling, which odis-path does not have" if pool else "does not say how it is pooled"
        raise UserError(f"{source}: {own}: say --pool {words}")
    return pool
