"""Scores, neighbours, intervals and folds, against plain float64 formulas and cases done by hand."""

from __future__ import annotations

import numpy as np
import pytest

from odis_path.evaluation.bootstrap import estimate_mean, resample_patients
from odis_path.evaluation.metrics import auroc, balanced_accuracy, confusion_matrix, macro_f1_from_confusion
from odis_path.evaluation.pixel_baselines import box_size, cut_box, grey_texture, rgb_mean
from odis_path.evaluation.probes.classifiers import knn_probe, linear_probe, prototype_probe, prototype_scores
from odis_path.evaluation.probes.knn import knn_scores
from odis_path.evaluation.probes.retrieval import Rule, measures, predict_by_vote, search
from odis_path.evaluation.probes.standardise import Features, in_space
from odis_path.evaluation.splits import check_cross_validation, cross_validation

RNG = np.random.default_rng(1)


def plain_knn(train_x, train_y, test_x, n_classes, k, weights):
    """One test row at a time, in float64."""
    out = np.zeros((len(test_x), n_classes))
    for i, q in enumerate(test_x.astype(np.float64)):
        cosine = np.array([q @ t / np.linalg.norm(q) / np.linalg.norm(t) for t in train_x.astype(np.float64)])
        for j in np.argsort(-cosine)[:k]:
            out[i, train_y[j]] += np.exp(cosine[j] / 0.07) if weights == "temperature" else 1
    return out / out.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("k", "chunk"), [(1, 4096), (5, 4), (500, 7)])
def test_knn_scores_are_those_of_the_formula(k: int, chunk: int) -> None:
    train, y, test = RNG.normal(size=(40, 6)), RNG.integers(0, 3, 40), RNG.normal(size=(23, 6))
    assert knn_scores(train, y, test, 3, k, chunk=chunk) == pytest.approx(
        plain_knn(train, y, test, 3, k, "temperature"), abs=1e-5
    )
    scores = knn_scores(train, y, test, 3, k, chunk=chunk, weights="majority")
    assert scores == pytest.approx(plain_knn(train, y, test, 3, k, "majority"), abs=2e-3), "a tie-breaker apart"


