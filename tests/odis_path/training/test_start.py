"""Whether a run starts and goes on: what is told in one line, and tiles that cannot be read."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from annotations.errors import UserError
from odis_path.checkpoint import latest_checkpoint, load_checkpoint
from odis_path.data.crops import Crop
from odis_path.data.dataset import SampledObject, TileSamples
from odis_path.data.targets import Target
from odis_path.data.tile_index import index_tiles
from odis_path.distributed import Ranks
from odis_path.embedding.encoder import load_encoder
from odis_path.embedding.run import embed
from odis_path.loss.dino_ibot import count_view_pairs
from odis_path.model.architectures import is_model_name
from odis_path.model.network import build_network
from odis_path.model.vit import build_encoder
from odis_path.training import loop
from odis_path.training.criterion import feature_std
from odis_path.training.setup import prepare
from tests.odis_path.conftest import tiny_config, write_tiny_slide
from tests.odis_path.data.test_from_slides import write_slide
from tiling.slide_file.write import replace_groups
from tiling.tiles.run import tile

CPU = Ranks(0, 1, torch.device("cpu"))
SHORT = {"eval": {"every_epochs": 0}, "optim": {"epochs": 0.17}}
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}


def gradients(tiles: Path, out: Path, **sections: Any) -> dict[int, torch.Tensor]:
    """First Adam moments after the steps of a short run: the sums of its gradients."""
    config = tiny_config(tiles, out, **{**SHORT, "model": {"drop_path": 0.0}, **sections})
    state = load_checkpoint(loop.pretrain(config)).state
    moments = {name: moment["exp_avg"] for name, moment in state.optimizer["state"].items()}
    return {**moments, -1: state.criterion["obj_center.value"], -2: state.criterion["patch_center.value"]}


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"target": {"crop": False}},
        {"target": {"objects": 2, "min_patches": 1}},
        {"target": {"objects": 3, "min_patches": 1}, "model": {"read_only": True, "drop_path": 0.0}},
        {"target": {"sampler": "reject", "tries": 2, "fallback": "zero"}},
        {"loss": {"image_weight": 0.5, "patch_in_box_only": True}},
    ],
    ids=["odis", "mask_only", "two", "read_only", "zero", "image"],
)
def test_micro_batches_add_up_to_the_batch_where_views_lack_their_object(
    sections: dict[str, Any], tiny_tiles: Path, tmp_path: Path
) -> None:
    """Two steps, so that the centers have moved once: the same gradients, and the same centers."""
    moments = []
    for parts in (1, 2):
        optim = {"accumulate": parts, "epochs": 0.34, "freeze_last_layer_epochs": 0}
        settings = {"data": {"kinds": ["cell"]}, **sections, "optim": optim}
        moments.append(gradients(tiny_tiles, tmp_path / str(parts), **settings))
    for name, moment in moments[0].items():
        assert torch.allclose(moment, moments[1][name], atol=3e-6), name


def test_pairs_are_counted_as_the_loss_counts_them() -> None:
    seen = torch.tensor([[1, 0], [1, 1], [0, 1], [1, 0]])  # two globals, two locals, of two tiles
    by_hand = sum(int(seen[q, b] and seen[v, b]) for b in range(2) for q in range(2) for v in range(4) if v != q)
    assert float(count_view_pairs(seen)) == by_hand == 5


def test_the_spread_is_between_tiles_not_between_views() -> None:
    tiles = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    agreeing = torch.stack([tiles, tiles])
    assert float(feature_std(agreeing)) > 0.9
    collapsed = torch.randn(2, 1, 16).expand(2, 64, 16)
    assert float(feature_std(collapsed)) < 1e-5
    assert float(feature_std(torch.randn(2, 1, 16))) == 0  # one tile a micro-batch


def test_a_run_does_not_go_on_with_other_tiles(tmp_path: Path) -> None:
    """More slides would change the held-out patients: those trained on would be judged as never seen."""
    tiles = tmp_path / "tiles"
    tiles.mkdir()
    for number in range(4):
        write_tiny_slide(tiles, f"S{number}", f"P{number}", 6, number)
    config = tiny_config(tiles, tmp_path / "run", **SHORT)
    path = loop.pretrain(config)
    assert loop.pretrain(config) == path
    replace_groups(tiles / "S0.h5", {}, root_attrs={"patient_id": "another"})
    with pytest.raises(UserError, match=r"was trained on other tiles than .*tiles holds now \((patients|other tiles)"):
        loop.pretrain(config)
    replace_groups(tiles / "S0.h5", {}, root_attrs={"patient_id": "P0"})
    write_tiny_slide(tiles, "S4", "P4", 6, 4)
    with pytest.raises(UserError, match="4 slides with 24 tiles, now 5 with 30") as caught:
        loop.pretrain(config)
    assert "\n" not in str(caught.value)
    content = torch.load(path, weights_only=True)
    del content["data"]  # as older versions wrote it
    torch.save(content, path)
    (tiles / "S4.h5").unlink()
    assert loop.pretrain(config) == path


def test_sizes_that_are_no_multiple_of_the_patch_are_told(tiny_tiles: Path, tmp_path: Path) -> None:
    for key, size in (("local_size", 20), ("global_size", 36)):
        with pytest.raises(
            UserError, match=rf"views\.{key}={size} is no multiple of the patch .* 8 px; take {size // 8 * 8} or"
        ):
            loop.pretrain(tiny_config(tiny_tiles, tmp_path / "run", views={key: size}))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_loader_worker_finds_wrong_is_one_line(workers: int, tmp_path: Path) -> None:
    for number in range(4):
        path = write_tiny_slide(tmp_path, f"S{number}", f"P{number}", 6, number)
        with h5py.File(path, "r+") as file:
            data = file["pixels/data"][...]
            data[int(file["pixels/offsets"][2]) : int(file["pixels/offsets"][3])] = 7
            file["pixels/data"][...] = data
    with pytest.raises(UserError, match=r"S\d\.h5: tile 2 cannot be decoded .*: tile the slide again") as caught:
        loop.pretrain(
            tiny_config(tmp_path, tmp_path / "run", data={"workers": workers, "holdout": 0}, eval={"every_epochs": 0})
        )
    assert "\n" not in str(caught.value)


def test_missing_polygons_are_told_before_training(tmp_path: Path) -> None:
    for number in range(3):
        write_tiny_slide(tmp_path, f"S{number}", f"P{number}", 6, number, polygons=False)
    config = tiny_config(tmp_path, tmp_path / "run", target={"geometry": "polygon"}, data={"workers": 2})
    with pytest.raises(UserError, match=r"S0\.h5: holds no polygons"):
        prepare(config, CPU)
    assert not (tmp_path / "run").exists()


def test_tiles_without_a_box_of_the_kinds_are_dropped(tmp_path: Path) -> None:
    path = write_tiny_slide(tmp_path, "S0", "P0", 6, 0)
    with h5py.File(path, "r+") as file:
        kind = file["objects/kind"][...]
        kind[1::4] = 0  # the cells of every second tile are tissue now
        del file["objects/kind"]
        file["objects/kind"] = kind
    assert index_tiles(tmp_path, need_boxes=np.array([1], np.uint8)).row.tolist() == [1, 3, 5]
    assert index_tiles(tmp_path, need_boxes=np.array([0, 1], np.uint8)).row.tolist() == list(range(6))


def test_a_torn_slide_without_stored_pixels_costs_its_tiles_and_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import tifffile

    slides = [write_slide(tmp_path / f"S{seed}.svs", seed) for seed in range(3)]
    with tifffile.TiffFile(slides[0]) as file:
        begin, length = file.pages[0].dataoffsets[1], file.pages[0].databytecounts[1]  # type: ignore[union-attr]
    content = bytearray(slides[0].read_bytes())
    content[begin + length // 2 : begin + length] = bytes(length - length // 2)
    slides[0].write_bytes(content)
    outcomes = tile(slides, tmp_path / "tiles", 0.5, 64, pixels="none", tissue="none", workers=1)
    assert all(outcome.ok for outcome in outcomes), outcomes
    config = tiny_config(
        tmp_path / "tiles",
        tmp_path / "run",
        data={"workers": 2, "holdout": 0},
        optim={"epochs": 1, "batch_size": 12},
        eval={"every_epochs": 0},
    )
    torn = TileSamples(index_tiles(tmp_path / "tiles"), config, 8)
    unreadable = [i for i in range(len(torn)) if torn[0, i].unreadable is not None]
    assert 1 <= len(unreadable) <= 9
    loop.pretrain(config)
    messages = capsys.readouterr().err
    assert messages.count("cannot be read from its slide, another is taken in its place") == len(unreadable)
    assert "S0.h5: tile" in messages
    outcomes = embed(tmp_path / "tiles", str(tmp_path / "run"), tmp_path / "features")
    assert all(outcome.ok for outcome in outcomes), outcomes
    notes = [outcome.message for outcome in outcomes]
    assert notes[0].startswith(f"{len(unreadable)} tiles cannot be read from its slide (the first, row ")
    assert notes[1:] == ["", ""]


def test_what_is_no_plain_vit_is_refused_when_it_is_built() -> None:
    for name in ("vit_tiny_r_s16_p8_224", "deit_tiny_distilled_patch16_224"):
        with pytest.raises(UserError, match="not a plain vision transformer"):
            build_encoder(name)
    for key, value in (("num_classes", 10), ("global_pool", "avg"), ("patch_drop_rate", 0.5), ("dynamic_img_size", False)):
        with pytest.raises(UserError, match=rf"model\.kwargs\.{key}={value} cannot be set"):
            build_encoder("vit_tiny_patch16_224", {**TINY, key: value})
    build_encoder("vit_tiny_patch16_224", {**TINY, "num_classes": 0, "dynamic_img_size": True})


def test_the_image_token_never_sees_a_box_and_is_no_objects_embedding(tmp_path: Path) -> None:
    config = tiny_config("x", tmp_path, loss={"image_weight": 0.5})
    encoder = build_network(config, student=False).encoder.eval()
    torch.nn.init.normal_(encoder.more_obj)  # type: ignore[arg-type]
    images, box = torch.randn(2, 3, 32, 32), torch.zeros(2, 16, dtype=torch.bool)
    box[:, 3:6] = True
    trained = encoder(images, torch.stack([box, torch.ones_like(box)], dim=1)).obj  # as a step gives its masks
    assert torch.equal(encoder(images, box).obj, trained[:, 0])


def test_several_tokens_are_kept_from_a_checkpoint(tiny_tiles: Path, tmp_path: Path) -> None:
    two = tiny_config(tiny_tiles, tmp_path / "two", target={"objects": 2, "min_patches": 1}, **SHORT)
    path = loop.pretrain(two)
    start = two.model_copy(update={"model": two.model.model_copy(update={"weights": str(path)})})
    encoder = build_network(start, student=True, weights=True).encoder
    assert torch.equal(encoder.more_obj, load_checkpoint(path).state.teacher["encoder.more_obj"])  # type: ignore[arg-type]
    four = start.model_copy(update={"target": start.target.model_copy(update={"objects": 4})})
    with pytest.raises(UserError, match=r"has 2 \[OBJ\] tokens, the model 4; set target\.objects"):
        build_network(four, student=True, weights=True)


def test_a_fallback_is_for_the_object_the_crops_were_drawn_for(tiny_tiles: Path) -> None:
    """Rejection that gives up says nothing of the second object, whose mask is what the view shows of it."""
    rules: dict[str, Any] = {"objects": 2, "min_patches": 1, "sampler": "reject", "tries": 1}
    full, construct = (
        TileSamples(index_tiles(tiny_tiles), tiny_config(tiny_tiles, "unused", target={**rules, "fallback": fallback}), 8)
        for fallback in ("full", "zero")
    )
    for i in range(30):
        a, b = full[0, i], construct[0, i]
        np.testing.assert_array_equal(a.views.object_masks_global[:, 1], b.views.object_masks_global[:, 1])
        np.testing.assert_array_equal(a.views.object_visible[:, 1], b.views.object_visible[:, 1])


def test_weights_that_are_not_finite_stop_every_rank_where_they_are_saved(
    tiny_tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepare(tiny_config(tiny_tiles, tmp_path / "run"), CPU)
    with torch.no_grad():
        next(run.student.parameters()).fill_(float("nan"))
    asked = []
    monkeypatch.setattr("odis_path.distributed.any_rank", lambda flag, _ranks: asked.append(flag) or flag)
    with pytest.raises(UserError, match="the weights are not finite"):
        loop.save(run)
    assert asked == [True]
    monkeypatch.setattr("odis_path.distributed.any_rank", lambda _flag, _ranks: True)  # what a rank hears that did not write
    run.ranks = Ranks(1, 2, torch.device("cpu"))
    with pytest.raises(UserError, match="see what rank 0 says"):
        loop.save(run)
    assert latest_checkpoint(tmp_path / "run") is None


def test_a_run_folder_that_cannot_be_made_is_told(tiny_tiles: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"run\.out=.*file/run cannot be made"):
        loop.pretrain(tiny_config(tiny_tiles, tmp_path / "file" / "run"))


def test_the_split_file_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    tiles = tmp_path / "tiles"
    tiles.mkdir()
    for number in range(3):
        write_tiny_slide(tiles, f"S{number}", f"P{number}", 6, number)
    path = loop.pretrain(tiny_config(tiles, tmp_path / "run", **SHORT))
    with (path.parent / "split.csv").open() as file:
        test = sorted(row["patient_id"] for row in csv.DictReader(file) if row["split"] == "test")
    assert load_checkpoint(path).state.data["held_out"] == test
    shutil.rmtree(tmp_path / "run")


def test_an_outline_beside_a_view_is_not_seen_in_it(tiny_tiles: Path) -> None:
    """The view shows a corner of the box alone, the outline is the diamond in it: no patch of the view is the object's."""
    samples = TileSamples(index_tiles(tiny_tiles), tiny_config(tiny_tiles, "unused", target={"geometry": "polygon"}), 8)
    diamond = np.array([(20.0, 0.0), (40.0, 20.0), (20.0, 40.0), (0.0, 20.0)])
    target = Target(np.array([0.0, 0.0, 40.0, 40.0]), np.array([0]))
    corner, middle = Crop(0, 0, 8, 8, 0, 32), Crop(8, 8, 32, 32, 0, 32)
    masks = samples._object_mask([corner, middle], SampledObject(target, [[diamond]], in_crops=False), local=False)
    assert not masks[0].any()
    assert masks[1].any()


def test_names_of_models_are_told_from_paths() -> None:
    assert all(is_model_name(name) for name in ("hf-hub:owner/model", "local-dir:/weights/vit", "S/16", "vit-b/14"))
    assert not any(is_model_name(path) for path in ("runs/odis", "/runs/s16", "checkpoint.pt", "runs/s/16"))
    with pytest.raises(UserError, match="no such checkpoint"):
        load_encoder("runs/nothing")
