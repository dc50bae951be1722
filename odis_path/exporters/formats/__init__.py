"""Tile features in the forms of other programs, a module each, named after its `--to`."""
