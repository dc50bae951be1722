"""XML of Aperio ImageScope and of HALO -> table: one object a Region, cut by the negative regions of its layer."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from xml.etree.ElementTree import Element

import numpy as np
import shapely

from annotations.errors import UserError
from annotations.geometry.rings import polygon_parts
from annotations.objects import Kind, ObjectTable
from annotations.readers.options import ReadOptions
from annotations.readers.table_builder import Shapes
from annotations.readers.xml.tree import REMEDY, position, refuse_foreign

ROOT = "Annotations"
POSITIONS = ("Vertex", "V")  # ImageScope's, HALO's
EMPTY = frozenset({"Annotation", "Attributes", "Attribute", "Regions", "RegionAttributeHeaders", "AttributeHeader", "Region"})
EMPTY |= {"Vertices", "Comments", "Comment", "Plots"}  # all that a file without a position may hold
RECTANGLES, ELLIPSES = ("1", "rectangle"), ("2", "ellipse")  # Region/@Type, a number in ImageScope, a word in HALO
LINES, POINTS = ("3", "4", "line", "polyline", "ruler", "arrow"), ("5", "counter", "pin", "point")
ELLIPSE_CORNERS = 64


def read_imagescope(root: Element, source: str, options: ReadOptions) -> ObjectTable:
    """Read every Region of every Annotation (a layer), level-0 pixels.

    The class is the layer's Name, or what the region's Text says; the id layer:region by their Id, or numbers. A Region with
    NegativeROA="1" is no object: it is cut out of those of its layer ("holes"; "holes_dropped" where it meets none); in a
    file of HALO those that lie within it stay, as islands in the hole. Rectangles and ellipses may be two corners; an
    ellipse is stored as corners along it. Rulers, arrows and polylines are lines, counters and pins points; a shape of any
    other name is taken for a polygon.
    Raises UserError where the file has no word of the two programs for a layer or for a position.
    """
    layers = root.findall("Annotation")
    if not layers and root.get("MicronsPerPixel") is None:
        raise UserError(f"{source}: XML <{ROOT}> without an <Annotation>: neither ImageScope's nor ASAP's nor HALO's: {REMEDY}")
    refuse_foreign(root, source, POSITIONS, EMPTY)
    is_halo = next(root.iter("V"), None) is not None
    regions, holes = Shapes(), Shapes()
    region_layers: list[int] = []
    hole_layers: list[int] = []
    for number, layer in enumerate(layers):
        for region in layer.iter("Region"):
            is_hole = (region.get("NegativeROA") or "").strip().lower() in ("1", "true")
            _add_region(holes if is_hole else regions, layer, region, len(regions) + len(holes), options)
            (hole_layers if is_hole else region_layers).append(number)
    table, rows = regions.build(options, source)
    if not len(holes):
        return table
    cuts, cut_rows = holes.build(replace(options, point_size_l0=None), source)
    counts = Counter(table.counts)
    counts.update(features=len(holes), holes_dropped=len(holes) - len(cuts))
    counts.update({name: cuts.counts.get(name, 0) for name in ("repaired", "vertices_dropped", "empty", "lines_skipped")})
    layer_of, cut_layer = np.array(region_layers, dtype=np.int64)[rows], np.array(hole_layers, dtype=np.int64)[cut_rows]
    return _cut_out(table, counts, layer_of, cuts.geometry, cut_layer, islands=is_halo)


def _add_region(shapes: Shapes, layer: Element, region: Element, place: int, options: ReadOptions) -> None:
    """Add a region, the one at `place` in the file."""
    form = (region.get("Type") or "").strip().lower()
    xy = [position(vertex) for vertex in region.iter() if vertex.tag in POSITIONS]
    name = (layer.get("Name") or "").strip() or (region.get("Text") or "").strip()
    number = region.get("Id") or str(place)
    row = shapes.add(f"{layer.get('Id') or ''}:{number}", name, options.kind_of(Kind.CELL if form in POINTS else Kind.TISSUE))
    if not xy:
        shapes.lose(row, "empty")
    elif form in LINES:
        shapes.lose(row, "lines_skipped")
    elif form in POINTS:
        shapes.add_points(row, xy)
    elif form in ELLIPSES and len(xy) <= 4:
        shapes.add_ring(row, _ellipse(xy))
    elif form in RECTANGLES and len(xy) == 2:
        (x0, y0), (x1, y1) = xy
        shapes.add_ring(row, [(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
    else:
        shapes.add_ring(row, xy)


def _ellipse(corners: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the ellipse that fills the box around corners."""
    low, high = np.min(corners, axis=0), np.max(corners, axis=0)
    angle = np.arange(ELLIPSE_CORNERS) * (2 * np.pi / ELLIPSE_CORNERS)
    with np.errstate(over="ignore", invalid="ignore"):  # what is no number is dropped and counted later
        ring = (low + high) / 2 + np.stack([np.cos(angle), np.sin(angle)], axis=1) * (high - low) / 2
    return [(float(x), float(y)) for x, y in ring]


def _cut_out(
    table: ObjectTable,
    counts: Counter[str],
    layer: np.ndarray,
    cuts: np.ndarray,
    cut_layer: np.ndarray,
    *,
    islands: bool,
) -> ObjectTable:
    """Cut objects (n,) by the cuts (m,) of their layer; those of which nothing remains are counted as "zero_area".

    islands: an object that lies within a cut is not cut by it.
    """
    geometry = table.geometry.copy()
    cut, row = shapely.STRtree(geometry).query(cuts, predicate="intersects")
    same = cut_layer[cut] == layer[row]
    if islands:
        same &= ~(shapely.covers(cuts[cut], geometry[row]) & ~shapely.covers(geometry[row], cuts[cut]))
    cut, row = cut[same], row[same]
    used = len(np.unique(cut))
    for target in np.unique(row).tolist():
        geometry[target] = shapely.difference(geometry[target], shapely.union_all(cuts[cut[row == target]]))
    geometry = polygon_parts(geometry)
    has_area = shapely.area(geometry) > 0
    counts.update(holes=used, holes_dropped=len(cuts) - used, zero_area=int((~has_area).sum()))
    gone = Counter((name or "", "zero_area") for name in table.take(~has_area).class_names())
    log = replace(table.log, skipped=dict(gone + Counter(table.log.skipped)))
    return replace(table, geometry=geometry, counts=dict(+counts), log=log).take(has_area)
