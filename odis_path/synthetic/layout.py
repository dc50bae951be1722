"""Lay out the tissue of a synthetic slide: outline, patchwork of tissue types, and their polygons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    import shapely

TUMOUR, STROMA, LYMPHOID, GLANDS, NECROSIS = range(5)
TISSUE_TYPES = ("tumour", "stroma", "lymphoid infiltrate", "normal glands", "necrosis")
BACKGROUND = 255
GRID_PX = 4  # the plan is drawn on a grid of 4 x 4 level-0 pixels, then its borders are smoothed

REGION_SPACING_UM = 180.0
TISSUE_SHARE = 0.65


@dataclass(frozen=True)
class Layout:
    """The plan of one slide.

    coarse: uint8 (g, g), tissue type of each plan cell of GRID_PX pixels, BACKGROUND off tissue. fine: uint8 (side, side),
    the same at level 0 with smoothed borders.
    """

    coarse: np.ndarray
    fine: np.ndarray


def resize_float(field: np.ndarray, side: int, *, box: tuple[float, float, float, float] | None = None) -> np.ndarray:
    """Resize (h, w) float32 to (side, side) float32, bicubic. box: the part (x0, y0, x1, y1) that is resized; None: all."""
    image = Image.fromarray(np.ascontiguousarray(field, dtype=np.float32))
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box=box))


def smooth_noise(rng: np.random.Generator, side: int, wavelength_px: float) -> np.ndarray:
    """Draw a random field (side, side) float32, of about zero mean and unit spread, with nothing finer than `wavelength_px`."""
    span = side / wavelength_px
    knots = rng.standard_normal((int(np.ceil(span)) + 4,) * 2).astype(np.float32)
    return resize_float(knots, side, box=(1.5, 1.5, 1.5 + span, 1.5 + span)) / 0.72


def tissue_outline(rng: np.random.Generator, grid: int) -> np.ndarray:
    """Draw one piece of tissue with an irregular outline, bool (grid, grid), about `TISSUE_SHARE` of the slide."""
    from scipy import ndimage

    axis = np.abs(np.linspace(-1, 1, grid, dtype=np.float32))
    height = 1 - (axis[:, None] ** 2.8 + axis[None, :] ** 2.8) ** (1 / 2.8)
    for wavelength, strength in ((grid / 3.5, 0.055), (grid / 9, 0.035), (grid / 28, 0.012)):
        height = height + strength * smooth_noise(rng, grid, wavelength)
    rim = max(2, grid // 50)
    height[:rim], height[-rim:], height[:, :rim], height[:, -rim:] = -9, -9, -9, -9
    pieces, n = ndimage.label(height > np.quantile(height, 1 - TISSUE_SHARE))
    largest = 1 + int(np.argmax(np.bincount(pieces.ravel(), minlength=n + 1)[1:]))
    outline: np.ndarray = ndimage.binary_fill_holes(pieces == largest)
    return outline


def region_types(rng: np.random.Generator, tissue: np.ndarray, mpp: float) -> np.ndarray:
    """Draw the tissue types, uint8 (g, g): a Voronoi patchwork with wavy borders, every type of about the same area."""
    from scipy.spatial import cKDTree

    grid = len(tissue)
    cells_per_um = 1 / (mpp * GRID_PX)
    spacing = min(REGION_SPACING_UM * cells_per_um, grid / 3.5)
    ticks = np.arange(-0.5 * spacing, grid + spacing, spacing)
    seeds = np.stack(np.meshgrid(ticks, ticks), -1).reshape(-1, 2)
    seeds = seeds + rng.uniform(-0.42, 0.42, seeds.shape) * spacing
    rows, columns = np.nonzero(tissue)
    points: np.ndarray = np.stack([columns, rows], 1).astype(np.float32)
    for wavelength, amplitude in ((90 * cells_per_um, 14 * cells_per_um), (28 * cells_per_um, 4 * cells_per_um)):
        warp = np.stack([smooth_noise(rng, grid, wavelength) for _ in range(2)], -1)
        points = points + amplitude * warp[rows, columns]
    owner = cKDTree(seeds).query(points)[1]
    area = np.bincount(owner, minlength=len(seeds))
    type_of_seed = np.zeros(len(seeds), np.uint8)
    total = np.zeros(len(TISSUE_TYPES))
    for seed in sorted(np.nonzero(area)[0], key=lambda s: -area[s] * rng.uniform(0.5, 1.0)):
        type_of_seed[seed] = kind = int(np.argmin(total + rng.uniform(0, 1e-3, total.shape)))
        total[kind] += area[seed]
    types = np.full(tissue.shape, BACKGROUND, np.uint8)
    types[rows, columns] = type_of_seed[owner]
    return types


def plan_layout(rng: np.random.Generator, side_px: int, mpp: float) -> Layout:
    """Draw the outline and the patchwork of one slide of `side_px` level-0 pixels at `mpp` um per pixel."""
    coarse = region_types(rng, tissue_outline(rng, side_px // GRID_PX), mpp)
    kinds = [*range(len(TISSUE_TYPES)), BACKGROUND]
    best = np.full((side_px, side_px), -1, np.float32)
    fine = np.full((side_px, side_px), BACKGROUND, np.uint8)
    for kind in kinds:
        share = resize_float((coarse == kind).astype(np.float32), side_px)
        won = share > best
        fine[won], best[won] = kind, share[won]
    return Layout(coarse=coarse, fine=fine)


def region_polygons(coarse: np.ndarray) -> tuple[list[shapely.Polygon], list[int]]:
    """Return polygons (level-0 pixels, holes kept) of the connected regions of a plan, and the tissue type of each.

    Specks of fewer than 40 plan cells are left out.
    """
    import shapely
    from scipy import ndimage
    from skimage.measure import find_contours

    trace: Callable[[np.ndarray, float], list[np.ndarray]] = find_contours
    polygons, kinds = [], []
    for kind in range(len(TISSUE_TYPES)):
        pieces, n = ndimage.label(coarse == kind)
        for number, window in enumerate(ndimage.find_objects(pieces, n), start=1):
            piece = np.pad(pieces[window] == number, 1)
            if piece.sum() < 40:
                continue
            origin = np.array([window[1].start, window[0].start]) - 1
            rings = [(ring[:, ::-1] + origin + 0.5) * GRID_PX for ring in trace(piece.astype(float), 0.5)]
            shape = shapely.build_area(shapely.MultiLineString(rings))
            shape = shapely.make_valid(shapely.simplify(shape, GRID_PX * 0.35))
            parts = [part for part in shapely.get_parts(shape) if part.geom_type == "Polygon"]
            polygons.append(max(parts, key=lambda part: part.area))
            kinds.append(kind)
    return polygons, kinds
