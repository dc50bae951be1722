"""One reader a format: bytes of an annotation file -> ObjectTable."""
