"""Tiles as training samples: target objects, object-aware crops, patch masks, colours.

A sample is a pure function of (seed, epoch, index): it does not depend on the number of workers, and a run that stops and
goes on sees the same crops and masks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import sqrt
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import numpy as np
import torch

from annotations.errors import UserError, one_line
from annotations.objects import Kind
from odis_path.data.augment import ColourRule, draw_colours, in_other_stains
from odis_path.data.block_masking import block_mask, draw_ratio
from odis_path.data.crops import Crop, CropRule, crop_matrices, patch_masks, sample_crops, shows, visible_share
from odis_path.data.polygon_mask import polygon_mask
from odis_path.data.slide_stains import SlideStains
from odis_path.data.targets import Target, choose_box, further_targets, noisy_boxes, tile_share, whole_tile
from odis_path.data.tile_index import OpenSlides, TileIndex
from tiling.slide_file.read import SlideFile
from tiling.storage.checksums import DamagedError

if TYPE_CHECKING:
    from odis_path.config import PretrainConfig

MAX_UNREADABLE = 16  # tiles in a row that cannot be read from their slide
Array = TypeVar("Array")


class SampledViews(NamedTuple, Generic[Array]):
    """Everything drawn for the V = 2 + L views of a tile with K objects; stacked by `collate`, tiles come after views.

    theta_*: float32 (2 or L, 2, 3), see `crop_matrices`. object_masks_*: bool (2 or L, K, N), the patches in each object, all
    of them where the view lacks it. object_visible: bool (V, K), False there. masked_patches: bool (2, N), to be predicted.
    colours: float32 (V, 24 or 25), see `draw_colours`. rects: int32 (V, 6), the fields of each `Crop`.
    """

    theta_global: Array
    theta_local: Array
    object_masks_global: Array
    object_masks_local: Array
    object_visible: Array
    masked_patches: Array
    colours: Array
    rects: Array


class TileSample(NamedTuple):
    """A tile, uint8 (S, S, 3), the box of its (first) target, float64 (4,) in tile px, and its views.

    unreadable: the tile of the index that this one was taken in place of, None where it could be read.
    """

    pixels: np.ndarray
    unreadable: int | None
    target: np.ndarray
    views: SampledViews[np.ndarray]


class TargetBoxes(NamedTuple):
    """Boxes of a tile that may be targets: xyxy float64 (k, 4) in tile px, label (k,) where needed, row (k,) in /boxes."""

    xyxy: np.ndarray
    label: np.ndarray | None
    row: np.ndarray


NO_BOXES = TargetBoxes(np.zeros((0, 4)), None, np.zeros(0, dtype=np.int64))


class SampledObject(NamedTuple):
    """An object of a sample: its target, None where a tile has no further one, and its outlines, rings as in a slide file.

    in_crops: the crops were drawn so that they show it.
    """

    target: Target | None
    outlines: list[list[np.ndarray]]
    in_crops: bool


class UnreadableTileError(Exception):
    """A tile cannot be read from its slide; others of the slide may be."""


class TileSamples(torch.utils.data.Dataset[TileSample | list[TileSample]]):
    """Training samples: item (epoch, i) is the tile i with its views, masks and colours."""

    def __init__(self, index: TileIndex, config: PretrainConfig, patch_px: int, side_px: int | None = None) -> None:
        """side_px: of what views are cut from, the tile if None."""
        self.index = index
        self.side_px = side_px or index.tile_px
        self.config = config
        self.files = OpenSlides(index.paths)
        self.grids = (config.views.global_size // patch_px, config.views.local_size // patch_px)
        self.rules = crop_rules(config)
        self.colour_rules = colour_rules(config)
        kinds = kinds_of(config)
        self._kinds = None if len(kinds) == len(Kind) else kinds
        mean_scale = sum(config.views.global_scale) / 2
        self.patch_side_px = sqrt(mean_scale) * self.side_px / self.grids[0]  # of a patch of a mean global crop, in tile px
        t = config.target
        self.min_side_px = sqrt(t.min_patches) * self.patch_side_px
        self._box_masks = partial(patch_masks, rule=t.mask_rule, fraction=t.mask_fraction, margin=t.mask_margin)
        self._outline_mask = partial(polygon_mask, rule=t.mask_rule, fraction=t.mask_fraction, margin=t.mask_margin)

        swapping = config.views.stain_swap_p > 0
        self.stains = SlideStains.measure(index, self.files, config.run.seed) if swapping else None

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: tuple[int, int]) -> TileSample | list[TileSample]:
        """Sample tile i or, where its slide is torn there (no pixels are stored), the next one that can be read."""
        epoch, i = key
        reason: Exception | None = None
        for candidate in (np.arange(i, i + MAX_UNREADABLE) % len(self)).tolist():
            rng = np.random.default_rng([self.config.run.seed, epoch, i])
            try:
                sample = self.sample_tile(rng, int(self.index.slide[candidate]), int(self.index.row[candidate]))
            except UnreadableTileError as error:
                reason = error
                continue
            if candidate == i:
                return sample
            return [one._replace(unreadable=i) for one in sample] if isinstance(sample, list) else sample._replace(unreadable=i)
        raise UserError(f"{reason} (nor can the {MAX_UNREADABLE - 1} tiles before it be read)")

    def sample_tile(self, rng: np.random.Generator, slide: int, row: int) -> TileSample | list[TileSample]:
        """Read and draw a tile. Raises UnreadableTileError where another is to be taken, UserError where none would do."""
        pixels = self.read(slide, row, lambda: self.files[slide].tile(row))
        target, views = self.sample_views(rng, self.files[slide], slide, row)
        return TileSample(pixels, None, target.box, views)

    def read(self, slide: int, row: int, pixels: Callable[[], np.ndarray]) -> np.ndarray:
        """Call `pixels`, which reads tile `row`; what it raises becomes one of the errors of `sample_tile`."""
        try:
            return pixels()
        except (UserError, ValueError, OSError) as error:
            file = self.files[slide]
            if file.has_pixels or isinstance(error, DamagedError):
                reason = error.what if isinstance(error, DamagedError) else one_line(error)
                raise UserError(f"{file.path}: tile {row} cannot be decoded ({reason}): tile the slide again") from None
            file.check_source()
            raise UnreadableTileError(error) from None

    def sample_views(
        self, rng: np.random.Generator, file: SlideFile, slide: int, row: int
    ) -> tuple[Target, SampledViews[np.ndarray]]:
        """Draw everything random about a sample, without its pixels: the (first) target and the views."""
        boxes = self._target_boxes(rng, file, slide, row)
        target, crops = self._sample_target(rng, boxes)
        objects = self._sample_objects(rng, file, boxes, target, crops)
        return target, self._sampled(rng, slide, crops, objects)

    def _target_boxes(self, rng: np.random.Generator, file: SlideFile, slide: int, row: int) -> TargetBoxes:
        """Read the boxes of a tile that may be targets, with the configured noise; none where no target is needed."""
        t = self.config.target
        boxes = self.boxes(file, slide, row) if t.crop or t.mask else NO_BOXES
        if len(boxes.xyxy) and (t.noise_jitter or t.noise_drop or t.noise_false):
            boxes = self._noisy(rng, boxes)
        return boxes

    def _sampled(
        self, rng: np.random.Generator, slide: int, crops: list[Crop], objects: list[SampledObject]
    ) -> SampledViews[np.ndarray]:
        """Put together the views of crops with masks of objects; draw the masked patches and the colours."""
        m, grid = self.config.mim, self.grids[0]
        masks_global = self._object_masks(crops[:2], objects, local=False)
        masks_local = self._object_masks(crops[2:], objects, local=True)
        object_visible = np.concatenate([masks_global.any(2), masks_local.any(2)])
        for masks in (masks_global, masks_local):
            masks |= ~masks.any(2, keepdims=True)  # never an empty key set; object_visible keeps it out of loss and center
        blocks = [block_mask(rng, grid, draw_ratio(rng, m.probability, m.ratio), m.blocks) for _ in range(2)]
        theta = crop_matrices(crops, self.side_px)
        colours = draw_colours(rng, self.colour_rules)
        if self.stains is not None:
            in_other_stains(colours, self.stains.swaps(rng, slide, self.config.views.stain_swap_p, len(crops)))
        return SampledViews(
            theta_global=theta[:2],
            theta_local=theta[2:],
            object_masks_global=masks_global,
            object_masks_local=masks_local,
            object_visible=object_visible,
            masked_patches=np.stack([mask.ravel() for mask in blocks]),
            colours=colours,
            rects=np.array([(c.x, c.y, c.w, c.h, c.turn, c.size_px) for c in crops], dtype=np.int32),
        )

    def boxes(self, file: SlideFile, slide: int, row: int) -> TargetBoxes:
        """Read the boxes of a tile that may be targets."""
        xyxy, at, labels = np.asarray(file.boxes(row), dtype=np.float64), file.box_rows(row), None
        rows = np.arange(at.start, at.stop) if isinstance(at, slice) else np.asarray(at)
        if (self._kinds is not None or self.config.target.choice == "label") and len(xyxy):
            kind, label = self.files.box_groups(slide)
            labels = label[rows]
            if self._kinds is not None:
                keep = np.isin(kind[rows], self._kinds)
                xyxy, labels, rows = xyxy[keep], labels[keep], rows[keep]
        return TargetBoxes(xyxy, labels, rows)

    def _noisy(self, rng: np.random.Generator, boxes: TargetBoxes) -> TargetBoxes:
        """Add the configured noise to boxes; a false one has label -1 and row -1."""
        t = self.config.target
        xyxy, source = noisy_boxes(
            rng, boxes.xyxy, jitter=t.noise_jitter, drop=t.noise_drop, false=t.noise_false, side_px=self.index.tile_px
        )
        label = None if boxes.label is None else np.where(source >= 0, boxes.label[source], -1)
        return TargetBoxes(xyxy, label, np.where(source >= 0, boxes.row[source], -1))

    def _sample_target(self, rng: np.random.Generator, boxes: TargetBoxes) -> tuple[Target, list[Crop]]:
        """Draw the (first) target and the crops of a sample, in the configured order: box first, or crops first.

        A target that nearly fills the tile becomes the whole tile, with free crops; with an outline in place of a box it stays
        what it is, since an outline may leave out most of its box.
        """
        side, t = self.side_px, self.config.target
        if not (t.crop or t.mask):
            return self._crops_around(rng, None)
        to_whole = rng.random() < t.whole_tile_p
        pair: list[Crop] | None = None
        target: Target | None = None
        if t.order == "crop_first" and not to_whole:
            pair = sample_crops(rng, side, None, self.rules[0], 2)
            shown = np.array([all(shows(crop, box, side, self.rules[0]) for crop in pair) for box in boxes.xyxy], dtype=bool)
            target = self._choose(rng, boxes, shown)
        if target is None:
            pair, target = None, self._choose(rng, boxes, np.ones(len(boxes.xyxy), dtype=bool))
        return self._crops_around(rng, None if to_whole else target, pair)

    def _crops_around(
        self, rng: np.random.Generator, target: Target | None, pair: list[Crop] | None = None
    ) -> tuple[Target, list[Crop]]:
        """Draw crops of a target; of None, or of one that nearly fills what they are cut from, free ones of all of it."""
        if target is None:
            return whole_tile(self.side_px), self._sample_crops(rng, None)
        if not self._fills(target):
            return target, self._sample_crops(rng, target.box, pair)
        outlined = self.config.target.geometry == "polygon"
        return target if outlined else whole_tile(self.side_px, target.rows), self._sample_crops(rng, None, pair)

    def _fills(self, target: Target) -> bool:
        """Tell whether a target is too large for crops around it to differ from the tile."""
        return target.whole or tile_share(target.box, self.side_px) > self.config.target.whole_share

    def _choose(self, rng: np.random.Generator, boxes: TargetBoxes, allowed: np.ndarray, beyond_px: int = 0) -> Target | None:
        """Draw a target among the allowed boxes, bool (k,). beyond_px: how far it may reach over the border of the tile."""
        rows = np.flatnonzero(allowed)
        target = choose_box(
            rng,
            boxes.xyxy[rows] + beyond_px,
            choice=self.config.target.choice,
            groups=None if boxes.label is None else boxes.label[rows],
            min_side_px=self.min_side_px,
            side_px=self.index.tile_px + 2 * beyond_px,
        )
        return None if target is None else Target(target.box - beyond_px, rows[target.rows])

    def _sample_crops(self, rng: np.random.Generator, box: np.ndarray | None, pair: list[Crop] | None = None) -> list[Crop]:
        """Draw two global crops (unless given as a pair) and the local ones, around a box or free."""
        side, t = self.side_px, self.config.target
        box = box if t.crop else None
        global_crops = pair or sample_crops(rng, side, box, self.rules[0], 2)
        box = box if t.local == "object" else None
        return global_crops + sample_crops(rng, side, box, self.rules[1], self.config.views.local_count)

    def _sample_objects(
        self, rng: np.random.Generator, file: SlideFile, boxes: TargetBoxes, target: Target, crops: list[Crop]
    ) -> list[SampledObject]:
        """Draw further objects, of which both global crops show enough, beside the target; with outlines where configured."""
        t, xyxy = self.config.target, boxes.xyxy
        targets: list[Target | None] = [target]
        if t.objects > 1:
            shared = np.minimum(*(visible_share(crop, xyxy) for crop in crops[:2])) >= t.fraction
            large = (xyxy[:, 2:] - xyxy[:, :2]).prod(1) >= self.min_side_px**2
            targets += further_targets(rng, xyxy, shared & large, t.objects - 1, target)
        in_crops = t.crop and not self._fills(target)
        return [
            SampledObject(
                candidate,
                [file.polygon(int(boxes.row[i])) for i in candidate.rows] if candidate and t.geometry == "polygon" else [],
                in_crops and candidate is target,
            )
            for candidate in targets
        ]

    def _object_masks(self, crops: list[Crop], objects: list[SampledObject], *, local: bool) -> np.ndarray:
        """Find the patches of global or local crops in each object: bool (crops, K, N)."""
        return np.stack([self._object_mask(crops, obj, local) for obj in objects], axis=1)

    def _object_mask(self, crops: list[Crop], obj: SampledObject, local: bool) -> np.ndarray:
        """Find the patches of crops in one object: bool (crops, N).

        All False where there is no object, where its outline lies beside a crop, or where rejection gave up on a crop that was
        to show it.
        """
        t, grid, rule, target = self.config.target, self.grids[local], self.rules[local], obj.target
        if target is None or not crops:
            return np.zeros((len(crops), grid * grid), dtype=bool)
        if target.whole or not t.mask or (local and t.local == "free"):
            return np.ones((len(crops), grid * grid), dtype=bool)
        if obj.outlines:
            masks = np.stack([self._outlines_mask(crop, obj.outlines, grid) for crop in crops])
        else:
            masks = self._box_masks(crops, target.box, grid)
        if obj.in_crops and t.sampler == "reject" and t.fallback != "construct":
            missed = [not shows(crop, target.box, self.side_px, rule) for crop in crops]
            masks[missed] = t.fallback == "full"
        return masks.reshape(len(crops), -1)

    def _outlines_mask(self, crop: Crop, outlines: list[list[np.ndarray]], grid: int) -> np.ndarray:
        """Find the patches of a crop in any outline, bool (grid, grid); of one too small for the rule those it touches."""
        mask: np.ndarray = np.logical_or.reduce([self._outline_mask(crop, rings, grid) for rings in outlines])
        return mask if mask.any() else np.logical_or.reduce([polygon_mask(crop, rings, grid) for rings in outlines])


def kinds_of(config: PretrainConfig) -> np.ndarray:
    """List the kinds of boxes that may be targets, as slide files number them: uint8."""
    return np.array([kind for kind in Kind if kind.word in config.data.kinds], dtype=np.uint8)


def crop_rules(config: PretrainConfig) -> tuple[CropRule, CropRule]:
    """Return the rules by which global and local crops are drawn."""
    v, t = config.views, config.target
    global_rule = CropRule(
        scale=v.global_scale,
        size_px=v.global_size,
        ratio=v.ratio,
        turns=v.turns,
        containment=t.containment,
        fraction=t.fraction,
        sampler=t.sampler,
        tries=t.tries,
        fallback=t.fallback,
    )
    return global_rule, replace(global_rule, scale=v.local_scale, size_px=v.local_size)


def colour_rules(config: PretrainConfig) -> tuple[ColourRule, ...]:
    """Return the colour changes of each view: the first global one, the second, and the locals."""
    v = config.views
    local = ColourRule(
        brightness=v.brightness,
        contrast=v.contrast,
        saturation=v.saturation,
        hue=v.hue,
        jitter_p=v.jitter_p,
        gray_p=v.gray_p,
        blur_p=v.blur_p[2],
        blur_sigma=v.blur_sigma,
        stain_scale=v.stain_scale,
        stain_shift=v.stain_shift,
        stain_p=v.stain_p,
        hue_space=v.hue_space,
    )
    second = replace(local, blur_p=v.blur_p[1], solarise_p=v.solarise_p)
    return (replace(local, blur_p=v.blur_p[0]), second, *(local,) * v.local_count)
