"""What other programs read: timm weights, QuPath GeoJSON."""
