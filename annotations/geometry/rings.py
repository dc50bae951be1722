"""Rings of positions -> valid polygons, in bulk: cleaned, closed, repaired, and every loss counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from typing import NamedTuple, cast

import msgspec
import numpy as np
import shapely

from annotations.objects import SHOWN_REPAIRS

BATCH_BYTES = 8 << 20  # bounds the list of Python floats that is alive at a time
NOT_IN_NUMBERS = b"[] \n\t\r"
NOT_BRACKETS = b"0123456789.eE+- \n\t\r"
POLYGON, RING, POSITION = 2, 3, 4  # depth of their opening brackets in a list of polygons
MAX_COORDINATE_L0 = 1e9  # no slide is a thousand million pixels wide; beyond this a coordinate is damage
TANGLED = 5_000  # vertices: below this whatever crosses itself can be repaired
SURE = 1e-12
SAMPLED_PAIRS, MAX_CROSSINGS = 20_000, 3_000_000  # a repair takes about 10 us a crossing

Ring = list[tuple[float, float]]

_floats = msgspec.json.Decoder(list[float])
_polygons = msgspec.json.Decoder(list[list[Ring]])


class Rings(NamedTuple):
    """R rings of P polygons, laid end to end.

    xy: float64 (V, 2) positions; length: int64 (R,) positions of each ring, closed or not; per_polygon: int64 (P,)
    rings of each polygon, the outline first, then holes.
    """

    xy: np.ndarray
    length: np.ndarray
    per_polygon: np.ndarray


class Repaired(NamedTuple):
    """K valid geometries with area, of n given.

    geometry: object (K,); kept: int64 (K,), which of the given each is; was_invalid: bool (K,); problems: what was wrong with
    the first SHOWN_REPAIRS of those, in order; lost: which of the given is left out, and why: "tangled" or "zero_area".
    """

    geometry: np.ndarray
    kept: np.ndarray
    was_invalid: np.ndarray
    problems: list[str]
    lost: list[tuple[int, str]]


class IrregularPositionError(ValueError):
    """Somewhere there is no pair of numbers where a position belongs."""


def rings_of(polygons: Sequence[msgspec.Raw] | Sequence[list[Ring]]) -> Rings:
    """Read the rings of polygons, whose coordinates are JSON or lists. Raises IrregularPositionError as rings_from_json."""
    if len(polygons) and isinstance(polygons[0], msgspec.Raw):
        return rings_from_json(cast("Sequence[msgspec.Raw]", polygons))
    return rings_from_lists(cast("Sequence[list[Ring]]", polygons))


def rings_from_json(raws: Sequence[msgspec.Raw]) -> Rings:
    """Read `coordinates` of polygons as JSON.

    Raises IrregularPositionError where a polygon is not a list of lists of pairs of numbers.
    """
    parts = [_regular(batch) or _any_pairs(batch) for batch in _batches(raws)]
    if not parts:
        return Rings(np.zeros((0, 2)), np.zeros(0, np.int64), np.zeros(0, np.int64))
    return Rings(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def rings_from_lists(polygons: Sequence[list[Ring]]) -> Rings:
    """Read polygons that are lists of rings of (x, y)."""
    count = np.fromiter(map(len, polygons), np.int64, len(polygons))
    rings = list(chain.from_iterable(polygons))
    length = np.fromiter(map(len, rings), np.int64, len(rings))
    flat = chain.from_iterable(chain.from_iterable(rings))
    return Rings(np.fromiter(flat, np.float64, 2 * int(length.sum())).reshape(-1, 2), length, count)


def _batches(raws: Sequence[msgspec.Raw]) -> Iterator[bytes]:
    """Yield lists of polygons, as JSON, of about BATCH_BYTES each."""
    size = np.array([memoryview(raw).nbytes for raw in raws], dtype=np.int64)
    cuts = (np.flatnonzero(np.diff(np.cumsum(size) // BATCH_BYTES)) + 1).tolist()
    for start, stop in pairwise([0, *cuts, len(raws)]):
        if stop > start:
            yield b"[" + b",".join(raws[start:stop]) + b"]"


def _regular(text: bytes) -> Rings | None:
    """Read numbers and brackets apart; None where something is empty, or no pair of numbers."""
    try:
        numbers = _floats.decode(b"[" + text.translate(None, NOT_IN_NUMBERS) + b"]")
    except msgspec.DecodeError:
        return None
    skeleton = text.translate(None, NOT_BRACKETS)
    pairs = skeleton.count(b"[,]")
    if len(numbers) != 2 * pairs:
        return None
    characters = np.frombuffer(skeleton, np.uint8)
    brackets = characters[characters != ord(",")]
    is_open = brackets == ord("[")
    depth = np.cumsum(np.where(is_open, np.int8(1), np.int8(-1)), dtype=np.int8)[is_open]
    at = [np.flatnonzero(depth == level) for level in (POLYGON, RING, POSITION)]
    if len(at[2]) != pairs or 1 + sum(map(len, at)) != len(depth):
        return None
    ends = len(depth)
    length = np.diff(np.searchsorted(at[2], np.append(at[1], ends)))
    rings = np.diff(np.searchsorted(at[1], np.append(at[0], ends)))
    return Rings(np.array(numbers, dtype=np.float64).reshape(-1, 2), length.astype(np.int64), rings.astype(np.int64))


def _any_pairs(text: bytes) -> Rings:
    try:
        return rings_from_lists(_polygons.decode(text))
    except msgspec.DecodeError as error:
        raise IrregularPositionError(str(error)) from None


def is_usable(xy: np.ndarray) -> np.ndarray:
    """Tell which positions (V, 2) are finite and on any conceivable slide; bool (V,)."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.all([np.abs(column) <= MAX_COORDINATE_L0 for column in xy.T], axis=0))


