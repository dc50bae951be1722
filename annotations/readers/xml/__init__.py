"""The XML dialects: ASAP, ImageScope, NDPA, VOC."""
