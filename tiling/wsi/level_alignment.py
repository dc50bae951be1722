"""Place a coarser level of a slide on level 0 by comparing their content.

Headers give the sizes of levels only. Their ratio is the scale where a level holds what level 0 holds; some writers pad levels
to whole stored tiles, each by another amount, and the ratio is off by a tenth or by half. So a level is compared with level 0
at a few places with structure before anything else is read from it, a far one by way of one in between that lies right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

from annotations.errors import UserError
from tiling.wsi.backends.tiff_pages import pages_of, size_of

if TYPE_CHECKING:
    from tiling.wsi.level_view import Levels, LevelView

CELLS = 3  # places looked at along each side of what has structure
ENOUGH = 4  # of them, where they tell and none speaks against the scale
PROBES, PROBE_PX = 8, 64  # along each side of level 0, and the side of one, where stored bytes tell nothing
BUSY_SHARE, BUSIEST = 0.4, 20  # of the structure of about the twentieth busiest part: a place worth looking at
SIDES_PX = (24, 48)  # of a place, in pixels of the level
MOST_FINER_PX = 1536  # of its side, in pixels of the level compared with
LEAST_PX = 16  # of the shorter side of a level: a smaller one is judged by its size
REACH_PX, NEAR_PX = 4, 1  # shifts tried, and the shifts that rounding of sizes explains
MOST_RATIO = 4  # of a level to the one compared with, where there is one
FLAT = 2.5  # grey levels, standard deviation: a smoothed place below it shows nothing
OTHER_TONE = 16.0  # grey levels, mean of a place: not of the same place
LIKE = 0.5  # correlation of a place with itself in another level, unless it stands out
TELLING = 0.1  # fall of the correlation within the reach: below it a shift along this axis would not show
SURE = 0.02  # fall of the correlation that counts where it is 1 but for it
MOST_AGAINST = 0.25  # share of the places that tell
ROUNDED_PX = 1  # by which writers round the size of a level


class Alignment(Enum):
    """The result of comparing a level at a scale with level 0, over all places."""

    ALIGNED = "lies there"
    MISALIGNED = "lies elsewhere"
    UNDECIDED = "shows too little to tell"


@dataclass(frozen=True)
class Placement:
    """Place of a level. downsample: level-0 pixels per pixel of it, None where it is not to be used; alignment: on its size."""

    downsample: float | None
    alignment: Alignment


def place_level(slide: Levels, level: int) -> Placement:
    """Place a level on level 0; a padded one of a power of two gets its true scale.

    Where content tells nothing, of blank slides, sizes decide: they are believed where both are level 0's divided by the same
    power of two, up to rounding.
    """
    stated = slide.info.level_downsamples[level]
    alignment = compare_level(slide, level, stated)
    if alignment is Alignment.ALIGNED:
        return Placement(stated, alignment)
    if alignment is Alignment.UNDECIDED:
        return Placement(stated if _is_power_of_two(slide, level) else None, alignment)
    nearest = round(math.log2(stated))
    powers = sorted((2.0**power for power in range(max(1, nearest - 1), nearest + 3)), key=lambda s: abs(math.log(s / stated)))
    scales = (scale for scale in powers if scale != stated)
    return Placement(
        next((scale for scale in scales if compare_level(slide, level, scale, 0.0) is Alignment.ALIGNED), None), alignment
    )


def compare_level(slide: Levels, level: int, downsample: float, most_against: float = MOST_AGAINST) -> Alignment:
    """Compare a level with level 0 divided by `downsample`, x and y apart; places that cannot be decoded do not count.

    most_against: the share of the telling places below which those that differ are overlooked.
    """
    finer = _finer(slide, level, downsample)
    if finer is None:
        return Alignment.MISALIGNED
    width, height = slide.info.level_dimensions[level]
    side = min(int(np.clip(MOST_FINER_PX * finer.downsample / downsample, *SIDES_PX)), width, height)
    if side < LEAST_PX:
        return Alignment.UNDECIDED
    against = telling = 0
    axes_seen = np.zeros(2, bool)
    for corner in _corners(slide, level, side, downsample):
        pair = _read_pair(slide, level, finer, corner, side, downsample)
        if pair is None:
            continue
        differs, axes = _compare_patches(*pair)
        against += differs
        telling += differs or bool(axes.any())
        axes_seen |= axes
        if telling >= ENOUGH and axes_seen.all() and not against:
            break
    if against > most_against * telling:
        return Alignment.MISALIGNED
    return Alignment.ALIGNED if axes_seen.all() else Alignment.UNDECIDED


def textured_places(slide: Levels) -> np.ndarray:
    """Find middles of parts with structure: float (N, 2) x, y in level-0 pixels, up to `CELLS` x `CELLS`, far apart.

    The bytes of compressed tiles tell of structure; where there are none, some small places are read.
    """
    structure, places = _structure_by_bytes(slide) or _structure_by_pixels(slide)
    busiest = np.sort(structure)[::-1][min(BUSIEST, structure.size // 50)]
    busy = structure >= max(BUSY_SHARE * busiest, 1e-6)
    structure, places = structure[busy], np.asarray(places[busy])
    if not len(places):
        return places
    low, high = places.min(axis=0), places.max(axis=0)
    column, row = ((places - low) * CELLS // (high - low + 1)).astype(int).T
    cell = row * CELLS + column
    by_cell = np.lexsort((-structure, cell))
    return _spread_apart(places[by_cell[np.unique(cell[by_cell], return_index=True)[1]]])


def _structure_by_bytes(slide: Levels) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the bytes of compressed tiles of level 0 of a TIFF, float (N,), and their middles (N, 2); None without."""
    size = slide.info.size_l0
    pages = [page for page in pages_of(slide.info.path) if size_of(page) == size and page.is_tiled and page.compression != 1]
    if not pages:
        return None
    tile_w, tile_h = pages[0].tilewidth, pages[0].tilelength
    columns, rows = (-(-whole // tile) for whole, tile in zip(size, (tile_w, tile_h), strict=True))
    counts = np.array(pages[0].databytecounts[: rows * columns], np.float64)  # of the first plane, where they are apart
    row, column = np.divmod(np.arange(len(counts)), columns)
    places = np.stack([(column + 0.5) * tile_w, (row + 0.5) * tile_h], axis=1)
    return (counts, np.minimum(places, size)) if len(counts) else None


def _spread_apart(places: np.ndarray) -> np.ndarray:
    """Order places so that the first few lie far apart, and the first far from the origin, where a scale shows most."""
    order = [int(places.sum(axis=1).argmax())]
    while len(order) < len(places):
        gaps = np.abs(places[:, None] - places[order]).max(axis=2).min(axis=1)
        gaps[order] = -1
        order.append(int(gaps.argmax()))
    return places[order]


def _structure_by_pixels(slide: Levels) -> tuple[np.ndarray, np.ndarray]:
    """Measure structure of level 0 in grey levels, float (N,), at places (N, 2) in pixels, no two in one row or column."""
    view = slide.full_view(0)
    row, column = np.indices((PROBES, PROBES)).reshape(2, -1)
    skewed = np.stack([column + (row + 0.5) / PROBES, row + (column + 0.5) / PROBES], axis=1) / PROBES
    places = skewed * (view.width, view.height)
    w, h = min(PROBE_PX, view.width), min(PROBE_PX, view.height)
    structure = np.zeros(len(places))
    for i, (x, y) in enumerate(places.tolist()):
        left, top = int(np.clip(x - w / 2, 0, view.width - w)), int(np.clip(y - h / 2, 0, view.height - h))
        pixels = _decoded(slide, view, (left, top, left + w, top + h))
        structure[i] = 0.0 if pixels is None else _grey(pixels).std()
    return np.where(structure < FLAT, 0.0, structure), places


def _finer(slide: Levels, level: int, downsample: float) -> LevelView | None:
    """Choose the level to compare with: the finest that lies right and is not much finer; None where none is finer at all."""
    sizes = slide.info.level_downsamples
    views = [slide.full_view(finer) for finer, size in enumerate(sizes) if size < sizes[level] and slide.downsample(finer)]
    finer = [view for view in views if view.downsample < downsample]
    near = [view for view in finer if downsample / view.downsample <= MOST_RATIO]
    if near:
        return min(near, key=lambda view: view.downsample)
    return max(finer, key=lambda view: view.downsample, default=None)


def _corners(slide: Levels, level: int, side: int, downsample: float) -> list[tuple[int, int]]:
    """List top left corners of the places to look at in a level, in its pixels; no two that are half the same."""
    info = slide.info
    ends = [
        min(own, math.ceil(whole / downsample)) for own, whole in zip(info.level_dimensions[level], info.size_l0, strict=True)
    ]
    corners: list[tuple[int, int]] = []
    for place in slide.textured_places.tolist():
        x, y = (max(0, min(round(at / downsample - side / 2), end - side)) for at, end in zip(place, ends, strict=True))
        if all(max(abs(x - u), abs(y - v)) >= side / 2 for u, v in corners):
            corners.append((x, y))
    return corners


def _read_pair(
    slide: Levels, level: int, finer: LevelView, corner: tuple[int, int], side: int, downsample: float
) -> tuple[np.ndarray, np.ndarray] | None:
    """Read a place out of a finer level, `REACH_PX` wider all round, and out of the level: smoothed grey. None: not decoded."""
    from tiling.wsi.level_view import LevelView, pixel_bounds

    x, y = corner
    width, height = slide.info.level_dimensions[level]
    own = _decoded(slide, LevelView(level, 1, downsample, width, height), (x, y, x + side, y + side))
    box = tuple(at * downsample for at in (x - REACH_PX, y - REACH_PX, x + side + REACH_PX, y + side + REACH_PX))
    (edges,) = pixel_bounds(finer, np.array([box])).tolist()
    block = _decoded(slide, finer, edges) if own is not None else None
    if own is None or block is None:
        return None
    wide = side + 2 * REACH_PX
    return _smoothed_grey(slide.resample_block(finer, edges, block, box, wide, wide)), _smoothed_grey(own)


def _compare_patches(wide: np.ndarray, own: np.ndarray) -> tuple[bool, np.ndarray]:
    """Tell whether a place differs from level 0, and whether it would show shifts along x and y: bool (2,).

    wide, own: as from `_read_pair`. A place that differs tells of neither; nor does one that is flat in both.
    """
    neither = np.zeros(2, bool)
    windows = np.lib.stride_tricks.sliding_window_view(wide, own.shape)
    middle = windows[REACH_PX, REACH_PX]
    if abs(float(middle.mean() - own.mean())) > OTHER_TONE:
        return True, neither
    spread, own_spread = _window_deviations(wide, own.shape), float(own.std())
    if max(float(spread[REACH_PX, REACH_PX]), own_spread) < FLAT:
        return False, neither
    products = np.einsum("abij,ij->ab", windows, own - own.mean()) / own.size
    alike = products / (np.maximum(spread, FLAT / 2) * max(own_spread, FLAT / 2))  # -1 to 1, by shifts in y and x
    near = slice(REACH_PX - NEAR_PX, REACH_PX + NEAR_PX + 1)
    inside, best = float(alike[near, near].max()), float(alike.max())
    falls = np.array([inside - alike[:, [0, -1]].max(), inside - alike[[0, -1]].max()])
    stands_out = inside == best and bool((falls > TELLING).all())  # noise, of which a level keeps every other pixel
    if (inside < LIKE and not stands_out) or best - inside > 1 - best + SURE:
        return True, neither
    return False, falls > min(TELLING, 2 * (1 - inside) + SURE)


def _decoded(slide: Levels, view: LevelView, edges: tuple[int, ...]) -> np.ndarray | None:
    """Read pixels of a view, uint8 (h, w, 3); None where they cannot be decoded."""
    left, top, right, bottom = edges
    try:
        return slide.read_block(view, (left, top, right, bottom))
    except UserError:
        slide.reopen()
        return None


def _grey(rgb: np.ndarray) -> np.ndarray:
    grey: np.ndarray = rgb.mean(axis=2, dtype=np.float32)
    return grey


def _smoothed_grey(rgb: np.ndarray) -> np.ndarray:
    """Average each pixel with its neighbours to grey, float (h, w): levels made of every other pixel are noisy."""
    grey = _grey(rgb)
    for _ in range(2):
        wide = np.pad(grey, 1, mode="edge")
        rows = wide[:-2] + 2 * wide[1:-1] + wide[2:]
        grey = (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 16
    return grey


def _window_deviations(wide: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Compute the standard deviation of every window of this shape."""
    sums = []
    for values in (wide.astype(np.float64), wide.astype(np.float64) ** 2):
        total = np.pad(values.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
        h, w = shape
        sums.append((total[h:, w:] - total[:-h, w:] - total[h:, :-w] + total[:-h, :-w]) / (h * w))
    deviations: np.ndarray = np.sqrt(np.maximum(sums[1] - sums[0] ** 2, 0))
    return deviations


def _is_power_of_two(slide: Levels, level: int) -> bool:
    """Tell whether the size of a level is level 0's divided by 2, 4, 8 and so on, up to rounding."""
    sides = list(zip(slide.info.size_l0, slide.info.level_dimensions[level], strict=True))
    power = 2.0 ** round(math.log2(slide.info.level_downsamples[level]))
    return all(abs(whole / power - own) <= ROUNDED_PX for whole, own in sides)


def describe_placements(slide: Levels, *, odd: bool = False) -> str:
    """Describe in one line the levels that do not lie where their size says, or may not; empty where there are none.

    odd: look at those whose size is no half, quarter and so on of level 0, beside those that were wanted so far.
    """
    stated = slide.info.level_downsamples
    for level in range(1, len(stated)) if odd else ():
        if not _is_power_of_two(slide, level):
            slide.downsample(level)
    placed = sorted(slide.placements.items())
    unused = {level: placement.alignment for level, placement in placed if placement.downsample is None}
    misaligned = [level for level, alignment in unused.items() if alignment is Alignment.MISALIGNED]
    undecided = [level for level, alignment in unused.items() if alignment is Alignment.UNDECIDED]
    moved = {level: own for level, placement in placed if (own := placement.downsample) not in (None, stated[level])}
    remarks = []
    if misaligned:
        remarks.append(f"size and content of {_levels(misaligned)} disagree: not used")
    if undecided:
        remarks.append(f"neither size nor content of {_levels(undecided)} tells the scale: not used")
    if moved:
        scales = ", ".join(f"1/{own:g}" for own in moved.values())
        remarks.append(f"size and content of {_levels(list(moved))} disagree, as of padded ones: read as {scales} of level 0")
    return "; ".join(remarks)


def _levels(levels: list[int]) -> str:
    """ "level 2", "levels 1 and 2", "levels 1 to 3", "levels 1, 3 and 4"."""
    if len(levels) == 1:
        return f"level {levels[0]}"
    if len(levels) > 2 and levels[-1] - levels[0] == len(levels) - 1:
        return f"levels {levels[0]} to {levels[-1]}"
    return f"levels {', '.join(map(str, levels[:-1]))} and {levels[-1]}"
