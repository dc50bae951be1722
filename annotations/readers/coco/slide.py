"""COCO json of one slide: a detector's export, or its bare list of detections -> table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePosixPath, PureWindowsPath

import numpy as np

from annotations.errors import UserError
from annotations.objects import Kind, ObjectTable, join_logs
from annotations.readers.coco.document import CocoDocument, decode_coco, decode_detections
from annotations.readers.coco.images import coco_tables
from annotations.readers.options import ReadOptions
from annotations.readers.slide_context import SlideContext


def read_coco_slide(data: bytes, source: str, options: ReadOptions, *, bare: bool = False) -> ObjectTable:
    """Read the objects of the one image that is the slide: named after it, or the only one there is. All are cells for "auto".

    Where the image's width and height are stated and are not the slide's, coordinates are scaled by their ratio; options.scale
    overrides. What is of an image that the file does not list is left out and counted ("unlisted_image").
    bare: the document is a list of detections (image_id, category_id, bbox, score) without images and categories; classes
    are the category numbers as text then.
    Raises UserError where no image can be told to be the slide, or its shape is not the slide's.
    """
    document = decode_detections(data, source) if bare else decode_coco(data, source)
    slide, scale = options.slide, options.scale
    name = _image_of(document, source, slide)
    coco = coco_tables(document, source)
    table, size, notes = coco.tables[name], coco.sizes.get(name), []
    if scale is None and size is not None and slide.size_l0 not in (None, size):
        scale = slide.scale_of_image(*size, source)
        notes.append(f"COCO image of {size[0]} x {size[1]}: scaled by {scale:g}")
    kind = np.full(len(table), options.kind_of(Kind.CELL), np.uint8)
    counts = table.counts
    if unlisted := sum(coco.unlisted.skipped.values()):
        counts = {**counts, "features": counts["features"] + unlisted, "unlisted_image": unlisted}
    table = replace(table.scaled(scale or 1.0), kind=kind, counts=counts, log=join_logs([table.log, coco.unlisted]))
    return table.with_notes(*notes)


def _image_of(document: CocoDocument, source: str, slide: SlideContext) -> str:
    names = list(dict.fromkeys(image.file_name for image in document.images))
    if len(names) == 1:
        return names[0]
    named = [name for name in names if slide.slide_id and _stem(name) in (slide.slide_id, f"{slide.slide_id}.ome")]
    if len(named) == 1:
        return named[0]
    if not names:
        raise UserError(f"{source}: COCO json without images: add the slide, with its file_name")
    which = f"the slide {slide.slide_id}" if slide.slide_id else "which slide is not known"
    raise UserError(f"{source}: COCO json of {len(names)} images ({names[0]}, ...), {which}: name one image after the slide")


def _stem(name: str) -> str:
    return PurePosixPath(PureWindowsPath(name).as_posix()).stem
