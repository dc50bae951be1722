"""Several objects a tile, the open choices of the sources, and the image-level term: samples, losses, training, embedding."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from annotations.errors import UserError
from odis_path.config import PretrainConfig, load_config
from odis_path.data import crops
from odis_path.data.dataset import TileSample, TileSamples
from odis_path.data.sampler import collate
from odis_path.data.targets import Target, choose_box, further_targets, whole_tile
from odis_path.data.tile_index import index_tiles
from odis_path.distributed import Ranks
from odis_path.embedding.encoder import FrozenEncoder
from odis_path.embedding.request import MODES
from odis_path.embedding.run import embed
from odis_path.features.read import read_features
from odis_path.loss.dino_ibot import cross_view_loss
from odis_path.model.network import Encoded, Views, build_network
from odis_path.training import loop
from odis_path.training.criterion import Criterion
from odis_path.training.optim import layer_of, parameter_groups, set_schedule, step_values
from odis_path.training.setup import prepare
from odis_path.training.step import apply_gradients, forward_backward
from tests.odis_path.conftest import SIDE, NoWaiting, take_steps, tiny_config, write_tiny_slide

TINY_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2}
CPU = Ranks(0, 1, torch.device("cpu"))


def samples_of(tiles: Path, **sections: Any) -> TileSamples:
    return TileSamples(index_tiles(tiles), tiny_config(tiles, "unused", **sections), 8)


def crops_of(sample: TileSample) -> list[crops.Crop]:
    return [crops.Crop(*(int(v) for v in rect)) for rect in sample.views.rects]


def test_further_objects_show_in_both_globals_and_are_not_the_first(tiny_tiles: Path) -> None:
    """Slot 0 is the target; slot 1 the other box where half of it shows in both globals, else nothing that weighs."""
    samples = samples_of(tiny_tiles, target={"objects": 3, "min_patches": 1})
    used = 0
    for i in range(len(samples)):
        sample = samples[(0, i)]
        assert sample.views.object_masks_global.shape == (2, 3, 16)
        assert not sample.views.object_visible[:, 2].any()  # a tile has two boxes
        assert sample.views.object_masks_global[:, 2].all()
        boxes = samples.files[int(samples.index.slide[i])].boxes(int(samples.index.row[i])).astype(float)
        further = boxes[(boxes != sample.target).any(1)]
        share = np.minimum(*(crops.visible_share(view, further) for view in crops_of(sample)[:2]))
        large = (further[:, 2:] - further[:, :2]).prod(1) >= samples.min_side_px**2
        assert sample.views.object_visible[:2, 1].all() == bool((large & (share >= 0.5)).any())
        if sample.views.object_visible[0, 1]:
            used += 1
            view = crops_of(sample)[0]
            assert np.array_equal(sample.views.object_masks_global[0, 1], crops.patch_mask(view, further[0], 4).ravel())
    assert used > len(samples) / 3


def test_crop_first_takes_a_box_that_both_free_crops_contain(tiny_tiles: Path) -> None:
    samples = samples_of(tiny_tiles, target={"order": "crop_first", "min_patches": 1})
    whole_in_both = 0
    for i in range(len(samples)):
        sample = samples[(1, i)]
        boxes = samples.files[int(samples.index.slide[i])].boxes(int(samples.index.row[i]))
        whole = sample.target[2] - sample.target[0] == SIDE  # a box that fills the tile: the crops stay free
        if not whole and (boxes == sample.target).all(1).any():  # not one that was too small and has been widened
            assert all(crops.contains(view, sample.target) for view in crops_of(sample)[:2])
        whole_in_both += not whole
    assert whole_in_both > len(samples) / 2  # crops that hold the cell hold the tile-sized box rarely


@pytest.mark.parametrize("fallback", ["construct", "zero", "full"])
def test_what_follows_the_last_try_is_as_configured(tiny_tiles: Path, fallback: str) -> None:
    """One try is too few for locals: they are constructed, weigh nothing, or see all."""
    samples = samples_of(
        tiny_tiles, target={"sampler": "reject", "tries": 1, "fallback": fallback, "min_patches": 1}, data={"kinds": ["cell"]}
    )
    missed = 0
    for i in range(len(samples)):
        sample = samples[(0, i)]
        for k, view in enumerate(crops_of(sample)):
            mask = sample.views.object_masks_global[k, 0] if k < 2 else sample.views.object_masks_local[k - 2, 0]
            if crops.shows(view, sample.target, SIDE, samples.rules[0 if k < 2 else 1]):
                assert sample.views.object_visible[k, 0]
                continue
            missed += 1
            assert mask.all()
            assert bool(sample.views.object_visible[k, 0]) == (fallback == "full")
    assert (missed == 0) == (fallback == "construct")


def test_a_tile_sized_box_is_accepted_by_rejection_when_half_of_the_crop_shows_it() -> None:
    rule = crops.CropRule(scale=(0.05, 0.25), size_px=32, sampler="reject", fallback="zero")
    whole = np.array([0.0, 0.0, SIDE, SIDE])
    for seed in range(50):
        view = crops.sample_crop(np.random.default_rng(seed), SIDE, whole, rule)
        assert crops.shows(view, whole, SIDE, rule)


def test_targets_know_the_boxes_they_are_made_of() -> None:
    boxes = np.array([[0, 0, 4, 4], [5, 0, 9, 4], [40, 40, 60, 60]], dtype=float)
    rng = np.random.default_rng(0)
    large = choose_box(rng, boxes, min_side_px=10, side_px=64)
    assert large is not None
    assert large.rows.tolist() == [2]
    merged = choose_box(rng, boxes[:2], min_side_px=6, side_px=64)
    assert merged is not None
    assert sorted(merged.rows.tolist()) == [0, 1]
    assert merged.box.tolist() == [0, 0, 9, 4]
    assert whole_tile(64).whole
    assert not merged.whole
    further = further_targets(rng, boxes, np.array([True, True, False]), 3, Target(boxes[0], np.array([0])))
    assert [None if t is None else t.rows.tolist() for t in further] == [[1], None, None]


def test_the_loss_of_k_objects_is_a_mean_over_all_pairs_that_weigh() -> None:
    """Three views, two tiles, two objects, one of which two views lack: against plain loops in float64."""
    torch.manual_seed(0)
    config = PretrainConfig.model_validate({"head": {"out_dim": 5}, "loss": {"patch_weight": 0.0, "image_weight": 0.5}})
    criterion = Criterion(config).double()
    criterion.obj_center.value.normal_()
    center = criterion.obj_center.value.clone()
    teacher = torch.randn(2, 2, 3, 5, dtype=torch.float64)  # two objects and the tile itself
    student = torch.randn(3, 2, 3, 5, dtype=torch.float64)
    seen = torch.ones(3, 2, 2, dtype=torch.bool)
    seen[1, 0, 1] = seen[2, 1, 0] = False
    tokens = torch.randn(2, 2, 4, dtype=torch.float64)
    hidden = torch.zeros(4, 4, dtype=torch.bool)
    views = Views(torch.zeros(0), torch.zeros(0), None, None, hidden, torch.zeros(0, dtype=torch.long), seen)
    parts = criterion(Encoded(teacher, None, tokens), Encoded(student, None, tokens), views, 0.05)

    def pair(q: int, v: int, b: int, k: int) -> float:
        p = torch.softmax((teacher[q, b, k] - center) / 0.05, -1)
        return float(-(p * torch.log_softmax(student[v, b, k] / 0.1, -1)).sum())

    pairs = [(q, v, b) for q in range(2) for v in range(3) if v != q for b in range(2)]
    obj = [pair(q, v, b, k) for q, v, b in pairs for k in range(2) if seen[q, b, k] and seen[v, b, k]]
    image = [pair(q, v, b, 2) for q, v, b in pairs]
    assert float(parts["loss_obj"]) == pytest.approx(np.mean(obj), rel=1e-12)
    assert float(parts["loss_image"]) == pytest.approx(np.mean(image), rel=1e-12)
    assert float(parts["loss"]) == pytest.approx(np.mean(obj) + 0.5 * np.mean(image), rel=1e-12)
    rows = teacher[:, :, :2][seen[:2]]
    assert torch.allclose(criterion.obj_center.value, 0.9 * center + 0.1 * rows.mean(0), atol=1e-12)


VARIANTS: dict[str, dict[str, Any]] = {
    "multi_obj": {"target": {"objects": 4, "min_patches": 1}},
    "read_only": {"target": {"objects": 3, "min_patches": 1}, "model": {"read_only": True}},
    "image term": {"loss": {"image_weight": 0.5}},
    "image term, read only": {"loss": {"image_weight": 0.5}, "model": {"read_only": True}},
    "sinkhorn, koleo": {"loss": {"centering": "sinkhorn", "koleo_weight": 0.1}},
    "kde": {"loss": {"kde_weight": 0.05}},
    "linear pool, two objects": {"model": {"pool": "linear"}, "target": {"objects": 2, "min_patches": 1}},
    "in box only": {"loss": {"patch_in_box_only": True}, "target": {"objects": 2, "min_patches": 1}},
    "rope": {"model": {"name": "eva02_tiny_patch14_224"}},
    "read_only ibot": {"model": {"read_only": True}, "target": {"crop": False, "mask": False}},
    "layer decay": {"optim": {"layer_decay": 0.7, "freeze_backbone_epochs": 0.5}},
}


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_every_variant_trains_and_moves_all_its_weights(tiny_tiles: Path, tmp_path: Path, name: str) -> None:
    config = tiny_config(tiny_tiles, tmp_path, **VARIANTS[name])
    run = prepare(config, CPU)
    before = {k: v.detach().clone() for k, v in run.student.named_parameters()}
    figures = list(take_steps(run))
    assert all(torch.isfinite(step["loss"]) for step in figures)
    still = [k for k, v in run.student.named_parameters() if v.requires_grad and torch.equal(v, before[k])]
    assert still == []
    if "koleo" in name:
        assert figures[0]["loss_koleo"] != figures[-1]["loss_koleo"]


def test_two_learned_tokens_are_two(tiny_tiles: Path, tmp_path: Path) -> None:
    run = prepare(tiny_config(tiny_tiles, tmp_path, **VARIANTS["multi_obj"]), CPU)
    assert run.student.encoder.more_obj is not None
    assert run.student.encoder.more_obj.shape == (3, 32)
    assert run.teacher.encoder.more_obj is not None


def test_read_only_objects_embed_in_one_pass_as_they_do_in_many(
    tiny_tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tiny_tiles, tmp_path / "run", optim={"epochs": 0.34}, **VARIANTS["read_only"])
    loop.pretrain(config)
    embed(tiny_tiles, str(tmp_path / "run"), tmp_path / "shared", level="object", mode="masked", dtype="float32")
    monkeypatch.setattr("odis_path.embedding.slide.OBJECTS_A_PASS", 1)
    embed(tiny_tiles, str(tmp_path / "run"), tmp_path / "alone", level="object", mode="masked", dtype="float32")
    shared, alone = read_features(tmp_path / "shared", "object"), read_features(tmp_path / "alone", "object")
    assert len(shared.x) == 6 * 24
    assert np.allclose(shared.x, alone.x, atol=1e-5)
    assert np.abs(shared.x[0] - shared.x[1]).max() > 1e-3


def test_polygons_make_the_mask_and_are_asked_for_where_there_are_none(tiny_tiles: Path, tmp_path: Path) -> None:
    """The outline of a tiny slide's box is the diamond in it: its corners' patches are out."""
    boxes, outlines = (samples_of(tiny_tiles, target={"geometry": kind, "min_patches": 1}) for kind in ("box", "polygon"))
    fewer = 0
    for i in range(len(boxes)):
        box, outline = boxes[(0, i)], outlines[(0, i)]
        assert np.array_equal(box.target, outline.target)
        assert not (outline.views.object_masks_global & ~box.views.object_masks_global).any()
        fewer += int(box.views.object_masks_global.sum() - outline.views.object_masks_global.sum())
    assert fewer > 0
    write_tiny_slide(tmp_path, "bare", "P", 4, 0, polygons=False)
    samples = samples_of(tmp_path, target={"geometry": "polygon"})
    with pytest.raises(UserError, match="annotate with --polygons"):
        samples[(0, 0)]


def test_layer_decay_gives_each_block_its_rate(tiny_tiles: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_tiles, tmp_path, optim={"layer_decay": 0.5})
    run = prepare(config, CPU)
    set_schedule(run.optimizer, step_values(config, 3, run.steps_per_epoch, run.total_steps))
    peak = max(group["lr"] for group in run.optimizer.param_groups)
    rate = {id(p): group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
    named = dict(run.student.named_parameters())
    expected = {
        "encoder.vit.patch_embed.proj.weight": 3,
        "encoder.vit.cls_token": 3,
        "encoder.vit.pos_embed": 3,
        "encoder.vit.blocks.0.attn.qkv.weight": 2,
        "encoder.vit.blocks.1.mlp.fc1.bias": 1,
        "encoder.vit.norm.weight": 0,
        "encoder.mask_token": 0,
        "head.mlp.0.weight": 0,
    }
    for name, power in expected.items():
        assert rate[id(named[name])] == pytest.approx(peak * 0.5**power), name
    groups = parameter_groups(run.student, 0.5)
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in named.values())
    for group in groups:
        for parameter in group["params"]:
            assert group["decays"] == (parameter.ndim > 1), parameter.shape
    assert layer_of("encoder.more_obj", 2) == 3


def test_a_frozen_backbone_stands_still_while_heads_warm(tiny_tiles: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_tiles, tmp_path, optim={"freeze_backbone_epochs": 0.5, "freeze_last_layer_epochs": 0})
    run = prepare(config, CPU)
    before = {k: v.detach().clone() for k, v in run.student.named_parameters()}
    for _ in take_steps(run):
        now = dict(run.student.named_parameters())
        moved = {k for k in now if not torch.equal(now[k], before[k])}
        assert any(k.startswith("head.") for k in moved)
        if run.step <= 0.5 * run.steps_per_epoch:
            assert not any(k.startswith("encoder.vit.") for k in moved)
    assert any(k.startswith("encoder.vit.") for k in moved)


def test_options_that_need_a_mask_say_so() -> None:
    with pytest.raises(UserError, match=r"target\.mask=true"):
        load_config("ibot", ["target.objects=2"])
    with pytest.raises(UserError, match=r"target\.mask=true"):
        load_config("dino", ["loss.image_weight=1"])


def test_the_defaults_are_those_of_the_sources() -> None:
    """Each row of the recipe's table of open choices, with its default."""
    c = PretrainConfig()
    t = c.target
    assert (t.containment, t.fraction, t.order, t.choice, t.min_patches) == ("full", 0.5, "box_first", "uniform", 4)
    assert (t.sampler, t.tries, t.fallback, t.mask_rule, t.mask_margin) == ("construct", 20, "construct", "any", 0)
    assert (t.local, t.geometry, t.whole_tile_p, t.objects) == ("object", "box", 0, 1)
    assert (c.loss.image_weight, c.loss.patch_in_box_only, c.model.read_only) == (0, False, False)
    assert (c.loss.centering, c.loss.koleo_weight, c.loss.kde_weight) == ("center", 0, 0)


