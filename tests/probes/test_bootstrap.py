"""The patient-cluster bootstrap against slow drawing of rows, and in cases with a known answer."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score

from odis_path.evaluate.bootstrap import Estimate, Judged, draw_clusters, estimate_classes, estimate_mean


def cases(patients: int = 8, per_patient: int = 30, seed: int = 0) -> tuple[np.ndarray, Judged, np.ndarray]:
    rng = np.random.default_rng(seed)
    cluster = np.repeat(np.arange(patients), per_patient)
    y = rng.integers(0, 3, len(cluster))
    scores = rng.random((len(y), 3)) + 0.5 * np.eye(3)[y] * rng.random(patients)[cluster, None]
    return y, Judged(scores.argmax(1)[None], scores[None]), cluster


def test_replicates_are_scores_of_the_drawn_patients_rows() -> None:
    y, judged, cluster = cases()
    drawn = draw_clusters(8, 20, seed=3)
    assert (drawn.sum(1) == 8).all()
    found = estimate_classes(y, judged, cluster, drawn, 3)
    for b, line in enumerate(drawn.astype(int)):
        rows = np.repeat(np.arange(len(y)), line[cluster])
        truth, pred, scores = y[rows], judged.pred[0][rows], judged.scores[0][rows]
        assert found["balanced_accuracy"].replicates[b] == pytest.approx(balanced_accuracy_score(truth, pred))
        assert found["macro_f1"].replicates[b] == pytest.approx(f1_score(truth, pred, average="macro"))
        area = np.mean([roc_auc_score(truth == c, scores[:, c]) for c in range(3)])
        assert found["auroc"].replicates[b] == pytest.approx(area)
    assert found["balanced_accuracy"].point == pytest.approx(balanced_accuracy_score(y, judged.pred[0])), "of the full sample"


def test_samples_done_some_at_a_time_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    y, judged, cluster = cases()
    drawn = draw_clusters(8, 23, seed=1)
    whole = estimate_classes(y, judged, cluster, drawn, 3)["auroc"].replicates
    monkeypatch.setattr("odis_path.evaluate.bootstrap._CELLS", 5 * len(y))
    assert np.array_equal(estimate_classes(y, judged, cluster, drawn, 3)["auroc"].replicates, whole)


def test_the_spread_of_a_mean_of_patients_is_the_textbooks() -> None:
    values = np.random.default_rng(0).normal(size=100)
    found = estimate_mean(values, np.arange(100), draw_clusters(100, 4000, seed=0))
    assert found.replicates.std() == pytest.approx(values.std() / 10, rel=0.05)
    interval = found.interval()
    assert interval["point"] == pytest.approx(values.mean())
    assert interval["high"] - interval["low"] == pytest.approx(2 * 1.96 * values.std() / 10, rel=0.07)  # type: ignore[operator]


def test_rows_of_a_patient_do_not_make_the_interval_narrower() -> None:
    values = np.random.default_rng(0).normal(size=20)
    drawn = draw_clusters(20, 2000, seed=0)
    once = estimate_mean(values, np.arange(20), drawn)
    hundred = estimate_mean(np.repeat(values, 100), np.repeat(np.arange(20), 100), drawn)
    assert np.allclose(once.replicates, hundred.replicates)


def test_a_model_against_itself_differs_by_nothing() -> None:
    y, judged, cluster = cases()
    drawn = draw_clusters(8, 1000, seed=0)
    found = estimate_classes(y, judged, cluster, drawn, 3)["balanced_accuracy"]
    assert found.minus(found).interval() == {"point": 0, "low": 0, "high": 0}
    better = Judged(np.where(np.arange(len(y)) % 10 == 0, y, judged.pred), judged.scores)
    paired = estimate_classes(y, better, cluster, drawn, 3)["balanced_accuracy"].minus(found)
    assert np.std(paired.replicates) < 0.7 * found.replicates.std(), "pairing takes out what the patients share"


def test_episodes_are_averaged() -> None:
    y, judged, cluster = cases()
    other = Judged((judged.pred + 1) % 3, judged.scores)
    both = Judged(np.concatenate([judged.pred, other.pred]), np.concatenate([judged.scores, other.scores]))
    drawn = draw_clusters(8, 50, seed=0)
    a, b, mean = (estimate_classes(y, j, cluster, drawn, 3)["balanced_accuracy"] for j in (judged, other, both))
    assert mean.point == pytest.approx((a.point + b.point) / 2)
    assert np.allclose(mean.replicates, (a.replicates + b.replicates) / 2)


def test_the_seed_decides_and_nan_has_no_interval() -> None:
    assert np.array_equal(draw_clusters(9, 7, 1), draw_clusters(9, 7, 1))
    assert not np.array_equal(draw_clusters(9, 7, 1), draw_clusters(9, 7, 2))
    assert Estimate(float("nan"), np.array([np.nan])).interval() == {"point": None, "low": None, "high": None}
