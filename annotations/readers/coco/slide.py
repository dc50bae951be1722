"""COCO json of one slide: a detector's export, or its bare list of detections -> table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePosixPath, PureWindowsPath

import numpy as np

from annotations.errors import UserError
from annotations.objects import Kind, ObjectTable, join_logs
from annotations.readers.coco.document import CocoDocument, decode_coco, decode_detections
from annotations.readers.coco.images import coco_tables
from annotations.readers.slide_context import SlideContext


def read_coco_slide(
    data: bytes, source: str, *, kind: str, scale: float | None, slide: SlideContext, bare: bool = False
) -> ObjectTable:
    """The objects of the one image that is the slide: named after it, or the only one there is. All are cells for "auto".

    Where the image's width and height are stated and are not the slide's, coordinates are scaled by their ratio; `scale`
    overrides. What is of an image that the file does not list is left out and counted ("unlisted_image").
    bare: the document is a list of detections (image_id, category_id, bbox, score) without images and categories; classes
    are the category numbers as text then.
    Raises UserError where no image can be told to be the slide, or its shape is not the slide's.
    """
    document = decode_detections(data, source) if bare else decode_coco(data, source)
    name = _image_of(document, source, slide)
    coco = coco_tables(document, source)
    table, sizes, notes = coco.tables[name], coco.sizes, []
    if scale is None:
        scale = 1.0
        if name in sizes and slide.size_l0 is not None and sizes[name] != slide.size_l0:
            scale = slide.scale_of_image(*sizes[name], source)
            notes.append(f"COCO image of {sizes[name][0]} x {sizes[name][1]}: scaled by {scale:g}")
    kinds = np.full(len(table), Kind.TISSUE if kind == "tissue" else Kind.CELL, np.uint8)
    log = join_logs([table.log, coco.unlisted]).with_notes(*notes)
    counts = table.counts
    if unlisted := sum(coco.unlisted.skipped.values()):
        counts = {**counts, "features": counts["features"] + unlisted, "unlisted_image": unlisted}
    return replace(table.scaled(scale), kind=kinds, counts=counts, log=log)


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
