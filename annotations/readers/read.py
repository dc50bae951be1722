"""Read any annotation file into an ObjectTable with the reader of its format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from annotations.errors import UserError
from annotations.objects import KindOption, ObjectTable
from annotations.readers.detect import content, dialect
from annotations.readers.geojson.qupath import (
    _collector_paused,
    _parsed,
    nuclei_as_geometry,
)
from annotations.readers.slide_context import SlideContext
from annotations.readers.xml import asap, imagescope, ndpa
from annotations.readers.xml.tree import READ, REMEDY, parse_xml


def read_annotations(
    path: Path | str,
    *,
    kind: KindOption = "auto",
    point_size_l0: float | None = None,
    scale: float | None = None,
    slide: SlideContext | None = None,
    measurements: bool = False,
    nuclei: bool = False,
    split_values: bool = False,
) -> ObjectTable:
    """Every object of an annotation file, in file order, level-0 pixels.

    What the file is, its content decides: GeoJSON of any dialect (plain, .gz, or a .zip of one), HoVer-Net's and CellViT's
    json, COCO json, GeoParquet, XML of ASAP, ImageScope and NDP.view, label images (PNG, TIFF).
    kind: "auto" takes detections, cells and what cell detectors write as cells, all else as tissue; "tissue" and "cell"
        decide for all. A MultiPolygon that is a cell becomes one row per polygon. TMA cores, tiles and the root of QuPath
        are ignored and counted.
    point_size_l0: side of the square, level-0 pixels, that a Point or MultiPoint position becomes; None skips them.
    scale: level-0 pixels per unit of the file's coordinates; None goes by what the dialect says, which is 1 for most.
    slide: the slide, for the dialects that do not count level-0 pixels or hold several slides.
    measurements: read those of GeoJSON too (GeoParquet's always are). nuclei: take the nucleus of a QuPath cell for it.
    split_values: each connected piece of a value of a label image is an object, not the value.
    The table's counts: "features" read; "exploded" rows gained from MultiPolygons and MultiPoints; "ignored",
        "points_skipped", "lines_skipped", "empty", "malformed" features left out; "vertices_dropped" positions that
        are not finite; "repaired" invalid outlines; "invalid_dropped" outlines of too few points and "zero_area"
        ones, left out. Only what occurred is listed. Its log says the same by class.
    Raises UserError (one line: file, place, way out) where the file is missing or of no known kind, where `slide` lacks
    what its dialect needs, and for XML with a document type or entities.
    """
    if kind not in ("auto", "tissue", "cell"):
        raise ValueError(f"kind {kind!r}: one of auto, tissue, cell")
    for name, value in (("point size", point_size_l0), ("scale", scale)):
        if value is not None and not (np.isfinite(value) and value > 0):
            raise UserError(f"{name} {value}: give a number of level-0 pixels above 0")
    path = Path(path)
    data = content(path)
    with _collector_paused():
        form = dialect(data, str(path))
        if form == "geojson":
            data = nuclei_as_geometry(data) if nuclei else data
            table = _parsed(
                data, kind, None if point_size_l0 is None else point_size_l0 / (scale or 1), str(path), measurements
            )
            table = table.scaled(scale or 1)
        else:
            table = read_dialect(form, data, path, kind, point_size_l0, scale, slide or SlideContext(), split_values)
    return replace(table, source=np.full(len(table), path.name, dtype=object))


_XML = {
    asap.ROOT: asap.read_asap,
    imagescope.ROOT: imagescope.read_imagescope,
    ndpa.ROOT: ndpa.read_ndpa,
}


def read_dialect(
    form: str,
    data: bytes,
    path: Path,
    kind: str,
    point_size_l0: float | None,
    scale: float | None,
    slide: SlideContext,
    split_values: bool = False,
) -> ObjectTable:
    """The table of a file whose dialect annotations.readers.detect.dialect has told; arguments as in read_annotations."""
    source = str(path)
    if form == "xml":
        return _read_xml(data, source, kind, point_size_l0, scale or 1.0, slide)
    if form in ("hovernet", "cellvit"):
        from annotations.readers.hovernet_cellvit import read_cellvit, read_hovernet

        read = read_hovernet if form == "hovernet" else read_cellvit
        return read(data, source, kind=kind, scale=scale, slide=slide)
    if form in ("coco", "detections"):
        from annotations.readers.coco.slide import read_coco_slide

        return read_coco_slide(data, source, kind=kind, scale=scale, slide=slide, bare=form == "detections")
    if form == "parquet":
        from annotations.readers.geoparquet import read_geoparquet

        return read_geoparquet(data, source, kind=kind, point_size_l0=point_size_l0, scale=scale or 1.0)
    from annotations.readers.label_image import read_labelmask

    return read_labelmask(data, path, kind=kind, scale=scale, slide=slide, split_values=split_values)


def _read_xml(
    data: bytes, source: str, kind: str, point_size_l0: float | None, scale: float, slide: SlideContext
) -> ObjectTable:
    root = parse_xml(data, source)
    if root.tag == "annotation":
        raise UserError(f"{source}: XML of boxes on one image (VOC): read with odis-path import --boxes, not as annotations")
    read = _XML.get(root.tag)
    if read is None:
        raise UserError(f"{source}: XML of an unknown kind, <{root.tag[:60]}> ({READ}): {REMEDY}")
    return read(root, source, kind=kind, point_size_l0=point_size_l0, scale=scale, slide=slide)
