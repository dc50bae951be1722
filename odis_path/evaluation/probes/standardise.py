"""Standardise features before distances are taken: one choice for the model and all its baselines, fitted on training rows.

none: nothing. zscore: each column to mean 0 and spread 1. whiten: principal components (those of 99 % of the variance) to
spread 1. centre-slide: minus the mean of the slide's judged rows, which needs no label but uses the judged slide itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from odis_path.evaluation.probes.knn import unit_rows

Metric = Literal["cosine", "euclidean"]
Standardise = Literal["none", "zscore", "whiten", "centre-slide"]
STANDARDISE: tuple[Standardise, ...] = ("none", "zscore", "whiten", "centre-slide")
AUTO = "auto"
CHOSEN_FROM: tuple[Standardise, ...] = ("none", "zscore", "whiten")  # by auto: what a single new tile allows
FITTED = ("zscore", "whiten")
WHITEN_SHARE = 0.99


@dataclass(frozen=True)
class Features:
    """Features x, float32 (n, D), of rows.

    metric: of the probes that measure distances, cosine for embeddings, euclidean for hand-made measures. slide: int (n,), code
    of the slide of each row.
    """

    x: np.ndarray
    metric: Metric
    slide: np.ndarray

    @staticmethod
    def of(x: np.ndarray, metric: Metric = "cosine") -> Features:
        """Make features whose slides are not known: each row is one of its own."""
        return Features(x, metric, np.arange(len(x)))

    def standardised(self, method: Standardise, fit: np.ndarray) -> np.ndarray:
        """Standardise all rows by statistics of the rows `fit`: float32 (n, d)."""
        x = np.asarray(self.x, dtype=np.float32)
        if method == "zscore":
            return _zscore(x, x[fit])
        if method == "whiten":
            return _whitened(x, x[fit])
        return centred_by_slide(x, self.slide) if method == "centre-slide" else x

    def space(self, method: Standardise, fit: np.ndarray) -> np.ndarray:
        """Standardise them as points whose similarity is 1 - distance**2 / 2; see `in_space`."""
        return in_space(self.standardised(method, fit), self.metric, fit)


def in_space(x: np.ndarray, metric: Metric, fit: np.ndarray | None = None) -> np.ndarray:
    """Return rows such that 1 - distance**2 / 2 is their similarity, float32 (n, D).

    cosine: unit length. euclidean: one factor for all columns, so that distances between the rows `fit` (all, where None)
    are of the size of those between unit vectors.
    """
    if metric == "cosine":
        return unit_rows(x)
    fitted = x if fit is None or not len(fit) else x[fit]
    variance = float(fitted.var(axis=0, dtype=np.float64).sum())
    return np.asarray((x - fitted.mean(axis=0)) / np.sqrt(variance if variance > 0 else 1.0), dtype=np.float32)


def centred_by_slide(x: np.ndarray, slide: np.ndarray) -> np.ndarray:
    """Subtract from each row the mean of its slide's rows, float32 (n, D)."""
    codes = np.unique(slide, return_inverse=True)[1]
    sums = np.zeros((codes.max(initial=-1) + 1, x.shape[1]))
    np.add.at(sums, codes, x)
    return np.asarray(x - (sums / np.bincount(codes)[:, None])[codes], dtype=np.float32)


def _zscore(x: np.ndarray, fit: np.ndarray) -> np.ndarray:
    mean, spread = fit.mean(axis=0, dtype=np.float64), fit.std(axis=0, dtype=np.float64)
    return np.asarray((x - mean) / np.where(spread > 0, spread, 1), dtype=np.float32)


def _whitened(x: np.ndarray, fit: np.ndarray) -> np.ndarray:
    from sklearn.decomposition import PCA

    if len(fit) < 2 or not np.ptp(fit, axis=0).any():
        return x
    return np.asarray(PCA(WHITEN_SHARE, whiten=True, svd_solver="covariance_eigh").fit(fit).transform(x), dtype=np.float32)
