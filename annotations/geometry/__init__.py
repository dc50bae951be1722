"""Planar geometry: valid polygons from raw rings, clipping to tiles, clusters, outlines of label images."""
