"""COCO: what every annotation becomes, outline, box or a loss that is counted and named by its id."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely

from annotations import ObjectTable, SlideContext, UserError, read_annotations, read_coco
from annotations.readers.coco.images import read_coco_images

SQUARE = [10, 10, 30, 10, 30, 30, 10, 30]
L_SHAPE = np.array([[0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 1, 0, 0, 0], [0, 1, 1, 1, 0]], dtype=np.uint8)
RING = {"size": [4, 5], "counts": [5, 3, 1, 1, 1, 1, 1, 3, 4]}  # rows 1 to 3 of columns 1 to 3, its middle left out
NAN = float("nan")


def one(id: Any = 1, **more: Any) -> dict[str, Any]:
    return {"id": id, "image_id": 1, "category_id": 7, **more}


def write(folder: Path, *annotations: dict[str, Any], images: Any = None, categories: Any = None) -> Path:
    document = {
        "images": [{"id": 1, "file_name": "a.png"}] if images is None else images,
        "annotations": list(annotations),
        "categories": [{"id": 7, "name": "gland"}] if categories is None else categories,
    }
    path = folder / "coco.json"
    path.write_text(json.dumps(document))
    return path


def read(folder: Path, *annotations: dict[str, Any], **more: Any) -> ObjectTable:
    """The table of a.png."""
    return read_coco(write(folder, *annotations, **more))["a.png"]


def column_major(mask: np.ndarray) -> dict[str, Any]:
    flat = mask.T.reshape(-1)
    edges = [0, *(np.flatnonzero(np.diff(flat)) + 1).tolist(), len(flat)]
    counts = [stop - start for start, stop in pairwise(edges)]
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


def test_a_run_length_mask_becomes_its_outline_with_holes(tmp_path: Path) -> None:
    table = read(tmp_path, one(segmentation=column_major(L_SHAPE), bbox=[0, 0, 5, 4]), one(2, segmentation=RING, iscrowd=1))
    assert table.geometry[0].equals(shapely.union(shapely.box(1, 1, 2, 4), shapely.box(1, 3, 4, 4)))
    assert table.geometry[1].equals(shapely.box(1, 1, 4, 4).difference(shapely.box(2, 2, 3, 3)))
    assert table.counts == {"features": 2, "crowds": 1}
    assert table.log.ids == {"crowds": ("2",)}


@pytest.mark.parametrize(
    "segmentation",
    [
        [SQUARE],
        SQUARE,
        [[[x, y] for x, y in zip(SQUARE[::2], SQUARE[1::2], strict=True)]],
        json.dumps([SQUARE]),
        [[x, y] for x, y in zip(SQUARE[::2], SQUARE[1::2], strict=True)],
        [[*SQUARE, 10, 10]],
    ],
)
def test_a_polygon_is_read_in_every_way_it_is_written(tmp_path: Path, segmentation: Any) -> None:
    table = read(tmp_path, one(segmentation=segmentation, bbox=[0, 0, 1, 1]))
    assert table.geometry[0].equals(shapely.box(10, 10, 30, 30))
    assert table.counts == {"features": 1}


def test_parts_of_a_polygon_add_up(tmp_path: Path) -> None:
    """As the COCO tools have it: apart they are parts of one object, one within the other fills it."""
    far, inner = [50, 50, 60, 50, 60, 60], [15, 15, 20, 15, 20, 20, 15, 20]
    table = read(tmp_path, one(segmentation=[SQUARE, far]), one(2, segmentation=[SQUARE, inner]))
    assert table.geometry[0].geom_type == "MultiPolygon"
    assert table.geometry[0].area == 450
    assert table.geometry[1].equals(shapely.box(10, 10, 30, 30))


@pytest.mark.parametrize(
    ("segmentation", "count"),
    [
        ([[1, 1, 5, 5]], "outlines_as_boxes"),
        ([[1, 1, 5, 5, 9, 9]], "outlines_as_boxes"),
        ([["a", "b"]], "outlines_as_boxes"),
        (5, "outlines_as_boxes"),
        ([{"size": [4, 5], "counts": [20]}], "outlines_as_boxes"),
        ({"size": [4, 5], "counts": [20]}, "masks_as_boxes"),
        ({"size": [4, 5], "counts": [3, 4]}, "masks_as_boxes"),
        ({"size": [4, 5], "counts": "~~"}, "masks_as_boxes"),
        ({"counts": [3, 4]}, "masks_as_boxes"),
        ({"size": [9, 9], "counts": [0, 81]}, "masks_as_boxes"),
        ({"size": [5, 4], "counts": [0, 20]}, "masks_as_boxes"),
    ],
)
def test_what_is_no_outline_is_its_box_and_said(tmp_path: Path, segmentation: Any, count: str) -> None:
    images = [{"id": 1, "file_name": "a.png", "width": 5, "height": 4}]
    table = read(tmp_path, one(101, segmentation=segmentation, bbox=[1, 1, 2, 2]), images=images)
    assert table.geometry[0].bounds == (1, 1, 3, 3)
    assert table.counts == {"features": 1, count: 1}
    assert table.log.ids == {count: ("101",)}


LOSSES = [
    ({}, "empty"),
    ({"segmentation": []}, "empty"),
    ({"segmentation": [[]], "bbox": None}, "empty"),
    ({"bbox": [1, 1, 5]}, "malformed"),
    ({"bbox": [1, NAN, 5, 5]}, "malformed"),
    ({"bbox": [1, 1, float("inf"), 5]}, "malformed"),
    ({"bbox": [1, None, 5, 5]}, "malformed"),
    ({"bbox": [-1e300, -1e300, 2e300, 2e300]}, "beyond"),
    ({"segmentation": [[-1e300, 0, 1e300, 0, 1e300, 1e300]]}, "beyond"),
    ({"bbox": [1, 1, 0, 5]}, "zero_area"),
    ({"bbox": [9, 9, -5, -5]}, "zero_area"),
    ({"segmentation": [[1, 1, 5, 5]]}, "invalid_dropped"),
    ({"segmentation": [[1, 1, 5, 5, 9, 9]], "bbox": [0, 0, 0, 0]}, "zero_area"),
    ({"segmentation": {"size": [4, 5], "counts": [20]}}, "zero_area"),
    ({"segmentation": {"size": [4, 5], "counts": [21]}}, "malformed"),
]


@pytest.mark.parametrize(("annotation", "reason"), LOSSES, ids=range(len(LOSSES)))
def test_every_loss_has_a_reason_and_an_id(tmp_path: Path, annotation: dict[str, Any], reason: str) -> None:
    table = read(tmp_path, one("lost", **annotation), one("kept", bbox=[0, 0, 4, 4]))
    assert table.id.tolist() == ["kept"]
    assert table.counts == {"features": 2, reason: 1}
    assert table.log.skipped == {("gland", reason): 1}
    assert table.log.ids == {reason: ("lost",)}


def test_all_at_once_is_each_alone(tmp_path: Path) -> None:
    several = [one(i, **annotation) for i, (annotation, _) in enumerate(LOSSES)]
    several += [one(100, segmentation=[SQUARE, [1, 1]]), one(101, segmentation=[[0, 0, 9, 9, 9, 0, 0, 9]])]
    together = read(tmp_path, *several)
    alone = [read(tmp_path, item) for item in several]
    assert together.id.tolist() == [id for table in alone for id in table.id]
    assert together.counts["features"] == len(together) + sum(together.log.skipped.values())
    for name in {name for table in alone for name in table.counts}:
        assert together.counts[name] == sum(table.counts.get(name, 0) for table in alone), name
    assert (together.counts["parts_dropped"], together.counts["repaired"]) == (1, 1)
    assert together.log.repaired == {"gland": 1}


def test_ids_are_one_whether_numbers_or_text(tmp_path: Path) -> None:
    images = [{"id": "1", "file_name": "a.png"}]
    items = [one(1.0, image_id=1.0, bbox=[0, 0, 4, 4]), one("x", category_id="7", bbox=[0, 0, 5, 5])]
    table = read(tmp_path, *items, images=images)
    assert (table.id.tolist(), table.class_names()) == (["1", "x"], ["gland", "gland"])


def test_a_category_that_is_not_listed_is_no_class_and_said(tmp_path: Path) -> None:
    items = [one(102 + i, category_id=category, bbox=[0, 0, 4, 4]) for i, category in enumerate((1234, None, NAN))]
    table = read(tmp_path, *items)
    assert table.class_names() == [None] * 3
    assert table.counts == {"features": 3, "unknown_category": 1}
    assert table.log.ids == {"unknown_category": ("102",)}


def test_the_same_annotation_twice_is_one(tmp_path: Path) -> None:
    first = one(5, bbox=[0, 0, 4, 4])
    table = read(tmp_path, first, first, one(5, bbox=[0, 0, 9, 9]), {**first, "id": None}, {**first, "id": None})
    assert len(table) == 4
    assert table.counts == {"features": 5, "repeated": 1, "shared_ids": 1}
    assert table.log.skipped == {("gland", "repeated"): 1}


def test_annotations_of_an_image_that_is_not_listed_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path, one(103, image_id=40, bbox=[0, 0, 4, 4]), one(104, image_id=1, bbox=[0, 0, 4, 4]))
    coco = read_coco_images(path)
    assert coco.tables["a.png"].id.tolist() == ["104"]
    assert coco.unlisted.skipped == {("gland", "unlisted_image"): 1}
    assert coco.unlisted.ids == {"unlisted_image": ("103",)}
    table = read_annotations(path)
    assert table.counts == {"features": 2, "unlisted_image": 1}
    assert table.log.skipped == {("gland", "unlisted_image"): 1}


def test_the_size_of_a_mask_is_that_of_an_image_that_states_none(tmp_path: Path) -> None:
    path = write(tmp_path, one(segmentation=column_major(L_SHAPE)), images=[{"id": 1, "file_name": "a.png", "width": None}])
    assert read_coco_images(path).sizes == {"a.png": (5, 4)}
    table = read_annotations(path, slide=SlideContext("a", (50, 40), 0.25))
    assert table.geometry[0].bounds == (10, 10, 40, 40)


@pytest.mark.parametrize("size", [{}, {"width": 5}, {"width": 0, "height": 0}, {"width": NAN, "height": 4}])
def test_an_image_without_a_size_states_none(tmp_path: Path, size: dict[str, Any]) -> None:
    path = write(tmp_path, one(bbox=[0, 0, 1, 1]), images=[{"id": 1, "file_name": "a.png", **size}])
    assert read_coco_images(path).sizes == {}


IMAGES = [{"id": 1, "file_name": "a.png"}]


@pytest.mark.parametrize(
    ("annotation", "images", "categories", "problem"),
    [
        (one(101, image_id=3, bbox=[0, 0, 1, 1]), IMAGES, None, "annotation 101 names image 3"),
        (one(101, bbox="x"), IMAGES, None, "annotation 101: .*bbox"),
        (one(101, bbox=[0, 0, "wide", 1]), IMAGES, None, "annotation 101: .*bbox"),
        (one(101, score="much", bbox=[0, 0, NAN, 1]), IMAGES, None, "annotation 101: .*score"),
        ({"image_id": 1, "score": "much"}, IMAGES, None, "annotation without an id, number 1: .*score"),
        ({"id": 101}, IMAGES, None, "annotation 101: .*image_id"),
        (one(), [{"id": 9, "file_name": 5}], None, "image 9: .*file_name"),
        (one(), IMAGES, [{"id": 7}], "category 7: .*name"),
        (one(), IMAGES, [{"id": 7, "name": "a"}, {"id": "7", "name": "b"}], "category 7 is called both a and b"),
        (one(), [*IMAGES, {"id": "1", "file_name": "b.png"}], None, "share the id 1, a.png and b.png"),
        (one(), [*IMAGES, {"id": 2, "file_name": "a.png"}], None, "share the file_name a.png, of the ids 1 and 2"),
    ],
)
def test_errors_name_ids(tmp_path: Path, annotation: Any, images: Any, categories: Any, problem: str) -> None:
    path = write(tmp_path, annotation, images=images, categories=categories)
    with pytest.raises(UserError, match=problem) as error:
        read_coco(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_rows_that_come_twice_with_the_same_content_do_no_harm(tmp_path: Path) -> None:
    categories = [{"id": 7, "name": "gland"}, {"id": 7, "name": "gland"}, {"id": 8, "name": "gland"}]
    table = read(tmp_path, one(category_id=8, bbox=[0, 0, 4, 4]), images=IMAGES * 2, categories=categories)
    assert (table.labels, table.class_names()) == (("gland",), ["gland"])


def test_a_file_damaged_further_on_is_refused_too(tmp_path: Path) -> None:
    path = tmp_path / "coco.json"
    path.write_text('{"images": [], "annotations": [{"id": 101, "image_id": [], "bbox": [}')
    with pytest.raises(UserError, match="not COCO json"):
        read_coco(path)
