"""What iBOT's and DINO's official code does beside this project's way, each a key: compared with numbers from the formulas."""

from __future__ import annotations

import colorsys
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from odis_path.config import PretrainConfig, config_folders, load_config
from odis_path.data.augment import ColourRule, apply_colours, draw_colours
from odis_path.data.block_masking import block_mask, draw_ratio
from odis_path.model.head import DinoHead, PrototypeLayer
from odis_path.model.network import Encoded, Views, build_network
from odis_path.training.criterion import Criterion
from odis_path.training.optim import parameter_groups, set_schedule
from tests.odis_path.conftest import tiny_config

# The official values of the keys, for ViT-S/16 (docs/method.md).
PUBLISHED: dict[str, Any] = {
    "views.hue_space": "hsv",
    "mim.blocks": "ibot",
    "head.norm_last_layer": False,
    "head.prototype_init": "uniform",
    "loss.patch_center": "all",
    "optim.decay_gain": True,
    "optim.warmup_epochs": 10,
    "optim.ema": (0.996, 1.0),
}
# What the recipes for slides have in their place (experiments/RESULTS.md).
OURS: dict[str, Any] = {
    "views.hue_space": "yiq",
    "mim.blocks": "filled",
    "head.norm_last_layer": True,
    "head.prototype_init": "normal",
    "loss.patch_center": "hidden",
    "optim.decay_gain": False,
    "optim.warmup_epochs": "auto",
    "optim.ema": "auto",
    "target.sampler": "construct",
    "target.local": "object",
}


def flat(config: PretrainConfig) -> dict[str, Any]:
    return {f"{s}.{k}": v for s, part in config.model_dump().items() if isinstance(part, dict) for k, v in part.items()}


def difference(name: str, other: str) -> dict[str, Any]:
    a, b = flat(load_config(name)), flat(load_config(other))
    return {key: value for key, value in a.items() if value != b[key] and key != "run.out"}


# Masks


