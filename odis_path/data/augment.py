"""Colour and sharpness changes of a view: parameters drawn per view on the CPU, applied in batch on any device.

All linear colour changes of a view collapse into one 3 x 3 matrix, all stain changes into one 3 x 3 matrix in optical
density, so that a batch costs two small matrix products whatever is switched on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import pi
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Ruifrok & Johnston 2001: optical density of haematoxylin, eosin, DAB in R, G, B (rows), unit length.
_HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
_HED = _HED / np.linalg.norm(_HED, axis=1, keepdims=True)
_HED_INVERSE = np.linalg.inv(_HED)
_LUMA = [0.299, 0.587, 0.114]
_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_YIQ_INVERSE = np.linalg.inv(_YIQ)
_GREY = np.tile(np.array(_LUMA), (3, 1))
_SAME = np.eye(3)
# A turn of the hue by an angle is the first of these plus its cosine times the second plus its sine times the third.
_HUE = [
    _YIQ_INVERSE @ np.array(part) @ _YIQ
    for part in ([[1, 0, 0], [0, 0, 0], [0, 0, 0]], [[0, 0, 0], [0, 1, 0], [0, 0, 1]], [[0, 0, 0], [0, 0, -1], [0, 1, 0]])
]
_OD_FLOOR = 1.0 / 255.0
SIGMA = 22  # column of the blur in a packed row
HUE = 24  # column of the turn of the hue, where any is turned in HSV
HueSpace = Literal["hsv", "yiq"]


@dataclass(frozen=True)
class ColourRule:
    """Strengths and probabilities of the changes of one kind of view (first global, second global, local)."""

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    jitter_p: float = 0.8
    gray_p: float = 0.2
    blur_p: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarise_p: float = 0.0
    stain_scale: float = 0.0  # each stain's amount times U(1 - s, 1 + s)
    stain_shift: float = 0.0  # each stain's amount plus U(-s, s), in optical density
    stain_p: float = 0.0
    hue_space: HueSpace = "yiq"  # hsv: hue as torchvision turns it; yiq: around the grey axis, one matrix with the others


@dataclass(frozen=True)
class Colours:
    """Drawn changes of n views.

    density: (n, 3, 4) matrix and shift; linear: (n, 3, 3); contrast, sigma (px), solarise (0 or 1): (n,); hue: (n,) turns in
    HSV, or None where no view turns its hue there.
    """

    density: Tensor
    linear: Tensor
    contrast: Tensor
    sigma: Tensor
    solarise: Tensor
    hue: Tensor | None


def draw_colours(rng: np.random.Generator, rules: tuple[ColourRule, ...]) -> np.ndarray:
    """Draw the changes of one view a rule, packed: float32 (n, 24) = density 12, linear 9, contrast, sigma, solarise.

    (n, 25) where a rule turns the hue in HSV: the turn is the last column. How much is drawn depends on n only.
    """
    r, n = _columns(rules), len(rules)
    happens = rng.random((5, n)) < r.chances
    stain, jitter, gray, blurred, solarised = happens
    spread = rng.uniform(-1.0, 1.0, (10, n)) * np.where(happens[[0, 0, 0, 0, 0, 0, 1, 1, 1, 1]], r.reach, 0.0)
    gain, shift, (brightness, contrast, saturation, hue) = 1 + spread[:3], spread[3:6], spread[6:]
    sigma = np.where(blurred, rng.uniform(*r.sigma), 0.0)
    packed = np.empty((n, HUE + 1 if r.hsv.any() else HUE), dtype=np.float32)
    density = packed[:, :12].reshape(n, 3, 4)
    # Rows of pixels times this, transposed for columns.
    mixed = ((_HED_INVERSE[None] * gain.T[:, None, :]) @ _HED).transpose(0, 2, 1)
    density[:, :, :3] = np.where(stain[:, None, None], mixed, _SAME)
    density[:, :, 3] = shift.T @ _HED
    angle = 2 * pi * np.where(r.hsv, 0.0, hue)[:, None, None]
    turned = _HUE[0] + np.cos(angle) * _HUE[1] + np.sin(angle) * _HUE[2]
    saturation = (1 + saturation)[:, None, None]
    linear = (saturation * _SAME + (1 - saturation) * _GREY) @ turned * (1 + brightness)[:, None, None]
    linear = np.where(jitter[:, None, None], linear, _SAME)
    packed[:, 12:21] = np.where(gray[:, None, None], _GREY @ linear, linear).reshape(n, 9)
    packed[:, 21], packed[:, SIGMA], packed[:, 23] = 1 + contrast, sigma, solarised
    if r.hsv.any():
        packed[:, HUE] = np.where(r.hsv, hue, 0.0)  # 0 too without jitter: nothing is reached then
    return packed


def in_other_stains(packed: np.ndarray, stains: np.ndarray) -> None:
    """Put a change of stain before the changes of `draw_colours`, in place: stains float (n, 3, 3), see `slide_stains`."""
    density = packed[:, :12].reshape(-1, 3, 4)
    density[:, :, :3] = density[:, :, :3] @ stains


class _Columns(NamedTuple):
    """Rules side by side: chances (5, n), reach of draws around 0 (10, n), lowest and highest sigma (2, n), hsv (n,)."""

    chances: np.ndarray
    reach: np.ndarray
    sigma: np.ndarray
    hsv: np.ndarray


@lru_cache(maxsize=64)
def _columns(rules: tuple[ColourRule, ...]) -> _Columns:
    chances = [(r.stain_p, r.jitter_p, r.gray_p, r.blur_p, r.solarise_p) for r in rules]
    reach = [(*(r.stain_scale,) * 3, *(r.stain_shift,) * 3, r.brightness, r.contrast, r.saturation, r.hue) for r in rules]
    hsv = [r.hue_space == "hsv" and r.hue > 0 for r in rules]
    return _Columns(*(np.array(rows).T for rows in (chances, reach, [r.blur_sigma for r in rules], hsv)))


def unpack_colours(packed: Tensor) -> Colours:
    """Split (n, 24) or (n, 25) rows of `draw_colours`."""
    n = len(packed)
    return Colours(
        packed[:, :12].reshape(n, 3, 4),
        packed[:, 12:21].reshape(n, 3, 3),
        packed[:, 21],
        packed[:, SIGMA],
        packed[:, 23],
        packed[:, HUE] if packed.shape[1] > HUE else None,
    )


def apply_colours(images: Tensor, packed: Tensor, blurred: Tensor | None) -> Tensor:
    """Change a batch of views: images float (n, 3, h, w) in [0, 1], packed float32 (n, 24 or 25) -> the same shape, in [0, 1].

    blurred: int64 (m,), the rows with a sigma above 0, found on the CPU so that a GPU need not be waited for; None blurs
    every row, by no sigma where that is 0: the form to be compiled, whose shapes never change.
    """
    c = unpack_colours(packed.to(images.dtype))
    n, _, h, w = images.shape
    flat = images.reshape(n, 3, h * w)
    density = -torch.log(flat.clamp(_OD_FLOOR, 1.0))
    density = _mix(c.density[:, :, :3], density) + c.density[:, :, 3:]
    flat = torch.exp(-density).clamp(0.0, 1.0)
    flat = _mix(c.linear, flat if c.hue is None else turn_hue(flat, c.hue))
    luma = torch.tensor(_LUMA, device=flat.device, dtype=flat.dtype)[:, None]
    mean = (flat * luma).sum(1).mean(1)[:, None, None]
    gain = c.contrast[:, None, None]
    flat = (flat * gain + mean * (1 - gain)).clamp(0.0, 1.0)
    images = flat.reshape(n, 3, h, w)
    if blurred is None:
        images = blur(images, c.sigma)
    elif len(blurred):
        images[blurred] = blur(images[blurred], c.sigma[blurred])
    solarised = torch.where(images >= 0.5, 1 - images, images)
    return torch.where(c.solarise[:, None, None, None] > 0, solarised, images)


def turn_hue(channels: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue in HSV, value and saturation as they are: (n, 3, p) in [0, 1], (n,) turns -> (n, 3, p).

    The hue is a place on a circle of six from red over green and blue; a channel falls from the greatest to the least value
    between one and two sixths from its own place.
    """
    red, green, blue = channels.unbind(1)
    high, low = channels.amax(1), channels.amin(1)
    chroma = high - low
    scale = chroma.clamp_min(1e-6).reciprocal_()  # 0 differences stay 0
    hue = torch.where(high == green, (blue - red).mul_(scale).add_(2), (red - green).mul_(scale).add_(4))
    hue = torch.where(high == red, (green - blue).mul_(scale), hue).add_(6 * turns[:, None]).remainder_(6)
    parts = ((hue - 3).abs_().sub_(1), 2 - (hue - 2).abs_(), 2 - (hue - 4).abs_())
    return torch.stack([part.clamp_(0, 1).mul_(chroma).add_(low) for part in parts], dim=1)