def test_collated_batches_put_views_first(tiny_tiles: Path) -> None:
    samples = samples_of(tiny_tiles, target={"objects": 2})
    batch = collate([samples[(0, i)] for i in range(3)])
    assert batch.views.object_masks_global.shape == (2, 3, 2, 16)
    assert batch.views.object_masks_local.shape == (2, 3, 2, 4)
    assert batch.views.object_visible.shape == (4, 3, 2)


def test_views_without_an_object_have_no_part_in_the_loss() -> None:
    """One object of one tile seen by one view alone: nothing to compare, no loss, no gradient."""
    student = torch.randn(3, 1, 4, dtype=torch.float64, requires_grad=True)
    seen = torch.zeros(3, 1)
    seen[0] = 1
    loss = cross_view_loss(torch.randn(2, 1, 4, dtype=torch.float64).softmax(-1), student, 0.1, seen)
    loss.backward()
    assert float(loss.detach()) == 0
    assert student.grad is not None
    assert not student.grad.any()


@pytest.mark.parametrize("name", ["plain", *sorted(VARIANTS)])
def test_a_step_never_waits_for_the_device(tiny_tiles: Path, tmp_path: Path, name: str) -> None:
    """Everything whose shape depends on values was found on the CPU by the loader; the logged figures are read elsewhere."""
    run = prepare(tiny_config(tiny_tiles, tmp_path, **VARIANTS.get(name, {})), CPU)
    samples = TileSamples(run.train, run.config, 8)
    batch = collate([samples[(0, i)] for i in range(8)])
    values = step_values(run.config, 6, run.steps_per_epoch, run.total_steps)
    set_schedule(run.optimizer, values)
    with NoWaiting():
        forward_backward(run, batch, values, last=True)
        apply_gradients(run, values)


