"""The probes: k nearest neighbours, linear, prototypes. Each judges every tested row by a model that never saw its group.

Settings (k, C, what is done to the features) are chosen on the inner folds of an outer fold, never on what that tests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from warnings import catch_warnings, simplefilter

import numpy as np

from odis_path.evaluation.bootstrap import AUROC_EPISODES, Predictions
from odis_path.evaluation.metrics import balanced_accuracy
from odis_path.evaluation.probes.knn import Weights, unit_rows, votes
from odis_path.evaluation.probes.standardise import FITTED, WHITEN_SHARE, Features, Standardise
from odis_path.evaluation.splits import CrossValidation, OuterFold

C_GRID = tuple(float(c) for c in np.logspace(-4, 0, 5))
MAX_ITER = 1000
SHOTS = (1, 2, 4, 8, 16)
DEFAULT_K, DEFAULT_C = 20, 1e-2


@dataclass(frozen=True)
class ProbeResult:
    """Predictions of the tested rows (`CrossValidation.tested`, in that order), and how they came about.

    per_setting: k or C -> balanced accuracy on the inner folds, mean over outer folds. chosen: what each took. methods: the
    standardising of each; inner_scores: the best balanced accuracy of each method on the inner folds, mean over outer folds.
    per_shots: shots -> balanced accuracy of each episode (prototypes only).
    """

    predictions: Predictions
    per_setting: dict[float, float] = field(default_factory=dict)
    chosen: tuple[float, ...] = ()
    methods: tuple[Standardise, ...] = ()
    inner_scores: dict[str, float] = field(default_factory=dict)
    per_shots: dict[int, np.ndarray] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def chosen_most(self) -> float | None:
        """The value that most rounds took; of equals the smaller."""
        counts = Counter(self.chosen)
        return min(counts, key=lambda value: (-counts[value], value)) if counts else None


# --- k nearest neighbours


@dataclass(frozen=True)
class FoldNeighbours:
    """For each row its nearest rows in each fold: similarity float32 (n, F, k), index int32 (n, F, k); -inf, -1: none.

    With these, the neighbours among any union of folds are a merge of short lists: every inner and outer fold of a
    nested cross-validation comes from one search.
    """

    similarity: np.ndarray
    index: np.ndarray

    @staticmethod
    def search(x: np.ndarray, cv: CrossValidation, k: int) -> FoldNeighbours:
        """Search x, float32 (n, D) of `Features.space`. Only pairs of folds that some outer fold needs are searched."""
        from sklearn.neighbors import NearestNeighbors

        shape = (len(x), cv.n_folds, k)
        similarity, index = np.full(shape, -np.inf, dtype=np.float32), np.full(shape, -1, dtype=np.int32)
        needed = {(q, g) for outer in cv.outer_folds for q in outer.test for g in outer.train}
        needed |= {(q, g) for outer in cv.outer_folds for val, train in outer.inner for q in val for g in train}
        for gallery in sorted({g for _, g in needed}):
            gallery_rows = cv.rows((gallery,))
            query_rows = cv.rows(tuple(q for q, g in needed if g == gallery))
            count = min(k, len(gallery_rows))
            search = NearestNeighbors(n_neighbors=count, algorithm="brute").fit(x[gallery_rows])
            distance, column = search.kneighbors(x[query_rows])
            similarity[query_rows, gallery, :count] = 1 - distance**2 / 2
            index[query_rows, gallery, :count] = gallery_rows[column]
        return FoldNeighbours(similarity, index)

    def among(self, rows: np.ndarray, folds: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Return the k nearest of `rows` among `folds`, nearest first: similarity and index (q, k)."""
        picked = np.ix_(rows, np.array(folds))
        similarity = self.similarity[picked].reshape(len(rows), -1)
        index = self.index[picked].reshape(len(rows), -1)
        order = np.argsort(-similarity, axis=1, kind="stable")[:, : self.similarity.shape[2]]
        return np.take_along_axis(similarity, order, axis=1), np.take_along_axis(index, order, axis=1)


