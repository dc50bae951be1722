"""Stains of slides from their pixels, and views in the stain of another slide."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from odis_path.data.augment import ColourRule, apply_colours, draw_colours, in_other_stains
from odis_path.data.dataset import TileSample, TileSamples
from odis_path.data.slide_stains import SlideStains, stain_matrix
from odis_path.data.tile_index import index_tiles
from tests.odis_path.conftest import tiny_config

PURPLE = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])
BLUE_ORANGE = np.array([[0.85, 0.45, 0.25], [0.15, 0.75, 0.60]])
STILL = ColourRule(brightness=0, contrast=0, saturation=0, hue=0, jitter_p=0, gray_p=0, blur_p=0)


def unit(stains: np.ndarray) -> np.ndarray:
    return stains / np.linalg.norm(stains, axis=1, keepdims=True)


def tile_of(stains: np.ndarray, strength: float, seed: int) -> np.ndarray:
    """A tile of pixels with random amounts of two stains, some with one alone."""
    rng = np.random.default_rng(seed)
    amounts = rng.gamma(2.0, 0.35, (96 * 96, 2)) * strength
    amounts[rng.random(len(amounts)) < 0.3, 0] = 0
    amounts[rng.random(len(amounts)) < 0.3, 1] = 0
    return np.clip(255 * np.exp(-amounts @ unit(stains)), 0, 255).astype(np.uint8).reshape(96, 96, 3)


def angle(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.degrees(np.arccos(np.clip((unit(a) * unit(b)).sum(1), -1, 1)).max()))


def test_the_stains_of_a_slide_are_told_from_its_pixels() -> None:
    for stains in (PURPLE, BLUE_ORANGE):
        assert angle(stain_matrix([tile_of(stains, 1.0, 1)])[:2], stains) < 4


def test_a_slide_without_stained_pixels_has_none_and_gives_none() -> None:
    blank = stain_matrix([np.full((96, 96, 3), 245, np.uint8)])
    assert np.isnan(blank).all()
    stains = SlideStains(np.stack([blank, stain_matrix([tile_of(PURPLE, 1.0, 2)])]))
    rng = np.random.default_rng(0)
    assert np.array_equal(stains.swaps(rng, 0, 1.0, 3), np.tile(np.eye(3), (3, 1, 1)))
    assert np.array_equal(stains.swaps(rng, 1, 1.0, 3), np.tile(np.eye(3), (3, 1, 1)))


def test_a_swapped_view_has_the_stain_and_strength_of_the_other_slide() -> None:
    tiles = [tile_of(PURPLE, 0.8, 3), tile_of(BLUE_ORANGE, 1.1, 4)]
    stains = SlideStains(np.stack([stain_matrix([tile]) for tile in tiles]))
    packed = draw_colours(np.random.default_rng(0), (STILL,))
    in_other_stains(packed, stains.swaps(np.random.default_rng(0), 0, 1.0, 1))
    image = torch.from_numpy(tiles[0]).permute(2, 0, 1)[None].float() / 255
    swapped = (apply_colours(image, torch.from_numpy(packed), None)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    there = stain_matrix([swapped])
    assert angle(there[:2], stains.stains[1][:2]) < 4
    assert np.allclose(np.linalg.norm(there, axis=1), np.linalg.norm(stains.stains[1], axis=1), rtol=0.1)


def test_a_share_of_views_is_swapped_and_the_rest_are_as_they_were(tiny_tiles: Path) -> None:
    """Every other draw of a sample is the same with and without the key."""
    index = index_tiles(tiny_tiles)
    plain, swapping = (
        TileSamples(index, tiny_config(tiny_tiles, "unused", views={"stain_swap_p": share, "turns": "none"}), 8)
        for share in (0.0, 0.5)
    )
    changed = []
    for i in range(len(index)):
        one, other = plain[(0, i)], swapping[(0, i)]
        assert isinstance(one, TileSample)
        assert isinstance(other, TileSample)
        rest = [views._replace(colours=views.rects) for views in (one.views, other.views)]
        assert all(np.array_equal(a, b) for a, b in zip(*rest, strict=True))
        changed.append((one.views.colours != other.views.colours).any(1))
        assert np.array_equal(one.views.colours[:, 12:], other.views.colours[:, 12:])  # stain alone
    assert 0.35 < np.mean(changed) < 0.65
