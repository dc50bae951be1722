"""Intervals over patients: samples against slow drawing of rows, cases with a known answer, how often they hold the truth."""

from __future__ import annotations

import sys
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, roc_auc_score

from odis_path.evaluation.bootstrap import (
    Estimate,
    Interval,
    Predictions,
    Resamples,
    VarianceRule,
    bootstrap_weights,
    estimate_classes,
    estimate_mean,
    jackknife_weights,
    resample_patients,
    t_quantile,
)

sys.path.insert(0, str(Path(__file__).parents[3] / "experiments"))


def cases(patients: int = 8, per_patient: int = 30, seed: int = 0) -> tuple[np.ndarray, Predictions, np.ndarray]:
    rng = np.random.default_rng(seed)
    cluster = np.repeat(np.arange(patients), per_patient)
    y = rng.integers(0, 3, len(cluster))
    scores = rng.random((len(y), 3)) + 0.5 * np.eye(3)[y] * rng.random(patients)[cluster, None]
    return y, Predictions(scores.argmax(1)[None], scores[None]), cluster


def resamples_of(cluster: np.ndarray, samples: int = 1000, seed: int = 0) -> Resamples:
    """Of rows of one class, so that all patients are in one stratum."""
    return resample_patients(np.zeros(len(cluster), int), cluster, 1, samples, seed)


def test_replicates_are_scores_of_the_sampled_patients_rows() -> None:
    y, predictions, cluster = cases()
    resamples = resample_patients(y, cluster, 3, 20, seed=3)
    assert resamples.is_jackknife
    assert np.allclose(resamples.weights.sum(1), 8)
    estimates = estimate_classes(y, predictions, resamples, 3)
    for b in range(8):
        rows = np.flatnonzero(cluster != b)
        truth, pred, scores = y[rows], predictions.pred[0][rows], predictions.scores[0][rows]
        assert estimates["balanced_accuracy"].replicates[b] == pytest.approx(balanced_accuracy_score(truth, pred))
        assert estimates["macro_f1"].replicates[b] == pytest.approx(f1_score(truth, pred, average="macro"))
        assert estimates["accuracy"].replicates[b] == pytest.approx(accuracy_score(truth, pred))
        area = np.mean([roc_auc_score(truth == c, scores[:, c]) for c in range(3)])
        assert estimates["auroc"].replicates[b] == pytest.approx(area)
    assert estimates["balanced_accuracy"].point == pytest.approx(balanced_accuracy_score(y, predictions.pred[0])), (
        "of the full sample"
    )


def test_more_patients_are_drawn_whole() -> None:
    weights = bootstrap_weights(np.zeros(8, int), 20, seed=3)
    assert np.allclose(weights.sum(1), 8)
    times = weights * 7 / 8
    assert np.allclose(times, np.round(times)), "seven of eight are drawn, each counts 8 / 7"
    y, predictions, cluster = cases(patients=120, per_patient=5)
    resamples = resample_patients(y, cluster, 3, 200, seed=0)
    assert not resamples.is_jackknife
    assert len(resamples.weights) == 200
    assert "among all" in resamples.method
    ends = estimate_classes(y, predictions, resamples, 3)["balanced_accuracy"].interval()
    assert ends.low < ends.point < ends.high


def test_samples_done_some_at_a_time_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    y, predictions, cluster = cases()
    resamples = resample_patients(y, cluster, 3, 1000, seed=1)
    whole = estimate_classes(y, predictions, resamples, 3)["auroc"].replicates
    monkeypatch.setattr("odis_path.evaluation.bootstrap._CELLS", 5 * len(y))
    assert np.array_equal(estimate_classes(y, predictions, resamples, 3)["auroc"].replicates, whole)


@pytest.mark.parametrize("patients", [10, 100, 400])
def test_the_spread_of_a_mean_of_patients_is_the_textbooks(patients: int) -> None:
    values = np.random.default_rng(0).uniform(0.3, 0.7, size=patients)
    estimate = estimate_mean(values, resamples_of(np.arange(patients), 4000))
    error = values.std(ddof=1) / np.sqrt(patients)
    assert np.sqrt(estimate.variance_rule.variance(estimate.replicates)) == pytest.approx(error, rel=0.05)
    interval = estimate.interval()
    assert interval.point == pytest.approx(values.mean())
    assert interval.high - interval.low == pytest.approx(2 * t_quantile(patients - 1) * error, rel=0.07)
    assert t_quantile(4) == pytest.approx(2.776, abs=1e-3)


