"""Nearest neighbours and their votes."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from odis_path.evaluation.probes.knn import knn_scores, nearest, votes


def slow_scores(train: np.ndarray, y: np.ndarray, test: np.ndarray, classes: int, k: int) -> np.ndarray:
    """The definition, in float64, a row at a time."""
    scores = np.zeros((len(test), classes))
    for i, row in enumerate(test.astype(np.float64)):
        cosine = train @ row / np.linalg.norm(train, axis=1) / np.linalg.norm(row)
        for j in np.argsort(-cosine)[:k]:
            scores[i, y[j]] += np.exp(cosine[j] / 0.07)
    return scores / scores.sum(1, keepdims=True)


@pytest.mark.parametrize(("rows", "k", "chunk"), [(1, 1, 4096), (37, 5, 10), (40, 60, 7), (40, 20, 40)])
def test_scores_are_the_definition(rows: int, k: int, chunk: int) -> None:
    rng = np.random.default_rng(rows)
    train, y, test = rng.normal(size=(50, 6)), rng.integers(0, 3, 50), rng.normal(size=(rows, 6))
    scores = knn_scores(train, y, test, 3, k, chunk=chunk)
    assert scores.dtype == np.float32
    assert np.allclose(scores, slow_scores(train, y, test, 3, min(k, 50)), atol=1e-5)


def test_no_test_rows_and_no_training_rows() -> None:
    train, y = np.ones((3, 2)), np.array([0, 1, 1])
    assert knn_scores(train, y, np.ones((0, 2)), 2, 1).shape == (0, 2)
    with pytest.raises(ValueError, match="at least 1"):
        knn_scores(train[:0], y[:0], train, 2, 1)


def test_predictions_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    train, y, test = rng.normal(size=(200, 5)), rng.integers(0, 4, 200), rng.normal(size=(80, 5))
    model = KNeighborsClassifier(11, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07))
    assert np.allclose(knn_scores(train, y, test, 4, 11), model.fit(train, y).predict_proba(test), atol=1e-4)


def test_the_nearest_come_first() -> None:
    similarity, columns = nearest(np.array([[0.1, 0.9, 0.5, 0.7]]), 3)
    assert columns.tolist() == [[1, 3, 2]]
    assert similarity.tolist() == [[0.9, 0.7, 0.5]]


def test_a_tied_majority_goes_to_the_larger_summed_similarity() -> None:
    labels = np.array([[0, 1, 1, 0, 2]])
    assert votes(np.array([[0.9, 0.8, 0.7, 0.5, 0.9]]), labels, 3, "majority").argmax() == 1
    assert votes(np.array([[0.9, 0.8, 0.7, 0.65, 0.9]]), labels, 3, "majority").argmax() == 0
    assert votes(np.array([[0.1, 0.1, -0.9, -0.9, 1.0]]), labels, 3, "majority").argmax() != 2, "two votes beat one"


def test_absent_neighbours_do_not_vote() -> None:
    similarity, labels = np.array([[0.2, -np.inf, -np.inf]]), np.array([[1, 0, 0]])
    for weights in ("temperature", "majority"):
        assert np.allclose(votes(similarity, labels, 2, weights), [[0, 1]])
