"""Read any annotation file into an ObjectTable with the reader of its format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from annotations.errors import UserError
from annotations.objects import ObjectTable
from annotations.readers.detect import detect_format, read_unpacked
from annotations.readers.geojson.decode import collector_paused
from annotations.readers.geojson.qupath import read_geojson
from annotations.readers.options import ReadOptions
from annotations.readers.xml import asap, imagescope, ndpa
from annotations.readers.xml.tree import READ, REMEDY, parse_xml

_XML = {asap.ROOT: asap.read_asap, imagescope.ROOT: imagescope.read_imagescope, ndpa.ROOT: ndpa.read_ndpa}


def read_annotations(path: Path | str, options: ReadOptions | None = None, **keywords: Any) -> ObjectTable:
    """Read every object of an annotation file, in file order, level-0 pixels.

    The content decides the format: GeoJSON of any dialect (plain, .gz, or a .zip of one), HoVer-Net's and CellViT's json, COCO
    json, GeoParquet, XML of ASAP, ImageScope and NDP.view, label images (PNG, TIFF).
    options: how to read it; or its fields as keywords: kind, point_size_l0, scale, slide, measurements, nuclei, split_values.
    A MultiPolygon that is a cell becomes one row per polygon. TMA cores, tiles and the root of QuPath are ignored and counted.
    The table's counts: "features" read; "exploded" rows gained from MultiPolygons and MultiPoints; "ignored",
        "points_skipped", "lines_skipped", "empty", "malformed" features left out; "vertices_dropped" positions that
        are not finite; "repaired" invalid outlines; "invalid_dropped" outlines of too few points and "zero_area"
        ones, left out. Only what occurred is listed. Its log says the same by class.
    Raises UserError (one line: file, place, way out) where the file is missing or of no known kind, where `slide` lacks
    what its format needs, and for XML with a document type or entities.
    """
    path = Path(path)
    options = replace(options or ReadOptions(), **keywords)
    table = _read(read_unpacked(path), path, options)
    return replace(table, source=np.full(len(table), path.name, dtype=object))


@collector_paused()
def _read(data: bytes, path: Path, options: ReadOptions) -> ObjectTable:
    source = str(path)
    match detect_format(data, source):
        case "geojson":
            return read_geojson(data, source, options)
        case "xml":
            return _read_xml(data, source, options)
        case "hovernet":
            from annotations.readers.hovernet_cellvit import read_hovernet

            return read_hovernet(data, source, options)
        case "cellvit":
            from annotations.readers.hovernet_cellvit import read_cellvit

            return read_cellvit(data, source, options)
        case "coco" | "detections" as form:
            from annotations.readers.coco.slide import read_coco_slide

            return read_coco_slide(data, source, options, bare=form == "detections")
        case "parquet":
            from annotations.readers.geoparquet import read_geoparquet

            return read_geoparquet(data, source, options)
        case _:
            from annotations.readers.label_image import read_label_image

            return read_label_image(data, path, options)


def _read_xml(data: bytes, source: str, options: ReadOptions) -> ObjectTable:
    root = parse_xml(data, source)
    if root.tag == "annotation":
        raise UserError(f"{source}: XML of boxes on one image (VOC): read with odis-path import --boxes, not as annotations")
    read = _XML.get(root.tag)
    if read is None:
        raise UserError(f"{source}: XML of an unknown kind, <{root.tag[:60]}> ({READ}): {REMEDY}")
    return read(root, source, options)