def is_beyond(xy: np.ndarray) -> np.ndarray:
    """Tell which positions (V, 2) are numbers, but on no conceivable slide; bool (V,)."""
    return np.asarray((np.abs(xy) > MAX_COORDINATE_L0).any(axis=1))


def drop_reasons(rings: Rings, group: np.ndarray, dropped: np.ndarray) -> list[str]:
    """Tell why polygons_from_rings, given the same, drops each of some groups whole: "beyond" or "invalid_dropped"."""
    far = np.unique(np.repeat(np.repeat(group, rings.per_polygon), rings.length)[is_beyond(rings.xy)])
    return ["beyond" if is_far else "invalid_dropped" for is_far in np.isin(dropped, far).tolist()]


def polygons_from_rings(rings: Rings, group: np.ndarray, counts: Counter[str]) -> tuple[np.ndarray, np.ndarray]:
    """Build polygons, or MultiPolygons where several share a group number; unrepaired.

    group: (P,) int64, ascending, the row each polygon belongs to
    Returns geometry (G,) object and (G,) int64, the group of each. Positions that are not usable are dropped
    ("vertices_dropped"), holes of fewer than three corners too ("holes_dropped"); a polygon whose outline has fewer
    than three corners is left out ("invalid_dropped"), one without any ring as well ("empty"): all are added to counts.
    """
    xy, length, ring_count = rings
    n_rings, n_polygons = len(length), len(ring_count)
    counts["empty"] += int((ring_count == 0).sum())

    good = is_usable(xy)
    if not good.all():
        counts["vertices_dropped"] += int((~good).sum())
        length = np.bincount(np.repeat(np.arange(n_rings), length)[good], minlength=n_rings)
        xy = xy[good]
    polygon_of_ring = np.repeat(np.arange(n_polygons), ring_count)
    is_outline = np.ones(n_rings, dtype=bool)
    is_outline[1:] = polygon_of_ring[1:] != polygon_of_ring[:-1]

    xy, length = _closed(xy, length)
    long_enough = length >= 4
    bad_outline = is_outline & ~long_enough
    counts["invalid_dropped"] += int(bad_outline.sum())
    counts["holes_dropped"] += int((~is_outline & ~long_enough).sum())
    alive = np.ones(n_polygons, dtype=bool)
    alive[polygon_of_ring[bad_outline]] = False
    alive &= ring_count > 0
    use = long_enough & alive[polygon_of_ring]
    if not use.all():
        xy, length, polygon_of_ring = xy[np.repeat(use, length)], length[use], polygon_of_ring[use]
    if not alive.any():
        return np.empty(0, dtype=object), np.empty(0, dtype=np.int64)

    ring_offsets = np.concatenate([[0], np.cumsum(length)])
    per_polygon = np.bincount(polygon_of_ring, minlength=n_polygons)[alive]
    polygon_offsets = np.concatenate([[0], np.cumsum(per_polygon)])
    built = shapely.from_ragged_array(shapely.GeometryType.POLYGON, xy, (ring_offsets, polygon_offsets))
    return _grouped(np.asarray(built, dtype=object), group[alive])


