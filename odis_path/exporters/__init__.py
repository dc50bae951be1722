"""Exports for other programs: timm weights, QuPath GeoJSON, tile features in many forms."""
