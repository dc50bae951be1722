"""Vector objects: read every dialect into one typed table, clip to tiles, write. Imports no torch and no raster code."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from annotations.errors import UserError

if TYPE_CHECKING:
    from annotations.classmap import ClassMap, read_classmap
    from annotations.clip import TileBoxes, clip_to_tiles
    from annotations.coco import read_coco
    from annotations.frame import SlideFrame
    from annotations.group import annotation_groups
    from annotations.read import read_annotations
    from annotations.table import CELL, PROPOSAL, TISSUE, ObjectTable, concatenate, empty_table
    from annotations.write import feature_collection, table_features, write_geojson

_HOME = {
    "CELL": "table",
    "ClassMap": "classmap",
    "PROPOSAL": "table",
    "TISSUE": "table",
    "ObjectTable": "table",
    "SlideFrame": "frame",
    "TileBoxes": "clip",
    "annotation_groups": "group",
    "clip_to_tiles": "clip",
    "concatenate": "table",
    "empty_table": "table",
    "feature_collection": "write",
    "read_annotations": "read",
    "read_classmap": "classmap",
    "read_coco": "coco",
    "table_features": "write",
    "write_geojson": "write",
}

__all__ = [
    "CELL",
    "PROPOSAL",
    "TISSUE",
    "ClassMap",
    "ObjectTable",
    "SlideFrame",
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
