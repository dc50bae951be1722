"""One backend a library or format, behind one protocol; the registry chooses."""
