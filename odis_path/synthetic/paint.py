"""Paint the tissue of a synthetic slide as two concentration maps, haematoxylin and eosin."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from odis_path.synthetic.cells import Glands, Nuclei
from odis_path.synthetic.layout import GLANDS, GRID_PX, LYMPHOID, NECROSIS, STROMA, TUMOUR, smooth_noise
from odis_path.synthetic.stamp import stamp_nuclei

LUMEN = 0.36  # the hollow middle of a gland, as a share of its radius


@dataclass(frozen=True)
class Fibres:
    """Wavy fibres: texture (side, side) float32 of unit spread, flow (g, g) direction along them in radians."""

    texture: np.ndarray
    flow: np.ndarray


@dataclass(frozen=True)
class Concentrations:
    """(side, side) float32 each: haematoxylin, eosin, and how much evenly spread stain a place can take."""

    h: np.ndarray
    e: np.ndarray
    capacity: np.ndarray


def draw_fibres(rng: np.random.Generator, side: int, mpp: float) -> Fibres:
    """Draw fibres along a bent coordinate, from noise that is fine across them and long along them."""
    from scipy import ndimage

    turn = rng.uniform(0, np.pi)
    y, x = np.mgrid[0:side, 0:side].astype(np.float32)
    across = np.float32(np.cos(turn)) * x + np.float32(np.sin(turn)) * y
    along = np.float32(-np.sin(turn)) * x + np.float32(np.cos(turn)) * y
    across = across + np.float32(75 / mpp) * smooth_noise(rng, side, 420 / mpp)
    across = across + np.float32(3.6 / mpp) * smooth_noise(rng, side, 46 / mpp)
    white = rng.standard_normal((512, 512)).astype(np.float32)
    grain = sum(s * ndimage.gaussian_filter(white, s, mode="wrap") for s in (0.8, 2.2))
    places = np.stack([across * (mpp / 1.1), along * (mpp / 16)])
    texture = ndimage.map_coordinates(grain, places, order=1, mode="grid-wrap")
    dy, dx = np.gradient(across[::GRID_PX, ::GRID_PX])
    return Fibres(texture / texture.std(), np.arctan2(dy, dx) + np.pi / 2)


def speckle(rng: np.random.Generator, side: int, sigma_px: float) -> np.ndarray:
    """Draw noise (side, side) float32 of unit spread with grains of about `sigma_px`."""
    from scipy import ndimage

    noise: np.ndarray = ndimage.gaussian_filter(rng.standard_normal((side, side), dtype=np.float32), sigma_px, mode="wrap")
    noise = noise / noise.std()
    return noise


def _cell_walls(types: np.ndarray, kind: int, nuclei: Nuclei) -> tuple[np.ndarray, np.ndarray]:
    """Return flat indices of the pixels of `kind`, and their distance (px) to the wall between the two nearest cells."""
    from scipy.spatial import cKDTree

    rows, columns = np.nonzero(types[::2, ::2] == kind)
    gap = np.full(types[::2, ::2].shape, 99, np.float32)
    if len(nuclei) > 2 and len(rows):
        near = cKDTree(np.stack([nuclei.x, nuclei.y], 1)).query(np.stack([columns, rows], 1) * 2.0 + 1, k=2)[0]
        gap[rows, columns] = (near[:, 1] - near[:, 0]) / 2
    where = np.flatnonzero(types.ravel() == kind)
    y, x = np.divmod(where, types.shape[1])
    return where, gap[y // 2, x // 2]


def _gland_profile(types: np.ndarray, glands: Glands, wobble: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return flat indices of the gland regions' pixels, distance to the nearest gland's centre, and that gland's radius."""
    from scipy.spatial import cKDTree

    where = np.flatnonzero(types.ravel() == GLANDS)
    if not len(glands.xy) or not len(where):
        return where, np.full(len(where), 1e6, np.float32), np.ones(len(where), np.float32)
    y, x = np.divmod(where, types.shape[1])
    distance, owner = cKDTree(glands.xy).query(np.stack([x, y], 1) + 0.5)
    return where, (distance + wobble.ravel()[where]).astype(np.float32), glands.radius[owner].astype(np.float32)


