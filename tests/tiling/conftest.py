"""Small generated slides with a known picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest


def painted(width: int = 1024, height: int = 768) -> np.ndarray:
    """uint8 (height, width, 3): white glass with a pink disc of tissue, and smooth gradients on it that tell x and y."""
    y, x = np.mgrid[:height, :width].astype(float)
    rgb = np.full((height, width, 3), 245.0)
    inside = ((x - width / 2) / (0.4 * width)) ** 2 + ((y - height / 2) / (0.4 * height)) ** 2 < 1
    tissue = np.stack([120 + 100 * x / width, 60 + 60 * y / height, 150 + 20 * np.sin(x / 37) * np.cos(y / 23)], axis=2)
    rgb[inside] = tissue[inside]
    return rgb.round().astype(np.uint8)


def write_slide(path: Path, rgb: np.ndarray, *, mpp: float | None = 0.5, levels: int = 3) -> Path:
    """An Aperio-style pyramid (256-px JPEG tiles, quality 95, each level half of the one before) that OpenSlide opens."""
    import tifffile

    path.parent.mkdir(parents=True, exist_ok=True)
    stated = "" if mpp is None else f"|AppMag = {10 / mpp:g}|MPP = {mpp:g}"
    options = {
        "tile": (256, 256),
        "compression": "jpeg",
        "compressionargs": {"level": 95},
        "photometric": "rgb",
        "metadata": None,
    }
    with tifffile.TiffWriter(path) as file:
        level = rgb
        for number in range(levels):
            height, width = level.shape[:2]
            text = f"Aperio Image Library v11\n{width}x{height} [0,0 {width}x{height}] (256x256) JPEG/RGB Q=95{stated}"
            file.write(level, description=text, subfiletype=1 if number else 0, **options)
            level = level[: height // 2 * 2, : width // 2 * 2].reshape(height // 2, 2, width // 2, 2, 3).mean(axis=(1, 3))
            level = level.round().astype(np.uint8)
    return path


@pytest.fixture(scope="session")
def picture() -> np.ndarray:
    return painted()


@pytest.fixture(scope="session")
def slide_path(tmp_path_factory: pytest.TempPathFactory, picture: np.ndarray) -> Path:
    """A slide of 1024 x 768 pixels at 0.5 mpp with three levels; do not change it."""
    return write_slide(tmp_path_factory.mktemp("slides") / "painted.svs", picture)


@pytest.fixture(scope="session")
def make_slide() -> Callable[..., Path]:
    return write_slide