def plain_ibot_mask(rng: random.Random, grid: int, ratio: float) -> np.ndarray:
    """BEiT's algorithm 1 with iBOT's smallest block, patch by patch."""
    mask = np.zeros((grid, grid), dtype=bool)
    wanted, placed = ratio * grid * grid, True
    while mask.sum() < wanted and placed:
        placed = False
        for _ in range(10):
            area, aspect = (
                rng.uniform((grid // 3) ** 2, wanted - mask.sum()),
                math.exp(rng.uniform(-math.log(1 / 0.3), math.log(1 / 0.3))),
            )
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h >= grid or w >= grid:
                continue
            y, x = rng.randint(0, grid - h), rng.randint(0, grid - w)
            tried = mask.copy()
            tried[y : y + h, x : x + w] = True
            if 0 < tried.sum() - mask.sum() <= wanted - mask.sum():
                mask, placed = tried, True
                break
    return mask


def shape_of(masks: list[np.ndarray]) -> dict[str, float]:
    """Mean hidden share, mean number of connected pieces, share of pieces of one or two patches."""
    pieces = [np.bincount(ndimage.label(mask)[0].ravel())[1:] for mask in masks]
    sizes = np.concatenate(pieces)
    return {
        "hidden": float(np.mean([mask.mean() for mask in masks])),
        "pieces": float(np.mean([len(p) for p in pieces])),
        "tiny": float((sizes <= 2).mean()),
    }


@pytest.mark.parametrize("grid", [14, 6, 16])
def test_ibots_blocks_have_the_law_of_its_algorithm(grid: int) -> None:
    rng, plain = np.random.default_rng(0), random.Random(0)
    ratios = [draw_ratio(rng, 1.0, (0.1, 0.5)) for _ in range(4000)]
    ours, published = (
        shape_of([block_mask(rng, grid, r, "ibot") for r in ratios]),
        shape_of([plain_ibot_mask(plain, grid, r) for r in ratios]),
    )
    assert ours["hidden"] == pytest.approx(published["hidden"], abs=0.006)
    assert ours["pieces"] == pytest.approx(published["pieces"], abs=0.06)
    assert ours["tiny"] == pytest.approx(published["tiny"], abs=0.015)


def test_ibots_blocks_are_few_and_large_and_filled_ones_many() -> None:
    """14 x 14 patches: 1.3 pieces a mask against 2.7, of one or two patches 2% against 20% (measured on the official code)."""
    rng = np.random.default_rng(1)
    ratios = [draw_ratio(rng, 1.0, (0.1, 0.5)) for _ in range(3000)]
    ibot, filled = (shape_of([block_mask(rng, 14, r, blocks) for r in ratios]) for blocks in ("ibot", "filled"))
    assert (ibot["pieces"], filled["pieces"]) == (pytest.approx(1.34, abs=0.08), pytest.approx(2.69, abs=0.15))
    assert (ibot["tiny"], filled["tiny"]) == (pytest.approx(0.018, abs=0.012), pytest.approx(0.20, abs=0.03))


@pytest.mark.parametrize("grid", [1, 2, 3, 6, 14])
def test_filled_hides_exactly_the_ratio_and_ibot_at_most_it(grid: int) -> None:
    rng = np.random.default_rng(2)
    for ratio in np.linspace(0, 1, 41):
        assert block_mask(rng, grid, ratio, "filled").sum() == int(ratio * grid * grid)
        assert block_mask(rng, grid, ratio, "ibot").sum() <= ratio * grid * grid


# The center of patches


def one_step(values: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Patch logits of a teacher, all (2B, N, P) and hidden (n, P), and its patch center after one step, in float64."""
    torch.manual_seed(0)
    config = tiny_config("x", "y", **values)
    network = build_network(config, student=False).double().eval()
    hidden = torch.rand(6, 16) < 0.3
    views = Views(
        torch.randn(6, 3, 32, 32).double(),
        torch.zeros(0),
        torch.ones(6, 1, 16, dtype=torch.bool),
        None,
        hidden,
        hidden.flatten().nonzero()[:, 0],
        torch.ones(2, 3, 1, dtype=torch.bool),
    )
    criterion = Criterion(config).double()
    mean = config.loss.patch_center == "all"
    with torch.no_grad():
        teacher: Encoded = network(views, with_locals=False, mask_patches=False, patches=True, mean=mean)
        criterion(teacher, network(views, with_locals=False, mask_patches=False, patches=True), views, 0.04)
        patches = network.encoder(views.globals_, views.object_masks_global, None).patches
        every = (network.patch_head or network.head)(patches)
    return every, every[hidden], criterion.patch_center.value


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("in_box_only", [False, True])
def test_the_patch_center_of_all_is_the_mean_over_every_patch_of_both_globals(shared: bool, in_box_only: bool) -> None:
    """c <- 0.9 c + 0.1 sum over images of (mean over patches of z) / images, from c = 0."""
    every, _, center = one_step({"loss": {"patch_center": "all", "patch_in_box_only": in_box_only}, "head": {"shared": shared}})
    expected = 0.1 * sum(image.mean(0) for image in every) / len(every)
    assert torch.allclose(center, expected, atol=1e-12)


def test_the_patch_center_of_hidden_ones_is_their_mean() -> None:
    every, hidden, center = one_step({"loss": {"patch_center": "hidden"}})
    assert torch.allclose(center, 0.1 * hidden.mean(0), atol=1e-12)
    assert not torch.allclose(center, 0.1 * every.mean((0, 1)), atol=1e-6)


def test_the_targets_do_not_depend_on_how_the_center_is_counted() -> None:
    """Logits of hidden patches are the same whether the mean of all is asked for beside them or not."""
    network = build_network(tiny_config("x", "y"), student=False).double().eval()
    hidden = torch.rand(4, 16) < 0.5
    views = Views(
        torch.randn(4, 3, 32, 32).double(),
        torch.zeros(0),
        None,
        None,
        hidden,
        hidden.flatten().nonzero()[:, 0],
        torch.ones(2, 2, 1, dtype=torch.bool),
    )
    plain = network(views, with_locals=False, mask_patches=False, patches=True)
    beside = network(views, with_locals=False, mask_patches=False, patches=True, mean=True)
    assert torch.allclose(plain.patches, beside.patches, atol=1e-12)
    assert plain.patch_mean is None


# The last layer


def decayed_gain(**values: Any) -> torch.Tensor:
    """The gain after a step of AdamW without gradients at rate 0.1 and decay 0.4."""
    network = build_network(tiny_config("x", "y", **values), student=True)
    config = tiny_config("x", "y", **values)
    optimizer = torch.optim.AdamW(parameter_groups(network, decay_gain=config.optim.decay_gain), lr=0.0)
    set_schedule(optimizer, type("Values", (), {"lr": 0.1, "weight_decay": 0.4})())  # type: ignore[arg-type]
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    return network.head.last_layer.gain.detach()


def test_the_gain_decays_where_it_is_trained_and_asked_to() -> None:
    """g <- g (1 - lr wd) as for any matrix; weight_norm's gain is (K, 1) in the official code, ours (K,)."""
    trained: dict[str, Any] = {"norm_last_layer": False}
    assert torch.allclose(decayed_gain(head=trained, optim={"decay_gain": True}), torch.full((64,), 1 - 0.1 * 0.4))
    assert torch.equal(decayed_gain(head=trained), torch.ones(64))
    assert torch.equal(decayed_gain(optim={"decay_gain": True}), torch.ones(64))  # not trained


def test_nothing_else_changes_its_group_with_the_gain() -> None:
    network = build_network(tiny_config("x", "y", head={"norm_last_layer": False, "shared": False}), student=True)

    def names(**options: bool) -> set[str]:
        known = {id(p): name for name, p in network.named_parameters()}
        return {known[id(p)] for group in parameter_groups(network, **options) if group["decays"] for p in group["params"]}

    assert names(decay_gain=True) - names() == {"head.last_layer.gain", "patch_head.last_layer.gain"}


def test_prototypes_start_at_the_length_of_torchs_linear_or_at_that_of_a_narrow_normal() -> None:
    """sqrt(d / (3 d)) = 0.577; a normal of 0.02 in 256 dimensions has 0.02 sqrt(256) = 0.32."""
    torch.manual_seed(0)
    uniform, normal = (PrototypeLayer(256, 4096, init=init).weight.detach() for init in ("uniform", "normal"))
    assert float(uniform.norm(dim=1).mean()) == pytest.approx(math.sqrt(1 / 3), rel=0.005)
    assert float(normal.norm(dim=1).mean()) == pytest.approx(0.02 * math.sqrt(256), rel=0.005)
    linear = torch.nn.Linear(256, 4096, bias=False).weight.detach()
    assert float(uniform.std()) == pytest.approx(float(linear.std()), rel=0.01)
    assert float(uniform.abs().max()) <= 1 / 16
    head = DinoHead(8, 64, bottleneck_dim=256, prototype_init="uniform")
    assert float(head.last_layer.weight.detach().norm(dim=1).mean()) > 0.5


# Hue


def only_hue(space: Any, strength: float, images: torch.Tensor, seed: int) -> tuple[torch.Tensor, np.ndarray]:
    """Images whose hue alone was changed, and the packed changes."""
    rule = ColourRule(0, 0, 0, strength, 1.0, 0, 0, hue_space=space)
    packed = draw_colours(np.random.default_rng(seed), (rule,) * len(images))
    return apply_colours(images, torch.from_numpy(packed).to(images.dtype), torch.zeros(0, dtype=torch.long)), packed


def test_hue_in_hsv_is_what_the_colour_system_says() -> None:
    """Pixel by pixel against rgb -> hsv -> a turn -> rgb, greys and pure colours included."""
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.uniform(1 / 255, 1, (40, 3, 4, 4)))
    images[0] = 0.5
    images[1, :, 0, 0] = torch.tensor([1.0, 1 / 255, 1 / 255])
    images[2, :2] = 0.7  # two channels the same
    changed, packed = only_hue("hsv", 0.5, images, 1)
    assert packed.shape == (40, 25)
    assert np.ptp(packed[:, 24]) > 0.8
    for image, out, turn in zip(images, changed, packed[:, 24], strict=True):
        for y, x in np.ndindex(4, 4):
            h, s, v = colorsys.rgb_to_hsv(*image[:, y, x].tolist())
            assert out[:, y, x].tolist() == pytest.approx(colorsys.hsv_to_rgb((h + float(turn)) % 1, s, v), abs=1e-5)


def test_hue_in_yiq_changes_stained_tissue_more() -> None:
    """Pinks and purples of H&E, turned by up to a tenth: mean absolute change, 1.4 times that in HSV on real tiles."""
    pink = np.random.default_rng(3).uniform([0.68, 0.45, 0.62], [0.92, 0.80, 0.86], (64, 40, 3))
    images = torch.from_numpy(pink.transpose(0, 2, 1).reshape(64, 3, 40, 1))
    moved = [float((only_hue(space, 0.1, images, 4)[0] - images).abs().mean()) for space in ("yiq", "hsv")]
    assert 1.25 < moved[0] / moved[1] < 1.65


def test_no_change_of_hue_draws_and_packs_as_before() -> None:
    """The other changes of a view are the same draws in either space, and without hue or jitter there is nothing to turn."""
    rules = [ColourRule(hue_space=space) for space in ("hsv", "yiq")]
    hsv, yiq = (draw_colours(np.random.default_rng(5), (rule,) * 300) for rule in rules)
    keep = [*range(12), 21, 22, 23]
    assert np.array_equal(hsv[:, keep], yiq[:, keep])
    assert (hsv[:, 24] == 0).mean() == pytest.approx(0.2, abs=0.07)  # jitter comes with probability 0.8
    assert draw_colours(np.random.default_rng(5), (ColourRule(hue=0.0, hue_space="hsv"),)).shape == (1, 24)


# Recipes


@pytest.mark.parametrize("name", ["ibot", "odis", "ibot_in1k", "odis_in1k"])
def test_recipes_named_after_a_paper_have_its_values(name: str) -> None:
    values = flat(load_config(name))
    assert {key: values[key] for key in PUBLISHED} == PUBLISHED
    assert (values["head.out_dim"], values["head.shared"], values["mim.ratio"], values["mim.probability"]) == (
        8192,
        True,
        (0.1, 0.5),
        0.5,
    )


@pytest.mark.parametrize("name", ["dino", "dino_in1k"])
def test_the_recipes_of_dino_have_its_values(name: str) -> None:
    values = flat(load_config(name))
    own = {key: value for key, value in PUBLISHED.items() if key not in ("mim.blocks", "loss.patch_center")}
    assert {key: values[key] for key in own} == own
    assert (values["head.out_dim"], values["loss.patch_weight"], values["mim.probability"]) == (65536, 0, 0)


@pytest.mark.parametrize("name", ["odis", "odis_in1k"])
def test_odis_crops_as_its_authors_tell(name: str) -> None:
    target = load_config(name).target
    assert (target.sampler, target.tries, target.local, target.containment) == ("reject", 20, "free", "full")


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("odis_crop_only", {"target.mask"}),
        ("odis_mask_only", {"target.crop"}),
        ("linear_pool", {"model.pool"}),
        ("odis_multi_obj", {"target.objects"}),
        ("odis_polygon", {"target.geometry"}),
        ("odis_readonly", {"target.objects", "target.local", "model.read_only"}),
        ("ibot", {"target.crop", "target.mask", "target.sampler", "target.local"}),
    ],
)
def test_an_ablation_differs_from_odis_in_what_it_is_named_after(name: str, keys: set[str]) -> None:
    assert set(difference(name, "odis")) == keys


@pytest.mark.parametrize("name", [f"{method}_{kind}" for method in ("odis", "ibot", "dino") for kind in ("wsi", "continue")])
def test_the_recipes_for_slides_have_what_measured_no_worse(name: str) -> None:
    values = flat(load_config(name))
    assert {key: values[key] for key in OURS} == OURS


def test_every_difference_is_told_in_the_method() -> None:
    text = (Path(__file__).parents[3] / "docs" / "method.md").read_text()
    part = text.split("## Differs from the official code, and why")[1].split("\n## ")[0]
    for key in [*PUBLISHED, "target.sampler", "target.local", "target.whole_share"]:
        assert f"`{key}" in part, key
    assert all(
        f"`{path.stem}`" in part or "_" in path.stem
        for path in config_folders()[-1].glob("*.yaml")
        if path.stem in ("odis", "ibot", "dino")
    )
