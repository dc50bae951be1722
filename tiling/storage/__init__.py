"""Files that are whole or absent, locks, HDF5 that survives a full disk, paths and URLs."""
