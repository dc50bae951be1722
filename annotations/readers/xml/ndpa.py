"""Hamamatsu's NDPA (XML beside an NDPI slide, in nanometres from the centre of the glass) -> table."""

from __future__ import annotations

import math
from dataclasses import replace
from xml.etree.ElementTree import Element

from annotations.errors import UserError
from annotations.objects import Kind, ObjectTable
from annotations.readers.options import ReadOptions
from annotations.readers.slide_context import SlideContext
from annotations.readers.table_builder import Shapes
from annotations.readers.xml.tree import number, refuse_foreign

ROOT = "annotations"
CIRCLE_CORNERS = 64


def read_ndpa(root: Element, source: str, options: ReadOptions) -> ObjectTable:
    """Read every ndpviewstate: closed freehands and rectangles and circles as outlines, pins as points; class its title.

    A position in nanometres from the centre of the glass lies at (position - offset of the slide's centre) / (1000 * mpp)
    + half the slide's size, in level-0 pixels; with coordformat "pixels" positions are taken as they stand.
    Raises UserError where the slide's size, mpp or offset are needed and not known, and where there is no ndpviewstate.
    """
    refuse_foreign(root, source, ("ndpviewstate",), ())
    views = root.findall("ndpviewstate")
    shapes = Shapes()
    for i, view in enumerate(views):
        item = view.find("annotation")
        form = (item.get("type") or "").lower() if item is not None else ""
        is_point = form in ("pin", "pointer")
        name = (view.findtext("title") or "").strip()
        row = shapes.add(view.get("id") or str(i), name, options.kind_of(Kind.CELL if is_point else Kind.TISSUE))
        units = (view.findtext("coordformat") or "nanometers").strip().lower()
        to_pixels = _Pixels(options.slide, source, nanometres=units.startswith("nano"))
        if item is None:
            shapes.lose(row, "empty")
        elif is_point:
            shapes.add_points(row, [to_pixels(number(item.findtext("x")), number(item.findtext("y")))])
        elif form == "circle":
            radius = number(item.findtext("radius"))
            x, y = number(item.findtext("x")), number(item.findtext("y"))
            turn = 2 * math.pi / CIRCLE_CORNERS
            angles = [turn * step for step in range(CIRCLE_CORNERS)]
            shapes.add_ring(row, [to_pixels(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles])
        elif not (points := item.findall("pointlist/point")):
            shapes.lose(row, "lines_skipped" if "measure" in form else "empty")
        elif (item.findtext("closed") or "1").strip() == "0" or "measure" in form:
            shapes.lose(row, "lines_skipped")
        else:
            shapes.add_ring(row, [to_pixels(number(p.findtext("x")), number(p.findtext("y"))) for p in points])
    return shapes.build(replace(options, scale=None), source)[0]


class _Pixels:
    """Positions of an NDPA file -> level-0 pixels."""

    def __init__(self, slide: SlideContext, source: str, *, nanometres: bool) -> None:
        self.offset, self.half, self.nm = (0.0, 0.0), (0.0, 0.0), 1.0
        if not nanometres:
            return
        if slide.offset_nm is None or slide.size_l0 is None or not slide.mpp_l0:
            raise UserError(
                f"{source}: counts nanometres from the centre of the glass, and the slide's size, mpp or "
                "hamamatsu.XOffsetFromSlideCentre is not known: bring the NDPI slide back to where it was tiled from"
            )
        self.offset, self.nm = slide.offset_nm, 1000 * slide.mpp_l0
        self.half = (slide.size_l0[0] / 2, slide.size_l0[1] / 2)

    def __call__(self, x: float, y: float) -> tuple[float, float]:
        return (x - self.offset[0]) / self.nm + self.half[0], (y - self.offset[1]) / self.nm + self.half[1]
