"""Exports for other programs: timm weights, QuPath GeoJSON."""
