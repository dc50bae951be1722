"""Scores of predictions. Classes are numbers 0..C-1; y and pred are int (n,), scores float (n, C), higher: more likely.

Averages over classes take the classes that have at least one true row: a class nobody could have found counts neither
for nor against.
"""

from __future__ import annotations

import numpy as np


def confusion_matrix(y: np.ndarray, pred: np.ndarray, n_classes: int) -> np.ndarray:
    """Counts int64 (C, C), rows the truth, columns the prediction."""
    y, pred = np.asarray(y, dtype=np.int64), np.asarray(pred, dtype=np.int64)
    return np.asarray(np.bincount(y * n_classes + pred, minlength=n_classes**2).reshape(n_classes, n_classes))


def recalls(confusion: np.ndarray) -> np.ndarray:
    """Recall of each class, (..., C, C) -> (..., C); NaN for a class without rows."""
    total = confusion.sum(axis=-1)
    right = np.diagonal(confusion, axis1=-2, axis2=-1)
    return _ratio(right, total, total > 0)


def precisions(confusion: np.ndarray) -> np.ndarray:
    """Precision of each class, (..., C, C) -> (..., C); NaN for a class never predicted."""
    return recalls(np.swapaxes(confusion, -1, -2))


def f1_scores(confusion: np.ndarray) -> np.ndarray:
    """F1 of each class, (..., C, C) -> (..., C); NaN for a class without rows."""
    right = np.diagonal(confusion, axis1=-2, axis2=-1)
    true, predicted = confusion.sum(axis=-1), confusion.sum(axis=-2)
    return _ratio(2.0 * right, true + predicted, true > 0)


def balanced_from_confusion(confusion: np.ndarray) -> np.ndarray:
    """Mean recall over the classes with rows, (..., C, C) -> (...)."""
    return _mean_known(recalls(confusion))


def macro_f1_from_confusion(confusion: np.ndarray) -> np.ndarray:
    """Mean F1 over the classes with rows, (..., C, C) -> (...)."""
    return _mean_known(f1_scores(confusion))


def accuracy_from_confusion(confusion: np.ndarray) -> np.ndarray:
    """Share of all rows named rightly, (..., C, C) -> (...); NaN for no rows."""
    total = confusion.sum(axis=(-1, -2))
    right = np.trace(confusion, axis1=-2, axis2=-1)
    return _ratio(right, total, total > 0)


def balanced_accuracy(y: np.ndarray, pred: np.ndarray, n_classes: int) -> float:
    """Share named rightly, averaged over the classes that occur in y; NaN for no rows."""
    return float(balanced_from_confusion(confusion_matrix(y, pred, n_classes)))


def auroc(y: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Area under the ROC curve, one class against the rest, averaged over classes; ties count half.

    weights: (B, n) how often each row counts, one line per bootstrap sample; None: every row once. Returns (B,), NaN
    where no class has rows on both sides. Rows are sorted once, not once per sample.
    """
    y, scores = np.asarray(y), np.asarray(scores)
    weights = np.ones((1, len(y))) if weights is None else weights
    total = weights.sum(axis=1, dtype=np.float64)
    areas = np.full((scores.shape[1], len(weights)), np.nan)
    for c in range(scores.shape[1]):
        order = np.argsort(scores[:, c], kind="stable")
        ranked = scores[order, c]
        first = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]]) if len(y) else np.zeros(0, int)
        is_class = y[order] == c
        if not is_class.any() or is_class.all():
            continue
        w = weights[:, order].astype(np.float64)
        positive = np.add.reduceat(w * is_class, first, axis=1)
        negative = np.add.reduceat(w * ~is_class, first, axis=1)
        below = np.cumsum(negative, axis=1) - 0.5 * negative
        n_positive = positive.sum(axis=1)
        pairs = n_positive * (total - n_positive)
        np.divide((positive * below).sum(axis=1), pairs, out=areas[c], where=pairs > 0)
    return _mean_known(areas.T)


def _mean_known(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis without the NaNs; NaN where all are."""
    known = ~np.isnan(values)
    count = known.sum(axis=-1)
    total = np.where(known, values, 0.0).sum(axis=-1)
    return _ratio(total, count, count > 0)


def _ratio(numerator: np.ndarray, denominator: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Divide where known; NaN elsewhere."""
    return np.asarray(np.divide(numerator, denominator, out=np.full(np.shape(known), np.nan), where=known))
