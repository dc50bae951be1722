"""ASAP's XML -> table: one outline an Annotation, its class the group it is part of."""

from __future__ import annotations

from xml.etree.ElementTree import Element

from annotations.objects import Kind, ObjectTable
from annotations.readers.options import ReadOptions
from annotations.readers.table_builder import Shapes
from annotations.readers.xml.tree import number, position, refuse_foreign

ROOT = "ASAP_Annotations"
EMPTY = frozenset({"Annotations", "Annotation", "Coordinates", "AnnotationGroups", "Group", "Attributes", "Attribute"})
_POINTS = frozenset({"dot", "pointset"})
_LINES = frozenset({"measurement", "polyline"})


def read_asap(root: Element, source: str, options: ReadOptions) -> ObjectTable:
    """Read every Annotation: Polygon, Spline (its knots) and Rectangle as outlines, Dot and PointSet as points.

    Coordinates are level-0 pixels, put in order by their Order; decimal commas are read. The class is PartOfGroup, unless
    it is None; the id is Name where it is unique, else the number of the annotation. Holes are objects of their own there
    (CAMELYON names their group _2 or Exclusion) and stay so. Raises UserError where positions are written in another way.
    """
    refuse_foreign(root, source, ("Coordinate",), EMPTY)
    items = root.findall(".//Annotation")
    names = [item.get("Name") or "" for item in items]
    unique = len(set(names)) == len(names) and all(names)
    shapes = Shapes()
    for row, item in enumerate(items):
        form = (item.get("Type") or "").lower()
        group = item.get("PartOfGroup") or ""
        is_point = form in _POINTS
        shapes.add(
            names[row] if unique else str(row),
            None if group.strip().lower() == "none" else group.strip(),
            options.kind_of(Kind.CELL if is_point else Kind.TISSUE),
        )
        corners = [(number(corner.get("Order")), i, position(corner)) for i, corner in enumerate(item.iter("Coordinate"))]
        # An Order that is no number compares with nothing: those stay where they are written.
        if all(order == order for order, _, _ in corners):
            corners.sort()
        xy = [corner for _, _, corner in corners]
        if not xy:
            shapes.lose(row, "empty")
        elif is_point:
            shapes.add_points(row, xy)
        elif form in _LINES:
            shapes.lose(row, "lines_skipped")
        else:
            shapes.add_ring(row, xy)
    return shapes.build(options, source)[0]
