"""`import`: images, with or without boxes, as slide files."""
