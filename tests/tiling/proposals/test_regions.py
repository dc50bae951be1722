"""Objects larger than nuclei: glands, vessels, nests."""

from __future__ import annotations

import numpy as np
import pytest

from tiling.proposals.nuclei import LABELS, propose_tile
from tiling.proposals.outlines import (
    FEATURES,
    MEAN,
    WEIGHTS,
    candidate_outlines,
    fill_holes,
    open_mask,
    products,
    split_at_necks,
)
from tiling.proposals.regions import find_regions
from tiling.proposals.stain import ProposalSettings, SlideLevels

MPP, SIDE = 0.5, 256
STROMA, NUCLEUS, GLASS, BLOOD = (225, 150, 190), (90, 60, 140), (245, 245, 245), (190, 40, 60)
Y, X = np.mgrid[:SIDE, :SIDE]


def disc(x: float, y: float, radius: float) -> np.ndarray:
    return (x - X) ** 2 + (y - Y) ** 2 <= radius**2


def tile(*paint: tuple[np.ndarray, tuple[int, int, int]]) -> np.ndarray:
    rgb = np.empty((SIDE, SIDE, 3))
    rgb[:] = STROMA
    for mask, colour in paint:
        rgb[mask] = colour
    return (rgb + np.random.default_rng(0).normal(0, 2, rgb.shape)).clip(0, 255).astype(np.uint8)


def ring(x: float, y: float, radius: float, share: float = 1.0, count: int = 20) -> np.ndarray:
    """Nuclei around a point, over a share of the circle."""
    angles = np.linspace(0, 2 * np.pi * share, count, endpoint=False)
    return np.any([disc(x + radius * np.cos(a), y + radius * np.sin(a), 6) for a in angles], axis=0)


def regions_of(rgb: np.ndarray, nuclei: np.ndarray, stain: str = "eosin") -> dict[str, np.ndarray]:
    levels = SlideLevels(stain)  # type: ignore[arg-type]
    regions = find_regions(rgb, nuclei.astype(np.int32), MPP, ProposalSettings(), levels)
    return {name: regions.xyxy[regions.label == i - 1] for i, name in enumerate(LABELS) if i}


def test_a_lumen_with_nuclei_around_is_a_gland_with_its_wall() -> None:
    nuclei = ring(120, 130, 48)
    regions = regions_of(tile((nuclei, NUCLEUS), (disc(120, 130, 36), GLASS)), nuclei)
    assert regions["gland"].tolist() == [pytest.approx([120 - 54, 130 - 54, 120 + 55, 130 + 55], abs=6)]
    assert len(regions["vessel"]) == 0


def test_a_lumen_without_nuclei_and_a_pool_of_blood_are_vessels() -> None:
    rgb = tile((disc(70, 70, 34), GLASS), (disc(180, 180, 36), BLOOD))
    regions = regions_of(rgb, ring(230, 30, 8, count=3))
    assert len(regions["gland"]) == 0
    boxes = sorted(regions["vessel"].tolist())
    assert boxes[0] == pytest.approx([70 - 40, 70 - 40, 70 + 41, 70 + 41], abs=6)
    assert boxes[1] == pytest.approx([180 - 42, 180 - 42, 180 + 43, 180 + 43], abs=6)


def test_crowded_nuclei_are_a_nest_or_a_cluster_and_a_lone_one_is_neither() -> None:
    nuclei = np.any([disc(60 + 18 * i, 70 + 18 * j, 7) for i in range(5) for j in range(4)], axis=0)
    lone = disc(220, 220, 7)
    regions = regions_of(tile((nuclei | lone, NUCLEUS)), nuclei | lone)
    boxes = np.concatenate([regions["cluster"], regions["nest"]])
    assert 1 <= len(boxes) <= 2
    for box in boxes:
        assert box.tolist() == pytest.approx([53, 63, 139, 131], abs=14)


@pytest.mark.parametrize("size", [(224, 224), (101, 257), (31, 40)])
def test_any_size_of_tile_gives_boxes_inside_it(size: tuple[int, int]) -> None:
    rgb = tile((ring(60, 60, 40), NUCLEUS), (disc(60, 60, 30), GLASS))
    rgb = np.tile(rgb, (1, 2, 1))[: size[0], : size[1]]
    for mpp in (0.25, 0.5, 1.0, 2.0):
        proposals = propose_tile(rgb, mpp)
        assert (proposals.xyxy[:, 2:] > proposals.xyxy[:, :2]).all()
        assert (proposals.xyxy >= 0).all()
        assert (proposals.xyxy <= [size[1], size[0]] * 2).all()
        assert len(proposals.label) == len(proposals.xyxy) == len(proposals.area_px)


def test_an_empty_tile_has_no_regions() -> None:
    for colour in (STROMA, GLASS, (3, 3, 3)):
        rgb = np.full((SIDE, SIDE, 3), colour, np.uint8)
        assert len(propose_tile(rgb, MPP).label) == 0


def test_necks_part_and_wide_waists_do_not() -> None:
    settings = ProposalSettings()
    dumbbell = disc(80, 80, 12) | disc(103, 80, 12)
    pieces, of = split_at_necks(dumbbell.astype(np.int32) * 7, MPP, settings)
    assert of.tolist() == [0, 7, 7]
    assert np.bincount(pieces.ravel())[1:].tolist() == pytest.approx([dumbbell.sum() / 2] * 2, rel=0.05)
    rod = (np.abs(Y - 80) < 8) & (np.abs(X - 80) < 30)
    assert len(split_at_necks(rod.astype(np.int32), MPP, settings)[1]) == 2


def test_an_ellipse_fits_an_ellipse_and_two_discs_do_not() -> None:
    settings = ProposalSettings(levels=1)
    oval = ((X - 70) / 20) ** 2 + ((Y - 60) / 10) ** 2 <= 1
    pair = disc(170, 170, 10) | disc(190, 170, 10)
    outlines = candidate_outlines((oval | pair).astype(np.float32), MPP, settings, float("-inf"))
    fit = outlines.features[:, FEATURES.index("fit")]
    boxes = outlines.box.tolist()
    assert fit[boxes.index([50, 50, 91, 71])] == pytest.approx(1, abs=0.02)
    assert fit[boxes.index([160, 160, 201, 181])] < 0.93
    assert len(outlines) == 4  # and the two halves of the pair


def test_masks_are_opened_and_filled_as_scipy_does() -> None:
    from scipy import ndimage

    mask = np.random.default_rng(0).random((60, 70)) < 0.6
    assert np.array_equal(open_mask(mask), ndimage.binary_opening(np.pad(mask, 2, mode="edge"))[2:-2, 2:-2])
    assert np.array_equal(fill_holes(mask), ndimage.binary_fill_holes(mask))


def test_products_are_one_row_of_the_upper_triangle_after_the_other() -> None:
    assert products(np.array([[2.0, 3.0]])).tolist() == [[1, 2, 3, 4, 6, 9]]
    assert WEIGHTS.shape == products(MEAN[None]).shape[1:]
    assert len(MEAN) == len(FEATURES)
