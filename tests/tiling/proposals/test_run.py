"""Proposals: nuclei and clusters where nobody annotated."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from annotations.errors import UserError
from tiling.proposals.nuclei import LABELS, propose_tile, segment_nuclei
from tiling.proposals.regions import boxes_of, segment_clusters
from tiling.proposals.run import propose
from tiling.proposals.stain import slide_levels, stain_of
from tiling.slide_file.read import SlideFile
from tiling.slide_file.write import SlideMeta, replace_groups, write_slide_file
from tiling.wsi import codec

MPP = 0.5
CENTRES = [(40, 40), (100, 60), (170, 50), (60, 130), (140, 140), (200, 180)]
RADIUS_PX = 7


def discs(ground: tuple[int, int, int], ink: tuple[int, int, int], centres: list[tuple[int, int]] = CENTRES) -> np.ndarray:
    """uint8 (224, 224, 3): discs of nuclear size at `centres` (x, y) on a noisy ground."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:224, :224]
    rgb = np.empty((224, 224, 3))
    rgb[:] = ground
    for cx, cy in centres:
        rgb[(x - cx) ** 2 + (y - cy) ** 2 <= RADIUS_PX**2] = ink
    return (rgb + random.normal(0, 3, rgb.shape)).clip(0, 255).astype(np.uint8)


PINK = discs((225, 150, 190), (90, 60, 140))
GLASS = discs((235, 235, 235), (110, 50, 150))
DAPI = discs((2, 2, 4), (10, 10, 170))


@pytest.mark.parametrize(("rgb", "stain"), [(PINK, "eosin"), (GLASS, "plain"), (DAPI, "dark")])
def test_every_disc_gets_one_box_of_its_size(rgb: np.ndarray, stain: str) -> None:
    assert stain_of([rgb]) == stain
    boxes, area_px = boxes_of(segment_nuclei(rgb, MPP))
    assert len(boxes) == len(CENTRES)
    for cx, cy in CENTRES:
        off = np.abs(boxes - [cx - RADIUS_PX, cy - RADIUS_PX, cx + RADIUS_PX + 1, cy + RADIUS_PX + 1]).max(axis=1)
        assert off.min() <= 2
    assert np.abs(area_px / (np.pi * RADIUS_PX**2) - 1).max() < 0.35


def test_touching_nuclei_are_parted() -> None:
    pair = discs((225, 150, 190), (90, 60, 140), [(100, 100), (112, 100)])
    boxes, _ = boxes_of(segment_nuclei(pair, MPP))
    assert len(boxes) == 2
    assert sorted(boxes[:, 0].round()) == pytest.approx([93, 106], abs=2)


def test_a_tile_without_nuclei_gets_none_once_the_slide_is_known() -> None:
    stroma = discs((225, 150, 190), (0, 0, 0), [])
    stroma[:, 112:] = discs((205, 120, 165), (0, 0, 0), [])[:, 112:]
    levels = slide_levels([PINK, stroma], MPP)
    assert not segment_nuclei(stroma, MPP, levels=levels).any()
    assert segment_nuclei(PINK, MPP, levels=levels).max() > 0
    assert not segment_nuclei(np.full((224, 224, 3), 240, np.uint8), MPP).any()


def test_nuclei_in_a_ring_are_one_cluster_with_their_lumen() -> None:
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    nuclei = np.zeros((224, 224), np.int32)
    y, x = np.mgrid[:224, :224]
    for i, angle in enumerate(angles, 1):
        nuclei[(x - 110 - 50 * np.cos(angle)) ** 2 + (y - 110 - 50 * np.sin(angle)) ** 2 <= 49] = i
    nuclei[(x - 205) ** 2 + (y - 205) ** 2 <= 49] = 17  # alone: part of no cluster
    boxes, area = boxes_of(segment_clusters(nuclei, MPP))
    assert boxes.tolist() == [pytest.approx([53, 53, 168, 168], abs=4)]
    assert area[0] > 0.9 * np.pi * 57**2


def test_boxes_lie_in_the_tile_and_say_what_they_are() -> None:
    proposals = propose_tile(GLASS, MPP)
    assert proposals.xyxy.dtype == np.float32
    assert proposals.xyxy.min() >= 0
    assert proposals.xyxy.max() <= 224
    assert (proposals.xyxy[:, 2:] > proposals.xyxy[:, :2]).all()
    assert set(proposals.label) <= set(range(len(LABELS)))
    assert (proposals.label == 0).sum() == len(CENTRES)
    assert (propose_tile(GLASS, 4.0).label != 0).all()  # at 4 um per pixel a nucleus is two pixels: none is claimed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    meta = SlideMeta("a", tmp_path / "a.svs", 1000, 1000, MPP, 0.25, 224, parameters={"x": 1})
    coords = np.array([(0, 0), (448, 0), (0, 448)])
    pixels = [codec.encode_jpeg(rgb, 95) for rgb in (PINK, discs((225, 150, 190), (0, 0, 0), []), PINK)]
    write_slide_file(tmp_path / "out" / "a.h5", meta=meta, coords=coords, pixels=pixels)
    return tmp_path / "out"