def _mix(matrix: Tensor, channels: Tensor) -> Tensor:
    """Multiply (n, 3, 3) by (n, 3, p) -> (n, 3, p); spelled out for the compiler, which then needs no pass over memory."""
    if torch.compiler.is_compiling():
        return (matrix[..., None] * channels[:, None]).sum(2)
    return torch.bmm(matrix, channels)


def blur(images: Tensor, sigma: Tensor, radius: int = 4) -> Tensor:
    """Blur by a Gaussian with one sigma (px) an image, 0 leaves it as it is: (n, 3, h, w), (n,) -> (n, 3, h, w)."""
    n, channels, h, w = images.shape
    steps = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (steps[None] / sigma.clamp_min(1e-3)[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    if torch.compiler.is_compiling():
        wide = F.pad(images, (radius, radius, 0, 0), mode="reflect")
        terms = [kernel[:, k, None, None, None] * wide[..., k : k + w] for k in range(2 * radius + 1)]
        high = F.pad(sum(terms[1:], start=terms[0]), (0, 0, radius, radius), mode="reflect")
        terms = [kernel[:, k, None, None, None] * high[..., k : k + h, :] for k in range(2 * radius + 1)]
        return sum(terms[1:], start=terms[0])
    kernel = kernel.repeat_interleave(channels, 0)
    flat = images.reshape(1, n * channels, h, w)
    flat = F.conv2d(F.pad(flat, (radius, radius, 0, 0), mode="reflect"), kernel[:, None, None, :], groups=n * channels)
    flat = F.conv2d(F.pad(flat, (0, 0, radius, radius), mode="reflect"), kernel[:, None, :, None], groups=n * channels)
    return flat.reshape(n, channels, h, w)
