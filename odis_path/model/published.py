"""Usage notes of published pathology models, from their authors: pooling, input size, mean and std.

Known without torch. A model is told by its name on the hub, or by the name of the folder its files lie in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from annotations.errors import UserError

Pool = Literal["cls", "mean", "cls+mean"]
POOLS: tuple[Pool, ...] = ("cls", "mean", "cls+mean")

RGB = tuple[float, float, float]
IMAGENET: tuple[RGB, RGB] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF: tuple[RGB, RGB] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
OPTIMUS: tuple[RGB, RGB] = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))
HIBOU: tuple[RGB, RGB] = ((0.7068, 0.5755, 0.7220), (0.1950, 0.2316, 0.1816))
LUNIT: tuple[RGB, RGB] = ((0.70322989, 0.53606487, 0.66096631), (0.21716536, 0.26081574, 0.20723464))

SWIGLU = {"mlp_layer": "SwiGLUPacked", "act_layer": "SiLU"}
LAYER_SCALE = {"init_values": 1e-5}
UNI2: dict[str, Any] = {
    "img_size": 224,
    "patch_size": 14,
    "depth": 24,
    "num_heads": 24,
    "embed_dim": 1536,
    "mlp_ratio": 2.66667 * 2,
    "reg_tokens": 8,
    "no_embed_class": True,
    **LAYER_SCALE,
}


@dataclass(frozen=True)
class Published:
    """One model (or family) as its authors use it.

    hub: owner/name. key: regular expression for its name in lower case, letters and digits alone. pool: of the embedding of
    a tile. size_px: side of the images; positions_px: that of the file's positions, where it is another. norm: mean and std of
    pixels in [0, 1]. kwargs: arguments of timm.create_model that the authors' page gives and the hub's config.json does not
    hold. layers: those of them that are classes, as words.
    """

    name: str
    hub: str
    key: str
    pool: Pool = "cls"
    size_px: int = 224
    positions_px: int | None = None
    norm: tuple[RGB, RGB] = IMAGENET
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    layers: Mapping[str, str] = field(default_factory=dict)


PUBLISHED = (
    Published("UNI", "MahmoodLab/UNI", "uni", kwargs=LAYER_SCALE),
    Published("UNI2-h", "MahmoodLab/UNI2-h", "uni2h?", kwargs=UNI2, layers=SWIGLU),
    Published("Virchow", "paige-ai/Virchow", "virchow", pool="cls+mean", layers=SWIGLU),
    Published("Virchow2", "paige-ai/Virchow2", "virchow2", pool="cls+mean", layers=SWIGLU),
    Published("H-optimus-0", "bioptimus/H-optimus-0", "hoptimus0", norm=OPTIMUS, kwargs=LAYER_SCALE),
    Published("H-optimus-1", "bioptimus/H-optimus-1", "hoptimus1", norm=OPTIMUS, kwargs=LAYER_SCALE),
    Published("H0-mini", "bioptimus/H0-mini", "h0mini", pool="cls+mean", norm=OPTIMUS, layers=SWIGLU),
    Published("Prov-GigaPath", "prov-gigapath/prov-gigapath", "(prov)?gigapath"),
    Published("Phikon", "owkin/phikon", "phikon"),
    Published("Phikon-v2", "owkin/phikon-v2", "phikonv2"),
    Published("Hibou-B", "histai/hibou-b", "hiboub", norm=HIBOU, layers=SWIGLU),
    Published("Hibou-L", "histai/hibou-L", "hiboul", norm=HIBOU, layers=SWIGLU),
    Published("Kaiko", "1aurent/vit_*.kaiko_ai_towards_large_pathology_fms", r".*kaikoai(towards.*)?", norm=HALF),
    Published("Midnight", "kaiko-ai/midnight", "midnight(12k)?", pool="cls+mean", positions_px=518, norm=HALF, layers=SWIGLU),
    Published("GPFM", "majiabo/GPFM", "gpfm", kwargs=LAYER_SCALE),
    Published("Lunit DINO", "1aurent/vit_small_patch*_224.lunit_dino", r".*lunitdino", norm=LUNIT),
)

# Models whose embedding no plain vision transformer gives.
NOT_PLAIN = {
    "CONCH": ("conch", "pools by attention layers of its own that are not part of timm"),
    "CONCH v1.5": ("conchv?15", "pools by attention layers of its own that are not part of timm"),
    "TITAN": ("titan", "embeds slides, from the patch embeddings of CONCH v1.5"),
    "CTransPath": ("ctranspath", "is a Swin transformer with a convolutional stem, without a class token"),
    "MUSK": ("musk", "is a multiway transformer, not one of timm's plain ones"),
}


def published(source: str) -> Published | None:
    """Look up `hf-hub:owner/name` or `local-dir:folder`; None for names of timm and models that are not known.

    Raises UserError for a known model that is no plain vision transformer.
    """
    for word in _names_in(source):
        for name, (key, why) in NOT_PLAIN.items():
            if re.fullmatch(key, word):
                raise UserError(f"{source}: {name} {why}: odis-path cannot embed with it")
        for model in PUBLISHED:
            if re.fullmatch(model.key, word):
                return model
    return None


def _names_in(source: str) -> list[str]:
    """List the words a source may have the model's name in: the last of its path, `models--owner--name` of the hub's cache."""
    kind, _, rest = source.partition(":")
    if not re.fullmatch(r"hf[-_]hub|local-dir", kind):
        return []
    parts = re.split(r"[/\\]", rest.partition("@")[0].rstrip("/\\"))
    cached = [part.rpartition("--")[2] for part in parts if part.startswith("models--")]
    return [re.sub(r"[^a-z0-9]", "", word.lower()) for word in [parts[-1], *cached]]
