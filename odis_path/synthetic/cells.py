"""Nuclei of a synthetic slide: positions, shapes, and outlines as polygons."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from odis_path.synthetic.layout import GLANDS, GRID_PX, LYMPHOID, NECROSIS, STROMA, TUMOUR, Layout

TUMOUR_CELL, LYMPHOCYTE, FIBROBLAST, EPITHELIAL_CELL, DEBRIS = range(5)
CELL_TYPES = ("tumour cell", "lymphocyte", "fibroblast", "epithelial cell")  # debris is drawn, never annotated
OUTLINE_VERTICES = 12
HARMONICS = np.array([2, 3, 5])


@dataclass(frozen=True)
class Look:
    """Size and stain of one kind of nucleus: half axes in um with their relative spread, and chromatin."""

    long_um: float
    short_um: float
    spread: float
    wobble: float  # irregularity of the outline, relative to the radius
    density: float  # haematoxylin in the middle
    rim: float  # extra haematoxylin along the membrane
    grain: float  # chromatin texture
    nucleolus: float  # share of nuclei with one


LOOKS = {
    TUMOUR_CELL: Look(6.0, 4.7, 0.20, 0.075, 0.50, 0.55, 0.22, 0.75),
    LYMPHOCYTE: Look(3.05, 2.8, 0.08, 0.03, 1.05, 0.20, 0.30, 0.0),
    FIBROBLAST: Look(8.2, 1.75, 0.18, 0.06, 0.95, 0.15, 0.12, 0.0),
    EPITHELIAL_CELL: Look(4.6, 2.6, 0.10, 0.03, 0.80, 0.25, 0.14, 0.10),
    DEBRIS: Look(1.5, 1.0, 0.45, 0.20, 1.10, 0.0, 0.15, 0.0),
}


@dataclass(frozen=True)
class Nuclei:
    """n nuclei; lengths in level-0 pixels, angles in radians.

    wobble and phase are (n, len(HARMONICS)): the outline at angle t is the ellipse times
    1 + sum(wobble * cos(HARMONICS * t + phase)). nucleolus: bool (n,).
    """

    x: np.ndarray
    y: np.ndarray
    long: np.ndarray
    short: np.ndarray
    angle: np.ndarray
    wobble: np.ndarray
    phase: np.ndarray
    kind: np.ndarray
    nucleolus: np.ndarray

    def __len__(self) -> int:
        return len(self.x)

    def take(self, rows: np.ndarray) -> Nuclei:
        return Nuclei(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def outlines(self) -> np.ndarray:
        """Return level-0 (x, y) of the outline of every nucleus, float64 (n, OUTLINE_VERTICES, 2)."""
        t = np.arange(OUTLINE_VERTICES) * (2 * np.pi / OUTLINE_VERTICES)
        waves = np.cos(HARMONICS[:, None] * t + self.phase[:, :, None])
        radius = 1 + (self.wobble[:, :, None] * waves).sum(1)
        u, v = self.long[:, None] * radius * np.cos(t), self.short[:, None] * radius * np.sin(t)
        c, s = np.cos(self.angle)[:, None], np.sin(self.angle)[:, None]
        return np.stack([self.x[:, None] + c * u - s * v, self.y[:, None] + s * u + c * v], -1)


@dataclass(frozen=True)
class Glands:
    """Gland centres (n, 2) as (x, y) and outer radii (n,), level-0 pixels."""

    xy: np.ndarray
    radius: np.ndarray


def scatter(rng: np.random.Generator, side_px: int, spacing_px: float, jitter: float = 0.28) -> np.ndarray:
    """Return the points (n, 2) of a hexagonal grid, every one moved by up to `jitter` spacings."""
    rows = np.arange(0, side_px, spacing_px * 0.866)
    columns = np.arange(0, side_px, spacing_px)
    x = columns[None, :] + np.where(np.arange(len(rows)) % 2, spacing_px / 2, 0)[:, None]
    points = np.stack([x, np.broadcast_to(rows[:, None], x.shape)], -1).reshape(-1, 2)
    return points + rng.uniform(-jitter, jitter, points.shape) * spacing_px


def inside(points: np.ndarray, type_map: np.ndarray, kind: int) -> np.ndarray:
    """Tell which points (n, 2) lie on tissue of type `kind`, bool (n,)."""
    side = len(type_map)
    column, row = np.floor(points).astype(np.int64).T
    lies: np.ndarray = (column >= 0) & (row >= 0) & (column < side) & (row < side)
    lies[lies] = type_map[row[lies], column[lies]] == kind
    return lies


def place_glands(rng: np.random.Generator, layout: Layout, mpp: float) -> Glands:
    """Place glands well inside the gland regions, on a jittered grid, none cut by the region's border."""
    from scipy import ndimage

    clearance = ndimage.distance_transform_edt(layout.coarse == GLANDS) * GRID_PX
    points = scatter(rng, len(layout.fine), 54 / mpp, jitter=0.10)
    points = points[inside(points, layout.fine, GLANDS)]
    grid = (points // GRID_PX).astype(np.int64)
    radius = np.minimum(rng.uniform(20, 25, len(points)) / mpp, clearance[grid[:, 1], grid[:, 0]])
    keep = radius > 14 / mpp
    return Glands(points[keep], radius[keep])


def gland_ring(rng: np.random.Generator, glands: Glands, mpp: float) -> tuple[np.ndarray, np.ndarray]:
    """Place the nuclei of the glands' lining: points (n, 2) near the base of the epithelium and radial angles (n,)."""
    points, angles = [np.zeros((0, 2))], [np.zeros(0)]
    for centre, radius in zip(glands.xy, glands.radius, strict=True):
        reach = radius - 6.0 / mpp
        n = max(6, round(2 * np.pi * reach / (6.2 / mpp)))
        t = (np.arange(n) + rng.uniform(-0.15, 0.15, n)) * (2 * np.pi / n) + rng.uniform(0, 2 * np.pi)
        r = reach + rng.uniform(-1.0, 1.0, n) / mpp
        points.append(centre + np.stack([np.cos(t), np.sin(t)], 1) * r[:, None])
        angles.append(t)
    return np.concatenate(points), np.concatenate(angles)


def grow(rng: np.random.Generator, points: np.ndarray, angle: np.ndarray, kind: int, mpp: float) -> Nuclei:
    """Draw size and outline of nuclei of one kind at `points` (n, 2)."""
    look, n = LOOKS[kind], len(points)
    size = np.exp(look.spread * rng.standard_normal(n)) / mpp
    aspect = np.exp(0.5 * look.spread * rng.standard_normal(n))
    return Nuclei(
        x=points[:, 0],
        y=points[:, 1],
        long=look.long_um * size * aspect,
        short=look.short_um * size / aspect,
        angle=angle,
        wobble=look.wobble * rng.standard_normal((n, len(HARMONICS))).clip(-2, 2) / np.sqrt(HARMONICS - 1),
        phase=rng.uniform(0, 2 * np.pi, (n, len(HARMONICS))),
        kind=np.full(n, kind, np.int8),
        nucleolus=rng.uniform(size=n) < look.nucleolus,
    )


def _join(parts: list[Nuclei]) -> Nuclei:
    return Nuclei(**{field.name: np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Nuclei)})


