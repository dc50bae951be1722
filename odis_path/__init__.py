"""odis-path: pretrain, embed and evaluate a pathology vision foundation model on your own whole-slide images."""

__version__ = "0.1.0"
