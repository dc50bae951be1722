"""Aperio ImageScope's XML -> table: one object a Region, cut by the negative regions of its layer."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from xml.etree.ElementTree import Element

import numpy as np
import shapely

from annotations.build import Shapes, add, kind_of
from annotations.errors import UserError
from annotations.frame import SlideFrame
from annotations.rings import polygon_parts
from annotations.table import CELL, TISSUE, ObjectTable
from annotations.xmltree import position

ROOT = "Annotations"
RECTANGLE, ELLIPSE, LINES, COUNTER = "1", "2", ("3", "4"), "5"  # Region/@Type; 0 is a polygon
ELLIPSE_CORNERS = 64


def read_imagescope(
    root: Element, source: str, *, kind: str, point_size_l0: float | None, scale: float, frame: SlideFrame
) -> ObjectTable:
    """Every Region of every Annotation (a layer), level-0 pixels.

    The class is the layer's Name, or what the region's Text says; the id layer:region by their Id. A Region with
    NegativeROA="1" is no object: it is cut out of those of its layer ("holes"; "holes_dropped" where it meets none).
    An ellipse is stored as the corners around it. Rulers and arrows are lines, counters points.
    Raises UserError where there is no layer, so that it is no file of ImageScope's.
    """
    layers = root.findall("Annotation")
    if not layers and root.get("MicronsPerPixel") is None:
        raise UserError(f"{source}: XML <{ROOT}> without an <Annotation>: neither ImageScope's nor ASAP's: export as GeoJSON")
    counts = {"features": 0}
    regions, holes = Shapes(), Shapes()
    layer_of: tuple[list[int], list[int]] = ([], [])
    for number, layer in enumerate(layers):
        for region in layer.iter("Region"):
            is_hole = (region.get("NegativeROA") or "0").strip() == "1"
            shapes = holes if is_hole else regions
            _add_region(shapes, layer, region, kind, counts)
            layer_of[is_hole].append(number)
    table, rows = regions.build(counts, point_size_l0=point_size_l0, scale=scale, source=source)
    if not len(holes):
        return table
    cut_counts: dict[str, int] = {}
    cuts, cut_rows = holes.build(cut_counts, point_size_l0=None, scale=scale, source=source)
    add(counts, "repaired", cut_counts.get("repaired", 0))
    add(counts, "vertices_dropped", cut_counts.get("vertices_dropped", 0))
    add(counts, "holes_dropped", len(holes) - len(cuts))
    return _cut_out(table, np.array(layer_of[0])[rows], cuts.geometry, np.array(layer_of[1])[cut_rows])


def _add_region(shapes: Shapes, layer: Element, region: Element, kind: str, counts: dict[str, int]) -> None:
    form = (region.get("Type") or "0").strip()
    xy = [position(vertex) for vertex in region.iter("Vertex")]
    name = (layer.get("Name") or "").strip() or (region.get("Text") or "").strip()
    number = region.get("Id") or str(counts["features"])
    row = shapes.add(f"{layer.get('Id') or ''}:{number}", name, kind_of(kind, CELL if form == COUNTER else TISSUE))
    counts["features"] += 1
    if not xy:
        shapes.lose(row, "empty", counts)
    elif form in LINES:
        shapes.lose(row, "lines_skipped", counts)
    elif form == COUNTER:
        shapes.add_points(row, xy)
    elif form == ELLIPSE and len(xy) <= 4:
        shapes.add_ring(row, _ellipse(xy))
    elif form == RECTANGLE and len(xy) == 2:
        (x0, y0), (x1, y1) = xy
        shapes.add_ring(row, [(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
    else:
        shapes.add_ring(row, xy)


def _ellipse(corners: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The ellipse that fills the box of some corners."""
    low, high = np.min(corners, axis=0), np.max(corners, axis=0)
    angle = np.arange(ELLIPSE_CORNERS) * (2 * np.pi / ELLIPSE_CORNERS)
    with np.errstate(over="ignore", invalid="ignore"):  # what is no number is dropped and counted later
        ring = (low + high) / 2 + np.stack([np.cos(angle), np.sin(angle)], axis=1) * (high - low) / 2
    return [(float(x), float(y)) for x, y in ring]


def _cut_out(table: ObjectTable, layer: np.ndarray, cuts: np.ndarray, cut_layer: np.ndarray) -> ObjectTable:
    """The objects less the cuts of their layer; those of which nothing is left are counted as "zero_area"."""
    counts, geometry = table.counts, table.geometry.copy()
    cut, row = shapely.STRtree(geometry).query(cuts, predicate="intersects")
    same = cut_layer[cut] == layer[row]
    cut, row = cut[same], row[same]
    add(counts, "holes", len(np.unique(cut)))
    add(counts, "holes_dropped", len(cuts) - len(np.unique(cut)))
    for target in np.unique(row).tolist():
        geometry[target] = shapely.difference(geometry[target], shapely.union_all(cuts[cut[row == target]]))
    geometry = polygon_parts(geometry)
    left = shapely.area(geometry) > 0
    add(counts, "zero_area", int((~left).sum()))
    names = table.class_names()
    gone = Counter((names[i] or "", "zero_area") for i in np.flatnonzero(~left).tolist())
    skipped = dict(gone + Counter(table.remarks.skipped))
    return replace(table, geometry=geometry, remarks=replace(table.remarks, skipped=skipped)).taken(left)