def test_knn_of_no_rows_ties_and_nonsense() -> None:
    x = np.array([[1.0, 0], [0.9, 0.1], [0, 1]])
    assert knn_scores(x, np.array([0, 1, 1]), np.zeros((0, 2)), 2, 3).shape == (0, 2)
    tie = knn_scores(x[:2], np.array([1, 0]), np.array([[1.0, 0]]), 2, 2, weights="majority")
    assert tie.argmax() == 1, "of one vote each the nearer wins"
    for train, k in ((x[:0], 1), (x, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            knn_scores(train, np.zeros(len(train), int), x, 2, k)


def test_scores_agree_with_scikit_learn() -> None:
    from sklearn import metrics

    y, pred = RNG.integers(0, 3, 200), RNG.integers(0, 3, 200)
    scores = RNG.integers(0, 6, (200, 3)).astype(float)  # many ties
    assert balanced_accuracy(y, pred, 3) == pytest.approx(metrics.balanced_accuracy_score(y, pred))
    assert macro_f1_from_confusion(confusion_matrix(y, pred, 3)) == pytest.approx(metrics.f1_score(y, pred, average="macro"))
    areas = [metrics.roc_auc_score(y == c, scores[:, c]) for c in range(3)]
    assert auroc(y, scores)[0] == pytest.approx(np.mean(areas))
    weights = RNG.integers(0, 4, (3, 200))
    for row, area in zip(weights, auroc(y, scores, weights), strict=True):
        repeated = np.repeat(np.arange(200), row)
        assert area == pytest.approx(np.mean([metrics.roc_auc_score(y[repeated] == c, scores[repeated, c]) for c in range(3)]))


def test_scores_of_a_case_by_hand() -> None:
    y, pred = np.array([0, 0, 0, 1]), np.array([0, 0, 2, 1])
    assert confusion_matrix(y, pred, 3).tolist() == [[2, 0, 1], [0, 1, 0], [0, 0, 0]]
    assert balanced_accuracy(y, pred, 3) == pytest.approx((2 / 3 + 1) / 2), "a class without rows does not count"
    assert np.isnan(balanced_accuracy(y[:0], pred[:0], 3))


def test_bootstrap_interval_of_a_known_case() -> None:
    """400 clusters of one row each, right or wrong by a coin: the interval of a share, sqrt(p (1 - p) / n)."""
    values, single_class = (np.arange(400) % 4 == 0).astype(float), np.zeros(3600, int)
    interval = estimate_mean(values, resample_patients(single_class[:400], np.arange(400), 1, 4000, 3)).interval()
    half = 1.96 * np.sqrt(0.25 * 0.75 / 400)
    assert (interval.point, interval.low, interval.high) == pytest.approx((0.25, 0.25 - half, 0.25 + half), abs=0.006)
    doubled = estimate_mean(
        np.repeat(values, 9), resample_patients(single_class, np.repeat(np.arange(400), 9), 1, 4000, 3)
    ).interval()
    assert doubled == pytest.approx(interval), "nine rows of a patient tell no more than one"


@pytest.mark.parametrize(("n_groups", "folds"), [(2, 5), (3, 5), (7, 3), (20, 5)])
def test_no_group_is_on_two_sides_of_any_round(n_groups: int, folds: int) -> None:
    group, y = np.repeat(np.arange(n_groups), 6), np.tile(np.arange(3), n_groups * 2)
    cv = cross_validation(y, group, folds, 0, "patient_id")
    check_cross_validation(cv, group)
    assert (cv.tested == np.arange(len(y))).all(), "every row is judged once"
    for outer in cv.outer_folds:
        for a, b in ((outer.test, outer.train), *outer.inner, *((outer.test, val) for val, _ in outer.inner)):
            assert not set(group[cv.rows(a)]) & set(group[cv.rows(b)])


def test_patient_memory_does_not_help() -> None:
    """Embeddings that know the patient and nothing else, every patient of one class: chance at best, not 1."""
    group = np.repeat(np.arange(12), 10)
    y = group % 2
    x = (RNG.normal(size=(12, 30))[group] + 0.01 * RNG.normal(size=(120, 30))).astype(np.float32)
    cv = cross_validation(y, group, 4, 0, "patient_id")
    for result in (
        knn_probe(Features.of(x), y, cv, 2, ks=(1, 5), weights="temperature"),
        linear_probe(Features.of(x), y, cv, 2),
    ):
        assert balanced_accuracy(y, result.predictions.pred[0], 2) < 0.85
    alone = cross_validation(y, np.arange(120), 4, 0, "none")
    assert (
        balanced_accuracy(y, knn_probe(Features.of(x), y, alone, 2, ks=(1,), weights="temperature").predictions.pred[0], 2) == 1
    )


def test_knn_probe_is_the_plain_search_in_every_round() -> None:
    group, y = np.repeat(np.arange(9), 8), RNG.integers(0, 3, 72)
    x = RNG.normal(size=(72, 5)).astype(np.float32)
    cv = cross_validation(y, group, 3, 0, "patient_id")
    result = knn_probe(Features.of(x), y, cv, 3, ks=(4,), weights="temperature")
    for outer in cv.outer_folds:
        train, test = cv.rows(outer.train), cv.rows(outer.test)
        assert result.predictions.scores[0][test] == pytest.approx(knn_scores(x[train], y[train], x[test], 3, 4), abs=1e-4)


def test_linear_probe_says_what_did_not_converge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("odis_path.evaluation.probes.classifiers.MAX_ITER", 1)
    group, y = np.repeat(np.arange(6), 10), np.tile([0, 1], 30)
    result = linear_probe(Features.of(RNG.normal(size=(60, 5))), y, cross_validation(y, group, 3, 0, "patient_id"), 2)
    assert any("had not converged" in text for text in result.warnings)


def test_prototypes_are_those_of_the_formula() -> None:
    x = RNG.normal(size=(20, 4)).astype(np.float32)
    support = {0: np.array([0, 1]), 1: np.array([2, 3])}
    centre = x[:4].mean(0)
    unit = (x - centre) / np.linalg.norm(x - centre, axis=1, keepdims=True)
    expected = [[-np.sum((q - unit[s].mean(0)) ** 2) for s in ([0, 1], [2, 3])] for q in unit[4:]]
    assert prototype_scores(x, support, x[4:], 2) == pytest.approx(np.array(expected), abs=1e-5)
    plain = [[-np.sum((q - x[s].mean(0)) ** 2) for s in ([0, 1], [2, 3])] for q in x[4:]]
    assert prototype_scores(x, support, x[4:], 3, unit=False)[:, :2] == pytest.approx(np.array(plain), abs=1e-4)
    y, group = np.arange(20) % 2, np.arange(20) // 2
    cv = cross_validation(y, group, 5, 0, "patient_id")
    result = prototype_probe(Features.of(x), y, cv, 2, shots=(1, 4), episodes=7)
    assert result.predictions.pred.shape == (7, 20)
    assert result.per_shots[4][3] == pytest.approx(balanced_accuracy(y, result.predictions.pred[3], 2))


def test_retrieval_by_hand() -> None:
    """Query 0 (class 0, patient 0): nearest first 1 (own patient), 2 (class 1), 3 (class 0), 4 (class 0)."""
    angle = np.array([0, 0.05, 0.1, 0.2, 0.3])
    x = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
    y, patient = np.array([0, 0, 1, 0, 0]), np.array([0, 0, 1, 1, 2])
    hits = search(in_space(x, "cosine"), y, np.array([0]), np.arange(5), 4, Rule("other", (patient,)))
    assert hits.index[0, :3].tolist() == [2, 3, 4]
    assert not np.isfinite(hits.similarity[0, 3])
    assert hits.relevant.tolist() == [2]
    at_2 = measures(hits, y, 2)
    assert (at_2["precision"][0], at_2["hit"][0], at_2["map"][0]) == (0.5, 1, pytest.approx((1 / 2) / 2))
    assert measures(hits, y, 4)["map"][0] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert predict_by_vote(hits, y, 2, 2).pred[0, 0] == 1, "one vote each: the nearer class"
    assert predict_by_vote(hits, y, 2, 3).pred[0, 0] == 0
    same = search(in_space(x, "cosine"), y, np.array([2]), np.arange(5), 4, Rule("same", (), within=patient))
    assert np.isnan(measures(same, y, 4)["hit"][0]), "no row of its class could answer"


def test_simple_measures() -> None:
    tile = np.zeros((32, 32, 3), np.uint8)
    tile[:, :16] = (200, 100, 0)
    assert rgb_mean(tile).tolist() == [100, 50, 0]
    assert cut_box(tile, np.array([2.5, 3, 20, 30.2])).shape == (28, 18, 3)
    assert cut_box(tile, np.array([31, 31, 32, 32])).shape == (8, 8, 3)
    noise = RNG.integers(0, 255, (32, 32, 3)).astype(np.uint8)
    assert grey_texture(noise).shape == grey_texture(tile[:8, :8]).shape
    assert np.abs(grey_texture(noise) - grey_texture(tile)).max() > 0.1
    assert box_size(np.array([[0, 0, 1, np.e]])) == pytest.approx(np.array([[0, 1]]))
