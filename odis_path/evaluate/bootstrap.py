"""Patient-cluster bootstrap: whole patients are drawn anew, with all their rows, so that intervals tell of new patients.

The models are not fitted again: the interval speaks of the patients they are judged on. A sample in which a class has no
patient is scored over the classes it has.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from odis_path.evaluate.metrics import auroc, balanced_from_confusion, confusion_matrix, macro_f1_from_confusion

LEVEL = 95.0
_CELLS = 4_000_000  # rows times samples held at once
AUROC_EPISODES = 10


@dataclass(frozen=True)
class Judged:
    """Out-of-sample predictions of n rows in E episodes (1 for all but prototypes): pred int (E, n), scores (E, n, C)."""

    pred: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class Estimate:
    """The score on all rows, and its B bootstrap replicates (NaNs among them where a sample could not be scored)."""

    point: float
    replicates: np.ndarray

    def interval(self) -> dict[str, float | None]:
        """point, low and high: the 95% percentile interval; None where there is no number."""
        known = self.replicates[np.isfinite(self.replicates)]
        if not len(known):
            return {"point": _number(self.point), "low": None, "high": None}
        low, high = np.percentile(known, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
        return {"point": _number(self.point), "low": float(low), "high": float(high)}

    def minus(self, other: Estimate) -> Estimate:
        """The paired difference: both replicates of a pair come from the same drawn patients."""
        return Estimate(self.point - other.point, self.replicates - other.replicates)


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def draw_clusters(n_clusters: int, samples: int, seed: int) -> np.ndarray:
    """How often each cluster is drawn: float32 (B, P), lines summing to P."""
    rng = np.random.default_rng(seed)
    drawn = np.empty((samples, n_clusters), dtype=np.float32)
    for line in drawn:
        line[:] = np.bincount(rng.integers(n_clusters, size=n_clusters), minlength=n_clusters)
    return drawn


def confusion_by_cluster(y: np.ndarray, pred: np.ndarray, cluster: np.ndarray, n_classes: int, n_clusters: int) -> np.ndarray:
    """Confusion counts of each cluster, float32 (P, C, C): exact, and sums of them too up to 16 million rows."""
    cell = (cluster * n_classes + y) * n_classes + pred
    counts = np.bincount(cell, minlength=n_clusters * n_classes**2)
    return counts.reshape(n_clusters, n_classes, n_classes).astype(np.float32)


def estimate_classes(
    y: np.ndarray, judged: Judged, cluster: np.ndarray, drawn: np.ndarray, n_classes: int, *, with_auroc: bool = True
) -> dict[str, Estimate]:
    """balanced_accuracy, macro_f1 and auroc with replicates; each is the mean over episodes.

    y int (n,); cluster int (n,) in 0..P-1; drawn (B, P). The AUROC takes the first ten episodes, the others all.
    """
    sums: dict[str, list[tuple[float, np.ndarray]]] = {"balanced_accuracy": [], "macro_f1": []}
    for pred in judged.pred:
        per_cluster = confusion_by_cluster(y, pred, cluster, n_classes, drawn.shape[1])
        whole = confusion_matrix(y, pred, n_classes)
        flat = per_cluster.reshape(len(per_cluster), -1)
        samples = (drawn @ flat).astype(np.float64).reshape(len(drawn), n_classes, n_classes)
        sums["balanced_accuracy"].append((float(balanced_from_confusion(whole)), balanced_from_confusion(samples)))
        sums["macro_f1"].append((float(macro_f1_from_confusion(whole)), macro_f1_from_confusion(samples)))
    if with_auroc:
        sums["auroc"] = [
            (float(auroc(y, scores)[0]), auroc_samples(y, scores, cluster, drawn)) for scores in judged.scores[:AUROC_EPISODES]
        ]
    return {
        name: Estimate(float(np.mean([point for point, _ in parts])), np.mean([samples for _, samples in parts], axis=0))
        for name, parts in sums.items()
    }


def auroc_samples(y: np.ndarray, scores: np.ndarray, cluster: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """AUROC of each bootstrap sample (B,): the rows are ranked once, the drawn patients are weights on them."""
    step = max(1, _CELLS // max(1, len(y)))
    parts = [auroc(y, scores, drawn[start : start + step][:, cluster]) for start in range(0, len(drawn), step)]
    return np.concatenate(parts) if parts else np.zeros(0)


def estimate_mean(values: np.ndarray, cluster: np.ndarray, drawn: np.ndarray) -> Estimate:
    """Mean over rows of values (n,) with replicates; rows with NaN are left out."""
    known = ~np.isnan(values)
    if not known.any():
        return Estimate(float("nan"), np.full(len(drawn), np.nan))
    clusters = drawn.shape[1]
    total = drawn @ np.bincount(cluster[known], values[known], clusters)
    count = drawn @ np.bincount(cluster[known], minlength=clusters).astype(np.float64)
    replicates = np.divide(total, count, out=np.full(len(drawn), np.nan), where=count > 0)
    return Estimate(float(values[known].mean()), replicates)
