"""The simple features a model is compared with."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from odis_path.evaluation.pixel_baselines import box_size, cut_box, grey_texture, pixel_baselines, rgb_mean
from odis_path.features.read import read_features
from tests.odis_path.evaluation.conftest import Cohort
from tiling.slide_file.read import SlideFile


def test_mean_colour_and_box_size_by_hand() -> None:
    region = np.zeros((8, 10, 3), np.uint8)
    region[:4, :, 0] = 200
    assert rgb_mean(region).tolist() == [100, 0, 0]
    assert box_size(np.array([[1, 2, 5, 10.0]])).tolist() == [pytest.approx([np.log(4), np.log(8)])]


def test_texture_tells_texture_and_not_colour() -> None:
    rng = np.random.default_rng(0)
    fine = [np.repeat(rng.integers(0, 255, (96, 96, 1)), 3, 2).astype(np.uint8) for _ in range(2)]
    coarse = [np.kron(f[:12, :12], np.ones((8, 8, 1))).astype(np.uint8) for f in fine]
    a, b, c, d = (grey_texture(region) for region in (*fine, *coarse))
    assert a.shape == (31,)
    assert np.abs(a[:28] - b[:28]).max() < 0.2 * np.abs(a[:28] - c[:28]).max()
    assert np.isfinite([a, b, c, d]).all()
    assert a[:10].sum() == pytest.approx(1)
    assert np.isfinite(grey_texture(np.full((8, 8, 3), 255, np.uint8))).all()
    assert grey_texture(np.full((224, 200, 3), 9, np.uint8)).shape == (31,), "a large region is shrunk"


@pytest.mark.parametrize(
    ("box", "shape"),
    [([0, 0, 64, 64], (64, 64)), ([10.4, 20.6, 30.1, 50], (30, 21)), ([62, 0, 64, 3], (8, 8)), ([30, 30, 30.5, 30.5], (8, 8))],
)
def test_boxes_are_cut_outward_and_never_too_small(box: list[float], shape: tuple[int, int]) -> None:
    tile = np.arange(64 * 64 * 3).reshape(64, 64, 3)
    cut = cut_box(tile, np.array(box))
    assert cut.shape[:2] == shape
    x0, y0 = int(box[0]), int(box[1])
    assert tile[y0, x0] in cut.reshape(-1, 3)


def test_each_row_is_measured_where_its_embedding_was_made(cohort: Cohort) -> None:
    tiles, objects = (read_features(cohort.good, level) for level in ("tile", "object"))
    pick = np.array([40, 3, 20])
    measured = pixel_baselines(tiles.take(pick)).features
    with SlideFile(cohort.tiles / "s2.h5") as file:
        assert np.allclose(measured["rgb_mean"][0], file.tile(8).reshape(-1, 3).mean(0), atol=1e-3)
        masked = replace(objects, mode="masked").take(np.array([34]))
        inside = pixel_baselines(masked).features["rgb_mean"][0]
        assert np.allclose(inside, file.tile(0)[2:30, 2:30].reshape(-1, 3).mean(0), atol=1e-3)
        averaged = pixel_baselines(replace(tiles, mode="masked").take(np.array([32 + 15]))).features["rgb_mean"][0]
        assert np.allclose(averaged, file.tile(15)[2:30, 2:30].reshape(-1, 3).mean(0), atol=1e-3)
        slides = pixel_baselines(read_features(cohort.good, "slide")).features["rgb_mean"]
        whole = np.mean([file.tile(i).reshape(-1, 3).mean(0) for i in range(16)], axis=0)
        assert np.allclose(slides[2], whole, atol=1e-2)


def test_gone_or_changed_slides_are_said(cohort: Cohort, tmp_path: Path) -> None:
    tiles = read_features(cohort.good, "tile")
    gone = pixel_baselines(replace(tiles, sources={f"s{i}": tmp_path / "gone.h5" for i in range(6)}))
    assert gone.features == {}
    assert "gone.h5" in gone.warnings[0]
    other = pixel_baselines(replace(tiles, coords=tiles.coords + 1))
    assert "not those that were embedded" in other.warnings[0]
    shutil.copy(cohort.tiles / "s0.h5", tmp_path / "s0.h5")
    assert pixel_baselines(tiles.take(np.arange(0))).features == {}
