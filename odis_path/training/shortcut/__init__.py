"""The shortcut: what two views of a tile, and embeddings, have in common beside the object."""
