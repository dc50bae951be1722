"""Evaluation of frozen embeddings: k-NN, linear probe, prototypes, retrieval; patients kept apart, baselines beside."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from odis_path.evaluation.run import evaluate

__all__ = ["evaluate"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that the training loop's k-NN does not load more than it needs."""
    if name not in __all__:
        raise AttributeError(f"module 'odis_path.evaluation' has no attribute {name!r}")
    return getattr(import_module("odis_path.evaluation.run"), name)
