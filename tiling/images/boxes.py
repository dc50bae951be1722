"""Boxes of an import: matched to images, placed in their pixels, clipped to tiles and arranged as groups of a slide file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from annotations.errors import UserError
from tiling.boxes.result import RESULT_ATTR, BoxResult, ClassCounts, reading_facts
from tiling.images.listing import ImageItem, box_file, match_names
from tiling.jobs.outcome import ItemResult, Note, notes_of
from tiling.slide_file.read import SlideFile
from tiling.storage.paths import expand_home
from tiling.wsi.backends.tiff_pages import ORIENTATION
from tiling.wsi.backends.upright import TURNS

if TYPE_CHECKING:
    from annotations.geometry.clip import TileBoxes
    from annotations.objects import ObjectTable

METHOD_VERSION = 2  # raise it when reading changes, so that old boxes are made anew
SHOWN_IMAGES = 3
Size = tuple[int, int]


@dataclass(frozen=True)
class ImageObjects:
    """Objects of one image, and the width and height of what they were drawn on, None where that is not stated.

    may_scale: a picture of another size is a copy of the image that was reduced or enlarged; else it is another image.
    """

    table: ObjectTable
    size: Size | None
    source: Path
    may_scale: bool = False


@dataclass(frozen=True)
class TileObjects:
    """Objects in pixels of an image or its tile, and their boxes there. scaled: says so where they were scaled."""

    table: ObjectTable
    boxes: TileBoxes
    scaled: str = ""


@dataclass(frozen=True)
class BoxGroups:
    """Groups /objects and /boxes. info: numbers of objects, boxes and objects outside every tile, and `result`."""

    groups: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)


@dataclass
class ImportResult(BoxResult):
    """The outcome of the boxes of an image. message: the notes as one text, in slide files of earlier versions."""

    message: str = ""

    def image_notes(self) -> list[Note]:
        """Return all notes on the image."""
        return notes_of(self.message, *self.notes, *self.left_out_notes(), *self.changed_notes())


@dataclass
class BoxReport:
    """The outcome of the boxes of an import. results: of slide files and of boxes of no image; notes: lines on the latter."""

    results: list[BoxResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add_left_out(self, coco: Path, skipped: Mapping[tuple[str, str], int], ids: Mapping[str, Sequence[str]]) -> None:
        """Add the annotations of a COCO file that belong to no image here. skipped: (class, reason) -> their number."""
        result = BoxResult(ids={reason: list(names) for reason, names in ids.items()})
        for (name, reason), n in skipped.items():
            result.labels.setdefault(name, ClassCounts()).skipped[reason] = n
        if skipped:
            self.results.append(result)
            self.notes += [f"{coco}: {note}" for note in result.left_out_notes()]


def coco_boxes(items: Sequence[ImageItem], coco: Path, report: BoxReport) -> tuple[dict[Path, ImageObjects], str]:
    """Read the objects of each image that a COCO file names, and a hash of the file; what is of no image goes to the report.

    Raises UserError where it is missing, no COCO json, or names none of the images.
    """
    from annotations.readers.coco.document import decode_coco
    from annotations.readers.coco.images import coco_tables

    if not coco.is_file():
        raise UserError(f"{coco}: no such COCO file")
    data = coco.read_bytes()
    listed = coco_tables(decode_coco(data, str(coco)), str(coco))
    names = match_names(items, listed.tables, coco)
    if not names:
        first = next(iter(listed.tables), "no image at all")
        raise UserError(f"{coco}: names none of the images (first: {first}): are they its images?")
    missing = listed.tables.keys() - set(names.values())
    _report_missing({name: listed.tables[name] for name in listed.tables if name in missing}, len(listed.tables), coco, report)
    report.add_left_out(coco, listed.unlisted.skipped, listed.unlisted.ids)
    digest = hashlib.sha256(b"%d" % METHOD_VERSION)
    digest.update(data)
    return {
        path: ImageObjects(listed.tables[name], listed.sizes.get(name), coco, True) for path, name in names.items()
    }, digest.hexdigest()


def _report_missing(tables: dict[str, ObjectTable], total: int, coco: Path, report: BoxReport) -> None:
    """Report images of a COCO file, of `total`, that are not among those to import, and their annotations."""
    from annotations.objects import SHOWN_IDS

    if not tables:
        return
    skipped: dict[tuple[str, str], int] = {}
    ids: list[str] = []
    for table in tables.values():
        names = [name or "" for name in table.class_names()]
        names += [name for (name, _), n in table.log.skipped.items() for _ in range(n)]
        for name in names:
            skipped[name, "no_image"] = skipped.get((name, "no_image"), 0) + 1
        if len(ids) < SHOWN_IDS:
            reasons = {reason for _, reason in table.log.skipped}
            ids += [*table.id.tolist(), *(id for reason in reasons for id in table.log.ids.get(reason, ()))]
    shown = ", ".join(list(tables)[:SHOWN_IMAGES]) + (", ..." if len(tables) > SHOWN_IMAGES else "")
    report.notes.append(f"{coco}: {len(tables)} of the {total} images it lists are not here ({shown})")
    report.add_left_out(coco, skipped, {"no_image": ids})


def box_folder(items: Sequence[ImageItem], folder: Path) -> Path:
    """Return the folder, absolute. Raises UserError where it is missing or holds the box file of no image."""
    folder = expand_home(folder).absolute()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of box files")
    if not any(box_file(folder, item) is not None for item in items):
        first = Path(items[0].key).with_suffix(".xml")
        raise UserError(f"{folder}: holds the box file of no image (looked for {first} and {first.name}): are they its images?")
    return folder


def xml_boxes(path: Path) -> ImageObjects:
    """Read the objects of a box file."""
    from annotations.readers.xml.voc import read_voc

    return ImageObjects(*read_voc(path), path)


def place_objects(drawn: ImageObjects, image: Path, size: Size) -> tuple[ObjectTable, str]:
    """Place objects in pixels of an image of this width and height, upright; and say so where they were scaled.

    What was drawn on the picture as it is stored is turned upright with it, where the sizes tell.
    Raises UserError where they were drawn on a picture of another shape, or of another size and that may not be.
    """
    stated = drawn.size
    if stated in (None, size):
        return drawn.table, ""
    assert stated is not None
    for turned in (False, True):
        stored = (size[1], size[0]) if turned else size
        factor = 1.0 if stated == stored else _factor(stated, stored) if drawn.may_scale else None
        if factor is None or (turned and (orientation := _orientation(image)) < 5):
            continue
        table = drawn.table.scaled(factor)
        if turned:
            table = table.moved(partial(TURNS[orientation].xy, stored=stored))
        return table, "" if factor == 1 else f"boxes drawn on an image of another size, scaled by {factor:g}"
    stated_size, image_size = (f"{width} x {height}" for width, height in (stated, size))
    swapped = ", the other way round" if stated == (size[1], size[0]) else ""
    raise UserError(
        f"{image}: its boxes are of an image of {stated_size} pixels, it has {image_size}{swapped}: "
        f"give the boxes of this image (they are from {drawn.source})"
    )


def _factor(stated: Size, size: Size) -> float | None:
    """Compute the pixels of an image per pixel of a reduced or enlarged copy; None where the two differ in shape."""
    from annotations.readers.slide_context import SlideContext

    try:
        return SlideContext(size_l0=size).scale_of_image(*stated, "")
    except UserError:
        return None


def _orientation(image: Path) -> int:
    """Read the orientation that a file states, 1 to 8: EXIF and TIFF have the same tag."""
    from PIL import Image

    try:
        with Image.open(image) as file:
            value = file.getexif().get(ORIENTATION, 1)
    except Exception:  # pillow has many, and does not read every TIFF
        return 1
    return value if value in range(1, 9) else 1


def clip_objects(table: ObjectTable, coords: np.ndarray, size_px: int, polygons: bool) -> TileBoxes:
    """Clip objects to tiles of size_px at coords (N, 2), all in pixels of the image; with their outlines, if wanted."""
    from annotations.geometry.clip import clip_to_tiles

    return clip_to_tiles(table.geometry, coords, float(size_px), size_px, polygons=polygons)


def join_tiles(objects: Sequence[TileObjects | None]) -> TileObjects:
    """Join the objects and boxes of single tiles into those of one file; None for a tile without."""
    from annotations.geometry.clip import TileBoxes, concatenate_polygons
    from annotations.objects import concatenate

    tables = [tile.table for tile in objects if tile is not None]
    boxes = [tile.boxes for tile in objects if tile is not None]
    first = np.cumsum([0, *map(len, tables)])[:-1]
    per_tile = [0 if tile is None else len(tile.boxes.object) for tile in objects]
    outlines = [part.polygons for part in boxes if part.polygons is not None]
    rows = [np.zeros(0, np.int32), *(part.object + start for part, start in zip(boxes, first, strict=True))]
    joined = TileBoxes(
        xyxy=np.concatenate([np.zeros((0, 4), np.float32), *(part.xyxy for part in boxes)]),
        offsets=np.concatenate([[0], np.cumsum(per_tile)]).astype(np.int64),
        object=np.concatenate(rows).astype(np.int32),
        visible=np.concatenate([np.zeros(0, np.float32), *(part.visible for part in boxes)]),
        counts={"outside": sum(int(part.counts.get("outside", 0)) for part in boxes)},
        polygons=concatenate_polygons(outlines, np.arange(sum(per_tile))) if outlines else None,
    )
    return TileObjects(concatenate(tables), joined)


def box_groups(objects: TileObjects, mpp: float, scaled_images: int = 0) -> BoxGroups:
    """Arrange objects and boxes as the groups of a slide file; /objects keeps the result, for a later run.

    scaled_images: images of a shard whose boxes were scaled.
    """
    from annotations.objects import SHOWN_IDS
    from annotations.slide_groups import annotation_groups

    table, boxes = objects.table, objects.boxes
    groups: dict[str, Any] = dict(annotation_groups(table, boxes, mpp))
    info = {"objects": len(table), "boxes": len(boxes.object), "outside": boxes.counts.get("outside", 0)}
    result = ImportResult(**reading_facts(table, boxes))
    result.notes = [objects.scaled] if objects.scaled else []
    result.ids["outside"] = table.id[np.setdiff1d(np.arange(len(table)), boxes.object)[:SHOWN_IDS]].tolist()
    if scaled_images:
        result.changed["scaled_images"] = scaled_images
    groups["objects"]["attrs"][RESULT_ATTR] = result.to_json()
    return BoxGroups(groups, {**info, "result": result}, result.image_notes())


def stored_result(file: SlideFile) -> ItemResult:
    """Read the result of an import that is done: info has tiles, boxes and, where there are any, the `result` of the boxes."""
    done = ItemResult({"tiles": len(file), "boxes": len(file.boxes_table()["object"])}, skipped=True)
    if (text := file.group_attrs("objects").get(RESULT_ATTR)) is not None:
        done.info["result"] = ImportResult.from_json(text)
        done.notes = done.info["result"].image_notes()
    return done
