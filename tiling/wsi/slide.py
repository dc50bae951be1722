"""A whole-slide image of any format: its header facts, and its pixels at any resolution."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from annotations.errors import UserError, one_line
from tiling.storage.paths import url_of
from tiling.wsi.backends.base import Reader
from tiling.wsi.backends.registry import open_reader
from tiling.wsi.backends.tiff_direct import DirectReader
from tiling.wsi.level_alignment import Placement, place_level, textured_places
from tiling.wsi.level_fidelity import matches_area_average, scale_matches_average
from tiling.wsi.level_view import BLOCK_PIXELS, LevelView, SlideInfo, pixel_bounds
from tiling.wsi.resample import area_resize

RESAMPLE = ("fast", "exact", "pyramid")
LEVEL_TOLERANCE = 1.01  # a level 1% coarser than wanted still serves: 2.0005 counts as 2
PIXELS_TO_SHARE = 3
MAX_FAILURES = 500  # of a thumbnail that cannot be read in one piece
SMALLEST_PART_L0 = 128  # level-0 pixels: about a stored tile, or half of one

Read = Callable[[int, int, int, int], np.ndarray]  # x, y, w, h inside a view -> uint8 (h, w, 3)


class Thumbnail(NamedTuple):
    """A whole slide at low resolution: rgb uint8 (h, w, 3), black where `unreadable`, bool (h, w), says so."""

    rgb: np.ndarray
    unreadable: np.ndarray


class Slide:
    """An open slide; a context manager. Made by `Slide.open`."""

    def __init__(self, info: SlideInfo, reader: Reader, resample: str = "fast") -> None:
        self.info = info
        self.reader = reader
        self.resample = resample
        self.skipped_levels: set[int] = set()  # levels that would have done, were they averages of level 0
        self.placements: dict[int, Placement] = {}  # of the levels looked at: how they lie on level 0
        self._faithful_levels: dict[float, int] = {}
        self._faithful_scales: dict[tuple[int, int], bool] = {}

    @classmethod
    def open(cls, path: Path | str, assume_mpp: float | None = None, reader: str = "auto", resample: str = "fast") -> Slide:
        """Open with the first reader that can (see tiling.wsi.backends.registry), or with the one named.

        assume_mpp fills in where the file has no mpp of its own. resample: "fast" starts from the coarsest level that will
        do and looks like an average of level 0, scaled in the decoder; "pyramid" from the coarsest that will do,
        whatever the scanner made of it; "exact" averages level 0. Raises UserError where the file is missing or nothing
        reads it.
        """
        if resample not in RESAMPLE:
            raise UserError(f"--resample {resample}: choose among {', '.join(RESAMPLE)}")
        path = Path(path)
        if not url_of(path) and not path.exists():
            raise UserError(f"{path}: no such slide")
        opened, why = open_reader(path, reader)
        return cls(SlideInfo.of(path, opened, why, assume_mpp), opened, resample)

    def close(self) -> None:
        self.reader.close()

    def __enter__(self) -> Slide:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @cached_property
    def textured_places(self) -> np.ndarray:
        """As `tiling.wsi.level_alignment.textured_places` finds them."""
        return textured_places(self)

    def downsample(self, level: int) -> float | None:
        """Return level-0 pixels per pixel of a level, held against level 0; None where the level is not to be used."""
        if level == 0:
            return self.info.level_downsamples[0]
        if level not in self.placements:
            self.placements[level] = place_level(self, level)
        return self.placements[level].downsample

    def full_view(self, level: int) -> LevelView:
        """Return a level as it is stored, without what it is padded with. Only of a level that is to be used."""
        own = self.downsample(level)
        assert own is not None
        width, height = self.info.level_dimensions[level]
        if own != self.info.level_downsamples[level]:
            width, height = (
                min(size, math.ceil(l0 / own)) for size, l0 in zip((width, height), self.info.size_l0, strict=True)
            )
        return LevelView(level, 1, own, width, height)

    def fine_enough_levels(self, downsample: float) -> Iterator[int]:
        """Yield levels at least as fine as `downsample` (level-0 pixels per wanted pixel), the coarsest first."""
        limit = downsample * LEVEL_TOLERANCE
        sizes = self.info.level_downsamples
        for level in sorted(range(1, len(sizes)), key=lambda i: -sizes[i]):
            if sizes[0] < sizes[level] <= limit and (own := self.downsample(level)) is not None and own <= limit:
                yield level
        yield 0

    def best_level(self, downsample: float) -> int:
        """Return the coarsest level that lies right and is as fine as `downsample` (level-0 pixels per wanted pixel)."""
        return next(self.fine_enough_levels(downsample))

    def faithful_level(self, downsample: float) -> int:
        """Return the coarsest fine enough level that looks like an average of level 0 (see level_fidelity)."""
        key = round(downsample, 2)
        if key not in self._faithful_levels:
            for level in self.fine_enough_levels(downsample):
                if level == 0 or matches_area_average(self, level, downsample):
                    self._faithful_levels[key] = level
                    break
                self.skipped_levels.add(level)
        return self._faithful_levels[key]

    def is_faithful_scale(self, level: int, scale: int) -> bool:
        """Tell whether the decoder's 1 / scale of a level looks like an average of all its pixels (see level_fidelity)."""
        if scale == 1 or not isinstance(self.reader, DirectReader):
            return True
        if (level, scale) not in self._faithful_scales:
            self._faithful_scales[level, scale] = scale_matches_average(self.reader, level, scale)
        return self._faithful_scales[level, scale]

    def choose_level(self, downsample: float, resample: str | None = None) -> int:
        """Choose the level to read for `downsample`; resample: as in `open`, None for the slide's own."""
        mode = resample or self.resample
        if mode == "exact":
            return 0
        return self.best_level(downsample) if mode == "pyramid" else self.faithful_level(downsample)

    def choose_view(self, downsample: float, boxes_l0: np.ndarray, resample: str | None = None) -> LevelView:
        """Choose what to decode for `downsample` level-0 pixels per wanted pixel: `choose_level`, scaled as far as is right.

        boxes_l0: (N, 4) x0, y0, x1, y1 that will be cut. Pixels of a scaled level can hardly be shared out between outputs
        (up to 7 grey levels away on sharp H&E, with 3 of them an output 2): a scale is taken where boxes and outputs hold
        whole pixels of it, and elsewhere only with `PIXELS_TO_SHARE` or more of them an output. resample: as in `open`.
        """
        mode = resample or self.resample
        full = self.full_view(self.choose_level(downsample, mode))
        for scale in sorted(self.reader.scales, reverse=True) if mode != "exact" else ():
            view_downsample = full.downsample * scale
            px_per_output = downsample / view_downsample
            whole_px = px_per_output >= 1 and px_per_output.is_integer() and not (boxes_l0 % view_downsample).any()
            is_right = scale == 1 or whole_px or px_per_output >= PIXELS_TO_SHARE
            if is_right and (mode == "pyramid" or self.is_faithful_scale(full.level, scale)):
                return LevelView(full.level, scale, view_downsample, -(-full.width // scale), -(-full.height // scale))
        return full

    def read_region(
        self, x_l0: float, y_l0: float, w_l0: float, h_l0: float, out_w: int, out_h: int, resample: str | None = None
    ) -> np.ndarray:
        """Read the area x, y, w, h in level-0 pixels, area-averaged from the best level: uint8 (out_h, out_w, 3).

        What lies beyond the slide or was not scanned has the background colour. resample: as in `open`, None for the slide's
        own. Raises UserError for pixels that cannot be decoded.
        """
        box = (x_l0, y_l0, x_l0 + w_l0, y_l0 + h_l0)
        view = self.choose_view(min(w_l0 / out_w, h_l0 / out_h), np.array([box], np.float64), resample)
        return self.read_area(view, box, out_w, out_h)

    def read_area(
        self,
        view: LevelView,
        box_l0: tuple[float, ...],
        out_w: int,
        out_h: int,
        read: Read | None = None,
        max_block_px: int = BLOCK_PIXELS,
    ) -> np.ndarray:
        """Read a level-0 box of a view, area-averaged, however large it is: uint8 (out_h, out_w, 3).

        read: as in `block`. max_block_px: pixels of the view that are decoded in one piece (at least one row of the output).
        """
        x0, y0, x1, y1 = box_l0
        step = (y1 - y0) / out_h
        rows = max(1, int(max_block_px / max(1.0, (x1 - x0) / view.downsample) / (step / view.downsample)))
        bands = []
        for top in range(0, out_h, rows):
            count = min(rows, out_h - top)
            box = (x0, y0 + top * step, x1, y0 + (top + count) * step)
            (edges,) = pixel_bounds(view, np.array([box])).tolist()
            bands.append(self.resample_block(view, edges, self.read_block(view, edges, read), box, out_w, count))
        return bands[0] if len(bands) == 1 else np.concatenate(bands)

    def thumbnail(self, max_side_px: int) -> np.ndarray:
        """Read the whole slide as `read_thumbnail`, its longer side `max_side_px`, never enlarged: uint8 (h, w, 3)."""
        return self.read_thumbnail(max_side_px).rgb

    def read_thumbnail(self, max_side_px: int) -> Thumbnail:
        """Read the whole slide, its longer side `max_side_px`, and tell which parts of it cannot be decoded.

        From the coarsest level that will do, whatever the slide's `resample`: an overview is worth no full read, and tissue
        must not depend on it. Raises UserError where many parts cannot be decoded, or all.
        """
        width, height = self.info.size_l0
        downsample = max(1.0, max(width, height) / max_side_px)
        out_w, out_h = max(1, round(width / downsample)), max(1, round(height / downsample))
        try:
            rgb = self.read_region(0, 0, width, height, out_w, out_h, "pyramid")
        except UserError as error:
            return _read_readable_parts(self, out_w, out_h, error)
        return Thumbnail(rgb, np.zeros((out_h, out_w), bool))

    def read_block(self, view: LevelView, edges: tuple[int, int, int, int], read: Read | None = None) -> np.ndarray:
        """Read pixels of a view, background where they lie beyond it: uint8 (bottom - top, right - left, 3).

        edges: left, top, right, bottom in pixels of the view. read: called with x, y, w, h inside the view, in place of the
        slide's reader.
        """
        left, top, right, bottom = edges
        inner = (max(left, 0), max(top, 0), min(right, view.width), min(bottom, view.height))
        w, h = inner[2] - inner[0], inner[3] - inner[1]
        read = read or (lambda *where: self.read_view(view, *where))
        if (w, h) == (right - left, bottom - top):
            return read(inner[0], inner[1], w, h)
        block = np.empty((bottom - top, right - left, 3), np.uint8)
        block[:] = np.array(self.info.background, np.uint8)
        if w > 0 and h > 0:
            block[inner[1] - top : inner[3] - top, inner[0] - left : inner[2] - left] = read(inner[0], inner[1], w, h)
        return block

    def resample_block(
        self, view: LevelView, edges: tuple[int, ...], block: np.ndarray, box_l0: tuple[float, ...], out_w: int, out_h: int
    ) -> np.ndarray:
        """Resample a level-0 box out of the block of a view that has these edges: uint8 (out_h, out_w, 3)."""
        x0, y0, x1, y1 = (round(value / view.downsample - edges[i % 2], 6) for i, value in enumerate(box_l0))
        return area_resize(block, (x0, y0, x1, y1), out_w, out_h)

    def read_view(self, view: LevelView, x: int, y: int, w: int, h: int) -> np.ndarray:
        """Read pixels x, y, w, h of a view, inside it: uint8 (h, w, 3). Raises UserError where they cannot be decoded."""
        try:
            return self.reader.read(view.level, x, y, w, h, view.scale)
        except Exception as error:  # each library has errors of its own
            place = f"level {view.level}, x {x * view.scale}, y {y * view.scale}, {w * view.scale} x {h * view.scale}"
            raise UserError(
                f"{self.info.path}: cannot decode pixels at {place}: {one_line(error)}: is the file whole?"
            ) from None

    def reopen(self) -> None:
        """Open the file once more: some libraries refuse all work after their first error."""
        if self.reader.name == "direct":
            return
        # The old reader is not closed: another thread may be in the middle of it. It is freed with its last reference.
        self.reader, _ = open_reader(self.info.path, self.info.reader)
        self.reader.expect_strips()


def _read_readable_parts(slide: Slide, out_w: int, out_h: int, error: UserError) -> Thumbnail:
    """Read a thumbnail of a slide that cannot be decoded in places, by halving each part that cannot be read.

    Raises `error`, that of the whole, after MAX_FAILURES parts, and where nothing can be read.
    """
    rgb, unreadable = np.zeros((out_h, out_w, 3), np.uint8), np.zeros((out_h, out_w), bool)
    step_x, step_y = slide.info.width_l0 / out_w, slide.info.height_l0 / out_h
    smallest_px = max(4, SMALLEST_PART_L0 / step_x)
    failures, parts = 0, [(0, 0, out_w, out_h)]
    while parts:
        x, y, w, h = parts.pop()
        part = (slice(y, y + h), slice(x, x + w))
        try:
            rgb[part] = slide.read_region(x * step_x, y * step_y, w * step_x, h * step_y, w, h, "pyramid")
            continue
        except UserError:
            failures += 1
            if failures > MAX_FAILURES:
                raise error from None
        slide.reopen()
        if max(w, h) <= smallest_px:
            unreadable[part] = True
        elif w >= h:
            parts += [(x + w // 2, y, w - w // 2, h), (x, y, w // 2, h)]
        else:
            parts += [(x, y + h // 2, w, h - h // 2), (x, y, w, h // 2)]
    if unreadable.all():
        raise error
    return Thumbnail(rgb, unreadable)
