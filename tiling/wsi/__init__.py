"""Whole-slide images: open, read regions at any mpp, resample."""
