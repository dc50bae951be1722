"""`propose --from-cells`: clusters of annotated cells and connected parts of annotated tissue, beside the annotations."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from annotations.errors import UserError
from tiling.boxes.run import HASH_ATTR as ANNOTATED_ATTR
from tiling.jobs.outcome import ItemResult
from tiling.slide_file.merge import drop_objects, merge_groups, read_groups
from tiling.slide_file.read import SlideFile
from tiling.slide_file.write import parameters_hash, replace_groups
from tiling.storage.locks import lock_file

if TYPE_CHECKING:
    from annotations.geometry.clusters import ClusterSettings
    from annotations.objects import ObjectTable


METHOD_VERSION = 1  # raise it when the method changes, so that old groups are made anew
CLUSTERS_ATTR = "gathered_sha256"


def propose_from_annotations(path: Path, settings: ClusterSettings | None = None) -> ItemResult:
    """Add clusters of cells and parts of tissue to the boxes of one slide file; earlier ones are replaced.

    info: the numbers of clusters and parts. Raises UserError where the file holds no annotated objects.
    """
    from annotations.geometry.clip import clip_to_tiles
    from annotations.geometry.clusters import CLUSTER_LABEL, PART_LABEL, ClusterSettings, cluster_objects
    from annotations.objects import Kind
    from annotations.slide_groups import annotation_groups

    settings = settings or ClusterSettings()
    with lock_file(path):
        with SlideFile(path) as file:
            objects = file.objects_table()
            annotated = objects["kind"] != Kind.PROPOSAL
            if not annotated.any():
                raise UserError(f"{path}: holds no annotated cells or tissue, which --from-cells gathers: run annotate first")
            attrs = file.group_attrs("objects")
            stamp = [METHOD_VERSION, asdict(settings), str(attrs.get(ANNOTATED_ATTR)), int(annotated.sum()), file.has_polygons]
            digest = parameters_hash({"gathered": stamp})[1]
            if attrs.get(CLUSTERS_ATTR) == digest:
                return ItemResult(_counts(objects["label"], objects["labels"]), skipped=True)
            table = cluster_objects(table_of_boxes(file), file.mpp_level0, settings)
            boxes = clip_to_tiles(table.geometry, file.coords, file.size_l0, file.patch_size, polygons=file.has_polygons)
            new = annotation_groups(table, boxes, file.mpp_level0)
        old = drop_objects(read_groups(path), (CLUSTER_LABEL, PART_LABEL))
        groups = merge_groups(path, old, new)
        groups["objects"]["attrs"][CLUSTERS_ATTR] = digest
        replace_groups(path, groups)
    return ItemResult(_counts(groups["objects"]["label"], groups["objects"]["attrs"]["labels"]))


def table_of_boxes(file: SlideFile) -> ObjectTable:
    """The annotated objects of a slide file as its tiles show them, in level-0 pixels.

    A cell is the box around its boxes; a region is made of its outlines in the tiles where they are stored, else of its
    boxes there.
    """
    import shapely

    from annotations.objects import Kind, ObjectTable

    objects, boxes = file.objects_table(), file.boxes_table()
    scale = file.size_l0 / file.patch_size
    rects = file.box_bounds_l0
    low, high = np.full((len(objects["kind"]), 2), np.inf), np.full((len(objects["kind"]), 2), -np.inf)
    np.minimum.at(low, boxes["object"], rects[:, :2])
    np.maximum.at(high, boxes["object"], rects[:, 2:])
    shown = np.isfinite(low[:, 0])
    cells = np.flatnonzero(shown & (objects["kind"] == Kind.CELL))
    geometry = [shapely.box(*low[cells].T, *high[cells].T)]
    regions = np.flatnonzero(shown & (objects["kind"] == Kind.TISSUE))
    rows = np.flatnonzero(np.isin(boxes["object"], regions))
    pieces = shapely.box(*rects[rows].T)
    if file.has_polygons:
        corners = file.coords[file.box_tiles[rows]]
        outlines = [_outline(file.polygon(int(row)), scale, at) for row, at in zip(rows, corners, strict=True)]
        pieces = np.array(outlines, dtype=object)
    order = np.argsort(boxes["object"][rows], kind="stable")
    owners, index = np.unique(boxes["object"][rows][order], return_inverse=True)
    collected = shapely.geometrycollections(pieces[order], indices=index) if len(rows) else np.zeros(0, dtype=object)
    geometry.append(np.array([_joined(parts) for parts in collected], dtype=object))
    taken = np.concatenate([cells, owners]).astype(int)
    ids, label, kind = (objects[name][taken] for name in ("id", "label", "kind"))
    return ObjectTable(np.concatenate(geometry), ids, label, kind, tuple(objects["labels"]))


def _joined(pieces: Any) -> Any:
    """One shape of the pieces of a region in its tiles; half a pixel around each closes the seams."""
    import shapely

    return shapely.union_all(shapely.buffer(shapely.get_parts(pieces), 0.5, join_style="mitre"))


def _outline(rings: list[np.ndarray], scale: float, corner_l0: np.ndarray) -> Any:
    """The shape, level-0 pixels, of rings (k, 2) in pixels of a tile, filled by the even-odd rule."""
    import shapely

    solid = [shapely.make_valid(shapely.Polygon(ring * scale + corner_l0)) for ring in rings if len(ring) >= 3]
    shape = shapely.symmetric_difference_all(solid)
    return shapely.union_all([part for part in shapely.get_parts(shape) if part.area > 0])


def _counts(label: np.ndarray, labels: list[str]) -> dict[str, int]:
    from annotations.geometry.clusters import CLUSTER_LABEL, PART_LABEL

    counts = np.bincount(label[label >= 0], minlength=len(labels))
    by_name = dict(zip(labels, counts.tolist(), strict=True))
    return {"clusters": by_name.get(CLUSTER_LABEL, 0), "parts": by_name.get(PART_LABEL, 0)}
