"""Draw the nuclei of a synthetic slide into a haematoxylin map."""

from __future__ import annotations

import numpy as np

from odis_path.synthetic.cells import HARMONICS, LOOKS, Nuclei


def stamp_nuclei(nuclei: Nuclei, chromatin: np.ndarray, mpp: float) -> tuple[np.ndarray, np.ndarray]:
    """Draw all nuclei; return H (side, side) and the share of each pixel that a nucleus covers, both float32.

    chromatin: noise (side, side) float32 of unit spread. Nuclei are drawn a few hundred at a time in square
    windows of one size; where two touch the darker wins.
    """
    h, cover = np.zeros(chromatin.shape, np.float32), np.zeros(chromatin.shape, np.float32)
    half = (np.ceil(1.35 * nuclei.long / 4) * 4).astype(np.int64) + 2
    for size in np.unique(half):
        rows = np.nonzero(half == size)[0]
        for start in range(0, len(rows), 256):
            batch = nuclei.take(rows[start : start + 256])
            px, py = _windows(batch, int(size), len(h))
            ink, edge = _ink(batch, px, py, chromatin[py, px], mpp)
            flat = (py * len(h) + px).ravel()
            np.maximum.at(h.reshape(-1), flat, ink.ravel())
            np.maximum.at(cover.reshape(-1), flat, edge.ravel())
    return h, cover


def _windows(nuclei: Nuclei, half: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return columns and rows (n, w, w) int64 of the pixels around each nucleus, kept inside the slide."""
    ticks = np.arange(-half, half + 1)
    px = np.floor(nuclei.x).astype(np.int64)[:, None, None] + ticks[None, None, :]
    py = np.floor(nuclei.y).astype(np.int64)[:, None, None] + ticks[None, :, None]
    px, py = np.broadcast_arrays(px.clip(0, side - 1), py.clip(0, side - 1))
    return px, py


def _ink(n: Nuclei, px: np.ndarray, py: np.ndarray, chromatin: np.ndarray, mpp: float) -> tuple[np.ndarray, np.ndarray]:
    """Return H and coverage, (n, w, w) float32 each, of nuclei in their windows of pixels `px`, `py`."""

    def column(values: np.ndarray) -> np.ndarray:
        return values.astype(np.float32)[:, None, None]

    def look(name: str) -> np.ndarray:
        return column(np.array([getattr(LOOKS[kind], name) for kind in n.kind.tolist()]))

    dx, dy = (px + 0.5 - n.x[:, None, None]).astype(np.float32), (py + 0.5 - n.y[:, None, None]).astype(np.float32)
    c, s = column(np.cos(n.angle)), column(np.sin(n.angle))
    along, across = c * dx + s * dy, c * dy - s * dx
    u, v = along / column(n.long), across / column(n.short)
    turn, outline = np.arctan2(v, u), np.float32(1)
    for i, order in enumerate(HARMONICS.tolist()):
        outline = outline + column(n.wobble[:, i]) * np.cos(order * turn + column(n.phase[:, i]))
    rho = np.hypot(u, v) / outline
    edge = ((1 - rho) * column(n.short) + 0.5).clip(0, 1)
    body = look("density") + look("rim") * np.exp(-(((rho - 0.9) / 0.16) ** 2))
    spot = column(n.nucleolus) * np.exp(-(along**2 + across**2) * np.float32(mpp) ** 2)
    ink = edge * (body * (1 + look("grain") * chromatin) + 0.8 * spot).clip(0.1)
    return ink.astype(np.float32), edge.astype(np.float32)
