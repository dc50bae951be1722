"""Weights of others into a timm vision transformer: the public key layouts, one strict rule for what fits.

A layout is told by its keys, never by its file name. Whatever stands before the patch embedding's key is the backbone's
prefix (`backbone.`, `module.backbone.`, `encoder.vit.`); keys outside it are another part of the training (heads, losses)
and are dropped. Inside it nothing may be missing, left over or of another shape.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from annotations.errors import UserError, one_line
from odis_path.model.source import no_file
from odis_path.tensor_file import check_zip, load_safetensors
from tiling.storage.checksums import DamagedError

State = dict[str, Tensor]

TIMM_ANCHOR = "patch_embed.proj.weight"
TRANSFORMERS_ANCHOR = "embeddings.patch_embeddings.projection.weight"
# The order is the preference: a teacher or a moving average before what was trained directly.
WRAPPERS = (
    "teacher",
    "state_dict_ema",
    "model_ema",
    "student",
    "state_dict",
    "model",
    "model_state",
    "model_state_dict",
    "module",
)
HEADS = re.compile(r"(head|heads|head_dist|pre_logits|pooler|lm_head|dino_head|ibot_head)\d*\.")
MASK_TOKENS = ("mask_token", "masked_embed")

# transformers' ViT and DINOv2 (with registers, and the SwiGLU of its giant) to the names of the original code.
TRANSFORMERS = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
    (r"^layernorm\.", "norm."),
)


@dataclass(frozen=True)
class Backbone:
    """The backbone found in a file, before it is fitted to a model.

    source: the file, for errors. state: its tensors without prefix, in the names of timm or of DINOv2. outside: keys that are
    no part of it. mask_token, more_obj, checked: as in `LoadReport`, the tensors of any shape.
    """

    source: str
    state: State
    outside: tuple[str, ...]
    layout: str
    mask_token: Any
    more_obj: Tensor | None
    checked: bool = False

    @property
    def class_token(self) -> bool:
        return "cls_token" in self.state

    @property
    def norm_after_pool(self) -> bool | None:
        """Tell whether the last norm comes after pooling (fc_norm) or before it (norm); None where it has both or neither."""
        after = "fc_norm.weight" in self.state
        return None if after == ("norm.weight" in self.state) else after


def is_gated(state: Mapping[str, Tensor]) -> bool:
    """Tell whether the MLP of a backbone has gate and value in one first layer, as SwiGLUPacked has."""
    first, second = ("w12", "w3") if any(".mlp.w12." in key for key in state) else ("fc1", "fc2")
    rows, columns = (state.get(f"blocks.0.mlp.{layer}.weight") for layer in (first, second))
    return rows is not None and columns is not None and rows.shape[0] == 2 * columns.shape[1]


@dataclass(frozen=True)
class LoadReport:
    """Account of what was loaded: the layout, the number of tensors, the keys left aside, and what had to be adapted.

    trained_px: side of the images that its positions were trained on, None where it has none. resampled: whether positions or
    patch kernels had another size. mask_token: float (1, 1, D), the token of masked patches where the file has one; the caller
    owns it. more_obj: float (k, D), what tells further [OBJ] tokens from the first, where an odis-path checkpoint has some.
    checked: the file holds checksums and its content matches them; False for .safetensors files of others, for torch's older
    form and for what timm fetched.
    """

    layout: str
    loaded: int
    dropped: tuple[str, ...]
    resampled: bool
    trained_px: int | None
    mask_token: Tensor | None
    more_obj: Tensor | None = None
    checked: bool = False


def load_weights(vit: nn.Module, path: Path | str) -> LoadReport:
    """Load a local .safetensors, .pth, .pt or .bin file into a timm VisionTransformer or Eva, in place.

    Layouts: timm's own; an odis-path checkpoint; DINO and iBOT training checkpoints; DINOv2 and DINOv3 as published or as
    trained; transformers' ViT and DINOv2; any of them inside a `state_dict`, `model` and the like. A teacher is preferred
    to its student. Position embeddings and patch kernels of another size are resampled as timm does it.
    Raises UserError, one line, where the file cannot be read or does not fit; the model is then unchanged.
    """
    return load_backbone(vit, read_backbone(Path(path)))


def read_backbone(path: Path) -> Backbone:
    """Read the backbone in a local file. Raises UserError where it cannot be read or holds none."""
    content, checked = _read(path)
    return find_backbone(content, str(path), checked)


def find_backbone(content: Mapping[str, Any], source: str, checked: bool = False) -> Backbone:
    """Find the backbone in what a file or a hub gave. Raises UserError where there is none, or more than one."""
    inner, part, spare = _unwrap(content, source)
    state, outside, layout, token = _backbone(inner, source)
    if part in ("teacher", "student"):
        layout = f"{layout}, {part}"
    if token is None:  # iBOT gives the mask token to the student alone
        token = next((v for k, v in spare.items() if k.endswith(MASK_TOKENS) and isinstance(v, Tensor)), None)
    more_obj = next((inner[key] for key in outside if key.endswith("encoder.more_obj")), None)
    # DINOv2 splits its blocks for sharding, as blocks.<chunk>.<block>, with the block's own number.
    state = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key): value for key, value in state.items()}
    return Backbone(source, state, tuple(outside), layout, token, more_obj, checked)


def load_backbone(vit: nn.Module, backbone: Backbone) -> LoadReport:
    """Load a backbone into a timm VisionTransformer or Eva, in place, with strict keys. Raises as `load_weights` does."""
    model: Any = vit
    state, resampled, trained_px = _fit(dict(backbone.state), model, backbone.source)
    in_model = model.state_dict()
    aside = [key for key in state if key not in in_model and (HEADS.match(key) or _another_pool(key, model))]
    state = {key: value for key, value in state.items() if key not in aside}
    _check(state, in_model, backbone.source)
    model.load_state_dict(state)
    return LoadReport(
        backbone.layout,
        len(state),
        (*backbone.outside, *aside),
        resampled,
        trained_px,
        _as_token(backbone.mask_token, model.embed_dim),
        backbone.more_obj,
        backbone.checked,
    )


def _another_pool(key: str, model: Any) -> bool:
    """Tell whether a key is of the attention pooling that a model published with it is used without (SigLIP's `gap` names)."""
    return key.startswith("attn_pool.") and model.global_pool == "avg"


def _read(path: Path) -> tuple[Mapping[str, Any], bool]:
    """Read the content of a file, and whether it matches checksums that the file holds.

    Nothing in it is ever executed (argparse.Namespace, DINO's and iBOT's `args`, is let in).
    """
    if not path.is_file():
        raise UserError(no_file(path))
    remedy = "copy or fetch it again"
    try:
        if path.suffix == ".safetensors":
            return load_safetensors(path, remedy)
        checked = check_zip(path, "readable as weights", remedy)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except DamagedError:
        raise
    except Exception as error:  # torch and safetensors raise many kinds for a torn or foreign file
        classes = _foreign(path)
        if classes:
            raise UserError(
                f"{path}: holds Python objects ({', '.join(classes[:3])}) that are not loaded, for they could run code; "
                "save the model's state_dict() alone"
            ) from None
        raise UserError(f"{path}: not readable as weights, torn or of another kind ({one_line(error)[:120]})") from None
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds {type(content).__name__}, not a dict of tensors; save the model's state_dict()")
    return content, checked


def _foreign(path: Path) -> list[str]:
    """List classes a pickle asks for beyond what is let in; empty where the file is no such pickle."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:
        return []


def _unwrap(content: Mapping[str, Any], source: str) -> tuple[Mapping[str, Any], str, Mapping[str, Any]]:
    """Find the mapping that holds a patch embedding, the wrapper it lay in, and the student beside a teacher (or nothing)."""
    part = ""
    spare: Mapping[str, Any] = {}
    for _ in range(4):
        named = {key: value for key, value in content.items() if isinstance(key, str)}
        if any(key.endswith((TIMM_ANCHOR, TRANSFORMERS_ANCHOR)) for key in named):
            return named, part, spare
        wrapper = next((w for w in WRAPPERS if isinstance(content.get(w), Mapping) and content[w]), None)
        if wrapper is None:
            break
        spare = content.get("student", {}) if wrapper == "teacher" else spare
        part, content = wrapper, content[wrapper]
    keys = ", ".join(str(key) for key in list(content)[:3])
    raise UserError(
        f"{source}: no vision transformer in a known layout (keys such as {keys or 'none'}); needed is a key that ends in "
        f"{TIMM_ANCHOR}, as timm, DINO, iBOT, DINOv2 and odis-path write it"
    )


def _backbone(content: Mapping[str, Any], source: str) -> tuple[State, list[str], str, Tensor | None]:
    """Separate the backbone's tensors, without their prefix, the keys outside, the layout's name, and the mask token."""
    anchor = TIMM_ANCHOR if any(key.endswith(TIMM_ANCHOR) for key in content) else TRANSFORMERS_ANCHOR
    prefixes = [key.removesuffix(anchor) for key in content if key.endswith(anchor)]
    if len(prefixes) > 1:
        prefixes = [p for p in prefixes if re.search(r"teacher|ema", p)] or prefixes
    if len(prefixes) > 1:
        raise UserError(f"{source}: holds {len(prefixes)} backbones ({', '.join(prefixes[:3])}); save the wanted one alone")
    prefix = prefixes[0]
    outside = [key for key in content if not key.startswith(prefix)]
    state: State = {
        key.removeprefix(prefix): value
        for key, value in content.items()
        if key.startswith(prefix) and isinstance(value, Tensor)
    }
    if anchor == TRANSFORMERS_ANCHOR:
        state, layout = _from_transformers(state), "transformers"
    elif prefix.endswith("encoder.vit."):
        layout = "odis-path"
    elif "storage_tokens" in state:
        layout = "DINOv3"
    elif "mask_token" in state or "register_tokens" in state:
        layout = "DINOv2"
    elif prefix.endswith("backbone."):
        layout = "DINO or iBOT"
    else:
        layout = "timm"
    # An odis-path checkpoint keeps its token beside the ViT: encoder.mask_token, encoder.vit.*
    token = content.get(f"{prefix.removesuffix('vit.')}mask_token") if prefix.endswith("vit.") else None
    for name in MASK_TOKENS:
        token = state.pop(name, token)
    return state, outside, layout, token


def _from_transformers(state: State) -> State:
    """Rename transformers' tensors to the original names; its three projections become one."""
    renamed: State = {}
    for key, value in state.items():
        for pattern, name in TRANSFORMERS:
            key = re.sub(pattern, name, key)
        renamed[key] = value
    for key in [key for key in renamed if ".attn.query." in key]:
        parts = [key.replace(".query.", f".{name}.") for name in ("query", "key", "value")]
        if all(part in renamed for part in parts):
            renamed[key.replace(".query.", ".qkv.")] = torch.cat([renamed.pop(part) for part in parts])
    return renamed


def _fit(state: State, vit: Any, source: str) -> tuple[State, bool, int | None]:
    """Rename and resample as timm does; also whether a grid or kernel was resampled, and the side trained on in px."""
    from timm.models import eva, vision_transformer

    for key in ("pos_embed", "cls_token", TIMM_ANCHOR):
        if key in state:
            state[key] = state[key].float()
    prefix_tokens = 1 if "register_tokens" in state else _fold_position(state, vit)
    kernel, own_kernel = state[TIMM_ANCHOR], vit.patch_embed.proj.weight.shape[-2:]
    resampled, trained_px = kernel.ndim == 4 and kernel.shape[-2:] != own_kernel, None
    if "pos_embed" in state and vit.pos_embed is not None:
        positions = state["pos_embed"].shape[1] - prefix_tokens
        resampled |= positions != prod(vit.patch_embed.grid_size)
        trained_px = isqrt(max(0, positions)) * (kernel.shape[-1] if kernel.ndim == 4 else own_kernel[-1])
    is_eva = isinstance(vit, eva.Eva)
    options: dict[str, Any] = {}
    if is_eva:
        _drop_zero_bias(state, vit, source)
    else:
        options = {"adapt_layer_scale": True}
        if "register_tokens" in state or any(".mlp.w12." in key for key in state):
            state["mask_token"] = torch.zeros(1)  # by this key timm tells DINOv2's layout from its own
    if "flexi" in str(vit.pretrained_cfg.get("architecture")):  # as timm resamples these
        options |= {"interpolation": "bilinear", "antialias": False}
    try:
        fitted = (eva if is_eva else vision_transformer).checkpoint_filter_fn(state, vit, **options)
    except Exception as error:  # an impossible grid, for example
        raise UserError(
            f"{source}: cannot be fitted to the model ({one_line(error)[:120]}); check model.name and model.kwargs"
        ) from None
    return fitted, bool(resampled), trained_px


def _fold_position(state: State, vit: Any) -> int:
    """Give the class token its own position where the model keeps none for it: the sum is the same.

    Returns the number of positions before the first patch's, in `state` as it is then.
    """
    expected = 0 if getattr(vit, "no_embed_class", False) else int(vit.num_prefix_tokens)
    position, token = state.get("pos_embed"), state.get("cls_token")
    if expected or position is None or token is None:
        return expected
    patches = position.shape[1] - 1
    if isqrt(patches) ** 2 == patches:
        state["cls_token"] = token + position[:, :1]
        state["pos_embed"] = position[:, 1:]
    return 0


def _drop_zero_bias(state: State, vit: Any, source: str) -> None:
    """Drop the bias of query, key and value that DINOv3's files keep at zero; timm's plain names have none."""
    if "storage_tokens" not in state or getattr(vit.blocks[0].attn, "q_bias", None) is not None:
        return
    for key in [key for key in state if key.endswith("attn.qkv.bias")]:
        if state[key].any():
            raise UserError(f"{source}: {key} is not zero and the model has no such bias; take the _qkvb name of the model")
        del state[key]


def _check(state: State, in_model: State, source: str) -> None:
    """Check strictly: every tensor of the model, none besides, each of its shape."""
    differences = [
        f"{key}: {tuple(state[key].shape)} there, {tuple(in_model[key].shape)} in the model"
        for key in in_model
        if key in state and state[key].shape != in_model[key].shape
    ]
    differences += [f"{key}: missing there, {tuple(in_model[key].shape)} in the model" for key in in_model if key not in state]
    differences += [f"{key}: {tuple(state[key].shape)} there, none in the model" for key in state if key not in in_model]
    if differences:
        raise UserError(
            f"{source}: does not fit the model, first at {differences[0]} ({len(differences)} differences); "
            "set model.name and model.kwargs (in a folder, model_args of config.json) to the architecture of these weights, or "
            "give weights that are whole"
        )


def _as_token(token: Any, width: int) -> Tensor | None:
    """Return a mask token as float (1, 1, D), None where there is none of this width."""
    if not isinstance(token, Tensor) or token.numel() != width:
        return None
    return token.detach().float().reshape(1, 1, width).clone()