def _closed(xy: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Close rings laid end to end: each ends where it starts; empty rings stay empty."""
    end = np.cumsum(length)
    filled = np.flatnonzero(length)
    open_ring = filled[(xy[end[filled] - 1] != xy[end[filled] - length[filled]]).any(axis=1)]
    if not len(open_ring):
        return xy, length
    closed = np.insert(xy, end[open_ring], xy[end[open_ring] - length[open_ring]], axis=0)
    length = length.copy()
    length[open_ring] += 1
    return closed, length


def _grouped(polygons: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Join polygons that share a group number into MultiPolygons; returns them and the group of each."""
    names, row, size = np.unique(group, return_inverse=True, return_counts=True)
    if len(names) == len(polygons):
        return polygons, names
    geometry = np.empty(len(names), dtype=object)
    single = size[row] == 1
    geometry[row[single]] = polygons[single]
    several = np.flatnonzero(size > 1)
    rank = np.searchsorted(several, row[~single])
    geometry[several] = shapely.multipolygons(polygons[~single], indices=rank)
    return geometry, names


def repair(geometry: np.ndarray, counts: Counter[str]) -> Repaired:
    """Make geometries (n,) valid.

    Invalid ones are repaired by make_valid, polygon parts kept ("repaired"); what has no area is left out ("zero_area"), and
    so is what crosses itself too often to be repaired in any time ("invalid_dropped"): all are added to counts.
    """
    original, geometry = geometry, geometry.copy()
    many = np.flatnonzero(shapely.get_num_coordinates(geometry) > TANGLED)
    tangled = [i for i in many.tolist() if _is_tangled(geometry[i])]  # before even the question whether they are valid
    geometry[tangled] = shapely.Polygon()
    doubtful = np.flatnonzero(~is_star_shaped(geometry))
    invalid = doubtful[~shapely.is_valid(geometry[doubtful])]
    if len(invalid):
        # "structure" keeps all that a hand-drawn loop encloses; "linework" has a hole where it crosses itself.
        fixed = polygon_parts(shapely.make_valid(geometry[invalid], method="structure", keep_collapsed=False))
        # Rarely it leaves something invalid, once and for all mended by the other way.
        for method in (shapely.make_valid, _buffered):
            if len(still := np.flatnonzero(~shapely.is_valid(fixed))):
                fixed[still] = polygon_parts(method(fixed[still]))
        fixed[~shapely.is_valid(fixed)] = shapely.Polygon()
        geometry[invalid] = fixed
    has_area = shapely.area(geometry) > 0
    was_invalid = np.zeros(len(geometry), dtype=bool)
    was_invalid[invalid] = True
    rows = invalid[has_area[invalid]]
    counts.update(repaired=len(rows), zero_area=int((~has_area).sum()) - len(tangled), invalid_dropped=len(tangled))
    problems = shapely.is_valid_reason(original[rows[:SHOWN_REPAIRS]])
    lost = [(row, "tangled" if row in tangled else "zero_area") for row in np.flatnonzero(~has_area).tolist()]
    return Repaired(geometry[has_area], np.flatnonzero(has_area), was_invalid[has_area], list(map(str, problems)), lost)


def _buffered(geometry: np.ndarray) -> np.ndarray:
    return np.asarray(shapely.buffer(geometry, 0.0), dtype=object)


def is_star_shaped(geometry: np.ndarray) -> np.ndarray:
    """Tell which polygons have one ring and are certainly valid, as cells nearly always are; bool (n,).

    All their edges turn the same way round a point inside, and once in all. Cheaper by far than to ask GEOS.

    Differences of floats have the right sign, and products of two differences are off by less than SURE of their size; so an
    edge counts only where it is clear of the point.
    """
    sure = (shapely.get_type_id(geometry) == 3) & (shapely.get_num_interior_rings(geometry) == 0)
    rows = np.flatnonzero(sure & ~shapely.is_empty(geometry))
    sure = np.zeros(len(geometry), dtype=bool)
    if not len(rows):
        return sure
    x, y = shapely.get_coordinates(geometry[rows]).T.copy()
    length = shapely.get_num_coordinates(geometry[rows])
    start = np.cumsum(length) - length
    x -= np.repeat(np.add.reduceat(x, start) / length, length)
    y -= np.repeat(np.add.reduceat(y, start) / length, length)
    a, b = x[:-1] * y[1:], x[1:] * y[:-1]
    turn, least = a - b, SURE * (np.abs(a) + np.abs(b))
    upward = (y[:-1] < 0) & (y[1:] >= 0)
    between = start[1:] - 1  # from the end of one ring to the start of the next is no edge
    turn[between], upward[between] = 0, False
    left, right, rises = (np.add.reduceat(edges, start, dtype=np.int64) for edges in (turn > least, turn < -least, upward))
    sure[rows] = ((left == length - 1) | (right == length - 1)) & (rises == 1)
    return sure


def _is_tangled(geometry: shapely.Geometry) -> bool:
    """Estimate from a sample of pairs of edges whether its outlines cross more than MAX_CROSSINGS times."""
    xy, ring = shapely.get_coordinates(shapely.get_rings(shapely.get_parts(geometry)), return_index=True)
    edges = np.flatnonzero(ring[1:] == ring[:-1])
    pairs = edges[np.random.default_rng(0).integers(0, len(edges), (2, SAMPLED_PAIRS))]
    (a, c), (b, d) = xy[pairs], xy[pairs + 1]

    def side(p: np.ndarray, q: np.ndarray, r: np.ndarray) -> np.ndarray:
        return np.asarray(np.sign((q - p)[:, 0] * (r - p)[:, 1] - (q - p)[:, 1] * (r - p)[:, 0]))

    crossing = (side(a, b, c) * side(a, b, d) < 0) & (side(c, d, a) * side(c, d, b) < 0)
    return float(crossing.mean()) * len(xy) ** 2 / 2 > MAX_CROSSINGS


def polygon_parts(geometry: np.ndarray) -> np.ndarray:
    """Take points and lines out of collections; an empty polygon where nothing is left."""
    geometry = np.array(geometry, dtype=object)
    mixed = np.flatnonzero(~np.isin(shapely.get_type_id(geometry), (3, 6)))
    for i in mixed.tolist():  # few: what a repair or a cut leaves of slivers and touching edges
        parts = shapely.get_parts(shapely.get_parts(geometry[i]))
        geometry[i] = shapely.union_all(parts[shapely.get_type_id(parts) == 3])
        if shapely.get_type_id(geometry[i]) not in (3, 6):
            geometry[i] = shapely.Polygon()
    return geometry
