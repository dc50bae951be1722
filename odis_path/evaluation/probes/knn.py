"""k nearest neighbours by cosine, small and quick: what the training loop calls, and the votes every probe shares."""

from __future__ import annotations

from typing import Literal

import numpy as np

TEMPERATURE = 0.07
Weights = Literal["temperature", "majority"]


def unit_rows(x: np.ndarray) -> np.ndarray:
    """Scale rows to length 1, float32 (n, D); a zero row stays zero."""
    x = np.asarray(x, dtype=np.float32)
    return np.asarray(x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12))


def nearest(similarity: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the k largest of each line of (q, n), largest first: similarities float (q, k) and columns int64 (q, k)."""
    k = min(k, similarity.shape[1])
    if k < similarity.shape[1]:
        columns = np.argpartition(similarity, similarity.shape[1] - k, axis=1)[:, similarity.shape[1] - k :]
    else:
        columns = np.broadcast_to(np.arange(k), similarity.shape)
    largest = np.take_along_axis(similarity, columns, axis=1)
    order = np.argsort(-largest, axis=1, kind="stable")
    return np.take_along_axis(largest, order, axis=1), np.take_along_axis(columns, order, axis=1)


def votes(
    similarity: np.ndarray,
    labels: np.ndarray,
    n_classes: int,
    weights: Weights = "temperature",
    temperature: float = TEMPERATURE,
) -> np.ndarray:
    """Return class scores of rows from their neighbours: similarity and labels (q, k) -> float64 (q, C), lines summing to 1.

    A neighbour with similarity -inf does not vote. temperature: a vote weighs exp(similarity / temperature). majority:
    a vote is a vote, and of classes with as many votes the one with the larger summed similarity comes first.
    """
    q, k = similarity.shape
    valid = np.isfinite(similarity)
    cell = np.arange(q)[:, None] * n_classes + np.where(valid, labels, 0)
    top = np.max(similarity, axis=1, keepdims=True, initial=-2.0)
    if weights == "temperature":
        weight = np.exp((similarity.astype(np.float64) - top) / temperature)
        scores = np.bincount(cell.ravel(), np.where(valid, weight, 0.0).ravel(), q * n_classes)
    else:
        scores = np.bincount(cell.ravel(), valid.ravel().astype(np.float64), q * n_classes)
        # |summed similarity| <= k, so this part is a thousandth of a vote at most: it orders ties and nothing else.
        summed = np.bincount(cell.ravel(), np.where(valid, np.clip(similarity, -1, 1), 0.0).ravel(), q * n_classes)
        scores = np.where(scores > 0, scores + 1e-3 * (summed + k) / (2 * k + 1), 0.0)
    scores = scores.reshape(q, n_classes)
    return np.asarray(scores / np.maximum(scores.sum(axis=1, keepdims=True), 1e-300))


def knn_scores(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    n_classes: int,
    k: int,
    temperature: float = TEMPERATURE,
    chunk: int = 4096,
    weights: Weights = "temperature",
) -> np.ndarray:
    """Return class scores of the test rows from their k nearest training rows by cosine; weights: see `votes`.

    train_x (n, D), train_y int (n,) in 0..C-1, test_x (m, D): float32 (m, C), lines summing to 1. More neighbours than
    training rows: all of them vote. Raises ValueError for no training rows or k < 1.
    """
    if len(train_x) == 0 or k < 1:
        raise ValueError(f"{len(train_x)} training rows and k = {k}: both must be at least 1")
    gallery, queries, train_y = unit_rows(train_x), unit_rows(test_x), np.asarray(train_y)
    scores = np.zeros((len(queries), n_classes), dtype=np.float32)
    for start in range(0, len(queries), chunk):
        similarity, columns = nearest(queries[start : start + chunk] @ gallery.T, k)
        scores[start : start + chunk] = votes(similarity, train_y[columns], n_classes, weights, temperature)
    return scores