def test_rows_of_a_patient_do_not_make_the_interval_narrower() -> None:
    values = np.random.default_rng(0).random(size=20)
    once = estimate_mean(values, resamples_of(np.arange(20)))
    hundred = estimate_mean(np.repeat(values, 100), resamples_of(np.repeat(np.arange(20), 100)))
    assert np.allclose(once.replicates, hundred.replicates)
    assert astuple(once.interval())[:3] == pytest.approx(astuple(hundred.interval())[:3])


def test_a_large_patient_leaves_fewer_degrees_of_freedom() -> None:
    sizes = np.array([300, 20, 20, 20, 20])
    even, uneven = resamples_of(np.arange(5)), resamples_of(np.repeat(np.arange(5), sizes))
    assert even.variance_rule(np.full(5, 0.2)).df == pytest.approx(4)
    rule = uneven.variance_rule(sizes / sizes.sum())
    assert 1 <= rule.df < 3
    assert rule.patients < 2


def test_patients_of_one_class_are_sampled_within_it() -> None:
    cluster = np.repeat(np.arange(7), 4)
    y = (cluster % 2).astype(int)
    resamples = resample_patients(y, cluster, 2, 1000, 0)
    assert "within their class" in resamples.method
    assert not resamples.lacking.any()
    per_class = np.stack([resamples.weights[:, np.arange(7) % 2 == c].sum(axis=1) for c in (0, 1)], axis=1)
    assert np.allclose(per_class, [4, 3]), "every sample has the classes in their true share"
    many = resample_patients(np.arange(150) % 2, np.arange(150), 2, 300, 0)
    assert "within their class" in many.method
    assert np.allclose(many.weights[:, ::2].sum(axis=1), 75)
    assert np.allclose(jackknife_weights(np.array([0, 0, 1, 1]))[0], [0, 2, 1, 1])


def test_a_class_of_one_patient_has_no_interval_and_says_why() -> None:
    """Five patients of two classes, and one of them alone has the third: the interval would be of the other two classes."""
    rng = np.random.default_rng(0)
    cluster = np.repeat(np.arange(5), 20)
    y = np.where((cluster == 2) & (np.arange(100) % 4 == 0), 2, np.arange(100) % 2)
    scores = rng.random((100, 3)) + 0.4 * np.eye(3)[y]
    resamples = resample_patients(y, cluster, 3, 1000, 0)
    assert resamples.single == (2,)
    assert resamples.lacking.sum() == 1, "a sample without the class is flagged"
    estimates = estimate_classes(
        y, Predictions(scores.argmax(1)[None], scores[None]), resamples, 3, ("gland", "stroma", "rare")
    )
    for name in ("balanced_accuracy", "macro_f1", "auroc"):
        ends = estimates[name].interval()
        assert (ends.low, ends.high) == (None, None)
        assert "one patient alone has the class rare" in ends.why
        assert estimates[name].minus(estimates[name]).interval().why
    ends = estimates["accuracy"].interval()
    assert ends.low < ends.point < ends.high
    recall = estimate_mean(np.where(y == 2, 1.0, np.nan), resamples).interval()
    assert recall.low is None
    assert "one patient" in recall.why


def test_samples_that_lack_a_class_are_left_out() -> None:
    """Two of 120 patients have the third class: a tenth and more of the drawn samples have none of them."""
    cluster = np.repeat(np.arange(120), 3)
    y = np.where((cluster < 2) & (np.arange(360) % 3 == 2), 2, np.arange(360) % 2)
    resamples = resample_patients(y, cluster, 3, 1000, 0)
    assert 80 < resamples.lacking.sum() < 200
    assert resamples.single == ()
    pred = np.where(y == 2, 0, y)
    estimate = estimate_classes(y, Predictions(pred[None], np.eye(3)[pred][None]), resamples, 3)["balanced_accuracy"]
    assert np.isnan(estimate.replicates).sum() == resamples.lacking.sum()
    assert estimate.interval().high < 0.75, "no sample is scored over two classes of three, which would be 1"


