"""Wrong values of a configuration are refused when it is loaded, in one line that names the key; no recipe is."""

from __future__ import annotations

from pathlib import Path

import pytest

from annotations.errors import UserError
from odis_path.config import PretrainConfig, config_folders, load_config

SHARES = [
    "target.whole_tile_p",
    "target.noise_drop",
    "target.noise_false",
    "views.brightness",
    "views.contrast",
    "views.saturation",
    "views.jitter_p",
    "views.gray_p",
    "views.solarise_p",
    "views.stain_p",
    "views.stain_shift",
    "mim.probability",
    "loss.center_momentum",
]
COUNTS = [
    "target.objects",
    "target.tries",
    "head.hidden_dim",
    "head.bottleneck_dim",
    "head.layers",
    "loss.sinkhorn_iterations",
    "optim.batch_size",
    "optim.accumulate",
    "eval.k",
    "eval.max_tiles",
    "run.keep",
    "run.log_every_steps",
]
RANGES = ["views.global_scale", "views.local_scale", "views.ratio", "views.blur_sigma", "mim.ratio"]
NUMBERS = [
    f"{section}.{key}"
    for section, part in PretrainConfig.model_fields.items()
    if section != "name"
    for key, field in part.annotation.model_fields.items()  # type: ignore[union-attr]
    if field.annotation in (int, float)
]
WRONG = [
    *(f"{key}={value}" for key in NUMBERS for value in ("-1", ".nan", ".inf", "true")),
    *(f"{key}=1.1" for key in SHARES),
    *(f"{key}={value}" for key in COUNTS for value in ("0", "1.5")),
    *(f"{key}={value}" for key in RANGES for value in ("[0.5,0.1]", "[-0.5,0.1]", "[0.5,.inf]", "[0.5]", "0.5")),
    "data.kinds=[]",
    "data.kinds=[cell,cell,cell]",
    "data.kinds=[nerve]",
    "data.std=[0,0,0]",
    "data.std=[-1,1,1]",
    "data.mean=[123,117,104]",
    "data.std=[58,57,57]",
    "target.mask_margin=1e20",
    "views.ratio=[0,1]",
    "views.hue=0.6",
    "views.stain_scale=1",
    "views.blur_p=[2,0,0]",
    "views.blur_p=[0,0,-1]",
    "mim.ratio=[0.5,2]",
    "optim.epochs=1e15",
    "loss.teacher_temperature=[0,0.07]",
    "loss.teacher_temperature=[-0.04,0.07]",
    "optim.lr=0",
    "optim.weight_decay=[-1,0]",
    "target.whole_share=0",
    "target.whole_share=1.5",
    "mim.blocks=beit",
    "loss.patch_center=none",
    "head.prototype_init=zero",
    "views.hue_space=lab",
    "optim.decay_gain=2",
    "optim.ema=[1.5,2]",
    "optim.ema=[0.9,-1]",
    "run.seed=18446744073709551616",
    "run.out=",
    "run.out=''",
]


def refused(overrides: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        load_config("odis", overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_value_is_one_line_that_names_its_key(override: str) -> None:
    assert override.split("=")[0] in refused([override])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("views.ratio=[2,0.5]", "views.ratio is [2, 0.5]: give the lower end first"),
        ("views.blur_p=[0,2,0]", "views.blur_p[1] is 2: Input should be less than or equal to 1"),
        ("optim.epochs=.inf", "optim.epochs is inf: Input should be a finite number"),
        ("loss.patch_in_box_only=true target.mask=false", "loss.patch_in_box_only=true needs target.mask=true"),
        ("loss.obj_weight=0 loss.patch_weight=0", "nothing to train"),
        (
            "views.ratio=[2,3] views.global_scale=[0.9,1]",
            "views.global_scale begins at 0.9, but no crop of views.ratio=[2.0, 3.0]",
        ),
        ("views.ratio=[0.2,0.3] views.local_scale=[0.5,1]", "covers more than 0.30 of a tile"),
        ("loss.obj_weight=0 mim.probability=0", "nothing to train"),
        ("loss.obj_weight=0 mim.ratio=[0,0]", "nothing to train"),
    ],
)
def test_the_line_says_which_value_and_what_would_be_right(overrides: str, words: str) -> None:
    assert words in refused(overrides.split())


@pytest.mark.parametrize(
    "override",
    [
        "views.ratio=[1,1]",
        "views.blur_sigma=[0,0]",
        "views.hue=0.5",
        "views.brightness=1",
        "mim.ratio=[0,1]",
        "data.std=[1,1,1]",
        "data.mean=[0,0,0]",
        "data.workers=0",
        "optim.ema=[1,1]",
        "optim.weight_decay=[0.4,0.04]",
        "target.whole_share=1",
        "views.local_scale=[1,1]",
        "optim.clip=0",
        "optim.min_lr=0",
        "views.local_count=0",
        "loss.patch_in_box_only=true",
    ],
)
def test_the_ends_of_what_is_allowed_are_allowed(override: str) -> None:
    load_config("odis", [override])


@pytest.mark.parametrize(
    "recipe", sorted(path for folder in config_folders() for path in folder.glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_recipe_loads(recipe: Path) -> None:
    load_config(recipe)