def knn_probe(
    features: Features,
    y: np.ndarray,
    cv: CrossValidation,
    n_classes: int,
    *,
    ks: Sequence[int],
    weights: Weights,
    methods: Sequence[Standardise] = ("none",),
) -> ProbeResult:
    """Judge by the k nearest; y int (n,).

    k of `ks` and the standardising of `methods` are those with the best inner balanced accuracy, of equals the smallest and
    first.
    """
    tested = cv.tested
    scores = np.zeros((len(tested), n_classes))
    k_scores: list[dict[float, float]] = []
    method_scores: list[dict[Standardise, float]] = []
    chosen_ks: list[float] = []
    chosen_methods: list[Standardise] = []
    shared: dict[Standardise, FoldNeighbours] = {}  # of methods that training rows do not decide on: the same for all folds
    for outer in cv.outer_folds:
        neighbours: dict[Standardise, FoldNeighbours] = {}
        for method in methods:
            fitted = method in FITTED or features.metric == "euclidean"
            if fitted or method not in shared:
                space = features.space(method, cv.rows(outer.train))
                near = FoldNeighbours.search(space, CrossValidation(cv.fold, (outer,), "") if fitted else cv, max(ks))
                shared |= {} if fitted else {method: near}
            neighbours[method] = near if fitted else shared[method]
        per_k = {method: _score_ks(near, y, cv, outer, n_classes, ks, weights) for method, near in neighbours.items()}
        method_scores.append({method: max(of_k.values()) for method, of_k in per_k.items() if of_k})
        method = _best_method(method_scores[-1], methods)
        k_scores.append(per_k[method])
        k = int(_best(per_k[method])) if per_k[method] else min(ks, key=lambda k: (abs(k - DEFAULT_K), k))
        chosen_ks.append(k)
        chosen_methods.append(method)
        rows = cv.rows(outer.test)
        similarity, index = neighbours[method].among(rows, outer.train)
        scores[np.searchsorted(tested, rows)] = votes(similarity[:, :k], y[index[:, :k]], n_classes, weights)
    return ProbeResult(
        Predictions(scores.argmax(axis=1)[None], scores[None]),
        _mean_by_key(k_scores),
        tuple(chosen_ks),
        tuple(chosen_methods),
        _mean_by_key(method_scores),
        warnings=() if all(k_scores) else (f"k could not be chosen on other groups within training; {chosen_ks[0]} was taken",),
    )


def _best_method(scores: Mapping[Standardise, float], methods: Sequence[Standardise]) -> Standardise:
    """Return the choice that did best on the inner folds, of equals the first; zscore where there were no folds."""
    if scores:
        return max(methods, key=lambda method: scores[method])
    return "zscore" if "zscore" in methods else methods[0]


def _score_ks(
    neighbours: FoldNeighbours,
    y: np.ndarray,
    cv: CrossValidation,
    outer: OuterFold,
    n_classes: int,
    ks: Sequence[int],
    weights: Weights,
) -> dict[float, float]:
    """Return k -> balanced accuracy over all inner folds of an outer fold together; empty where there are none."""
    truth, guesses = [], []
    for val, train in outer.inner:
        rows = cv.rows(val)
        similarity, index = neighbours.among(rows, train)
        truth.append(y[rows])
        guesses.append([votes(similarity[:, :k], y[index[:, :k]], n_classes, weights).argmax(axis=1) for k in ks])
    if not truth:
        return {}
    together = np.concatenate(truth)
    return {k: balanced_accuracy(together, np.concatenate([part[i] for part in guesses]), n_classes) for i, k in enumerate(ks)}


def _best(scores: dict[float, float]) -> float:
    """Return the setting with the best score, of equals the smallest."""
    return min(scores, key=lambda value: (-scores[value], value))


def _mean_by_key(parts: Sequence[Mapping[Any, float]]) -> dict[Any, float]:
    known = [part for part in parts if part]
    return {key: float(np.mean([part[key] for part in known])) for key in known[0]} if known else {}


# --- linear probe


@dataclass
class LinearFits:
    """Counts over all fits of a probe, and a memory of fits: two rounds often share a training set."""

    x: np.ndarray
    y: np.ndarray
    cv: CrossValidation
    n_classes: int
    whiten: bool = False
    fits: int = 0
    stopped: int = 0
    paths: dict[frozenset[int], dict[float, Any]] = field(default_factory=dict)

    def path(self, train: tuple[int, ...], grid: Sequence[float]) -> dict[float, Any]:
        """Return C -> model fitted on the folds `train`, from strong to weak regularisation, each starting from the last."""
        key = frozenset(train)
        if not set(grid) <= set(self.paths.get(key, {})):
            self.paths[key] = self._fit(train, grid)
        return self.paths[key]

    def _fit(self, train: tuple[int, ...], grid: Sequence[float]) -> dict[float, Any]:
        from sklearn.decomposition import PCA
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        rows = self.cv.rows(train)
        classes = np.unique(self.y[rows])
        if len(classes) < 2:
            return dict.fromkeys(grid, int(classes[0]))
        whitening = [PCA(WHITEN_SHARE, whiten=True, svd_solver="covariance_eigh")] if self.whiten else []
        scaler = make_pipeline(*whitening, StandardScaler()).fit(self.x[rows])
        scaled = scaler.transform(self.x[rows])
        models: dict[float, Any] = {}
        last = None
        with catch_warnings():
            simplefilter("ignore", ConvergenceWarning)  # counted below, and told in the result
            for c in sorted(grid):
                model = LogisticRegression(C=c, max_iter=MAX_ITER, solver="lbfgs", warm_start=True)
                if last is not None:
                    model.coef_, model.intercept_, model.classes_ = last.coef_.copy(), last.intercept_.copy(), last.classes_
                last = model.fit(scaled, self.y[rows])
                self.fits += 1
                self.stopped += int(np.max(model.n_iter_) >= MAX_ITER)
                models[c] = (scaler, model)
        return models

    def scores(self, model: Any, rows: np.ndarray) -> np.ndarray:
        """Return class probabilities float64 (q, C); 0 for classes the training rows lack."""
        scores = np.zeros((len(rows), self.n_classes))
        if isinstance(model, int):
            scores[:, model] = 1
            return scores
        scaler, logistic = model
        scores[:, logistic.classes_] = logistic.predict_proba(scaler.transform(self.x[rows]))
        return scores


