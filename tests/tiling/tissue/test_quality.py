"""Ink and blur: what they are told by, and what must not be taken for them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from tiling.tissue.mask import tissue_mask
from tiling.tissue.quality import blur_score, pen_mask

INKS = {
    "green": (20, 120, 60),
    "light green": (90, 190, 130),
    "blue": (35, 60, 190),
    "dark blue": (20, 30, 110),
    "black": (35, 33, 38),
}
H_AND_E, IHC = ((205, 130, 180), (120, 75, 150)), ((190, 200, 215), (120, 80, 55))


def section(colours: tuple, glass: tuple = (244, 243, 245), size: int = 600) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (size, size, 3) with a disc of speckled tissue on noisy glass, and the disc, bool (size, size)."""
    rng = np.random.default_rng(1)
    y, x = np.mgrid[:size, :size] - size / 2
    disc = np.hypot(x, y) < 0.33 * size
    dots = np.asarray(
        Image.fromarray(rng.normal(128, 90, (size, size)).clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(1.5))
    )
    picture = np.where(disc[..., None], np.where((dots > 132)[..., None], colours[1], colours[0]), glass)
    return (picture + rng.normal(0, 2, picture.shape)).clip(0, 255).astype(np.uint8), disc


def drawn(picture: np.ndarray, ink: tuple, width: int = 18) -> tuple[np.ndarray, np.ndarray]:
    """The picture with a ring and a line of ink, and where they are."""
    strokes = Image.new("L", picture.shape[1::-1])
    draw = ImageDraw.Draw(strokes)
    draw.ellipse((30, 60, 560, 560), outline=255, width=width)
    draw.line((80, 20, 500, 40), fill=255, width=width)
    ink_there = np.asarray(strokes.filter(ImageFilter.GaussianBlur(1)))[..., None] / 255
    noise = np.random.default_rng(2).normal(0, 4, picture.shape)
    return (picture * (1 - ink_there) + (np.array(ink) + noise) * ink_there).clip(0, 255).astype(np.uint8), ink_there[
        ..., 0
    ] > 0.5


@pytest.mark.parametrize("ink", INKS)
@pytest.mark.parametrize("glass", [(244, 243, 245), (200, 199, 202)])
def test_ink_is_found_and_is_no_tissue(ink: str, glass: tuple) -> None:
    clean, disc = section(H_AND_E, glass)
    picture, strokes = drawn(clean, INKS[ink])
    pen = pen_mask(picture, 10.0)
    assert (pen & strokes).sum() > 0.9 * strokes.sum()
    assert (pen & strokes).sum() > 0.85 * pen.sum()
    tissue, truth = tissue_mask(picture, 10.0), disc & ~strokes
    assert (tissue & truth).sum() / (tissue | truth).sum() > 0.9
    assert (tissue & strokes).sum() < 0.1 * strokes.sum()


@pytest.mark.parametrize("um_per_px", [None, 4.0, 10.0])
@pytest.mark.parametrize("colours", [H_AND_E, IHC, ((150, 160, 200), (95, 100, 160)), ((235, 120, 150), (60, 30, 90))])
def test_stains_are_not_ink(colours: tuple, um_per_px: float | None) -> None:
    picture, _ = section(colours)
    assert pen_mask(picture, um_per_px).mean() < 1e-4


def test_what_is_narrower_than_a_stroke_is_not_ink() -> None:
    picture, _ = section(H_AND_E)
    y, x = np.mgrid[:600, :600]
    picture[(y % 20 < 2) & (x % 20 < 2)] = (20, 20, 22)
    assert not pen_mask(picture, 10.0).any()


def textured(side: int = 256, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    noise = Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8))
    return np.asarray(noise.filter(ImageFilter.GaussianBlur(1.0)))


def reference_blur(tile: np.ndarray, width: int = 9) -> float:
    """The same measure over every row and column, by convolution, in float64."""
    scores = []
    for planes in (tile.transpose(2, 0, 1), tile.transpose(2, 1, 0)):
        lines = planes.reshape(-1, planes.shape[2]).astype(float)
        mean = np.stack([np.convolve(line, np.ones(width) / width, mode="valid") for line in lines])
        change = np.abs(np.diff(lines, axis=1))[:, width // 2 : -(width // 2)]
        again = np.abs(np.diff(mean, axis=1))
        scores.append(1 - np.maximum(change - again, 0).sum() / change.sum())
    return max(scores)


def test_blur_is_the_measure_of_the_paper_and_grows_with_the_blur() -> None:
    scores = []
    for radius in (0, 1, 2, 4):
        tile = np.asarray(Image.fromarray(textured()).filter(ImageFilter.GaussianBlur(radius)))
        scores.append(blur_score(tile))
        # A few rows and columns stand for all of them.
        assert scores[-1] == pytest.approx(reference_blur(tile), abs=0.03)
    assert scores == sorted(scores)
    assert scores[-1] > scores[0] + 0.3


def test_blur_in_one_direction_counts() -> None:
    sharp = textured()
    smeared = np.stack([sharp[:, max(0, x - 6) : x + 7].mean(axis=1) for x in range(256)], axis=1).astype(np.uint8)
    assert blur_score(smeared) > blur_score(sharp) + 0.2
    assert blur_score(smeared.transpose(1, 0, 2)) == pytest.approx(blur_score(smeared), abs=0.03)


def test_plain_and_tiny_tiles_have_no_blur_to_tell() -> None:
    rng = np.random.default_rng(0)
    assert np.isnan(blur_score(rng.normal(240, 1, (224, 224, 3)).astype(np.uint8)))
    assert np.isnan(blur_score(textured(8)))