@pytest.mark.parametrize("patients", [5, 40])
def test_a_perfect_score_is_as_sure_as_its_patients_are_many(patients: int) -> None:
    y, cluster = np.tile([0, 1], patients * 5), np.repeat(np.arange(patients), 10)
    right, scores = Predictions(y[None], np.eye(2)[y][None]), Predictions(np.zeros_like(y)[None], np.eye(2)[y][None])
    resamples = resample_patients(y, cluster, 2, 1000, 0)
    ends = estimate_classes(y, right, resamples, 2)["balanced_accuracy"].interval()
    t = t_quantile(patients - 1)
    assert (ends.point, ends.high) == (1, 1)
    assert ends.low == pytest.approx(patients / (patients + t**2))
    constant = estimate_classes(y, scores, resamples, 2)["balanced_accuracy"]
    assert constant.interval() == Interval(0.5, 0.5, 0.5)
    difference = estimate_classes(y, right, resamples, 2)["balanced_accuracy"].minus(constant).interval()
    assert difference.low == pytest.approx(ends.low - 0.5)


def test_intervals_stay_on_their_scale_and_hold_the_point() -> None:
    rng = np.random.default_rng(1)
    for point in (0.02, 0.5, 0.985):
        for patients in (2, 3, 6):
            values = np.clip(point + 0.4 * rng.normal(size=patients), 0, 1)
            ends = estimate_mean(values, resamples_of(np.arange(patients))).interval()
            assert 0 <= ends.low <= ends.point <= ends.high <= 1


def test_a_model_against_itself_differs_by_nothing() -> None:
    y, predictions, cluster = cases()
    resamples = resample_patients(y, cluster, 3, 1000, 0)
    estimate = estimate_classes(y, predictions, resamples, 3)["balanced_accuracy"]
    assert astuple(estimate.minus(estimate).interval())[:3] == pytest.approx((0, 0, 0))
    better = Predictions(np.where(np.arange(len(y)) % 10 == 0, y, predictions.pred), predictions.scores)
    paired = estimate_classes(y, better, resamples, 3)["balanced_accuracy"].minus(estimate)
    assert np.std(paired.replicates) < 0.7 * estimate.replicates.std(), "pairing takes out what the patients share"


def test_episodes_are_averaged() -> None:
    y, predictions, cluster = cases()
    other = Predictions((predictions.pred + 1) % 3, predictions.scores)
    both = Predictions(np.concatenate([predictions.pred, other.pred]), np.concatenate([predictions.scores, other.scores]))
    resamples = resample_patients(y, cluster, 3, 50, 0)
    a, b, mean = (estimate_classes(y, j, resamples, 3)["balanced_accuracy"] for j in (predictions, other, both))
    assert mean.point == pytest.approx((a.point + b.point) / 2)
    assert np.allclose(mean.replicates, (a.replicates + b.replicates) / 2)


def test_the_seed_decides_and_nan_has_no_interval() -> None:
    strata = np.zeros(9, int)
    assert np.array_equal(bootstrap_weights(strata, 7, 1), bootstrap_weights(strata, 7, 1))
    assert not np.array_equal(bootstrap_weights(strata, 7, 1), bootstrap_weights(strata, 7, 2))
    rule = VarianceRule(None, 1, 1)
    assert Estimate(float("nan"), np.array([np.nan]), rule).interval() == Interval(None)
    y, predictions, cluster = cases()
    none = resample_patients(y, cluster, 3, 0, 0)
    assert "no intervals" in none.method
    assert estimate_classes(y, predictions, none, 3)["accuracy"].interval().low is None


@pytest.mark.parametrize("design", [0, 3], ids=["several classes a patient", "one class a patient"])
@pytest.mark.parametrize("patients", [5, 20])
def test_95_percent_intervals_hold_the_truth_about_as_often(design: int, patients: int) -> None:
    """The short form of experiments/coverage.py: 400 simulations, whose own error of 0.011 the limits allow for."""
    from coverage import DESIGNS, MEASURES, coverage, truth_of

    truth = truth_of(DESIGNS[design], seed=0, parts=4)
    shares = coverage(DESIGNS[design], patients, truth, simulations=400, samples=1000, seed=7)
    assert shares["simulations"] == 400
    for name in MEASURES:
        assert 0.915 <= shares[name] <= 0.99, f"{name}: {shares[name]}"
