"""Files that are whole or absent, locks, checksums, HDF5 that survives a full disk, paths and URLs, CSV."""
