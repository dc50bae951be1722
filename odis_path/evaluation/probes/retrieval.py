"""Retrieval: each row asks for the rows most like it. By default rows of its own patient may not answer.

precision@k: share of the class among the first k (of those allowed, where there are fewer). hit@k: is one among them.
mAP@k: mean over the relevant of the first k of the precision at their place, over min(k, relevant allowed). mMV@k: the
majority vote of the first k, ties by summed similarity, scored by balanced accuracy. Queries without any relevant row
allowed can neither hit nor miss: the first three leave them out, and count them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from odis_path.evaluation.bootstrap import Interval, Predictions, Resamples, estimate_classes, estimate_mean
from odis_path.evaluation.probes.knn import nearest, votes

_CHUNK = 512


@dataclass(frozen=True)
class Rule:
    """Which rows may answer. apart: group codes (n,) that must differ; within: a code (n,) that must be the same, or None."""

    name: str
    apart: tuple[np.ndarray, ...]
    within: np.ndarray | None = None


@dataclass(frozen=True)
class RetrievalTable:
    """Measures by k and name. queries_without_relevant: how many have no row of their class among those that may answer."""

    queries: int
    queries_without_relevant: int
    per_k: dict[str, dict[str, Interval]]


@dataclass(frozen=True)
class Hits:
    """Answers to q queries, nearest first: similarity (q, k), -inf for none; index (q, k); relevant int (q,)."""

    queries: np.ndarray
    similarity: np.ndarray
    index: np.ndarray
    relevant: np.ndarray


def search(space: np.ndarray, y: np.ndarray, queries: np.ndarray, gallery: np.ndarray, k: int, rule: Rule) -> Hits:
    """Exact search, some queries at a time. No row answers itself.

    space: (n, D) of `Features.space`; y (n,); queries and gallery are row numbers.
    """
    half = 0.5 * (space**2).sum(axis=1)
    there, there_half = space[gallery].T, half[gallery]
    k = min(k, len(gallery))
    similarity, index = np.full((len(queries), k), -np.inf, dtype=np.float32), np.zeros((len(queries), k), dtype=np.int64)
    relevant = np.zeros(len(queries), dtype=np.int64)
    for start in range(0, len(queries), _CHUNK):
        part = slice(start, start + _CHUNK)
        rows = queries[part]
        allowed = rows[:, None] != gallery[None, :]
        for code in rule.apart:
            allowed &= code[rows][:, None] != code[gallery][None, :]
        if rule.within is not None:
            allowed &= rule.within[rows][:, None] == rule.within[gallery][None, :]
        alike = 1 + space[rows] @ there - half[rows][:, None] - there_half[None, :]
        similarity[part], columns = nearest(np.where(allowed, alike, -np.inf), k)
        index[part] = gallery[columns]
        relevant[part] = (allowed & (y[rows][:, None] == y[gallery][None, :])).sum(axis=1)
    return Hits(queries, similarity, index, relevant)


def measures(hits: Hits, y: np.ndarray, k: int) -> dict[str, np.ndarray]:
    """precision, hit and map at k of each query, float64 (q,); NaN for queries that have no relevant row."""
    valid = np.isfinite(hits.similarity[:, :k])
    right = (y[hits.index[:, :k]] == y[hits.queries][:, None]) & valid
    answerable = hits.relevant > 0
    places = np.arange(1, right.shape[1] + 1)
    precision_at = np.cumsum(right, axis=1) / places
    scores = {
        "precision": right.sum(axis=1) / np.maximum(valid.sum(axis=1), 1),
        "hit": right.any(axis=1).astype(np.float64),
        "map": (precision_at * right).sum(axis=1) / np.maximum(np.minimum(k, hits.relevant), 1),
    }
    return {name: np.where(answerable, values, np.nan) for name, values in scores.items()}


def majority_vote(hits: Hits, y: np.ndarray, n_classes: int, k: int) -> np.ndarray:
    """Vote shares of the first k answers of each query, float64 (q, C); ties by summed similarity."""
    return votes(hits.similarity[:, :k], y[hits.index[:, :k]], n_classes, "majority")


def retrieval_table(
    hits: Hits, y: np.ndarray, names: tuple[str, ...], ks: Sequence[int], resamples: Resamples
) -> RetrievalTable:
    """Measure everything at every k, with intervals. names: of the classes; resamples: of the patients of the queries."""
    per_k = {}
    truth = y[hits.queries]
    for k in ks:
        row = {name: estimate_mean(values, resamples).interval() for name, values in measures(hits, y, k).items()}
        predictions = predict_by_vote(hits, y, len(names), k)
        vote_scores = estimate_classes(truth, predictions, resamples, len(names), names, with_auroc=False)
        row["mmv_balanced_accuracy"] = vote_scores["balanced_accuracy"].interval()
        per_k[str(k)] = row
    return RetrievalTable(len(hits.queries), int((hits.relevant == 0).sum()), per_k)


def predict_by_vote(hits: Hits, y: np.ndarray, n_classes: int, k: int) -> Predictions:
    """The majority vote at k as a prediction of each query."""
    scores = majority_vote(hits, y, n_classes, k)
    return Predictions(scores.argmax(axis=1)[None], scores[None])
