"""Folders in the form of the hub, with tiny models of timm in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

State = dict[str, Tensor]
SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
MEAN, STD = (0.5, 0.4, 0.6), (0.2, 0.25, 0.3)


def random_model(architecture: str, seed: int = 0, **arguments: Any) -> nn.Module:
    """A tiny model of timm as timm builds it, every parameter drawn, in eval mode."""
    torch.manual_seed(seed)
    model = timm.create_model(architecture, **{**SMALL, **arguments}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def hub_folder(
    folder: Path,
    architecture: str,
    *,
    change: Callable[[State], Any] = lambda state: state,
    file: str = "pytorch_model.bin",
    config: dict[str, Any] | None = None,
    cfg: dict[str, Any] | None = None,
    **arguments: Any,
) -> tuple[str, nn.Module]:
    """Write config.json and weights as timm does; returns the source (`local-dir:...`) and the model.

    change: made to the state dict before it is written. config: further keys of config.json; cfg: of its pretrained_cfg.
    """
    model = random_model(architecture, seed=1, **arguments)
    folder.mkdir(parents=True, exist_ok=True)
    pretrained_cfg = {"mean": MEAN, "std": STD, "num_classes": model.num_classes, "classifier": "head", **(cfg or {})}
    text = {
        "architecture": architecture,
        "model_args": {**SMALL, **arguments},
        "pretrained_cfg": pretrained_cfg,
        **(config or {}),
    }
    (folder / "config.json").write_text(json.dumps(text))
    content = change({key: value.clone() for key, value in model.state_dict().items()})
    if file.endswith(".safetensors"):
        from safetensors.torch import save_file

        save_file(content, folder / file)
    else:
        torch.save(content, folder / file)
    return f"local-dir:{folder}", model


def pixels(tiles: np.ndarray) -> Tensor:
    """uint8 (n, S, S, 3) as the model sees it."""
    images = torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255
    return (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


@torch.no_grad()
def own_feature(model: Any, tiles: np.ndarray) -> np.ndarray:
    """The feature of timm itself: its tokens, its pooling, its norm after pooling, without the classifier."""
    return model.forward_head(model.forward_features(pixels(tiles)), pre_logits=True).numpy()
