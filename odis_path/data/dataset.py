"""Tiles as training samples: target objects, object-aware views, patch masks, colours.

A sample is a pure function of (seed, epoch, index): it does not depend on the number of workers, and a run that stops and
goes on sees the same crops and masks.
"""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from annotations.errors import UserError
from annotations.objects import Kind
from odis_path.data import augment as colour
from odis_path.data import block_masking as mim
from odis_path.data import crops, targets
from odis_path.data.polygon_mask import polygon_mask
from odis_path.data.targets import Target
from odis_path.data.tile_index import OpenSlides, TileIndex
from tiling.slide_file.read import SlideFile
from tiling.storage.checksums import DamagedError

if TYPE_CHECKING:
    from odis_path.config import PretrainConfig

Rings = list[np.ndarray]  # the outline of an object in a tile, as SlideFile.polygon gives it
MOST_LOST = 16  # tiles in a row that cannot be read from their slide
NO_BOXES = (np.zeros((0, 4)), None, np.zeros(0, dtype=np.int64))


class TileSamples(torch.utils.data.Dataset[dict[str, np.ndarray]]):
    """Training samples: item (epoch, i) is the tile i with its views, masks and colours."""

    def __init__(self, index: TileIndex, config: PretrainConfig, patch_px: int) -> None:
        self.index = index
        self.config = config
        self.files = OpenSlides(index.paths)
        self.grids = (config.views.global_size // patch_px, config.views.local_size // patch_px)
        self.rules = view_rules(config)
        self.colour_rules = colour_rules(config)
        kinds = kinds_of(config)
        self._kinds = None if len(kinds) == len(Kind) else kinds
        mean_scale = sum(config.views.global_scale) / 2
        cell = sqrt(mean_scale) * index.tile_px / self.grids[0]  # tile px a patch of a mean global crop
        self._min_side_px = sqrt(config.target.min_patches) * cell

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, np.ndarray]:
        epoch, i = key
        rng = np.random.default_rng([self.config.run.seed, epoch, i])
        found, pixels = self._readable(i)
        slide, row = int(self.index.slide[found]), int(self.index.row[found])
        lost = np.array(-1 if found == i else i, dtype=np.int64)
        return {"tile": pixels, "lost": lost, **self.draw(rng, self.files[slide], slide, row)}

    def _readable(self, i: int) -> tuple[int, np.ndarray]:
        """Tile i with its pixels or, where its slide is torn there (no pixels are stored), the next one that can be read."""
        for found in (np.arange(i, i + MOST_LOST) % len(self)).tolist():
            file, row = self.files[int(self.index.slide[found])], int(self.index.row[found])
            try:
                return found, file.tile(row)
            except (UserError, ValueError, OSError) as error:
                if file.has_pixels or isinstance(error, DamagedError):
                    said = error.what if isinstance(error, DamagedError) else " ".join(str(error).split())
                    raise UserError(f"{file.path}: tile {row} cannot be decoded ({said}): tile the slide again") from None
                file.check_source()
                last = error
        raise UserError(f"{last} (nor can the {MOST_LOST - 1} tiles before it be read)")

    def draw(self, rng: np.random.Generator, file: SlideFile, slide: int, row: int) -> dict[str, np.ndarray]:
        """Everything random about a sample, without its pixels.

        theta_* float32 (views, 2, 3); mask_* bool (views, K, N) in-box patches of K objects; hidden bool (2, N); seen bool
        (views, K) False where the view lacks the object; colours float32 (views, 24); target float64 (4,), of the first
        object; rects int32 (views, 6).
        """
        side, t = self.index.tile_px, self.config.target
        boxes, labels, at = self.boxes(file, slide, row) if t.crop or t.mask else NO_BOXES
        if len(boxes) and (t.noise_jitter or t.noise_drop or t.noise_false):
            boxes, labels, at = self._noisy(rng, boxes, labels, at)
        chosen, views = self._compose(rng, boxes, labels)
        objects: list[Target | None] = [chosen]
        if t.objects > 1:
            shared = np.minimum(*(crops.visible_share(view, boxes) for view in views[:2])) >= t.fraction
            large = (boxes[:, 2:] - boxes[:, :2]).prod(1) >= self._min_side_px**2
            objects += targets.more_boxes(rng, boxes, shared & large, t.objects - 1, chosen)
        around = t.crop and not self._fills(chosen)  # whether the views were drawn around the object
        shapes: list[list[Rings]] = [[] for _ in objects]
        if t.geometry == "polygon":
            shapes = [[] if o is None else [file.polygon(int(at[i])) for i in o.rows] for o in objects]
        found = [
            np.stack(
                [self._masks(some, o, number, s, around and o is chosen) for o, s in zip(objects, shapes, strict=True)], axis=1
            )
            for number, some in enumerate((views[:2], views[2:]))
        ]  # globals bool (2, K, N), locals (L, K, N')
        seen = np.concatenate([masks.any(2) for masks in found])
        for masks in found:
            masks |= ~masks.any(2, keepdims=True)  # never an empty key set; `seen` keeps it out of loss and center
        grid, m = self.grids[0], self.config.mim
        hidden = [mim.block_mask(rng, grid, mim.draw_ratio(rng, m.probability, m.ratio), m.blocks) for _ in range(2)]
        theta = crops.crop_matrices(views, side)
        return {
            "theta_global": theta[:2],
            "theta_local": theta[2:],
            "mask_global": found[0],
            "mask_local": found[1],
            "hidden": np.stack([mask.ravel() for mask in hidden]),
            "seen": seen,
            "colours": colour.draw_colours(rng, self.colour_rules),
            "target": chosen.box,
            "rects": np.array([(v.x, v.y, v.w, v.h, v.turn, v.size_px) for v in views], dtype=np.int32),
        }

    def boxes(self, file: SlideFile, slide: int, row: int) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """Boxes (k, 4) of a tile that may be targets, their labels (k,) where needed, and their rows (k,) in /boxes."""
        t = self.config.target
        boxes, at, labels = np.asarray(file.boxes(row), dtype=np.float64), file.box_rows(row), None
        rows = np.arange(at.start, at.stop) if isinstance(at, slice) else np.asarray(at)
        if (self._kinds is not None or t.choice == "label") and len(boxes):
            kind, label = self.files.box_groups(slide)
            labels = label[rows]
            if self._kinds is not None:
                keep = np.isin(kind[rows], self._kinds)
                boxes, labels, rows = boxes[keep], labels[keep], rows[keep]
        return boxes, labels, rows

    def _noisy(
        self, rng: np.random.Generator, boxes: np.ndarray, labels: np.ndarray | None, at: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """The boxes with the configured noise; a false one has label -1 and row -1."""
        t = self.config.target
        boxes, was = targets.noisy_boxes(
            rng, boxes, jitter=t.noise_jitter, drop=t.noise_drop, false=t.noise_false, side_px=self.index.tile_px
        )
        real = was >= 0
        return boxes, None if labels is None else np.where(real, labels[was], -1), np.where(real, at[was], -1)

    def _compose(
        self, rng: np.random.Generator, boxes: np.ndarray, labels: np.ndarray | None
    ) -> tuple[Target, list[crops.Crop]]:
        """The (first) target and the views of a sample, in the configured order: box first, or crops first.

        A target that nearly fills the tile becomes the whole tile, with free views; with an outline in place of a box it stays
        what it is, since an outline may leave out most of its box.
        """
        side, t = self.index.tile_px, self.config.target
        whole = targets.whole_tile(side)
        if not (t.crop or t.mask):
            return whole, self._views(rng, None)
        to_whole = rng.random() < t.whole_tile_p
        pair: list[crops.Crop] | None = None
        chosen: Target | None = None
        if t.order == "crop_first" and not to_whole:
            pair = crops.sample_crops(rng, side, None, self.rules[0], 2)
            shown = np.array([all(crops.shows(view, box, side, self.rules[0]) for view in pair) for box in boxes], dtype=bool)
            chosen = self._choose(rng, boxes, labels, shown)
        if chosen is None:
            pair, chosen = None, self._choose(rng, boxes, labels, np.ones(len(boxes), dtype=bool))
        if chosen is None or to_whole:
            return whole, self._views(rng, None)
        if not self._fills(chosen):
            return chosen, self._views(rng, chosen.box, pair)
        return chosen if t.geometry == "polygon" else targets.whole_tile(side, chosen.rows), self._views(rng, None, pair)

    def _fills(self, target: Target) -> bool:
        """Tell whether a target is too large for crops around it to differ from the tile."""
        return target.whole or targets.tile_share(target.box, self.index.tile_px) > self.config.target.whole_share

    def _choose(
        self, rng: np.random.Generator, boxes: np.ndarray, labels: np.ndarray | None, allowed: np.ndarray
    ) -> Target | None:
        """A target among the allowed boxes."""
        rows = np.flatnonzero(allowed)
        found = targets.choose_box(
            rng,
            boxes[rows],
            choice=self.config.target.choice,
            groups=None if labels is None else labels[rows],
            min_side_px=self._min_side_px,
            side_px=self.index.tile_px,
        )
        return None if found is None else Target(found.box, rows[found.rows])

    def _views(
        self, rng: np.random.Generator, box: np.ndarray | None, pair: list[crops.Crop] | None = None
    ) -> list[crops.Crop]:
        """Two globals (drawn here unless given) and the locals, around a box or free."""
        side, t = self.index.tile_px, self.config.target
        aware = box if t.crop else None
        aware_local = aware if t.local == "object" else None
        views = pair or crops.sample_crops(rng, side, aware, self.rules[0], 2)
        return views + crops.sample_crops(rng, side, aware_local, self.rules[1], self.config.views.local_count)

    def _masks(
        self, views: list[crops.Crop], target: Target | None, number: int, shapes: list[Rings], sampled: bool
    ) -> np.ndarray:
        """In-object patches of the global (number 0) or local (1) views, bool (views, N).

        All False where there is no object, where its outline lies beside a view, or where rejection gave up on a view that was
        to show it (sampled: the views were drawn around this object).
        """
        t, grid = self.config.target, self.grids[number]
        if target is None or not views:
            return np.zeros((len(views), grid * grid), dtype=bool)
        if target.whole or not t.mask or (number and t.local == "free"):
            return np.ones((len(views), grid * grid), dtype=bool)
        rule: dict[str, Any] = {"rule": t.mask_rule, "fraction": t.mask_fraction, "margin": t.mask_margin}
        masks = crops.patch_masks(views, target.box, grid, **rule)
        if shapes:
            masks = np.stack([self._outline(view, shapes, grid, rule) for view in views])
        if sampled and t.sampler == "reject" and t.fallback != "construct":
            side, asked = self.index.tile_px, self.rules[number]
            masks[[not crops.shows(view, target.box, side, asked) for view in views]] = t.fallback == "full"
        return masks.reshape(len(views), -1)

    @staticmethod
    def _outline(view: crops.Crop, shapes: list[Rings], grid: int, rule: dict[str, Any]) -> np.ndarray:
        """Patches of the outlines, bool (grid, grid); of one too small for the rule those that it touches."""
        found = np.logical_or.reduce([polygon_mask(view, rings, grid, **rule) for rings in shapes])
        return found if found.any() else np.logical_or.reduce([polygon_mask(view, rings, grid) for rings in shapes])


def kinds_of(config: PretrainConfig) -> np.ndarray:
    """The kinds of boxes that may be targets, as slide files number them: uint8."""
    return np.array([kind for kind in Kind if kind.word in config.data.kinds], dtype=np.uint8)


def view_rules(config: PretrainConfig) -> tuple[crops.CropRule, crops.CropRule]:
    """The rules by which global and local crops are drawn."""
    v, t = config.views, config.target
    shared: dict[str, Any] = {
        "ratio": v.ratio,
        "turns": v.turns,
        "containment": t.containment,
        "fraction": t.fraction,
        "sampler": t.sampler,
        "tries": t.tries,
        "fallback": t.fallback,
    }
    return (
        crops.CropRule(scale=v.global_scale, size_px=v.global_size, **shared),
        crops.CropRule(scale=v.local_scale, size_px=v.local_size, **shared),
    )


def colour_rules(config: PretrainConfig) -> tuple[colour.ColourRule, ...]:
    """Colour changes of each view: the first global one, the second, and the locals."""
    v = config.views
    first, second, local = (
        colour.ColourRule(
            v.brightness,
            v.contrast,
            v.saturation,
            v.hue,
            v.jitter_p,
            v.gray_p,
            v.blur_p[k],
            v.blur_sigma,
            v.solarise_p if k == 1 else 0.0,
            v.stain_scale,
            v.stain_shift,
            v.stain_p,
            v.hue_space,
        )
        for k in range(3)
    )
    return (first, second, *(local,) * v.local_count)
