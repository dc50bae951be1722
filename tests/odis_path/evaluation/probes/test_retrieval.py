"""Retrieval against its definition, one query at a time."""

from __future__ import annotations

import numpy as np
import pytest

from odis_path.evaluation.bootstrap import resample_patients
from odis_path.evaluation.probes.retrieval import Hits, Rule, majority_vote, measures, retrieval_table, search
from odis_path.evaluation.probes.standardise import in_space


def labelled_points(n: int = 90) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, n)
    return rng.normal(size=(3, 5))[y] + rng.normal(size=(n, 5)), y, rng.integers(0, 9, n)


def test_search_is_exact_and_leaves_out_the_own_patient() -> None:
    x, y, patient = labelled_points()
    everyone = np.arange(len(y))
    hits = search(in_space(x, "cosine"), y, everyone, everyone, 7, Rule("other patients", (patient,)))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    for i in everyone:
        allowed = np.flatnonzero(patient != patient[i])
        best = allowed[np.argsort(-(unit[allowed] @ unit[i]))[:7]]
        assert hits.index[i].tolist() == best.tolist()
        assert np.allclose(hits.similarity[i], unit[best] @ unit[i], atol=1e-5)
        assert hits.relevant[i] == (y[allowed] == y[i]).sum()


def test_rules_of_slide_and_site() -> None:
    x, y, patient = labelled_points()
    everyone = np.arange(len(y))
    slide, site = patient * 2 + everyone % 2, patient % 2
    same = search(in_space(x, "cosine"), y, everyone, everyone, 50, Rule("same slide", (), within=slide))
    valid = np.isfinite(same.similarity)
    assert (slide[same.index] == slide[:, None])[valid].all()
    assert (same.index != everyone[:, None])[valid].all(), "no row answers itself"
    assert valid.sum(1).tolist() == [(slide == s).sum() - 1 for s in slide]
    cross = search(in_space(x, "cosine"), y, everyone, everyone, 5, Rule("other sites", (patient, site)))
    assert (site[cross.index] != site[:, None]).all()


def test_measures_by_hand() -> None:
    y = np.array([0, 0, 1, 0, 1])
    # Query 0: right, wrong, right among four allowed, two of them relevant. Query 2: one relevant, found third.
    hits = Hits(
        np.array([0, 2]), np.array([[0.9, 0.8, 0.7], [0.9, 0.8, 0.7]]), np.array([[1, 2, 3], [0, 1, 4]]), np.array([2, 1])
    )
    at3 = measures(hits, y, 3)
    assert at3["precision"] == pytest.approx([2 / 3, 1 / 3])
    assert at3["hit"].tolist() == [1, 1]
    assert at3["map"] == pytest.approx([(1 / 1 + 2 / 3) / 2, 1 / 3])
    at1 = measures(hits, y, 1)
    assert at1["map"].tolist() == [1, 0], "over min(k, relevant)"
    assert at1["hit"].tolist() == [1, 0]


def test_queries_without_a_relevant_row_are_left_out_and_counted() -> None:
    x, y, patient = labelled_points()
    y = np.where(patient == 4, 3, y)
    everyone = np.arange(len(y))
    hits = search(in_space(x, "cosine"), y, everyone, everyone, 5, Rule("other patients", (patient,)))
    assert np.isnan(measures(hits, y, 5)["map"]).tolist() == (patient == 4).tolist()
    table = retrieval_table(hits, y, ("a", "b", "c", "d"), [1, 5], resample_patients(y, patient, 4, 200, 0))
    assert table.queries_without_relevant == (patient == 4).sum()
    precision = table.per_k["5"]["precision"]
    assert precision.point == pytest.approx(np.nanmean(measures(hits, y, 5)["precision"]))
    assert precision.low < precision.point < precision.high
    assert "class d" in table.per_k["5"]["mmv_balanced_accuracy"].why


def test_the_vote_takes_the_first_k_and_breaks_ties_by_similarity() -> None:
    y = np.array([0, 1, 1, 0, 0])
    hits = Hits(np.array([0]), np.array([[0.9, 0.5, 0.45, 0.1]]), np.array([[1, 3, 4, 2]]), np.array([2]))
    assert majority_vote(hits, y, 2, 1).argmax() == 1
    assert majority_vote(hits, y, 2, 3).argmax() == 0
    assert majority_vote(hits, y, 2, 4).argmax() == 1, "two to two: 0.9 + 0.1 is more than 0.5 + 0.45"
