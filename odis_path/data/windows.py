"""views.window_um: training samples are windows around objects in place of tiles."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from annotations.errors import UserError
from odis_path.data.dataset import SampledObject, TargetBoxes, TileSample, TileSamples
from odis_path.data.tile_index import TileIndex
from tiling.slide_file.read import SlideFile

if TYPE_CHECKING:
    from odis_path.config import PretrainConfig

LEAST_PX = 8


def window_px(window_um: float, mpp: float) -> int:
    """The side of a window in pixels of a tile. Raises UserError where it holds too few of them to be seen."""
    side = round(window_um / mpp)
    if side < LEAST_PX:
        least = LEAST_PX * mpp
        raise UserError(
            f"a window of {window_um:g} micrometres is {side} px at {mpp:g} micrometres per pixel: take {least:g} or more"
        )
    return side


def training_samples(index: TileIndex, config: PretrainConfig, patch_px: int) -> TileSamples:
    """The samples of a run: tiles, or windows where views.window_um says their side."""
    samples = WindowSamples if config.views.window_um else TileSamples
    return samples(index, config, patch_px)


class WindowSamples(TileSamples):
    """Training samples: item (epoch, i) is a window around an object of tile i, with target.objects > 1 a list of them.

    Without an object a window lies anywhere in the tile, and all of it is the target. Where a tile has fewer objects, some come
    again and are not visible.
    """

    def __init__(self, index: TileIndex, config: PretrainConfig, patch_px: int) -> None:
        super().__init__(index, config, patch_px, window_px(config.views.window_um, index.mpp))

    def sample_tile(self, rng: np.random.Generator, slide: int, row: int) -> TileSample | list[TileSample]:
        """As `TileSamples.sample_tile`."""
        file = self.files[slide]
        boxes = self._target_boxes(rng, file, slide, row)
        left = np.ones(len(boxes.xyxy), dtype=bool)
        samples = [self._sample_window(rng, slide, row, boxes, left) for _ in range(self.config.target.objects)]
        return samples if len(samples) > 1 else samples[0]

    def boxes(self, file: SlideFile, slide: int, row: int) -> TargetBoxes:
        """As `TileSamples.boxes`, with the parts of objects in other tiles."""
        boxes = super().boxes(file, slide, row)
        if not len(boxes.xyxy):
            return boxes
        return boxes._replace(xyxy=self.files.windows(slide).whole_boxes(self.side_px)[boxes.row])

    def _sample_window(
        self, rng: np.random.Generator, slide: int, row: int, boxes: TargetBoxes, left: np.ndarray
    ) -> TileSample:
        """Draw a window around one of the boxes that are left, bool (k,), and take it from them."""
        t, windows, tile_px = self.config.target, self.files.windows(slide), self.index.tile_px
        again = len(left) > 0 and not left.any()
        target = None if rng.random() < t.whole_tile_p else self._choose(rng, boxes, left | again, beyond_px=tile_px)
        place = np.tile(rng.uniform(0, tile_px, 2), 2) if target is None else target.box
        corner = windows.corner(row, place, self.side_px)
        outlines: list[list[np.ndarray]] = []
        if target is not None:
            left[target.rows] = False
            if t.geometry == "polygon":
                parts = [part for i in target.rows for part in windows.outlines(int(boxes.row[i]), self.side_px)]
                outlines = [[ring - np.array(corner) for ring in rings] for rings in parts]
            target = target._replace(box=np.clip(target.box - np.tile(corner, 2), 0, self.side_px))
        target, crops = self._crops_around(rng, target)
        drawn = SampledObject(target, outlines, in_crops=t.crop and not self._fills(target))
        views = self._sampled(rng, slide, crops, [drawn])
        if again:
            views = views._replace(object_visible=np.zeros_like(views.object_visible))
        pixels = self.read(slide, row, partial(windows.read, row, *corner, self.side_px))
        return TileSample(pixels, None, target.box, views)
