"""Short names of architectures, and the words of a YAML file turned into the layer classes timm expects."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from annotations.errors import UserError

# 16: the plain ViT; 14: the one with four registers and layer scale that DINOv2 published its weights for.
SHORT_NAMES = {
    "ti/16": "vit_tiny_patch16_224",
    "s/16": "vit_small_patch16_224",
    "b/16": "vit_base_patch16_224",
    "l/16": "vit_large_patch16_224",
    "s/14": "vit_small_patch14_reg4_dinov2",
    "b/14": "vit_base_patch14_reg4_dinov2",
    "l/14": "vit_large_patch14_reg4_dinov2",
    "h/14": "vit_huge_patch14_224",
    "g/14": "vit_giant_patch14_reg4_dinov2",
}

TimmArguments = dict[str, Any]  # of timm.create_model

# What every encoder here is built with: no classifier, [OBJ] in the place of the class token, any grid of patches.
BASE_KWARGS: TimmArguments = {"num_classes": 0, "global_pool": "token", "class_token": True, "dynamic_img_size": True}


SHORT = re.compile(r"(?:vit[-_])?([a-z]{1,2}/\d+)", re.IGNORECASE)


def is_model_name(source: str) -> bool:
    """Tell whether a word that looks like a path names a model: `S/16`, `hf-hub:owner/name`, `local-dir:folder`."""
    return bool(SHORT.fullmatch(source.strip()) or re.match(r"(hf[-_]hub|local-dir):", source))


def resolve_model(name: str, kwargs: TimmArguments) -> tuple[str, TimmArguments]:
    """Resolve a model to a timm name and arguments for timm.create_model.

    name: `S/16`, `ViT-B/14` and the like (in any case), or any name of timm, which is returned as it is. kwargs: words
    under keys that end in `_layer` (mlp_layer: SwiGLUPacked) become the classes of timm.layers or torch.nn.
    Raises UserError for a short name or a word that is not known.
    """
    match = SHORT.fullmatch(name.strip())
    if match:
        short = match[1].lower()
        if short not in SHORT_NAMES:
            known = ", ".join(f"{size[0].upper()}{size[1:]}" for size in SHORT_NAMES)
            raise UserError(f"model.name is {name!r}: no such short name; take one of {known}, or a full name of timm")
        name = SHORT_NAMES[short]
    resolved = {
        key: find_layer(key, value)[1] if key.endswith("_layer") and isinstance(value, str) else value
        for key, value in kwargs.items()
    }
    return name, resolved


def patch_px(name: str, kwargs: Mapping[str, Any]) -> int:
    """Return the side of a model's patches in px: of its arguments, else as its full name states it, else 16.

    Imports neither torch nor timm. Raises UserError for a short name that is not known.
    """
    stated = re.search(r"patch(\d+)", resolve_model(name, {})[0])
    return int(kwargs.get("patch_size") or (stated[1] if stated else 16))


def find_layer(key: str, word: str) -> tuple[str, Any]:
    """Find the dotted name and the class behind `word`: timm.layers first, then torch.nn; the case is forgiven.

    key: which argument asked, for the error. timm's LayerNorm has the eps of its vision transformers (1e-6).
    """
    import timm.layers
    import torch.nn

    for module, dotted in ((timm.layers, "timm.layers"), (torch.nn, "torch.nn")):
        names = [word, *(n for n in sorted(vars(module)) if n.lower() == word.lower())]
        for name in names:
            value = vars(module).get(name)
            if isinstance(value, partial) or (isinstance(value, type) and issubclass(value, torch.nn.Module)):
                return f"{dotted}.{name}", value
    raise UserError(
        f"model.kwargs.{key} is {word!r}: no such layer; name a class of timm.layers or torch.nn, "
        "for example SwiGLUPacked, SiLU or LayerNorm"
    )
