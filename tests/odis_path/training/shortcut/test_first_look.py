"""Before training: does colour alone find the other view, and do the targets teach anything; by `pretrain` and `doctor`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from odis_path.config import PretrainConfig
from odis_path.data.dataset import TileSamples
from odis_path.data.tile_index import index_tiles
from odis_path.training.shortcut.first_look import FirstLook, take_first_look
from tests.odis_path.conftest import tiny_values
from tests.png import encode_png
from tiling.slide_file.write import SlideMeta, write_slide_file

SIDE = 64
UNCHANGED = {
    **dict.fromkeys(("brightness", "contrast", "saturation", "hue", "jitter_p", "gray_p", "solarise_p", "stain_p"), 0.0),
    "blur_p": [0.0, 0.0, 0.0],
}


def write_painted(folder: Path, boxes: np.ndarray, *, tiles: int = 60, boxed: int | None = None) -> Path:
    """A folder with one slide of tiles of one random colour each; the first `boxed` of them have these boxes, float (k, 4)."""
    folder.mkdir()
    colours = np.random.default_rng(0).integers(60, 200, (tiles, 3))
    pixels = [encode_png(np.full((SIDE, SIDE, 3), colour, np.uint8)) for colour in colours]
    with_boxes = tiles if boxed is None else boxed
    count = len(boxes) * with_boxes
    meta = SlideMeta("S", folder / "S.png", tiles * SIDE, SIDE, mpp=0.5, mpp_level0=0.5, patch_px=SIDE, patient_id="P")
    meta.source.touch()
    groups: dict[str, Any] = {
        "objects": {
            "id": [str(i) for i in range(count)],
            "label": np.zeros(count, np.int16),
            "kind": np.ones(count, np.uint8),
            "area_um2": np.ones(count, np.float32),
            "attrs": {"labels": ["cell"]},
        },
        "boxes": {
            "xyxy": np.tile(boxes, (with_boxes, 1)).astype(np.float32),
            "offsets": np.minimum(np.arange(tiles + 1), with_boxes).astype(np.int64) * len(boxes),
            "object": np.arange(count, dtype=np.int32),
            "visible": np.ones(count, np.float32),
        },
    }
    coords = np.stack([np.arange(tiles) * SIDE, np.zeros(tiles)], axis=1).astype(np.int64)
    write_slide_file(folder / "S.h5", meta=meta, coords=coords, pixels=pixels, groups=groups)
    return folder


BOX = np.array([[10.0, 10.0, 40.0, 40.0]])


def look(folder: Path, **sections: dict[str, Any]) -> FirstLook:
    values = tiny_values(folder, folder / "run", **sections)
    values["optim"] |= {"ema": [0.5, 0.6], "warmup_epochs": 0}
    config = PretrainConfig.model_validate(values)
    return take_first_look(TileSamples(index_tiles(folder), config, 8), 100, 100)


def test_without_colour_changes_mean_colour_finds_every_view_at_rank_one(tmp_path: Path) -> None:
    seen = look(write_painted(tmp_path / "t", BOX), views=UNCHANGED)
    assert seen.mean_colour is not None
    assert (seen.mean_colour.median, seen.mean_colour.best, seen.mean_colour.count) == (1.0, 1.0, 60)
    (warning,) = seen.warnings
    assert "mean colour" in warning
    assert all(f"views.{key}" in warning for key in ("gray_p", "stain_scale", "stain_shift", "brightness", "hue"))


def test_where_colours_are_lost_colour_finds_views_by_chance_and_nothing_is_warned_of(tmp_path: Path) -> None:
    """Contrast 0 to 2 of one colour changes nothing; gray, any brightness and any stain leave next to nothing of it."""
    strong = {"brightness": 1.0, "gray_p": 1.0, "stain_p": 1.0, "stain_scale": 0.99, "stain_shift": 0.6, "jitter_p": 1.0}
    seen = look(write_painted(tmp_path / "t", BOX), views={**UNCHANGED, **strong})
    assert seen.mean_colour is not None
    assert seen.mean_colour.median > 0.6 * seen.mean_colour.chance
    assert not seen.warnings


@pytest.mark.parametrize(("whole", "share"), [(1.0, 0.0), (0.5, 1.0)])
def test_pairs_that_are_one_crop_are_counted_and_named(tmp_path: Path, whole: float, share: float) -> None:
    """A box of the whole tile that is cropped around leaves one crop; where it counts as the whole tile crops are free."""
    folder = write_painted(tmp_path / "t", np.array([[0.0, 0.0, SIDE, SIDE]]))
    seen = look(folder, target={"whole_share": whole}, views={"global_scale": [0.2, 1.0]})
    assert seen.identity_pairs == pytest.approx(1 - share, abs=0.01)
    assert any("target.whole_share" in text and "views.global_scale" in text for text in seen.warnings) == (whole == 1.0)


@pytest.mark.parametrize(("side", "share"), [(2.0, 1.0), (30.0, 0.0)])
def test_targets_below_the_patch_are_counted_and_named(tmp_path: Path, side: float, share: float) -> None:
    seen = look(write_painted(tmp_path / "t", np.array([[10, 10, 10 + side, 10 + side]])))
    assert seen.small_targets == share
    assert any("model.kwargs.patch_size" in text for text in seen.warnings) == bool(share)


def test_a_tile_with_one_large_box_has_no_small_target(tmp_path: Path) -> None:
    """Targets are drawn among the large boxes, if there are any."""
    assert look(write_painted(tmp_path / "t", np.array([[1, 1, 3, 3], [10, 10, 40, 40.0]]))).small_targets == 0.0


@pytest.mark.parametrize("boxed", [0, 15, 60])
def test_tiles_without_a_box_are_counted_and_named(tmp_path: Path, boxed: int) -> None:
    seen = look(write_painted(tmp_path / "t", BOX, boxed=boxed))
    assert seen.boxless == pytest.approx(1 - boxed / 60)
    assert (seen.small_targets is None) == (boxed == 0)
    assert any("data.boxless=drop" in text and "data.kinds" in text for text in seen.warnings) == (boxed < 30)


def test_boxes_of_no_use_to_a_method_are_not_looked_for(tmp_path: Path) -> None:
    seen = look(write_painted(tmp_path / "t", BOX, boxed=0), target={"crop": False, "mask": False})
    assert (seen.boxless, seen.small_targets) == (None, None)


def test_windows_are_looked_at_as_they_are_cut(tmp_path: Path) -> None:
    folder = write_painted(tmp_path / "t", BOX)
    config = PretrainConfig.model_validate(
        tiny_values(folder, tmp_path / "run", views={**UNCHANGED, "window_um": 12}, target={"objects": 2})
    )
    from odis_path.data.windows import training_samples

    seen = take_first_look(training_samples(index_tiles(folder), config, 8), 100, 100)
    assert seen.tiles == 60
    assert seen.mean_colour is not None
    assert seen.mean_colour.median == 1.0


def test_few_tiles_have_no_rank(tmp_path: Path) -> None:
    seen = look(write_painted(tmp_path / "t", BOX, tiles=12))
    assert (seen.mean_colour, seen.colour_spread, seen.tiles) == (None, None, 12)


def test_the_same_seed_sees_the_same_and_training_goes_as_without(tmp_path: Path) -> None:
    folder = write_painted(tmp_path / "t", BOX)
    assert look(folder) == look(folder)


def command(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "odis_path", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_doctor_looks_without_training_and_pretrain_says_the_same_before_its_first_step(tmp_path: Path) -> None:
    folder = write_painted(tmp_path / "t", BOX)
    values = tiny_values("", tmp_path / "run", views=UNCHANGED, data={"holdout": 0.0})
    values["optim"] |= {"epochs": 1, "ema": [0.996, 1.0], "warmup_epochs": 1}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    doctor = command("doctor", recipe, f"data.tiles={folder}")
    assert doctor.returncode == 0, doctor.stderr
    assert not (tmp_path / "run").exists()
    lines = doctor.stdout.splitlines()
    assert (
        "first look: mean colour finds the other view at median rank 1 of 60 (chance 30), in the best 5% for 100%" in lines[0]
    )
    assert any(line.startswith("warning: ") and "views.gray_p" in line for line in lines)
    assert any(line.startswith("warning: ") and "optim.ema" in line for line in lines)
    assert any(line.startswith("warning: ") and "optim.warmup_epochs" in line for line in lines)
    trained = command("pretrain", recipe, f"data.tiles={folder}")
    assert trained.returncode == 0, trained.stderr
    shown = trained.stderr.splitlines()
    assert [line for line in shown if line.startswith(("first look", "warning"))] == lines
    assert shown.index(lines[0]) < next(i for i, line in enumerate(shown) if "step 1/7" in line)
    rows = [json.loads(line) for line in (tmp_path / "run" / "train.jsonl").read_text().splitlines()]
    assert (rows[0]["step"], rows[0]["look_mean_colour_median"], rows[0]["look_boxless"]) == (0, 1.0, 0.0)
    assert [row["step"] for row in rows if row["step"] == 0] == [0]


def test_doctor_of_a_recipe_that_is_none_or_lacks_tiles_is_one_line(tmp_path: Path) -> None:
    for words, names in (
        (("odis_wsii", "data.tiles=t"), "odis_wsi"),
        ((str(tmp_path / "none.yaml"),), "none.yaml"),
        (("odis_wsi",), "data.tiles"),
        (("odis_wsi", f"data.tiles={tmp_path}", "views.grey_p=1"), "views.gray_p"),
    ):
        done = command("doctor", *words)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert names in done.stderr
