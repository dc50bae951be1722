"""A box that nearly fills its tile is the whole tile with free crops; global views that are one crop are counted and told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from odis_path.checkpoint import load_checkpoint
from odis_path.config import PretrainConfig
from odis_path.data import crops
from odis_path.data.dataset import TileSample, TileSamples
from odis_path.data.sampler import StepSampler
from odis_path.data.tile_index import index_tiles
from odis_path.distributed import Ranks
from odis_path.training import loop
from odis_path.training.knn_monitor import IdentityWatch
from odis_path.training.log.live_table import Progress
from odis_path.training.log.run_log import RunLog
from odis_path.training.run import TrainedRun
from odis_path.training.setup import prepare
from tests.odis_path.conftest import SIDE, take_steps, tiny_config, tiny_values, write_tiny_slide
from tiling.slide_file.read import SlideFile

CPU = Ranks(0, 1, torch.device("cpu"))


class OneBox:
    """A slide file of one tile with one box, whose outline is a thin diagonal band in it."""

    def __init__(self, box: np.ndarray) -> None:
        self.box = box

    def boxes(self, _row: int) -> np.ndarray:
        return self.box[None].astype(np.float32)

    def box_rows(self, _row: int) -> np.ndarray:
        return np.array([0])

    def polygon(self, _row: int) -> list[np.ndarray]:
        x0, y0, x1, y1 = self.box
        return [np.array([[x0, y0], [x0 + 3, y0], [x1, y1], [x1 - 3, y1]])]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("one")
    write_tiny_slide(folder, "S0", "P0", 2, 0)
    return index_tiles(folder)


def draw(index: Any, box: np.ndarray, seed: int, **target: Any) -> tuple[TileSample, TileSamples]:
    samples = TileSamples(index, tiny_config("x", "y", target={"min_patches": 1, **target}), 8)
    target, views = samples.sample_views(np.random.default_rng(seed), OneBox(box), 0, 0)  # type: ignore[arg-type]
    return TileSample(np.zeros(0), None, target.box, views), samples


def crops_of(sample: TileSample) -> list[crops.Crop]:
    return [crops.Crop(*(int(v) for v in rect)) for rect in sample.views.rects]


@st.composite
def boxes(draw: st.DrawFn) -> np.ndarray:
    w, h = draw(st.floats(13, SIDE)), draw(st.floats(13, SIDE))  # large enough to be no part of a merger
    x, y = draw(st.floats(0, SIDE - w)), draw(st.floats(0, SIDE - h))
    return np.array([x, y, min(x + w, SIDE), min(y + h, SIDE)]).astype(np.float32).astype(np.float64)


@settings(max_examples=400, deadline=None)
@given(
    boxes(),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["construct", "reject"]),
    st.sampled_from(["full", "fraction", "any"]),
    st.sampled_from([0.5, 0.8, 1.0]),
    st.sampled_from(["box_first", "crop_first"]),
)
def test_above_the_share_a_box_is_the_tile_and_below_it_is_cropped_around(
    index: Any, box: np.ndarray, seed: int, sampler: str, containment: str, share: float, order: str
) -> None:
    sample, samples = draw(index, box, seed, sampler=sampler, containment=containment, whole_share=share, order=order)
    fills = (box[2] - box[0]) * (box[3] - box[1]) / SIDE**2 > share
    assert sample.views.object_visible.all()
    if fills:
        assert sample.target.tolist() == [0, 0, SIDE, SIDE]
        assert sample.views.object_masks_global.all()
        assert sample.views.object_masks_local.all()
    else:
        assert np.allclose(sample.target, box)
        for number, view in enumerate(crops_of(sample)):
            assert crops.shows(view, box, SIDE, samples.rules[number >= 2])


def test_crops_of_a_box_that_fills_the_tile_have_the_law_of_free_ones(index: Any) -> None:
    box = np.array([1.0, 0.0, 64.0, 63.0])
    rects = np.concatenate([draw(index, box, seed)[0].views.rects[:2] for seed in range(1500)])
    free = crops.sample_crops(np.random.default_rng(0), SIDE, None, crops.CropRule(scale=(0.25, 1), size_px=32), 3000)
    drawn = np.array([(v.x, v.y, v.w, v.h) for v in free])
    assert np.abs(rects[:, :4].mean(0) - drawn.mean(0)).max() < 0.8
    assert np.abs(rects[:, :4].std(0) - drawn.std(0)).max() < 0.8


def test_an_outline_keeps_its_mask_where_its_box_fills_the_tile(index: Any) -> None:
    """Free crops, but [OBJ] still sees the outline alone; a view that lacks it weighs nothing."""
    lacking = 0
    for sampler in ("construct", "reject"):
        for seed in range(60):
            sample, _ = draw(
                index, np.array([0.0, 0.0, 64.0, 64.0]), seed, geometry="polygon", sampler=sampler, fallback="zero"
            )
            shown = sample.views.object_visible[:, 0]
            assert shown[:2].any() or not shown.all()
            assert not sample.views.object_masks_global[shown[:2], 0].all(axis=1).any()
            lacking += int((~shown).sum())
    assert lacking > 0
    assert len({tuple(v) for v in sample.views.rects[:, :4].tolist()}) == 4


def test_another_object_of_a_tile_is_never_the_box_that_fills_it(tiny_tiles: Path) -> None:
    """Each tile has a tissue box that is the tile, and a cell."""
    samples = TileSamples(index_tiles(tiny_tiles), tiny_config(tiny_tiles, "y", target={"objects": 2, "min_patches": 1}), 8)
    for i in range(len(samples)):
        sample = samples[(0, i)]
        if sample.target[2] - sample.target[0] == SIDE and sample.views.object_visible[0, 1]:
            assert not sample.views.object_masks_global[:, 1].all()


def identical(rects: np.ndarray) -> bool:
    return rects[0, :4].tolist() == rects[1, :4].tolist()


@pytest.mark.parametrize(
    "box", [[0, 0, 64, 64], [1, 1, 63, 63], [0, 0, 64, 58], [0, 4, 64, 60], [0, 0, 57, 57], [0, 20, 64, 28], [0, 0, 64, 51]]
)
def test_two_globals_around_a_large_box_are_rarely_one_and_the_same(index: Any, box: list[float]) -> None:
    """At 64 px a tile has few rectangles; below a twentieth all the same, and at 224 px or more far below."""
    same = [identical(draw(index, np.array(box, float), seed)[0].views.rects) for seed in range(400)]
    assert np.mean(same) < 0.1


def test_without_the_share_every_crop_of_a_tile_sized_box_is_the_tile(index: Any) -> None:
    """What the key is for; 1 switches it off."""
    whole = np.array([0.0, 0.0, 64.0, 64.0])
    assert all(identical(draw(index, whole, seed, whole_share=1.0)[0].views.rects) for seed in range(50))


# Counted, shown, told


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


def test_the_log_holds_the_share_of_identity_pairs_of_its_steps(tiny_tiles: Path, tmp_path: Path) -> None:
    """Against the samples of those steps, drawn again; equal rectangles count, however they are turned."""
    config = tiny_config(
        tiny_tiles,
        tmp_path / "run",
        target={"whole_share": 1.0, "min_patches": 1},
        run={"log_every_steps": 4},
        optim={"epochs": 2, "batch_size": 8, "accumulate": 2},
        eval={"every_epochs": 0},
    )
    folder = loop.pretrain(config).parent
    run = prepare(tiny_config(tiny_tiles, tmp_path / "other"), CPU)
    samples = TileSamples(run.train, config, 8)
    sampler = StepSampler(len(run.train), 8, seed=0, first_step=0, last_step=12, rank=0, world=1)
    batches = [[samples[key] for key in keys] for keys in sampler]
    expected = [np.mean([identical(s.views.rects) for batch in batches[k : k + 4] for s in batch]) for k in (0, 4, 8)]
    assert [row["identity_pairs"] for row in rows_of(folder) if row["step"]] == pytest.approx(expected, abs=1e-6)
    assert min(expected) > 0.2  # half of the boxes are the tile


def test_many_identity_pairs_are_told_once_with_the_keys_to_change(
    tiny_tiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values: dict[str, Any] = {"target": {"whole_share": 1.0}, "data": {"kinds": ["tissue"]}, "eval": {"every_epochs": 0}}
    config = tiny_config(tiny_tiles, tmp_path / "run", **values)
    run = prepare(config, CPU)
    run.total_steps = 5
    loop.train(run)
    run = prepare(config, CPU)  # goes on
    loop.train(run)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "same crop of their tile" in line]
    assert len(warnings) == 1
    assert "in 100% of the samples so far" in warnings[0]
    assert "target.whole_share (now 1)" in warnings[0]
    assert "views.global_scale (now 0.25 to 1)" in warnings[0]


def test_at_the_default_nothing_is_told(tiny_tiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = loop.pretrain(tiny_config(tiny_tiles, tmp_path / "run", data={"kinds": ["tissue"]}, eval={"every_epochs": 0}))
    assert "same crop" not in capsys.readouterr().err
    TrainedRun(path).print()
    assert "identity pairs" in capsys.readouterr().out


def watch(batch: int = 10) -> IdentityWatch:
    return IdentityWatch(PretrainConfig.model_validate({"optim": {"batch_size": batch}}))


def test_chance_is_not_told_and_a_lasting_share_is() -> None:
    few = watch(8)
    assert few.see({"step": 1, "identity_pairs": 1 / 8}) is None  # one pair of eight
    rng = np.random.default_rng(0)
    for share, expected in ((0.03, False), (0.08, True)):
        of = watch(20)
        lines = [of.see({"step": step, "identity_pairs": rng.binomial(20, share) / 20}) for step in range(1, 2001)]
        assert sum(line is not None for line in lines) == expected
    assert watch().see({"step": 5, "loss": 1.0}) is None


def test_the_table_and_the_line_show_the_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(10, 0, "pretraining", 4.0)
    progress.take({"step": 1, "epoch": 0.1, "identity_pairs": 0.21})
    rows = {name: (value, note) for name, _, value, note in progress.rows()}
    assert rows["identity pairs"] == ("21.0%", "MANY: see target.whole_share")
    assert "identity pairs 21%" in progress.text()
    progress.take({"step": 2, "epoch": 0.2, "identity_pairs": 0.01})
    assert {n: note for n, _, _, note in progress.rows()}["identity pairs"] == ""
    assert "identity" not in progress.text()
    log = RunLog(tmp_path, 10, active=True, first_step=0, title="x", identity=watch(64))
    log.write({"step": 2, "epoch": 0.2, "identity_pairs": 0.5})
    log.close()
    assert "target.whole_share" in capsys.readouterr().err


# A run that began before there was such a key


def test_a_run_saved_before_the_key_goes_on_as_it_began(
    tiny_tiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stored configuration lacks it: such a run had no share, and is not refused for today's default."""
    old = tiny_config(tiny_tiles, tmp_path / "old", target={"whole_share": 1.0})
    new = tiny_config(tiny_tiles, tmp_path / "old")
    run = prepare(old, CPU)
    list(take_steps(run, 5))
    loop.save(run)
    path = tmp_path / "old" / "checkpoint-00000005.pt"
    content = torch.load(path, weights_only=True)
    del content["config"]["target"]["whole_share"]
    torch.save(content, path)
    assert load_checkpoint(path).config.target.whole_share == 1.0
    straight = loop.pretrain(tiny_config(tiny_tiles, tmp_path / "straight", target={"whole_share": 1.0}))
    resumed = loop.pretrain(new)
    assert "with target.whole_share=1 as it began" in capsys.readouterr().err
    a, b = load_checkpoint(straight).state.student, load_checkpoint(resumed).state.student
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert load_checkpoint(resumed).config.target.whole_share == 1.0


def test_another_share_than_the_runs_own_is_refused_in_a_line(tiny_tiles: Path, tmp_path: Path) -> None:
    short: dict[str, Any] = {"optim": {"epochs": 0.34}, "eval": {"every_epochs": 0}}
    loop.pretrain(tiny_config(tiny_tiles, tmp_path / "run", target={"whole_share": 0.7}, **short))
    with pytest.raises(Exception, match=r"target\.whole_share=0\.7, now target\.whole_share=0\.8.*config\.yaml"):
        loop.pretrain(tiny_config(tiny_tiles, tmp_path / "run", **short))


def test_the_stored_tile_is_untouched(tiny_tiles: Path) -> None:
    """The key changes targets, never boxes: the slide file is read only."""
    path = next(tiny_tiles.glob("*.h5"))
    before = path.read_bytes()
    samples = TileSamples(index_tiles(tiny_tiles), PretrainConfig.model_validate(tiny_values(tiny_tiles, "y")), 8)
    _ = samples[(0, 0)]
    with SlideFile(path) as file:
        assert len(file.boxes(0)) == 2
    assert path.read_bytes() == before
