"""Scores agree with scikit-learn, and with cases small enough to count by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score
from sklearn.metrics import confusion_matrix as sklearn_confusion

from odis_path.evaluation import metrics


@pytest.mark.parametrize("seed", range(5))
def test_scores_agree_with_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    y, pred = rng.integers(0, 4, 200), rng.integers(0, 4, 200)
    scores = rng.integers(0, 9, (200, 4)) / 8  # with ties
    assert np.array_equal(metrics.confusion_matrix(y, pred, 4), sklearn_confusion(y, pred, labels=range(4)))
    assert metrics.balanced_accuracy(y, pred, 4) == pytest.approx(balanced_accuracy_score(y, pred))
    assert metrics.macro_f1_from_confusion(metrics.confusion_matrix(y, pred, 4)) == pytest.approx(
        f1_score(y, pred, average="macro")
    )
    expected = np.mean([roc_auc_score(y == c, scores[:, c]) for c in range(4)])
    assert metrics.auroc(y, scores)[0] == pytest.approx(expected, abs=1e-12)


def test_a_case_counted_by_hand() -> None:
    y, pred = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])
    assert metrics.confusion_matrix(y, pred, 2).tolist() == [[2, 1], [0, 1]]
    assert metrics.balanced_accuracy(y, pred, 2) == pytest.approx((2 / 3 + 1) / 2)
    assert metrics.macro_f1_from_confusion(metrics.confusion_matrix(y, pred, 2)) == pytest.approx((4 / 5 + 2 / 3) / 2)
    scores = np.array([0.1, 0.6, 0.4, 0.6])  # of class 1: it beats 0.1 and 0.4, ties 0.6
    assert metrics.auroc(y, np.stack([-scores, scores], 1))[0] == pytest.approx(2.5 / 3)


def test_a_class_without_rows_counts_neither_for_nor_against() -> None:
    y, pred = np.array([0, 1]), np.array([0, 2])
    assert metrics.balanced_accuracy(y, pred, 4) == 0.5
    assert metrics.macro_f1_from_confusion(metrics.confusion_matrix(y, pred, 4)) == 0.5
    assert np.isnan(metrics.recalls(metrics.confusion_matrix(y, pred, 4))[2:]).all()
    assert np.isnan(metrics.balanced_accuracy(y[:0], pred[:0], 4))


def test_weighted_auroc_is_that_of_repeated_rows() -> None:
    rng = np.random.default_rng(0)
    y, scores, weights = rng.integers(0, 3, 60), rng.integers(0, 5, (60, 3)) / 4, rng.integers(0, 4, (3, 60))
    areas = metrics.auroc(y, scores, weights)
    for line, area in zip(weights, areas, strict=True):
        again = np.repeat(np.arange(60), line)
        assert area == pytest.approx(np.mean([roc_auc_score(y[again] == c, scores[again, c]) for c in range(3)]))
    assert np.isnan(metrics.auroc(np.zeros(3, int), np.zeros((3, 2)))[0])
    assert np.isnan(metrics.auroc(np.zeros(0, int), np.zeros((0, 2)))[0])
