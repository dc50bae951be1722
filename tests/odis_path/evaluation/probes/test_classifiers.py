"""The probes against plain scikit-learn, and what they may not look at."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from odis_path.evaluation.metrics import balanced_accuracy
from odis_path.evaluation.probes.classifiers import (
    MAX_ITER,
    ProbeResult,
    knn_probe,
    linear_probe,
    majority_probe,
    prototype_probe,
    prototype_scores,
)
from odis_path.evaluation.probes.standardise import Features
from odis_path.evaluation.splits import CrossValidation, cross_validation

KS = (1, 3, 9, 27)


def labelled_points(n: int = 240, patients: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y, group = rng.integers(0, 3, n), rng.permutation(np.arange(n) % patients)
    x = rng.normal(size=(3, 6))[y] + rng.normal(size=(n, 6)) + 0.5 * rng.normal(size=(patients, 6))[group]
    return x.astype(np.float32), y, group


def cv_of(y: np.ndarray, group: np.ndarray) -> CrossValidation:
    return cross_validation(y, group, 4, 0, "patient_id")


@pytest.mark.parametrize("weights", ["temperature", "majority"])
def test_knn_is_scikit_learns_with_k_chosen_inside(weights: str) -> None:
    x, y, group = labelled_points()
    cv = cv_of(y, group)
    result = knn_probe(Features.of(x), y, cv, 3, ks=KS, weights=weights)  # type: ignore[arg-type]
    vote = "uniform" if weights == "majority" else lambda d: np.exp((1 - d) / 0.07)
    scores = np.zeros((len(y), 3))
    for outer, chosen in zip(cv.outer_folds, result.chosen, strict=True):
        inner = {}
        for k in KS:
            model = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=vote)
            truth, pred = [], []
            for val, train in outer.inner:
                model.fit(x[cv.rows(train)], y[cv.rows(train)])
                pred.append(model.predict_proba(x[cv.rows(val)]).argmax(1))
                truth.append(y[cv.rows(val)])
            inner[k] = balanced_accuracy(np.concatenate(truth), np.concatenate(pred), 3)
        if weights == "temperature":  # scikit-learn breaks ties of a majority by class number, ours by similarity
            assert chosen == max(KS, key=lambda k: (inner[k], -k))
        model = KNeighborsClassifier(int(chosen), metric="cosine", algorithm="brute", weights=vote)
        rows = cv.rows(outer.test)
        scores[rows] = model.fit(x[cv.rows(outer.train)], y[cv.rows(outer.train)]).predict_proba(x[rows])
    assert np.allclose(result.predictions.scores[0], scores, atol=2e-3)
    assert set(result.per_setting) == set(KS)


def test_linear_is_scikit_learns_with_the_chosen_c() -> None:
    x, y, group = labelled_points()
    cv = cv_of(y, group)
    result = linear_probe(Features.of(x), y, cv, 3)
    for outer, c in zip(cv.outer_folds, result.chosen, strict=True):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=5000, tol=1e-8))
        model.fit(x[cv.rows(outer.train)].astype(float), y[cv.rows(outer.train)])
        rows = cv.rows(outer.test)
        assert np.allclose(result.predictions.scores[0][rows], model.predict_proba(x[rows]), atol=5e-3)
    assert not result.warnings


@pytest.mark.parametrize("probe", ["knn", "linear", "prototype"])
def test_labels_of_judged_rows_are_never_looked_at(probe: str) -> None:
    """Shuffle the labels of one fold: what is said of that very fold does not change."""
    x, y, group = labelled_points()
    cv = cv_of(y, group)
    hidden = cv.rows(cv.outer_folds[0].test)
    other = y.copy()
    other[hidden] = (y[hidden] + 1) % 3

    def run(labels: np.ndarray) -> ProbeResult:
        if probe == "knn":
            return knn_probe(Features.of(x), labels, cv, 3, ks=KS, weights="temperature")
        return (
            linear_probe(Features.of(x), labels, cv, 3)
            if probe == "linear"
            else prototype_probe(Features.of(x), labels, cv, 3, episodes=2)
        )

    a, b = run(y), run(other)
    assert np.array_equal(a.predictions.scores[:, hidden], b.predictions.scores[:, hidden])
    if probe != "prototype":
        assert a.chosen[0] == b.chosen[0]


def test_noise_is_at_chance() -> None:
    _, y, group = labelled_points(n=1200, patients=30)
    x = np.random.default_rng(5).normal(size=(1200, 16)).astype(np.float32)
    cv = cv_of(y, group)
    for result in (
        knn_probe(Features.of(x), y, cv, 3, ks=KS, weights="temperature"),
        linear_probe(Features.of(x), y, cv, 3),
    ):
        assert balanced_accuracy(y, result.predictions.pred[0], 3) == pytest.approx(1 / 3, abs=0.06)


def test_k_beyond_the_training_rows_and_a_class_unseen_in_training() -> None:
    x, y, group = labelled_points(n=24, patients=4)
    y = np.where(group == 0, 2, y % 2)
    cv = cross_validation(y, group, 4, 0, "patient_id")
    result = knn_probe(Features.of(x), y, cv, 3, ks=(1, 50), weights="temperature")
    assert np.isfinite(result.predictions.scores).all()
    assert (linear_probe(Features.of(x), y, cv, 3).predictions.pred[0][group == 0] != 2).all()
    assert (prototype_probe(Features.of(x), y, cv, 3, episodes=2).predictions.pred[:, group == 0] != 2).all()


def test_nothing_to_choose_by_is_said() -> None:
    x, y, group = labelled_points(n=40, patients=2)
    cv = cross_validation(y, group, 5, 0, "patient_id")
    assert "k could not be chosen" in knn_probe(Features.of(x), y, cv, 3, ks=KS, weights="temperature").warnings[0]
    assert "C could not be chosen" in linear_probe(Features.of(x), y, cv, 3).warnings[0]


def test_not_converged_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("odis_path.evaluation.probes.classifiers.MAX_ITER", 2)
    x, y, group = labelled_points()
    assert "had not converged after 2 steps" in linear_probe(Features.of(x), y, cv_of(y, group), 3).warnings[0]
    assert MAX_ITER >= 1000


def test_prototypes_by_hand() -> None:
    x = np.array([[0, 0], [0, 2], [4, 0], [4, 2], [1, 1], [3, 1]], float)
    support = {0: np.array([0, 1]), 1: np.array([2, 3])}
    scores = prototype_scores(x, support, x[[4, 5]], 3)
    centre = np.array([2, 1])
    unit = [(row - centre) / np.linalg.norm(row - centre) for row in x]
    means = [(unit[0] + unit[1]) / 2, (unit[2] + unit[3]) / 2]
    expected = [[-((unit[i] - mean) ** 2).sum() for mean in means] for i in (4, 5)]
    assert np.allclose(scores[:, :2], expected, atol=1e-6)
    assert (scores[:, 2] == -np.inf).all()


def test_more_shots_help_and_the_seed_decides() -> None:
    x, y, group = labelled_points(n=600)
    cv = cv_of(y, group)
    a, b = (prototype_probe(Features.of(x), y, cv, 3, episodes=12, seed=4) for _ in range(2))
    assert np.array_equal(a.predictions.pred, b.predictions.pred)
    mean = {s: values.mean() for s, values in a.per_shots.items()}
    assert mean[1] < mean[4] < mean[16]
    assert a.per_shots[16] == pytest.approx([balanced_accuracy(y, pred, 3) for pred in a.predictions.pred])


def test_prototype_support_is_of_training_rows() -> None:
    """Features that name their row: the score of a row with itself would be the only high one."""
    _, y, group = labelled_points(n=60)
    cv = cv_of(y, group)
    result = prototype_probe(Features.of(np.eye(60, dtype=np.float32)), y, cv, 3, episodes=3)
    assert balanced_accuracy(y, result.predictions.pred[0], 3) < 0.6


def test_majority_is_the_training_rows() -> None:
    y, group = np.array([0, 0, 0, 1, 1, 1, 1, 1]), np.array([0, 0, 0, 1, 1, 2, 2, 2])
    cv = CrossValidation(np.array([0, 0, 0, 1, 1, 1, 1, 1]), cross_validation(y, group, 3, 0, "patient_id").outer_folds[:0], "")
    from odis_path.evaluation.splits import OuterFold

    cv = CrossValidation(cv.fold, (OuterFold((0,), (1,), ()), OuterFold((1,), (0,), ())), "")
    assert majority_probe(y, cv, 2).predictions.pred.tolist() == [[1, 1, 1, 0, 0, 0, 0, 0]]