def test_proposals_are_stored_and_not_made_twice(folder: Path) -> None:
    (outcome,) = propose(folder, workers=1)
    assert (outcome.ok, outcome.skipped, outcome.info["nuclei"]) == (True, False, 2 * len(CENTRES))
    with SlideFile(folder / "a.h5") as file:
        objects, boxes = file.objects_table(), file.boxes_table()
        assert objects["labels"] == list(LABELS)
        assert (objects["kind"] == 2).all()
        assert (boxes["visible"] == 1).all()
        assert boxes["offsets"][-1] == len(boxes["xyxy"]) == len(boxes["object"])
        assert len(file.boxes(1)) == 0
        nuclei = objects["label"] == 0
        assert objects["area_um2"][nuclei].mean() == pytest.approx(np.pi * (RADIUS_PX * MPP) ** 2, rel=0.3)
        assert [array.dtype for array in (boxes["xyxy"], boxes["offsets"], boxes["object"])] == ["f4", "i8", "i4"]
    (again,) = propose(folder, workers=1)
    assert (again.skipped, again.info) == (True, outcome.info)


def test_annotations_are_not_overwritten_unless_asked(folder: Path) -> None:
    propose(folder, workers=1)
    objects = {
        "id": ["x"],
        "label": np.zeros(1, np.int16),
        "kind": np.zeros(1, np.uint8),
        "area_um2": np.ones(1, np.float32),
        "attrs": {"labels": ["tumour"]},
    }
    boxes = {
        "xyxy": np.array([[0, 0, 9, 9]], np.float32),
        "offsets": np.array([0, 1, 1, 1]),
        "object": np.zeros(1, np.int32),
        "visible": np.ones(1, np.float32),
    }
    replace_groups(folder / "a.h5", {"objects": objects, "boxes": boxes})
    (refused,) = propose(folder, workers=1)
    assert not refused.ok
    assert "boxes from annotations" in refused.message
    assert "--replace" in refused.message
    with SlideFile(folder / "a.h5") as file:
        assert file.objects_table()["labels"] == ["tumour"]
    (replaced,) = propose(folder, workers=1, replace=True)
    assert replaced.ok


@pytest.mark.parametrize("other", [{"replace": True}, {"from_cells": True}])
def test_a_run_with_other_settings_is_refused_while_one_is_at_work(
    folder: Path, other: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def meanwhile(*_: object, **__: object) -> list:
        with pytest.raises(UserError, match=rf"another run of odis-path propose .*{next(iter(other))} False, now True"):
            propose(folder, workers=1, **other)
        monkeypatch.undo()
        tried.append(propose(folder, workers=1))  # an equal one shares the work
        return []

    monkeypatch.setattr("tiling.proposals.run.run_cohort", meanwhile)
    propose(folder, workers=1)
    assert [outcome.ok for outcome in tried[0]] == [True]
    assert [path.name for path in folder.iterdir()] == ["a.h5"]


def test_a_folder_without_slide_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        propose(tmp_path / "gone")
    with pytest.raises(UserError, match="holds no slide file"):
        propose(tmp_path)


def test_proposals_find_most_nuclei_of_real_tissue(test_data: Path) -> None:
    folder = test_data / "brca_m2c"
    right = proposed = truth = 0
    for image in sorted((folder / "images").iterdir())[::30]:
        outline = next((folder / "geojson").glob(f"{image.stem}*"))
        features = json.loads(outline.read_text())
        features = features["features"] if isinstance(features, dict) else features
        points = np.array([p for f in features for p in np.reshape(f["geometry"]["coordinates"], (-1, 2))])
        boxes, _ = boxes_of(segment_nuclei(np.asarray(Image.open(image).convert("RGB")), 0.5))
        inside = ((points[:, None] >= boxes[:, :2] - 1) & (points[:, None] <= boxes[:, 2:] + 1)).all(axis=2)
        right, proposed, truth = right + inside.any(axis=0).sum(), proposed + len(boxes), truth + len(points)
        assert inside.any(axis=1).mean() > 0.6
    assert right / proposed > 0.6
