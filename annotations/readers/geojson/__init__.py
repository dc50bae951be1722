"""GeoJSON: decode features, read them as QuPath means them, split large files."""
