"""Vector objects: read every dialect into one typed table, clip to tiles, write. Imports no torch and no raster code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from annotations.lazy_names import lazy_names

if TYPE_CHECKING:
    from annotations.class_map import ClassMap as ClassMap
    from annotations.class_map import read_classmap as read_classmap
    from annotations.errors import UserError as UserError
    from annotations.geojson_writer import feature_collection as feature_collection
    from annotations.geojson_writer import table_features as table_features
    from annotations.geojson_writer import write_geojson as write_geojson
    from annotations.geometry.clip import TileBoxes as TileBoxes
    from annotations.geometry.clip import clip_to_tiles as clip_to_tiles
    from annotations.objects import Kind as Kind
    from annotations.objects import ObjectTable as ObjectTable
    from annotations.objects import concatenate as concatenate
    from annotations.objects import empty_table as empty_table
    from annotations.readers.coco.images import read_coco as read_coco
    from annotations.readers.options import ReadOptions as ReadOptions
    from annotations.readers.read import read_annotations as read_annotations
    from annotations.readers.slide_context import SlideContext as SlideContext
    from annotations.slide_groups import annotation_groups as annotation_groups

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "annotations.errors": "UserError",
        "annotations.class_map": "ClassMap, read_classmap",
        "annotations.geojson_writer": "feature_collection, table_features, write_geojson",
        "annotations.geometry.clip": "TileBoxes, clip_to_tiles",
        "annotations.objects": "Kind, ObjectTable, concatenate, empty_table",
        "annotations.readers.coco.images": "read_coco",
        "annotations.readers.options": "ReadOptions",
        "annotations.readers.read": "read_annotations",
        "annotations.readers.slide_context": "SlideContext",
        "annotations.slide_groups": "annotation_groups",
    },
)
