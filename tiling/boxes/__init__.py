"""`annotate`: annotation files clipped into the boxes of slide files."""
