"""The [OBJ] vision transformer and its projection head."""
