"""The recipes for natural images: they load, say what was published, and train on imported photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from odis_path.config import PretrainConfig, config_folders, load_config
from odis_path.distributed import Ranks
from odis_path.training.optim import step_values
from odis_path.training.setup import prepare
from tests.odis_path.conftest import take_steps
from tiling.images.run import import_images

RECIPES = ("odis_in1k", "ibot_in1k", "dino_in1k")
TINY = [
    "data.workers=0",
    "views.global_size=32",
    "views.local_size=16",
    "views.local_count=2",
    "model.name=vit_tiny_patch16_224",
    "model.kwargs={img_size: 32, patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}",
    "head.out_dim=64",
    "head.hidden_dim=32",
    "head.bottleneck_dim=16",
    "optim.batch_size=8",
    "optim.epochs=1",
    "optim.warmup_epochs=0",
    "optim.freeze_last_layer_epochs=0",
    "loss.teacher_temperature_epochs=0",
    "run.log_every_steps=1",
    "run.device=cpu",
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slide files of 24 generated photographs of two classes with a box file each, the last three without."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(24):
        name, (width, height) = ("n01", "n02")[i % 2], rng.integers(40, 80, 2).tolist()
        rgb = rng.integers(0, 255, (height // 4, width // 4, 3), dtype=np.uint8)
        box = (width // 4, height // 4, 3 * width // 4, 3 * height // 4)
        path = folder / "train" / name / f"{name}_{i}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rgb).resize((width, height)).save(path)
        if i < 21:
            corners = "".join(f"<{tag}>{v}</{tag}>" for tag, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
            text = f"<annotation><object><name>{name}</name><bndbox>{corners}</bndbox></object></annotation>"
            (folder / "boxes").mkdir(exist_ok=True)
            (folder / "boxes" / f"{name}_{i}.xml").write_text(text)
    out = folder / "tiles"
    outcomes = import_images(folder / "train", out, fit="crop", no_mpp=True, size=32, shard=5, boxes=folder / "boxes")
    assert all(outcome.ok for outcome in outcomes)
    return out


@pytest.mark.parametrize("name", RECIPES)
def test_two_steps_on_photographs(photos: Path, tmp_path: Path, name: str) -> None:
    config = load_config(name, [*TINY, f"data.tiles={photos}", f"run.out={tmp_path}", "data.holdout=0"])
    run = prepare(config, Ranks(0, 1, torch.device("cpu")))
    assert len(run.train) == 24
    assert run.total_steps == 3
    before = {key: value.clone() for key, value in run.student.state_dict().items()}
    assert all(torch.isfinite(figures["loss"]) for figures in take_steps(run, 2))
    after = run.student.state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before if "blocks" in key)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_writes_out_what_was_published(name: str) -> None:
    """The keys that make a recipe are in the file itself: a changed default changes none of them."""
    from omegaconf import OmegaConf

    config = load_config(name)
    written = OmegaConf.to_container(OmegaConf.load(config_folders()[-1] / f"{name}.yaml"))
    assert {"views", "model", "head", "loss", "optim"} <= set(written)
    keys = {
        "epochs",
        "batch_size",
        "lr",
        "min_lr",
        "warmup_epochs",
        "weight_decay",
        "clip",
        "clip_mode",
        "freeze_last_layer_epochs",
        "ema",
    }
    assert keys <= set(written["optim"])
    assert (config.optim.epochs, config.optim.batch_size, config.optim.lr) == (800, 1024, 5e-4)
    assert (config.optim.weight_decay, config.optim.ema, config.optim.clip) == ((0.04, 0.4), (0.996, 1.0), 3.0)
    assert (config.views.global_scale, config.views.local_scale, config.views.local_count) == ((0.25, 1), (0.05, 0.25), 10)
    assert (config.loss.teacher_temperature, config.loss.teacher_temperature_epochs) == ((0.04, 0.07), 30)
    assert config.head.norm_last_layer is False
    assert config.views.turns == "flip"
    assert config.views.stain_p == 0
    assert config.data.holdout == 0
    assert step_values(config, 10 * 1251, 1251, 800 * 1251).lr == pytest.approx(2e-3, rel=1e-4)


def test_the_recipes_differ_where_the_methods_do() -> None:
    odis, ibot, dino = (load_config(name) for name in RECIPES)
    same = ("views", "model", "head", "loss", "optim", "mim", "eval")
    assert {key: getattr(odis, key) for key in same} == {key: getattr(ibot, key) for key in same}
    target = odis.target
    assert (target.crop, target.mask, target.order, target.choice) == (True, True, "box_first", "uniform")
    assert (target.containment, target.sampler, target.tries, target.whole_tile_p) == ("full", "reject", 20, 0)
    for plain in (ibot, dino):
        assert (plain.target.crop, plain.target.mask) == (False, False)
    assert (ibot.head.out_dim, ibot.loss.patch_weight, ibot.mim.ratio, ibot.mim.probability) == (8192, 1, (0.1, 0.5), 0.5)
    assert (dino.head.out_dim, dino.loss.patch_weight, dino.mim.probability) == (65536, 0, 0)
    assert isinstance(dino, PretrainConfig)
