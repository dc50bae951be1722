"""Colour and sharpness changes of a view: parameters drawn per view on the CPU, applied in batch on any device.

All linear colour changes of a view collapse into one 3 x 3 matrix, all stain changes into one 3 x 3 matrix in optical
density, so that a batch costs two small matrix products whatever is switched on.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi, sin

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
_SAME, _SAME_DENSITY = np.eye(3), np.eye(3, 4)
_OD_FLOOR = 1.0 / 255.0
SIGMA = 22  # column of the blur in a packed row


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


@dataclass(frozen=True)
class Colours:
    """Drawn changes of n views.

    density: (n, 3, 4) matrix and shift; linear: (n, 3, 3); contrast, sigma (px), solarise (0 or 1): (n,).
    """

    density: Tensor
    linear: Tensor
    contrast: Tensor
    sigma: Tensor
    solarise: Tensor


def draw_colour(rng: np.random.Generator, rule: ColourRule) -> np.ndarray:
    """The changes of one view, packed: float32 (24,) = density 12, linear 9, contrast, sigma, solarise."""
    density = _SAME_DENSITY
    if rule.stain_p and rng.random() < rule.stain_p:
        density = density.copy()
        gain = rng.uniform(1 - rule.stain_scale, 1 + rule.stain_scale, 3)
        shift = rng.uniform(-rule.stain_shift, rule.stain_shift, 3)
        density[:, :3] = ((_HED_INVERSE * gain) @ _HED).T  # rows of pixels times this, transposed for columns
        density[:, 3] = shift @ _HED
    linear, contrast = _SAME, 1.0
    if rule.jitter_p and rng.random() < rule.jitter_p:
        contrast = rng.uniform(1 - rule.contrast, 1 + rule.contrast)
        angle = rng.uniform(-rule.hue, rule.hue) * 2 * pi
        saturation = rng.uniform(1 - rule.saturation, 1 + rule.saturation)
        turn = np.array([[1, 0, 0], [0, cos(angle), -sin(angle)], [0, sin(angle), cos(angle)]])
        linear = (saturation * _SAME + (1 - saturation) * _GREY) @ _YIQ_INVERSE @ turn @ _YIQ
        linear = linear * rng.uniform(1 - rule.brightness, 1 + rule.brightness)
    if rule.gray_p and rng.random() < rule.gray_p:
        linear = _GREY @ linear
    sigma = rng.uniform(*rule.blur_sigma) if rng.random() < rule.blur_p else 0.0
    solarise = float(rng.random() < rule.solarise_p)
    return np.concatenate([density.ravel(), linear.ravel(), [contrast, sigma, solarise]]).astype(np.float32)


def unpack_colours(packed: Tensor) -> Colours:
    """Split (n, 24) rows of `draw_colour`."""
    n = len(packed)
    return Colours(
        packed[:, :12].reshape(n, 3, 4), packed[:, 12:21].reshape(n, 3, 3), packed[:, 21], packed[:, SIGMA], packed[:, 23]
    )


def apply_colours(images: Tensor, packed: Tensor, blurred: Tensor | None) -> Tensor:
    """Change a batch of views: images float (n, 3, h, w) in [0, 1], packed float32 (n, 24) -> the same shape, in [0, 1].

    blurred: int64 (m,), the rows with a sigma above 0, found on the CPU so that a GPU need not be waited for; None blurs
    every row, by no sigma where that is 0: the form to be compiled, whose shapes never change.
    """
    c = unpack_colours(packed.to(images.dtype))
    n, _, h, w = images.shape
    flat = images.reshape(n, 3, h * w)
    density = -torch.log(flat.clamp(_OD_FLOOR, 1.0))
    density = _mix(c.density[:, :, :3], density) + c.density[:, :, 3:]
    flat = _mix(c.linear, torch.exp(-density).clamp(0.0, 1.0))
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


def _mix(matrix: Tensor, channels: Tensor) -> Tensor:
    """(n, 3, 3) times (n, 3, p) -> (n, 3, p); spelled out for the compiler, which then needs no pass over memory of its own."""
    if torch.compiler.is_compiling():
        return (matrix[..., None] * channels[:, None]).sum(2)
    return torch.bmm(matrix, channels)


def blur(images: Tensor, sigma: Tensor, radius: int = 4) -> Tensor:
    """Gaussian blur with one sigma (px) an image, 0 leaves it as it is: (n, 3, h, w), (n,) -> (n, 3, h, w)."""
    n, channels, h, w = images.shape
    steps = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (steps[None] / sigma.clamp_min(1e-3)[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    if torch.compiler.is_compiling():
        wide = F.pad(images, (radius, radius, 0, 0), mode="reflect")
        images = sum(kernel[:, k, None, None, None] * wide[..., k : k + w] for k in range(2 * radius + 1))  # type: ignore[assignment]
        high = F.pad(images, (0, 0, radius, radius), mode="reflect")
        return sum(kernel[:, k, None, None, None] * high[..., k : k + h, :] for k in range(2 * radius + 1))  # type: ignore[return-value]
    kernel = kernel.repeat_interleave(channels, 0)
    flat = images.reshape(1, n * channels, h, w)
    flat = F.conv2d(F.pad(flat, (radius, radius, 0, 0), mode="reflect"), kernel[:, None, None, :], groups=n * channels)
    flat = F.conv2d(F.pad(flat, (0, 0, radius, radius), mode="reflect"), kernel[:, None, :, None], groups=n * channels)
    return flat.reshape(n, channels, h, w)
