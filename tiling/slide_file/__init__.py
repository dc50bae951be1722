"""The slide file (HDF5): read, write, merge annotations into it."""