def linear_probe(
    features: Features,
    y: np.ndarray,
    cv: CrossValidation,
    n_classes: int,
    *,
    method: Standardise = "zscore",
    grid: Sequence[float] = C_GRID,
) -> ProbeResult:
    """Judge by logistic regression on standardised features; C by inner balanced accuracy.

    The scaler is fitted on the training rows. method: whiten and centre-slide come before the scaler.
    """
    x = features.standardised("centre-slide" if method == "centre-slide" else "none", np.zeros(0, dtype=np.int64))
    fits = LinearFits(x, y, cv, n_classes, method == "whiten")
    tested = cv.tested
    scores = np.zeros((len(tested), n_classes))
    c_scores, chosen = [], []
    for outer in cv.outer_folds:
        score_of_c: dict[float, float] = {}
        if outer.inner:
            rows = [cv.rows(val) for val, _ in outer.inner]
            truth = y[np.concatenate(rows)]
            for c in grid:
                parts = [fits.scores(fits.path(train, grid)[c], q) for q, (_, train) in zip(rows, outer.inner, strict=True)]
                score_of_c[c] = balanced_accuracy(truth, np.concatenate(parts).argmax(axis=1), n_classes)
        c_scores.append(score_of_c)
        chosen.append(_best(score_of_c) if score_of_c else min(grid, key=lambda c: abs(np.log(c / DEFAULT_C))))
        rows_tested = cv.rows(outer.test)
        upto = [c for c in grid if c <= chosen[-1]]
        scores[np.searchsorted(tested, rows_tested)] = fits.scores(fits.path(outer.train, upto)[chosen[-1]], rows_tested)
    warnings = []
    if not all(c_scores):
        warnings.append(f"C could not be chosen on other groups within training; {chosen[0]:g} was taken")
    if fits.stopped:
        warnings.append(f"{fits.stopped} of {fits.fits} logistic regressions had not converged after {MAX_ITER} steps")
    return ProbeResult(
        Predictions(scores.argmax(axis=1)[None], scores[None]),
        _mean_by_key(c_scores),
        tuple(chosen),
        (method,) * len(cv.outer_folds),
        warnings=tuple(warnings),
    )


# --- prototypes


def prototype_probe(
    features: Features,
    y: np.ndarray,
    cv: CrossValidation,
    n_classes: int,
    *,
    shots: Sequence[int] = SHOTS,
    episodes: int = 200,
    seed: int = 0,
    methods: Sequence[Standardise] = ("none",),
) -> ProbeResult:
    """Judge by SimpleShot (Wang et al. 2019): centre by the support mean, unit length, class means, nearest.

    An episode draws `shots` training rows per class in every outer fold (all of a class that has fewer) and judges all tested
    rows. The same seed draws the same rows, whatever the features. Predictions are those of the most shots, scores
    (minus the squared distance) too, of the first episodes, which the AUROC takes.
    """
    spaces = [_prototype_space(features, y, cv, outer, n_classes, methods) for outer in cv.outer_folds]
    tested = cv.tested
    test_rows = [cv.rows(outer.test) for outer in cv.outer_folds]
    queries = [space.x[rows] for space, rows in zip(spaces, test_rows, strict=True)]
    squared = [(q**2).sum(axis=1) for q in queries]
    most = max(shots)
    pred = np.zeros((episodes, len(tested)), dtype=np.int64)
    scores = np.full((min(episodes, AUROC_EPISODES), len(tested), n_classes), -np.inf, dtype=np.float32)
    per_shots = {s: np.zeros(episodes) for s in shots}
    short = set()
    for episode in range(episodes):
        orders = {n: _support_order(y, cv, outer, (seed, episode, n)) for n, outer in enumerate(cv.outer_folds)}
        for s in shots:
            now = np.full((len(tested), n_classes), -np.inf, dtype=np.float32)
            for n, rows in enumerate(test_rows):
                support = {c: order[:s] for c, order in orders[n].items()}
                short |= {c for c in support if s == most and len(support[c]) < s}
                now[np.searchsorted(tested, rows)] = prototype_scores(
                    spaces[n].x, support, queries[n], n_classes, unit=features.metric == "cosine", squared=squared[n]
                )
            guess = now.argmax(axis=1)
            per_shots[s][episode] = balanced_accuracy(y[tested], guess, n_classes)
            if s == most:
                pred[episode] = guess
                if episode < len(scores):
                    scores[episode] = now
    warning = f"{len(short)} classes have fewer than {most} training rows in some round; all they have were taken"
    return ProbeResult(
        Predictions(pred, scores),
        methods=tuple(space.method for space in spaces),
        inner_scores=_mean_by_key([space.inner for space in spaces]),
        per_shots=per_shots,
        warnings=(warning,) if short else (),
    )


