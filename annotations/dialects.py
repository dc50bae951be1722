"""Everything that is not GeoJSON: which reader a file goes to."""

from __future__ import annotations

from pathlib import Path

from annotations import asap, imagescope, ndpa
from annotations.errors import UserError
from annotations.frame import SlideFrame
from annotations.table import ObjectTable
from annotations.xmltree import READ, REMEDY, parse_xml

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
    frame: SlideFrame,
    split_values: bool = False,
) -> ObjectTable:
    """The table of a file whose dialect annotations.content.dialect has told; arguments as in read_annotations."""
    source = str(path)
    if form == "xml":
        return _read_xml(data, source, kind, point_size_l0, scale or 1.0, frame)
    if form in ("hovernet", "cellvit"):
        from annotations.cells import read_cellvit, read_hovernet

        read = read_hovernet if form == "hovernet" else read_cellvit
        return read(data, source, kind=kind, scale=scale, frame=frame)
    if form in ("coco", "detections"):
        from annotations.cocoslide import read_coco_slide

        return read_coco_slide(data, source, kind=kind, scale=scale, frame=frame, bare=form == "detections")
    if form == "parquet":
        from annotations.geoparquet import read_geoparquet

        return read_geoparquet(data, source, kind=kind, point_size_l0=point_size_l0, scale=scale or 1.0)
    from annotations.labelmask import read_labelmask

    return read_labelmask(data, path, kind=kind, scale=scale, frame=frame, split_values=split_values)


def _read_xml(data: bytes, source: str, kind: str, point_size_l0: float | None, scale: float, frame: SlideFrame) -> ObjectTable:
    root = parse_xml(data, source)
    if root.tag == "annotation":
        raise UserError(f"{source}: XML of boxes on one image (VOC): read with odis-path import --boxes, not as annotations")
    read = _XML.get(root.tag)
    if read is None:
        raise UserError(f"{source}: XML of an unknown kind, <{root.tag[:60]}> ({READ}): {REMEDY}")
    return read(root, source, kind=kind, point_size_l0=point_size_l0, scale=scale, frame=frame)
