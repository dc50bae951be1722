"""Mode window: masked embeddings of objects, each in a window of its own, as runs with views.window_um are trained."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from annotations.errors import UserError
from odis_path.data.windows import window_px as side_of
from odis_path.embedding.request import EmbedJob
from tiling.slide_file.read import SlideFile
from tiling.slide_file.window import TileWindows

if TYPE_CHECKING:
    from odis_path.embedding.encoder import FrozenEncoder


def window_um(encoder: FrozenEncoder, job: EmbedJob) -> float:
    """Return the side of a job's windows in um: as asked, else as the encoder was trained. UserError where neither says it."""
    side_um = job.window_um or encoder.window_um
    if not side_um:
        raise UserError(f"{encoder.name}: was not trained on windows (views.window_um): say their side with --window-um")
    return side_um


def window_px(encoder: FrozenEncoder, file: SlideFile, job: EmbedJob) -> int:
    """Return the same in pixels of the tiles of a slide file."""
    return side_of(window_um(encoder, job), file.mpp)


def window_encoder(encoder: FrozenEncoder) -> FrozenEncoder:
    """Return the encoder for windows: each is resized to --resize, else to the size that the encoder was trained at."""
    return encoder if encoder.resize_px else replace(encoder, resize_px=encoder.trained_px)


class ObjectWindows:
    """Windows of one slide file around objects, and the boxes of the objects in them."""

    def __init__(self, file: SlideFile, side_px: int) -> None:
        self.windows, self.side_px = TileWindows(file), side_px

    def around(self, tile_of: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read a window around each box: uint8 (n, side, side, 3), and the boxes in them, float64 (n, 4), cut at their edges.

        tile_of: int (n,); boxes: (n, 4) in pixels of those tiles.
        """
        corners = [self.windows.corner(int(t), box, self.side_px) for t, box in zip(tile_of, boxes, strict=True)]
        pixels = [self.windows.read(int(t), *corner, self.side_px) for t, corner in zip(tile_of, corners, strict=True)]
        moved = np.asarray(boxes, np.float64) - np.tile(np.array(corners, np.float64).reshape(-1, 2), 2)
        return np.stack(pixels), np.clip(moved, 0, self.side_px)