def _without_overlap(rng: np.random.Generator, nuclei: Nuclei) -> Nuclei:
    """Drop one of every two nuclei that would lie on each other."""
    from scipy.spatial import cKDTree

    reach = 2 * float(nuclei.short.max(initial=0))
    xy = np.stack([nuclei.x, nuclei.y])
    pairs = cKDTree(xy.T).query_pairs(reach, output_type="ndarray")
    gap = np.hypot(*(xy[:, pairs[:, 0]] - xy[:, pairs[:, 1]]))
    close = pairs[gap < 0.92 * (nuclei.short[pairs[:, 0]] + nuclei.short[pairs[:, 1]])]
    rank = rng.permutation(len(nuclei))
    loser = np.where(rank[close[:, 0]] < rank[close[:, 1]], close[:, 0], close[:, 1])
    keep = np.ones(len(nuclei), bool)
    keep[loser] = False
    return nuclei.take(np.nonzero(keep)[0])


def place_nuclei(rng: np.random.Generator, layout: Layout, glands: Glands, flow: np.ndarray, mpp: float) -> Nuclei:
    """Place all nuclei of a slide. flow: float (g, g), the direction of the fibres on the plan's grid."""
    side = len(layout.fine)
    parts: list[Nuclei] = []

    def add(tissue: int, kind: int, spacing_um: float, keep: float, along: bool = False, jitter: float = 0.28) -> None:
        points = scatter(rng, side, spacing_um / mpp, jitter)
        points = points[inside(points, layout.fine, tissue) & (rng.uniform(size=len(points)) < keep)]
        angle = rng.uniform(0, np.pi, len(points))
        if along:
            grid = (points // GRID_PX).astype(np.int64)
            angle = flow[grid[:, 1], grid[:, 0]] + 0.15 * rng.standard_normal(len(points))
        if tissue == GLANDS and len(glands.xy):
            gap = np.linalg.norm(points[:, None] - glands.xy[None], axis=2) - glands.radius
            points, angle = points[gap.min(1) > 0], angle[gap.min(1) > 0]
        parts.append(grow(rng, points, angle, kind, mpp))

    add(TUMOUR, TUMOUR_CELL, 13.2, keep=0.97)
    add(TUMOUR, LYMPHOCYTE, 45, keep=0.4)
    add(STROMA, FIBROBLAST, 16.5, keep=0.9, along=True)
    add(STROMA, LYMPHOCYTE, 40, keep=0.4)
    add(LYMPHOID, LYMPHOCYTE, 7.2, keep=0.95, jitter=0.2)
    add(GLANDS, FIBROBLAST, 15, keep=0.7, along=True)
    add(GLANDS, LYMPHOCYTE, 14, keep=0.35)
    add(NECROSIS, DEBRIS, 7.5, keep=0.55)
    add(NECROSIS, LYMPHOCYTE, 40, keep=0.3)
    ring, radial = gland_ring(rng, glands, mpp)
    parts.append(grow(rng, ring, radial, EPITHELIAL_CELL, mpp))
    nuclei = _without_overlap(rng, _join(parts))
    outline = nuclei.outlines()
    return nuclei.take(np.nonzero(((outline >= 0) & (outline <= side)).all((1, 2)))[0])
