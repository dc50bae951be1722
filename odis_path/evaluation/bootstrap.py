"""Intervals over patients: whole patients are taken out or drawn anew, with all their rows, so that they tell of new patients.

Up to FEW patients, each is left out once and the others of its stratum weigh more (the jackknife); the spread of these scores
is that of the score. With more, patients are drawn anew (the bootstrap: of n, n - 1 are drawn and weigh n / (n - 1), so that
the spread is not n - 1 n-ths of the true one; Rao & Wu 1988). Where every patient has rows of one class only, a stratum is a
class, so that no sample lacks one. The models are not fitted again: the interval speaks of the patients they are judged on.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import hypot, sqrt

import numpy as np

from odis_path.evaluation.metrics import (
    accuracy_from_confusion,
    auroc,
    balanced_from_confusion,
    confusion_matrix,
    macro_f1_from_confusion,
)

LEVEL = 95.0
FEW = 100
_CELLS = 4_000_000  # rows times samples held at once
AUROC_EPISODES = 10
_NO_VARIANCE = 1e-12


@dataclass(frozen=True)
class Predictions:
    """Out-of-sample predictions of n rows in E episodes (1 for all but prototypes): pred int (E, n), scores (E, n, C)."""

    pred: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class Interval:
    """A score with the ends of its 95% interval; None where not known. why: the reason why there is no interval, or empty."""

    point: float | None
    low: float | None = None
    high: float | None = None
    why: str = ""

    def as_json(self) -> dict[str, float | str | None]:
        """Return the fields, without an empty reason."""
        ends: dict[str, float | str | None] = {"point": self.point, "low": self.low, "high": self.high}
        return ends | ({"why": self.why} if self.why else {})


@dataclass(frozen=True)
class Estimate:
    """The score on all rows, and its replicates (B,) on samples of patients (NaN for a sample that could not be scored).

    variance_rule: makes a variance of them. why: the reason why there is no interval, or empty. operands: of a
    difference, minuend and subtrahend.
    """

    point: float
    replicates: np.ndarray
    variance_rule: VarianceRule
    why: str = ""
    operands: tuple[Estimate, Estimate] | None = None

    def interval(self) -> Interval:
        """Return the 95% interval, without ends where there is none.

        The variance and a t quantile make a score interval (as Wilson's for a share), which is wider towards the middle of
        the scale and never leaves it; a difference is taken as a share of the scale from -1 to 1.
        """
        point = float(self.point) if np.isfinite(self.point) else None
        ends = self._ends()
        return Interval(point, *ends) if ends else Interval(point, why=self.why)

    def _ends(self) -> tuple[float, float] | None:
        variance = self.variance_rule.variance(self.replicates)
        if self.why or np.isnan(variance) or not np.isfinite(self.point):
            return None
        t = t_quantile(self.variance_rule.df)
        if self.operands is None:
            return _score_interval(self.point, variance, t, self.variance_rule.patients)
        if variance < _NO_VARIANCE and abs(self.point) > sqrt(_NO_VARIANCE):
            return self._ends_of_constant_difference(*self.operands)
        low, high = _score_interval((self.point + 1) / 2, variance / 4, t)
        return 2 * low - 1, 2 * high - 1

    def minus(self, other: Estimate) -> Estimate:
        """Return the paired difference: both replicates of a pair come from the same patients."""
        replicates = self.replicates - other.replicates
        return Estimate(self.point - other.point, replicates, self.variance_rule, self.why or other.why, (self, other))

    def _ends_of_constant_difference(self, minuend: Estimate, subtrahend: Estimate) -> tuple[float, float]:
        """Return the ends where all samples have the same difference, from those of both (MOVER: Zou & Donner 2008)."""
        a, b = minuend.point, subtrahend.point
        (a_low, a_high), (b_low, b_high) = minuend._ends() or (a, a), subtrahend._ends() or (b, b)
        return max(-1.0, self.point - hypot(a - a_low, b_high - b)), min(1.0, self.point + hypot(a_high - a, b - b_low))


def t_quantile(df: float) -> float:
    """The upper 2.5 % point of Student's t."""
    from scipy.special import ndtri, stdtrit

    upper = (100 + LEVEL) / 200
    return float(stdtrit(df, upper) if np.isfinite(df) else ndtri(upper))


def _score_interval(p: float, variance: float, t: float, patients: float = float("inf")) -> tuple[float, float]:
    """All q in [0, 1] with (p - q)^2 <= t^2 variance q (1 - q) / (p (1 - p)).

    A score of 0 or 1 in every sample has no variance to go by: each of the patients then counts as one that was all right.
    """
    k = t**2 / patients if p in (0, 1) else 0.0 if variance < _NO_VARIANCE else t**2 * variance / (p * (1 - p))
    middle, half = (p + k / 2) / (1 + k), sqrt(k * p * (1 - p) + k**2 / 4) / (1 + k)
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Resamples:
    """Samples of P patients (or of other clusters).

    cluster: int (n,), the patient of each row, 0..P-1. strata: int (P,): patients are drawn among those of equal number.
    weights: float32 (B, P), the weight of each patient in each sample; lines sum to P. is_jackknife: sample i leaves patient i
    out, else patients are drawn. lacking: bool (B,), samples without a patient of some class. single: classes that one patient
    alone has.
    """

    cluster: np.ndarray
    strata: np.ndarray
    weights: np.ndarray
    is_jackknife: bool
    lacking: np.ndarray
    single: tuple[int, ...] = ()

    @property
    def n_clusters(self) -> int:
        return len(self.strata)

    @property
    def method(self) -> str:
        """Describe the method, for the settings of a result."""
        if not len(self.weights):
            return "no intervals (a single patient or other group, or --bootstrap 0)"
        where = "within their class" if self.strata.max(initial=0) > 0 else "among all"
        method = "each left out once (jackknife)" if self.is_jackknife else f"drawn {len(self.weights)} times (bootstrap)"
        return f"95 %, patients (or other groups) {method}, {where}; t quantile, score interval"

    def variance_rule(self, share: np.ndarray) -> VarianceRule:
        """Return the rule that makes a variance of replicates, for a score of which the patients make up these shares (P,).

        n patients of unequal shares count as m, the square of their sum over the sum of squares (Kish), and leave m / n of the
        n - 1 degrees of freedom; those of strata are put together by Welch and Satterthwaite's formula.
        """
        count, s1, s2 = (np.bincount(self.strata, part) for part in (share > 0, share, share**2))
        filled = count > 0
        if not filled.any():
            return VarianceRule(None, 1.0, 1.0)
        count, s1, s2 = (part[filled] for part in (count, s1, s2))
        freedom = np.maximum((count - 1) / count * s1**2 / s2, 1.0)
        df, patients = s2.sum() ** 2 / (s2**2 / freedom).sum(), s1.sum() ** 2 / s2.sum()
        return VarianceRule(self.strata if self.is_jackknife else None, float(df), float(patients))


@dataclass(frozen=True)
class VarianceRule:
    """The rule that makes a variance of replicates.

    strata: int (P,) where replicate i left patient i out, None where patients were drawn. df: degrees of freedom of the
    variance. patients: how many equally large patients would tell as much.
    """

    strata: np.ndarray | None
    df: float
    patients: float

    def variance(self, replicates: np.ndarray) -> float:
        """Return the variance of a score with these replicates (B,); NaN where there are too few."""
        if self.strata is None:
            known = replicates[np.isfinite(replicates)]
            return float(known.var(ddof=1)) if len(known) > 1 else float("nan")
        total = 0.0
        for stratum in np.unique(self.strata):
            known = replicates[(self.strata == stratum) & np.isfinite(replicates)]
            if len(known) < 2:
                return float("nan")
            total += (len(known) - 1) * float(known.var())
        return total


def resample_patients(y: np.ndarray, cluster: np.ndarray, n_classes: int, samples: int, seed: int) -> Resamples:
    """Samples of patients: within their class where each has one class and no class has one patient, else among all.

    y int (n,), cluster int (n,) in 0..P-1. samples: how often to draw more than FEW patients; 0: no samples.
    """
    clusters = int(cluster.max(initial=-1)) + 1
    has = np.zeros((clusters, n_classes), dtype=np.float32)
    has[cluster, y] = 1
    per_class = has.sum(axis=0)
    nested = bool((has.sum(axis=1) == 1).all() and (per_class[per_class > 0] >= 2).all())
    strata = has.argmax(axis=1) if nested else np.zeros(clusters, dtype=np.int64)
    is_jackknife = clusters <= FEW
    if not samples or clusters < 2:
        weights = np.zeros((0, clusters), dtype=np.float32)
        strata, is_jackknife = np.zeros(clusters, dtype=np.int64), False
    else:
        weights = jackknife_weights(strata) if is_jackknife else bootstrap_weights(strata, samples, seed)
    lacking = ((weights @ has == 0) & (per_class > 0)).any(axis=1)
    return Resamples(cluster, strata, weights, is_jackknife, lacking, tuple(np.flatnonzero(per_class == 1).tolist()))


def jackknife_weights(strata: np.ndarray) -> np.ndarray:
    """Weights float32 (P, P): line i leaves cluster i out, and the n - 1 others of its stratum weigh n / (n - 1)."""
    same = strata[:, None] == strata[None, :]
    n = same.sum(axis=1, keepdims=True)
    weights = np.where(same, n / np.maximum(n - 1, 1), 1.0)
    np.fill_diagonal(weights, 0)
    return weights.astype(np.float32)


def bootstrap_weights(strata: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Weights float32 (B, P): of the n clusters of a stratum n - 1 are drawn, each weighing n / (n - 1)."""
    rng = np.random.default_rng(seed)
    weights = np.ones((samples, len(strata)), dtype=np.float32)
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        n = len(members)
        if n > 1:
            for line in weights:
                line[members] = np.bincount(rng.integers(n, size=n - 1), minlength=n) * (n / (n - 1))
    return weights


def confusion_by_cluster(y: np.ndarray, pred: np.ndarray, cluster: np.ndarray, n_classes: int, n_clusters: int) -> np.ndarray:
    """Confusion counts of each cluster, float32 (P, C, C): exact, and sums of them too up to 16 million rows."""
    cell = (cluster * n_classes + y) * n_classes + pred
    counts = np.bincount(cell, minlength=n_clusters * n_classes**2)
    return counts.reshape(n_clusters, n_classes, n_classes).astype(np.float32)


def estimate_classes(
    y: np.ndarray,
    predictions: Predictions,
    resamples: Resamples,
    n_classes: int,
    names: tuple[str, ...] = (),
    *,
    with_auroc: bool = True,
) -> dict[str, Estimate]:
    """balanced_accuracy, macro_f1, accuracy and auroc with replicates; each is the mean over episodes.

    y int (n,); names: of the classes, to say which of them one patient alone has. Such a class leaves averages over classes
    without an interval, and samples that lack a class are left out of theirs. The AUROC takes the first ten episodes.
    """
    scores_of = {
        "balanced_accuracy": balanced_from_confusion,
        "macro_f1": macro_f1_from_confusion,
        "accuracy": accuracy_from_confusion,
    }
    sums: dict[str, list[tuple[float, np.ndarray]]] = {name: [] for name in scores_of}
    for pred in predictions.pred:
        per_cluster = confusion_by_cluster(y, pred, resamples.cluster, n_classes, resamples.n_clusters)
        whole = confusion_matrix(y, pred, n_classes)
        flat = per_cluster.reshape(len(per_cluster), -1)
        samples = (resamples.weights @ flat).astype(np.float64).reshape(len(resamples.weights), n_classes, n_classes)
        for name, score in scores_of.items():
            sums[name].append((float(score(whole)), score(samples)))
    if with_auroc:
        sums["auroc"] = [(float(auroc(y, s)[0]), auroc_samples(y, s, resamples)) for s in predictions.scores[:AUROC_EPISODES]]
    estimates = {}
    for name, parts in sums.items():
        point, replicates = float(np.mean([p for p, _ in parts])), np.mean([r for _, r in parts], axis=0)
        macro = name != "accuracy"
        rule = resamples.variance_rule(_shares(y, resamples, n_classes, macro=macro))
        replicates = np.where(resamples.lacking, np.nan, replicates) if macro else replicates
        estimates[name] = Estimate(point, replicates, rule, _why(resamples, names) if macro else "")
    return estimates


def _shares(y: np.ndarray, resamples: Resamples, n_classes: int, *, macro: bool) -> np.ndarray:
    """The share of a score that each patient makes up: float64 (P,), summing to 1. macro: every class counts the same."""
    if not macro:
        return np.bincount(resamples.cluster, minlength=resamples.n_clusters) / max(1, len(y))
    counts = np.bincount(resamples.cluster * n_classes + y, minlength=resamples.n_clusters * n_classes).reshape(-1, n_classes)
    total = counts.sum(axis=0)
    return np.asarray((counts[:, total > 0] / total[total > 0]).mean(axis=1))


def _why(resamples: Resamples, names: tuple[str, ...]) -> str:
    """The reason why averages over classes have no interval; empty where they have one."""
    if not resamples.single:
        return ""
    classes = ", ".join(names[c] if names else str(c) for c in resamples.single)
    return f"one patient alone has the class {classes}: how patients differ in it cannot be known"


def auroc_samples(y: np.ndarray, scores: np.ndarray, resamples: Resamples) -> np.ndarray:
    """AUROC of each bootstrap sample (B,): the rows are ranked once, the drawn patients are weights on them."""
    step, weights = max(1, _CELLS // max(1, len(y))), resamples.weights
    parts = [auroc(y, scores, weights[start : start + step][:, resamples.cluster]) for start in range(0, len(weights), step)]
    return np.concatenate(parts) if parts else np.zeros(0)


def estimate_mean(values: np.ndarray, resamples: Resamples) -> Estimate:
    """Mean over rows of values (n,) in [0, 1] with replicates; rows with NaN are left out."""
    known = ~np.isnan(values)
    if not known.any():
        return Estimate(float("nan"), np.full(len(resamples.weights), np.nan), VarianceRule(None, 1.0, 1.0))
    clusters = resamples.n_clusters
    rows = np.bincount(resamples.cluster[known], minlength=clusters).astype(np.float64)
    total = resamples.weights @ np.bincount(resamples.cluster[known], values[known], clusters)
    count = resamples.weights @ rows
    replicates = np.divide(total, count, out=np.full(len(resamples.weights), np.nan), where=count > 0)
    why = "the rows of one patient alone count here" if (rows > 0).sum() < 2 < clusters else ""
    return Estimate(float(values[known].mean()), replicates, resamples.variance_rule(rows / rows.sum()), why)
