"""Which pieces of which tiles are embedded, and that their shares are those of the embeddings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from odis_path.config import PretrainConfig
from odis_path.data.tile_index import index_tiles
from odis_path.embedding.encoder import FrozenEncoder
from odis_path.model.network import build_network
from odis_path.training import loop
from odis_path.training.shortcut.variance import variance_share
from odis_path.training.shortcut.variance_monitor import VarianceProbe, by_turns
from tests.odis_path.conftest import tiny_config, write_tiny_slide
from tests.odis_path.training.shortcut.test_first_look import write_painted

CELLS = np.array([[2, 2, 20, 20], [30, 30, 50, 50], [2, 40, 20, 60], [40, 2, 60, 20], [25, 5, 35, 20.0]])


def probe_of(folder: Path, most: int = 16, **sections: dict[str, Any]) -> tuple[PretrainConfig, VarianceProbe]:
    config = tiny_config(folder, folder / "run", **sections)
    index = index_tiles(folder)
    half = np.arange(len(index)) % 2 == 0
    train, held_out = (index.rows(np.flatnonzero(rows)) for rows in (half, ~half))
    return config, VarianceProbe(config, train, held_out, 8, most)


def encoder_of(config: PretrainConfig) -> FrozenEncoder:
    torch.manual_seed(0)
    module = build_network(config, student=False).encoder.eval()
    return FrozenEncoder(module, "tiny", config.data.mean, config.data.std, torch.device("cpu"))


def test_objects_of_a_tile_are_its_pieces_masked_as_trained(tmp_path: Path) -> None:
    config, probe = probe_of(write_painted(tmp_path / "t", CELLS))
    p = probe.pieces
    assert p.are_objects
    assert len(set(p.tile)) == len(p.images) == 16
    assert np.bincount(np.unique(p.tile, return_inverse=True)[1]).tolist() == [4] * 16
    assert {tuple(box) for box in p.boxes} <= {tuple(box) for box in CELLS}
    assert set(p.label) == {0}
    encoder = encoder_of(config)
    shares = probe.score(encoder)
    encoder = replace(encoder, resize_px=config.views.global_size)
    x = np.concatenate([encoder.encode(p.images[p.image[i : i + 1]], p.boxes[i : i + 1], "masked") for i in range(len(p))])
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    assert shares == {"variance_tile": pytest.approx(variance_share(x, p.tile), abs=1e-3)}  # of one slide, patient and class


@pytest.mark.parametrize(
    "sections",
    [{"target": {"mask": False}}, {"views": {"window_um": 12}}, {"views": {"stain_swap_p": 0.5}}],
    ids=["cut out", "windows", "stains"],
)
def test_every_way_of_training_on_objects_has_its_pieces(tmp_path: Path, sections: dict[str, Any]) -> None:
    config, probe = probe_of(write_painted(tmp_path / "t", CELLS), **sections)
    side = 24 if "window_um" in sections.get("views", {}) else 64
    assert probe.pieces.images.shape[1:] == (side, side, 3)
    assert (probe.pieces.boxes >= 0).all()
    assert (probe.pieces.boxes <= side).all()
    assert 0 <= probe.score(encoder_of(config))["variance_tile"] <= 1


def test_tiles_of_one_colour_explain_all_of_an_embedding_of_their_quarters(tmp_path: Path) -> None:
    """Tiles with fewer than two objects are cut in four."""
    config, probe = probe_of(write_painted(tmp_path / "t", CELLS[:1]))
    assert not probe.pieces.are_objects
    assert probe.pieces.images.shape == (64, 32, 32, 3)
    assert probe.score(encoder_of(config))["variance_tile"] == pytest.approx(1.0, abs=1e-3)


def test_all_four_shares_are_there_where_slides_patients_and_labels_are(tiny_tiles: Path) -> None:
    config, probe = probe_of(tiny_tiles, most=24)
    assert set(probe.score(encoder_of(config))) == {f"variance_{name}" for name in ("class", "patient", "slide", "tile")}
    p = probe.pieces
    assert np.unique(p.slide, return_counts=True)[1].tolist() == [16] * 6  # four tiles a slide, four quarters each
    assert len(set(p.patient)) == 3
    for slide in range(6):
        assert len(set(p.patient[p.slide == slide])) == 1
    index = index_tiles(tiny_tiles)
    assert len(set(zip(index.slide[p.tile], index.row[p.tile], strict=True))) == 24


def test_slides_take_turns(tmp_path: Path) -> None:
    for name, tiles in (("a", 40), ("b", 3), ("c", 12)):
        write_tiny_slide(tmp_path, name, name, tiles, 0)
    index = index_tiles(tmp_path)
    order = by_turns(index, 0)
    assert sorted(order) == list(range(55))
    assert np.bincount(index.slide[order[:9]]).tolist() == [3, 3, 3]
    assert np.bincount(index.slide[order[:15]]).tolist() == [6, 3, 6]
    assert (by_turns(index, 1) != order).any()


def test_a_single_tile_or_torn_ones_say_nothing(tmp_path: Path) -> None:
    _, probe = probe_of(write_painted(tmp_path / "t", CELLS, tiles=1))
    assert not probe.ready


def test_a_run_logs_the_shares_before_and_after_training_beside_both_k_nn(tiny_tiles: Path, tmp_path: Path) -> None:
    folder = loop.pretrain(tiny_config(tiny_tiles, tmp_path / "run")).parent
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    scored = [row for row in rows if "variance_tile" in row]
    assert [row["step"] for row in scored] == [0, 6, 12]
    for row in scored:
        assert all(0 <= row[f"variance_{name}"] <= 1 for name in ("class", "patient", "slide", "tile"))
        assert 0 <= row["knn_balanced_accuracy_zscored"] <= 1


def test_shares_need_neither_labels_nor_held_out_patients(tmp_path: Path) -> None:
    folder = write_painted(tmp_path / "t", CELLS)
    run = loop.pretrain(tiny_config(folder, tmp_path / "run", data={"holdout": 0.0}, optim={"epochs": 1})).parent
    rows = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "variance_tile" in row] == [0, 7]
    assert not any("knn_balanced_accuracy" in row for row in rows)