@pytest.mark.parametrize("name", ["plain", "multi_obj", "read_only", "linear pool, two objects", "read_only ibot", "rope"])
def test_every_method_embeds_in_every_mode(name: str) -> None:
    """Embeddings of the same box: finite, one a tile; only the box's mask, cut or blackout tells them apart.

    In mode window the images are windows already, seen as masked tiles are.
    """
    torch.manual_seed(0)
    config = tiny_config("x", "y", **VARIANTS.get(name, {}))
    encoder = FrozenEncoder(build_network(config, student=False).encoder.eval(), name, (0.5,) * 3, (0.2,) * 3, CPU.device)  # type: ignore[arg-type]
    tiles = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), dtype=np.uint8)
    boxes = np.array([[4.0, 4, 20, 20], [8, 0, 32, 12]])
    embeddings = {mode: encoder.encode(tiles, boxes, mode) for mode in MODES}  # type: ignore[arg-type]
    assert all(x.shape == (2, 32) and np.isfinite(x).all() for x in embeddings.values())
    assert np.array_equal(embeddings.pop("window"), embeddings["masked"])
    for a, b in combinations(embeddings, 2):
        assert np.abs(embeddings[a] - embeddings[b]).max() > 1e-5, (a, b)


def test_compiled_blocks_train_as_plain_ones(tiny_tiles: Path, tmp_path: Path) -> None:
    """One step of one block; the names of the weights stay timm's."""
    losses = []
    for on in (False, True):
        config = tiny_config(
            tiny_tiles,
            tmp_path,
            views={"local_count": 0},
            eval={"every_epochs": 0},
            optim={"epochs": 0.1},
            model={"compile_blocks": on, "drop_path": 0.0, "kwargs": {**TINY_VIT, "depth": 1}},
        )
        run = prepare(config, CPU)
        losses.append([float(figures["loss"]) for figures in take_steps(run)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert not any("_orig_mod" in name for name in run.student.state_dict())
