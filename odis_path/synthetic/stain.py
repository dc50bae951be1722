"""Colour of a synthetic slide: haematoxylin and eosin concentrations to RGB by Beer-Lambert.

Tissue types differ in shape and texture: `balance` makes the mean colour of every type the same on a slide, so that
an encoder that only sees colour learns next to nothing about tissue.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from odis_path.synthetic.paint import Concentrations
from odis_path.synthetic.layout import BACKGROUND, TISSUE_TYPES, smooth_noise

MEAN_H, MEAN_E = 0.44, 0.52  # the mean concentrations every tissue type is brought to


@dataclass(frozen=True)
class Stain:
    """The look of one slide.

    h, e: optical density per unit of dye (3,); glass: colour of empty glass (3,); blur_um: sigma of the scanner's focus;
    noise: standard deviation of the camera in grey levels.
    """

    h: np.ndarray
    e: np.ndarray
    glass: np.ndarray
    blur_um: float
    noise: float


def draw_stain(rng: np.random.Generator) -> Stain:
    """Draw a stain as different laboratories make it: hue and strength of both dyes, lamp, focus and noise all vary."""
    h = np.array([0.60, 0.70, 0.36]) + rng.normal(0, [0.07, 0.05, 0.07])
    e = np.array([0.14, 0.88, 0.38]) + rng.normal(0, [0.06, 0.06, 0.09])
    h, e = h.clip(0.05), e.clip(0.02)
    strength = np.exp(rng.uniform(np.log(0.65), np.log(1.45), 2))
    glass = rng.uniform(234, 250) + rng.normal(0, 2.0, 3)
    return Stain(
        strength[0] * h / np.linalg.norm(h),
        strength[1] * e / np.linalg.norm(e),
        glass.clip(225, 253),
        blur_um=rng.uniform(0.25, 0.95),  # focus and noise differ by scanner, so that fine grain alone says little
        noise=float(np.exp(rng.uniform(np.log(1.0), np.log(6.0)))),
    )


def light(h: np.ndarray, e: np.ndarray, stain: Stain) -> np.ndarray:
    """Return the share (n, 3) of the light that passes concentrations (n,) of H and E."""
    share: np.ndarray = np.exp(-(h[:, None] * stain.h.astype(np.float32) + e[:, None] * stain.e.astype(np.float32)))
    return share


def balance(paint: Concentrations, types: np.ndarray, stain: Stain) -> None:
    """Bring every tissue type to the same mean colour, in place, by stain spread evenly where there is capacity.

    types: uint8 (side, side).
    """
    h, e, capacity = paint.h.ravel(), paint.e.ravel(), paint.capacity.ravel()
    target = light(np.array([MEAN_H], np.float32), np.array([MEAN_E], np.float32), stain)[0, :2]
    for kind in range(len(TISSUE_TYPES)):
        where = np.flatnonzero(types.ravel() == kind)
        if not len(where):
            continue
        sample = where[:: max(1, len(where) // 20000)]
        pixels = h[sample], e[sample], capacity[sample]
        dose = np.zeros(2)

        for _ in range(6):  # Newton on red and green; two dyes can match two channels
            now, step = _mean_light(*pixels, dose, stain), 0.02
            slope = np.stack([(_mean_light(*pixels, dose + step * unit, stain) - now) / step for unit in np.eye(2)], 1)
            dose = dose + np.linalg.lstsq(slope, target - now, rcond=None)[0].clip(-0.3, 0.3)
        h[where] += np.float32(dose[0]) * capacity[where]
        e[where] += np.float32(dose[1]) * capacity[where]


def _mean_light(h: np.ndarray, e: np.ndarray, capacity: np.ndarray, dose: np.ndarray, stain: Stain) -> np.ndarray:
    """Return the mean share of red and green light (2,) that passes after a dose (2,) of H and E is added."""
    passing = light((h + dose[0] * capacity).clip(0), (e + dose[1] * capacity).clip(0), stain)
    mean: np.ndarray = passing[:, :2].mean(0)
    return mean


def develop(rng: np.random.Generator, h: np.ndarray, e: np.ndarray, types: np.ndarray, stain: Stain, mpp: float) -> np.ndarray:
    """Render concentrations (side, side) as uint8 (side, side, 3): uneven thickness, the slide's blur and camera noise."""
    from scipy import ndimage

    side = len(h)
    thickness = [1 + 0.09 * smooth_noise(rng, side, length / mpp) for length in (160, 160)]
    tissue = ndimage.gaussian_filter((types != BACKGROUND).astype(np.float32), 1.2)
    dust = 0.004 * smooth_noise(rng, side, 200 / mpp)
    h = ndimage.gaussian_filter(h.clip(0) * thickness[0], stain.blur_um / mpp) * tissue
    e = ndimage.gaussian_filter(e.clip(0) * thickness[1], stain.blur_um / mpp) * tissue
    out = np.empty((side, side, 3), np.uint8)
    for channel in range(3):
        density = h * np.float32(stain.h[channel]) + e * np.float32(stain.e[channel]) + dust
        noise = rng.standard_normal((side, side), dtype=np.float32) * np.float32(stain.noise)
        out[..., channel] = (np.exp(-density) * np.float32(stain.glass[channel]) + noise).clip(0, 255)
    return out