@dataclass(frozen=True)
class Canvas:
    """Concentrations under the brush and the noise they are painted with; flat views of (side, side) maps."""

    h: np.ndarray
    e: np.ndarray
    capacity: np.ndarray
    fibre: np.ndarray
    grain: np.ndarray
    clump: np.ndarray


def paint_tissue(
    rng: np.random.Generator, types: np.ndarray, nuclei: Nuclei, glands: Glands, fibres: Fibres, mpp: float
) -> Concentrations:
    """Draw matrix, cytoplasm and nuclei of every tissue type. types: uint8 (side, side) at level 0."""
    side = len(types)
    grain, clump = speckle(rng, side, 0.45 / mpp), speckle(rng, side, 1.4 / mpp)
    nuclear_h, cover = stamp_nuclei(nuclei, speckle(rng, side, 0.6 / mpp), mpp)
    h, e, capacity = np.zeros((side, side), np.float32), np.zeros((side, side), np.float32), np.ones((side, side), np.float32)
    canvas = Canvas(*(a.ravel() for a in (h, e, capacity, fibres.texture, grain, clump)))
    _paint_tumour(canvas, types, nuclei, mpp)
    _paint_stroma(canvas, np.flatnonzero(types.ravel() == STROMA))
    _paint_lymphoid(canvas, np.flatnonzero(types.ravel() == LYMPHOID))
    _paint_glands(canvas, types, glands, smooth_noise(rng, side, 18 / mpp) * (1.3 / mpp))
    _paint_necrosis(canvas, np.flatnonzero(types.ravel() == NECROSIS), speckle(rng, side, 3.0 / mpp).ravel())
    capacity *= 1 - 0.6 * cover
    np.maximum(h, nuclear_h + 0.35 * h * (cover > 0), out=h)
    e *= 1 - 0.55 * cover
    return Concentrations(h, e, capacity)


def _paint_tumour(canvas: Canvas, types: np.ndarray, nuclei: Nuclei, mpp: float) -> None:
    where, wall = _cell_walls(types, TUMOUR, nuclei)
    clump = canvas.clump[where]
    canvas.h[where] = 0.16 + 0.03 * clump
    canvas.e[where] = 0.50 + 0.07 * clump + 0.05 * canvas.grain[where] - 0.32 * np.exp(-((wall * mpp / 0.9) ** 2))


def _paint_stroma(canvas: Canvas, where: np.ndarray) -> None:
    fibre = canvas.fibre[where]
    canvas.h[where] = 0.22 + 0.06 * fibre
    canvas.e[where] = 0.50 + 0.24 * fibre + 0.04 * canvas.grain[where]


def _paint_lymphoid(canvas: Canvas, where: np.ndarray) -> None:
    canvas.h[where] = 0.06 + 0.02 * canvas.clump[where]
    canvas.e[where] = 0.55 + 0.10 * canvas.clump[where]


def _paint_necrosis(canvas: Canvas, where: np.ndarray, smudges: np.ndarray) -> None:
    smudge, clump = smudges[where], canvas.clump[where]
    canvas.h[where] = (0.28 + 0.06 * smudge + 0.08 * clump).clip(0)
    canvas.e[where] = (0.60 + 0.12 * smudge + 0.18 * clump + 0.12 * canvas.grain[where]).clip(0.05)


def _paint_glands(canvas: Canvas, types: np.ndarray, glands: Glands, wobble: np.ndarray) -> None:
    where, distance, radius = _gland_profile(types, glands, wobble)
    fibre, grain, clump = canvas.fibre[where], canvas.grain[where], canvas.clump[where]
    rho = distance / radius
    lining, lumen = rho < 1, rho < LUMEN
    h = np.where(lining, 0.12 + 0.02 * clump, 0.20 + 0.04 * fibre)
    e = np.where(lining, 0.50 + 0.05 * grain - 0.25 * (rho < 0.62), 0.50 + 0.18 * fibre)
    e += 0.3 * np.exp(-(((rho - LUMEN) / 0.05) ** 2))
    canvas.h[where] = np.where(lumen, 0.03, h)
    canvas.e[where] = np.where(lumen, 0.05 + 0.05 * np.maximum(clump, 0), e)
    canvas.capacity[where] = np.where(lumen, 0.12, 1.0)
