"""Outlines of COCO annotations: polygons, run-length masks, else boxes; and the reason where an annotation has none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import shapely

from annotations.geometry.rings import Rings, drop_reasons, is_beyond, is_usable, polygons_from_rings, repair
from annotations.readers.class_name import unpacked
from annotations.readers.coco.document import Annotation
from annotations.readers.coco.run_length import Runs, outlines_of, runs_of

BLOCK = 50_000  # annotations whose outlines are made together, which bounds memory
Size = tuple[int, int]


@dataclass
class Outlined:
    """Annotations and their outlines.

    geometry: object (n,), one an annotation, None for those left out; reason: row -> why it is left out.
    repaired: row -> what was wrong with it. changed: (row, what) -> how often, as in the counts of a table. sizes: image ->
    width and height, of those known beforehand and of those whose masks tell.
    """

    geometry: np.ndarray
    sizes: dict[int, Size]
    reason: dict[int, str] = field(default_factory=dict)
    repaired: dict[int, str] = field(default_factory=dict)
    changed: Counter[tuple[int, str]] = field(default_factory=Counter)


@dataclass
class _Block:
    """Outlines of annotations before they are built. rings: one a polygon; masks that can be read; row of each."""

    rings: list[np.ndarray] = field(default_factory=list)
    ring_row: list[int] = field(default_factory=list)
    masks: list[Runs] = field(default_factory=list)
    mask_row: list[int] = field(default_factory=list)


def outlined(items: Sequence[Annotation], image: Sequence[int], sizes: Mapping[int, Size]) -> Outlined:
    """Build the outlines of annotations (n,), whose images are numbered image (n,), and of which a few may have a known size.

    Polygons of one annotation add up, as parts of it. A mask has to be as large as its image; where the image's size is not
    stated, the first mask's counts. What has no outline that can be used is its box ("outlines_as_boxes",
    "masks_as_boxes"); what has no box either is left out: "empty" without both, "malformed", "invalid_dropped" with fewer
    than three corners, "zero_area", "tangled".
    """
    done = Outlined(np.full(len(items), None, dtype=object), dict(sizes))
    for start in range(0, len(items), BLOCK):
        rows = range(start, min(start + BLOCK, len(items)))
        block = _Block()
        for row in rows:
            _sort(row, items[row].segmentation, image[row], block, done)
        _build(block, done)
        _fill_with_boxes(rows, items, done)
    return done


def _sort(row: int, segmentation: Any, image: int, block: _Block, done: Outlined) -> None:
    """Put the rings or the mask of an annotation into the block; `reason` says what is wrong with it, for now."""
    segmentation = segmentation and unpacked(segmentation)
    if not segmentation or (isinstance(segmentation, list) and not any(segmentation)):
        return
    try:
        if isinstance(segmentation, dict):
            runs, size = runs_of(segmentation)
            if done.sizes.get(image, size) != size:
                raise ValueError("a mask of another size than its image")
            if len(runs[0]):
                done.sizes[image] = size
            block.masks.append(runs)
            block.mask_row.append(row)
            done.reason[row] = "zero_area"
            return
        rings = _rings(segmentation, done.changed, row)
        block.rings += rings
        block.ring_row += [row] * len(rings)
        done.reason[row] = "invalid_dropped"
    except (ValueError, TypeError, OverflowError):
        done.reason[row] = "malformed"


def _rings(segmentation: Any, changed: Counter[tuple[int, str]], row: int) -> list[np.ndarray]:
    """Return polygons, float64 (m, 2) each: one or several, x, y, x, y, ... or in pairs. Raises ValueError else."""
    parts = segmentation if isinstance(segmentation[0], list) else [segmentation]
    if all(len(part) == 2 and not isinstance(part[0], list) for part in parts):
        parts = [parts]  # of one polygon in pairs
    rings = []
    for part in parts:
        ring = np.array(part, dtype=np.float64)  # takes None for NaN, which is counted later
        if ring.ndim == 1:
            if len(ring) % 2:
                changed[row, "vertices_dropped"] += 1
            ring = ring[: len(ring) // 2 * 2].reshape(-1, 2)
        if ring.ndim != 2 or ring.shape[1] < 2:
            raise ValueError("positions are not pairs of numbers")
        rings.append(ring[:, :2])
    return rings


def _build(block: _Block, done: Outlined) -> None:
    """Make the geometry of a block; those that come out have no `reason` any more."""
    length = np.array([len(ring) for ring in block.rings], dtype=np.int64)
    owner = np.array(block.ring_row, dtype=np.int64)
    xy = np.concatenate([np.zeros((0, 2)), *block.rings])
    rings = Rings(xy, length, np.ones(len(length), np.int64))
    polygons, of_polygon = polygons_from_rings(rings, owner, Counter())
    dropped = np.setdiff1d(owner, of_polygon)
    done.reason |= zip(dropped.tolist(), drop_reasons(rings, owner, dropped), strict=True)
    which, masks = outlines_of(block.masks)
    rows = np.concatenate([of_polygon, np.array(block.mask_row, dtype=np.int64)[which]])
    order = np.argsort(rows)
    rows, outlines = rows[order], np.concatenate([polygons, masks])[order]
    repaired = repair(outlines, Counter())
    done.reason |= {int(rows[outline]): reason for outline, reason in repaired.lost}
    rows = rows[repaired.kept]
    done.geometry[rows] = repaired.geometry
    for row in rows.tolist():
        del done.reason[row]
    bad = rows[repaired.was_invalid].tolist()
    done.repaired |= dict.fromkeys(bad, "") | dict(zip(bad, repaired.problems, strict=False))
    _count_lost_parts(rings, owner, polygons, of_polygon, rows, done.changed)


def _count_lost_parts(
    rings: Rings,
    owner: np.ndarray,
    polygons: np.ndarray,
    of_polygon: np.ndarray,
    kept: np.ndarray,
    changed: Counter[tuple[int, str]],
) -> None:
    """Count of outlines that are kept: positions that are no numbers, and parts of fewer than three corners."""
    if not len(owner):
        return
    keeps = np.isin(owner, kept)
    bad = np.repeat(owner, rings.length)[~is_usable(rings.xy)]
    names, counts = np.unique(bad[np.isin(bad, kept)], return_counts=True)
    changed.update(dict(zip([(row, "vertices_dropped") for row in names.tolist()], counts.tolist(), strict=True)))
    given = Counter(owner[keeps].tolist())
    parts = dict(zip(of_polygon.tolist(), shapely.get_num_geometries(polygons).tolist(), strict=True))
    changed.update({(row, "parts_dropped"): n - parts[row] for row, n in given.items() if n > parts[row]})


def _fill_with_boxes(rows: range, items: Sequence[Annotation], done: Outlined) -> None:
    """Give annotations that have no outline that of their box (x, y, width, height)."""
    missing = [row for row in rows if done.geometry[row] is None]
    boxed = [row for row in missing if (box := items[row].bbox) is not None and len(box) == 4]
    xywh = np.array([items[row].bbox for row in boxed], dtype=np.float64).reshape(-1, 4)
    numbers, area = is_usable(xywh), (xywh[:, 2:] > 0).all(axis=1)  # NaN compares false
    good = numbers & area
    low, size = xywh[good, :2], xywh[good, 2:]
    boxed_rows = np.array(boxed, dtype=np.int64)[good]
    done.geometry[boxed_rows] = shapely.box(*low.T, *(low + size).T)
    for row in boxed_rows.tolist():
        if row in done.reason:
            what = "masks_as_boxes" if isinstance(items[row].segmentation, dict) else "outlines_as_boxes"
            done.changed[row, what] += 1
            del done.reason[row]
    far = is_beyond(xywh) & np.isfinite(xywh).all(axis=1)
    why = dict(zip(boxed, np.select([numbers, far], ["zero_area", "beyond"], "malformed").tolist(), strict=True))
    for row in missing:
        if done.geometry[row] is None:
            done.reason.setdefault(row, why.get(row, "malformed" if items[row].bbox else "empty"))
