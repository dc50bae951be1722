"""Vector objects: read every dialect into one typed table, clip to tiles, write. Imports no torch and no raster code."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from annotations.errors import UserError

if TYPE_CHECKING:
    from annotations.class_map import ClassMap, read_classmap
    from annotations.geojson_writer import feature_collection, table_features, write_geojson
    from annotations.geometry.clip import TileBoxes, clip_to_tiles
    from annotations.objects import Kind, ObjectTable, concatenate, empty_table
    from annotations.readers.coco.images import read_coco
    from annotations.readers.read import read_annotations
    from annotations.readers.slide_context import SlideContext
    from annotations.slide_groups import annotation_groups

_HOME = {
    "ClassMap": "class_map",
    "Kind": "objects",
    "ObjectTable": "objects",
    "SlideContext": "readers.slide_context",
    "TileBoxes": "geometry.clip",
    "annotation_groups": "slide_groups",
    "clip_to_tiles": "geometry.clip",
    "concatenate": "objects",
    "empty_table": "objects",
    "feature_collection": "geojson_writer",
    "read_annotations": "readers.read",
    "read_classmap": "class_map",
    "read_coco": "readers.coco.images",
    "table_features": "geojson_writer",
    "write_geojson": "geojson_writer",
}

__all__ = [
    "ClassMap",
    "Kind",
    "ObjectTable",
    "SlideContext",
    "TileBoxes",
    "UserError",
    "annotation_groups",
    "clip_to_tiles",
    "concatenate",
    "empty_table",
    "feature_collection",
    "read_annotations",
    "read_classmap",
    "read_coco",
    "table_features",
    "write_geojson",
]


def __getattr__(name: str) -> Any:
    """Import a name's module on first use: shapely loads only where geometry is needed."""
    if name not in _HOME:
        raise AttributeError(f"module 'annotations' has no attribute {name!r}")
    return getattr(import_module(f"annotations.{_HOME[name]}"), name)
