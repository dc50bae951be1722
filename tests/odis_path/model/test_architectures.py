"""Names of models and layers, what docs/weights.md says of published models, and the recipes that go on from one."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from annotations.errors import UserError
from odis_path.config import load_config
from odis_path.model.architectures import BASE_KWARGS, SHORT_NAMES, find_layer, patch_px, resolve_model


@pytest.mark.parametrize("short", [*SHORT_NAMES, "ViT-S/16", "vit_b/14", "L/16"])
def test_short_names_are_names_of_timm(short: str) -> None:
    name, _ = resolve_model(short, {})
    assert timm.is_model(name)


@pytest.mark.parametrize("name", [*SHORT_NAMES, "vit_small_patch8_224", "eva02_tiny_patch14_224"])
def test_the_patch_of_a_model_is_known_from_its_name(name: str) -> None:
    with torch.device("meta"):
        vit = timm.create_model(resolve_model(name, {})[0], depth=1)
    assert patch_px(name, {}) == vit.patch_embed.patch_size[0]
    assert patch_px(name, {"patch_size": 4}) == 4


def test_other_names_stay() -> None:
    for name in ("hf-hub:MahmoodLab/UNI2-h", "vit_small_patch14_dinov2.lvd142m", "eva02_tiny_patch14_224"):
        assert resolve_model(name, {"depth": 2}) == (name, {"depth": 2})
    with pytest.raises(UserError, match=r"'M/16'.*Ti/16, S/16"):
        resolve_model("M/16", {})


def test_layers_by_word() -> None:
    _, kwargs = resolve_model("S/16", {"mlp_layer": "SwiGLUPacked", "act_layer": "silu", "norm_layer": "LayerNorm", "depth": 2})
    assert kwargs == {
        "mlp_layer": timm.layers.SwiGLUPacked,
        "act_layer": nn.SiLU,
        "norm_layer": timm.layers.LayerNorm,
        "depth": 2,
    }
    assert find_layer("mlp_layer", "GluMlp")[0] == "timm.layers.GluMlp"
    for word in ("system", "SwiGlu2", "Tensor", "trunc_normal_"):
        with pytest.raises(UserError, match=f"mlp_layer is '{word}'"):
            resolve_model("S/16", {"mlp_layer": word})


# Of the published files: width, rows of the first layer of the MLP, registers, layer scale.
PUBLISHED = {
    "uni/pytorch_model.bin": (1024, 4096, 0, True),
    "uni2-h/pytorch_model.bin": (1536, 8192, 8, True),
    "virchow2/pytorch_model.bin": (1280, 6832, 4, True),
    "h-optimus/pytorch_model.bin": (1536, 8192, 4, True),
    "hibou-b/model.safetensors": (768, 4096, 4, True),
    "hibou-l/model.safetensors": (1024, 5472, 4, True),
    "dinov2_vitb14_reg4_pretrain.pth": (768, 3072, 4, True),
    "dinov3_vitb16_pretrain.pth": (768, 3072, 4, True),
    "ibot_vits16_checkpoint.pth": (384, 1536, 0, False),
}


def documented() -> list[list[str]]:
    """The overrides of each command of docs/weights.md that starts from published weights."""
    text = (Path(__file__).resolve().parents[3] / "docs" / "weights.md").read_text(encoding="utf-8")
    return [shlex.split(line)[3:] for line in text.splitlines() if line.startswith("odis-path pretrain odis_continue")]


def test_every_published_model_is_documented() -> None:
    files = [
        word.removeprefix("model.weights=") for words in documented() for word in words if word.startswith("model.weights")
    ]
    assert sorted(files) == sorted(PUBLISHED)


@pytest.mark.parametrize("overrides", documented(), ids=lambda words: words[0])
def test_a_documented_command_describes_the_published_architecture(overrides: list[str]) -> None:
    config = load_config("odis_continue", overrides)
    width, hidden, registers, scale = PUBLISHED[str(config.model.weights)]
    name, kwargs = resolve_model(config.model.name, config.model.kwargs)
    with torch.device("meta"):
        vit = timm.create_model(name, **{**BASE_KWARGS, **kwargs, "depth": 1})
    block = vit.blocks[0]
    assert (vit.embed_dim, block.mlp.fc1.out_features, vit.num_prefix_tokens) == (width, hidden, 1 + registers)
    assert any(key.endswith(("ls1.gamma", "gamma_1")) for key in vit.state_dict()) == scale
    patch = vit.patch_embed.patch_size[0]
    assert config.views.global_size % patch == config.views.local_size % patch == 0


@pytest.mark.parametrize("method", ["dino", "ibot", "odis"])
def test_continue_recipes_differ_from_their_parent_in_the_start_alone(method: str) -> None:
    config, parent = load_config(f"{method}_continue"), load_config(f"{method}_wsi")
    patch = 14
    assert config.model.weights == "timm"
    assert config.views.global_size % patch == config.views.local_size % patch == 0
    assert (config.optim.layer_decay, config.optim.freeze_backbone_epochs) == (0.75, 1)
    assert config.optim.lr < parent.optim.lr
    sizes = {"global_size": parent.views.global_size, "local_size": parent.views.local_size}
    assert config.views.model_copy(update=sizes) == parent.views
    assert (config.target, config.mim, config.loss) == (parent.target, parent.mim, parent.loss)
