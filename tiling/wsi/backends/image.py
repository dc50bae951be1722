"""The backend of plain images, decoded into memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tiling.wsi.backends.base import MAX_IMAGE_PIXELS, as_rgb
from tiling.wsi.backends.tiff_pages import SparseTiles, main_page, not_shown, pages_of
from tiling.wsi.backends.tiff_rules import pillow_refusal
from tiling.wsi.backends.upright import TURNS, exif_orientation

PHOTOMETRIC, MINISWHITE = 262, 0  # a TIFF tag and a value of it


class ImageReader:
    """A PNG, JPEG or TIFF held in memory as one level, upright; of a TIFF its largest page."""

    name = "image"
    scales: tuple[int, ...] = (1,)
    threadsafe = True
    orientation = 1

    def __init__(self, path: Path) -> None:
        from PIL import Image

        Image.MAX_IMAGE_PIXELS = MAX_IMAGE_PIXELS
        self.properties: Mapping[str, Any] = {}
        with Image.open(path) as image:
            page = main_page(pages_of(path)) if image.format == "TIFF" else None
            _seek(image, page)
            if refusal := pillow_refusal(image, page):
                raise ValueError(refusal)
            self.vendor = str(image.format or "image").lower()
            resolution = image.info.get("dpi")
            if resolution:
                x, y = resolution
                self.properties = {"tiff.ResolutionUnit": "inch", "tiff.XResolution": x, "tiff.YResolution": y}
            is_inverted = image.format == "TIFF" and getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == MINISWHITE
            pixels = TURNS[exif_orientation(image)].array(np.asarray(_flattened(image)))
            self._rgb = as_rgb(65535 - pixels if is_inverted and pixels.dtype.itemsize == 2 else pixels)
        self.tags_only = True  # of the dpi an image editor may have written
        self.level_dimensions: tuple[tuple[int, int], ...] = ((self._rgb.shape[1], self._rgb.shape[0]),)
        self.note = not_shown(path, self.level_dimensions)
        self.level_downsamples: tuple[float, ...] = (1.0,)

    def expect_strips(self) -> None:
        """Nothing to prepare."""

    def read(self, level: int, x: int, y: int, w: int, h: int, scale: int = 1) -> np.ndarray:
        """uint8 (h, w, 3)"""
        return self._rgb[y : y + h, x : x + w]

    def sparse_tiles(self, level: int) -> SparseTiles | None:
        """It is there whole."""
        return None

    def close(self) -> None:
        self._rgb = np.zeros((0, 0, 3), np.uint8)


def _seek(image: Any, page: Any | None) -> None:
    """Go to a page of an image of Pillow's that is a TIFF; nothing of one that lies beneath another, or of other images."""
    if page is not None and page.index and len(page.treeindex) == 1:
        image.info.pop("dpi", None)  # of the page before
        image.seek(page.index)
    if image.format == "TIFF":
        image.info.pop("xmp", None)  # an orientation in it would turn the picture for this reader alone


def _flattened(image: Any) -> Any:
    """An image without transparency (composited on white) and without a palette."""
    from PIL import Image

    if image.mode in ("I;16", "I;16B", "I;16L", "L", "RGB"):
        return image
    if image.mode == "La":
        image = image.convert("LA")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