@dataclass(frozen=True)
class _PrototypeSpace:
    """The standardising of an outer fold, the features (n, d) after it, and the inner balanced accuracy of each choice."""

    method: Standardise
    x: np.ndarray
    inner: Mapping[Standardise, float]


def _prototype_space(
    features: Features, y: np.ndarray, cv: CrossValidation, outer: OuterFold, n_classes: int, methods: Sequence[Standardise]
) -> _PrototypeSpace:
    """Choose by prototypes of all inner training rows; the features are near 0, which changes no distance and spares digits."""
    train, unit = cv.rows(outer.train), features.metric == "cosine"
    inner: dict[Standardise, float] = {}
    xs = {}
    for method in methods:
        x = features.standardised(method, train) if unit else features.space(method, train)
        xs[method] = x - x[train].mean(axis=0)
        guesses, truth = [], []
        for val, fit in outer.inner if len(methods) > 1 else ():
            rows, known = cv.rows(val), cv.rows(fit)
            support = {int(c): known[y[known] == c] for c in np.unique(y[known])}
            guesses.append(prototype_scores(xs[method], support, xs[method][rows], n_classes, unit=unit).argmax(axis=1))
            truth.append(y[rows])
        if truth:
            inner[method] = balanced_accuracy(np.concatenate(truth), np.concatenate(guesses), n_classes)
    method = _best_method(inner, methods)
    return _PrototypeSpace(method, xs[method], inner)


def _support_order(y: np.ndarray, cv: CrossValidation, outer: OuterFold, seed: tuple[int, ...]) -> dict[int, np.ndarray]:
    """Shuffle the training rows of each class; fewer shots are the beginning of more."""
    rng = np.random.default_rng(seed)
    rows = cv.rows(outer.train)
    return {int(c): rng.permutation(rows[y[rows] == c]) for c in np.unique(y[rows])}


def prototype_scores(
    x: np.ndarray,
    support: dict[int, np.ndarray],
    queries: np.ndarray,
    n_classes: int,
    *,
    unit: bool = True,
    squared: np.ndarray | None = None,
) -> np.ndarray:
    """Return minus the squared distance of queries (q, D) to the mean of each class's support, float32 (q, C); -inf: none.

    support: class -> rows of x. squared: the squared lengths of the queries (q,), where they are known already. All inner
    products come from one matrix product with the centre and the class means, so that no query is centred by itself.
    """
    centre = x[np.concatenate(list(support.values()))].mean(axis=0)
    shape = unit_rows if unit else np.asarray
    prototypes = np.stack([shape(x[rows] - centre).mean(axis=0) for rows in support.values()])
    inner = queries @ np.concatenate([prototypes, centre[None]]).T
    squared = (queries**2).sum(axis=1) if squared is None else squared
    length = np.sqrt(np.maximum(squared - 2 * inner[:, -1] + centre @ centre, 1e-24))
    along = inner[:, :-1] - prototypes @ centre
    if unit:
        along, length = along / length[:, None], np.ones_like(length)
    scores = np.full((len(queries), n_classes), -np.inf, dtype=np.float32)
    scores[:, list(support)] = 2 * along - (prototypes**2).sum(axis=1) - length[:, None] ** 2
    return scores


def majority_probe(y: np.ndarray, cv: CrossValidation, n_classes: int) -> ProbeResult:
    """Predict the commonest class of the training rows."""
    tested = cv.tested
    scores = np.zeros((len(y), n_classes))
    for outer in cv.outer_folds:
        scores[cv.rows(outer.test)] = np.bincount(y[cv.rows(outer.train)], minlength=n_classes) / len(cv.rows(outer.train))
    return ProbeResult(Predictions(scores[tested].argmax(axis=1)[None], scores[tested][None]))
