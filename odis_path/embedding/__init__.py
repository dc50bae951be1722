"""`embed`: frozen encoders over tiles, objects and slides."""
