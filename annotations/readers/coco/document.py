"""COCO json as it is written: images, annotations, categories, or a bare list of detections."""

from __future__ import annotations

import json
import re
from typing import Any, TypeVar

import msgspec

from annotations.errors import UserError

Id = int | str | float
T = TypeVar("T")
_PLACE = re.compile(r"`\$\.?(images|annotations|categories|)\[(\d+)\]")
_ONE_OF = {"images": "image", "annotations": "annotation", "categories": "category", "": "annotation"}


class Image(msgspec.Struct, gc=False):
    id: Id
    file_name: str
    width: float | None = None
    height: float | None = None


class Category(msgspec.Struct, gc=False):
    id: Id
    name: str


class Annotation(msgspec.Struct, gc=False):
    """An annotation whose segmentation is not looked at yet: what is wrong with it concerns this annotation alone."""

    image_id: Id
    id: Id | None = None
    category_id: Id | None = None
    bbox: list[float | None] | None = None
    segmentation: Any = None
    score: float | None = None
    iscrowd: Any = None


class CocoDocument(msgspec.Struct):
    images: list[Image]
    annotations: list[Annotation]
    categories: list[Category] = []


def key_of(value: Id) -> str:
    """Return an id as text: 7, "7" and 7.0 are one."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


class Keys(dict[Id, str]):
    """Ids as text, each made once: image and category come again with every annotation."""

    def __missing__(self, value: Id) -> str:
        key = self[value] = key_of(value)
        return key


def name_of(item: Annotation, row: int) -> str:
    """Return the name of an annotation: its id, or its place among all where it has none."""
    return str(row) if item.id is None else key_of(item.id)


def decode_coco(data: bytes, source: str) -> CocoDocument:
    """Decode a COCO json. Raises UserError where it is none."""
    return _decoded(data, source, CocoDocument, "not COCO json", "it needs images, annotations and categories")


def decode_detections(data: bytes, source: str) -> CocoDocument:
    """Decode a bare list of detections, each with its image_id, as a document whose names are the ids as text."""
    remedy = "give image_id, category_id and bbox"
    items = _decoded(data, source, list[Annotation], "not a list of COCO detections", remedy)
    images = dict.fromkeys(key_of(item.image_id) for item in items)
    categories = dict.fromkeys(key_of(item.category_id) for item in items if item.category_id is not None)
    return CocoDocument([Image(i, i) for i in images], items, [Category(i, i) for i in categories])


def _decoded(data: bytes, source: str, kind: type[T], what: str, remedy: str) -> T:
    """Decode a document; NaN and Infinity, which Python writes, are taken as they are."""
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        problem = _named(str(error), data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        problem = str(error)
        try:
            return msgspec.convert(json.loads(data), type=kind)
        except msgspec.ValidationError as invalid:
            problem = _named(str(invalid), data)
        except (ValueError, RecursionError):
            pass
    raise UserError(f"{source}: {what}: {problem}: {remedy}")


def _named(problem: str, data: bytes) -> str:
    """Return a problem with the id of what has it in place of its number."""
    place = _PLACE.search(problem)
    if place is None:
        return problem
    part, row = place[1], int(place[2])
    try:
        document = json.loads(data)
        item = (document[part] if part else document)[row]
    except (ValueError, RecursionError):  # damaged further on
        item = None
    known = item.get("id") if isinstance(item, dict) else None
    name = f"{_ONE_OF[part]} {known}" if known is not None else f"{_ONE_OF[part]} without an id, number {row + 1}"
    return f"{name}: {problem.partition(' - at ')[0]}{_field(problem[place.end() :])}"


def _field(rest: str) -> str:
    name = rest.strip("`.").partition("[")[0]
    return f" as {name}" if name else ""
