"""Maps of embeddings: t-SNE, coloured by class beside the same coloured by slide, and what their neighbourhoods hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from odis_path.figures import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_ROWS = 2000
NEIGHBOURS = 10


@dataclass(frozen=True)
class Embeddings:
    """A sample of n embeddings with a class each: features float32 (n, D), label and slide int (n,) into the names."""

    level: str
    encoder: str
    mode: str
    features: np.ndarray
    label: np.ndarray
    labels: list[str]
    slide: np.ndarray
    slides: list[str]
    total: int


@dataclass(frozen=True)
class Neighbourhood:
    """Of the ten nearest neighbours of a point: the share of its class and of its slide, and what chance would give."""

    same_class: float
    same_slide: float
    chance_class: float
    chance_slide: float


def read_embeddings(folder: Path, level: str, seed: int = 0) -> Embeddings | None:
    """A seeded sample of at most `MAX_ROWS` labelled rows of a level; None where no row has a label.

    Raises UserError for embeddings that `odis_path.features.read` refuses (NaN, constant, mixed encoders).
    """
    from odis_path.features.read import FeatureSet, read_features

    labelled = 0

    def choose(index: FeatureSet) -> np.ndarray:
        nonlocal labelled
        known = np.flatnonzero(index.label >= 0)
        labelled = len(known)
        return np.sort(np.random.default_rng(seed).choice(known, min(MAX_ROWS, labelled), replace=False))

    found = read_features(folder, level, choose)
    if not labelled:
        return None
    slides, slide = np.unique(found.slide_id.astype(str), return_inverse=True)
    used = np.unique(found.label)
    return Embeddings(
        level=level,
        encoder=found.encoder,
        mode=found.mode,
        features=found.x,
        label=np.searchsorted(used, found.label),
        labels=[found.labels[i] for i in used],
        slide=slide,
        slides=slides.tolist(),
        total=labelled,
    )


def layout_2d(features: np.ndarray, seed: int = 0) -> np.ndarray:
    """(n, D) -> (n, 2): unit length, PCA to 50, t-SNE; the same seed gives the same map. Needs n >= 4."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    short = PCA(min(50, *unit.shape), random_state=seed).fit_transform(unit)
    perplexity = min(30.0, (len(short) - 1) / 3)
    return TSNE(2, init="pca", perplexity=perplexity, random_state=seed, max_iter=750).fit_transform(short)


def neighbourhood(e: Embeddings) -> Neighbourhood:
    """Composition of the ten nearest neighbours (cosine, full dimensions), beside that of a random order."""
    unit = e.features / np.maximum(np.linalg.norm(e.features, axis=1, keepdims=True), 1e-12)
    likeness = unit @ unit.T
    np.fill_diagonal(likeness, -np.inf)
    k = min(NEIGHBOURS, len(unit) - 1)
    near = np.argpartition(-likeness, k - 1, axis=1)[:, :k]

    def shares(value: np.ndarray) -> tuple[float, float]:
        counts = np.bincount(value)
        chance = (counts * (counts - 1)).sum() / max(1, len(value) * (len(value) - 1))
        return float((value[near] == value[:, None]).mean()), float(chance)

    (same_class, chance_class), (same_slide, chance_slide) = shares(e.label), shares(e.slide)
    return Neighbourhood(same_class, same_slide, chance_class, chance_slide)


def draw_map(e: Embeddings, xy: np.ndarray, colors: dict[str, str]) -> Figure:
    """The map twice: coloured (and marked) by class, and coloured by slide."""
    figure = style.new_figure(style.WIDTH_IN, style.WIDTH_IN / 2 + 0.75)
    size = 16 if len(xy) > 800 else 26
    order = np.random.default_rng(0).permutation(len(xy))  # so that no class lies on top
    with style.styled():
        left, right = figure.subplots(1, 2)
        handles = _by_class(left, e, xy, order, colors, size)
        hues = _spread_colors(len(e.slides))
        right.scatter(*xy[order].T, s=size, c=hues[e.slide[order]], lw=0, alpha=0.85)
        for axes, title in ((left, "coloured by class"), (right, f"the same points, coloured by slide ({len(e.slides)})")):
            style.picture_axes(axes)
            axes.set_title(title)
            axes.margins(0.03)
        figure.legend(handles=handles, loc="outside lower left", ncols=min(5, len(handles)), fontsize=9)
    return figure


def _by_class(axes: Any, e: Embeddings, xy: np.ndarray, order: np.ndarray, colors: dict[str, str], size: int) -> list[Any]:
    from matplotlib.lines import Line2D

    markers = style.class_markers(e.labels)
    for part in np.array_split(order, 12):  # class after class in small helpings, for the same reason
        for i, name in enumerate(e.labels):
            rows = part[e.label[part] == i]
            axes.scatter(*xy[rows].T, s=size, color=colors.get(name, style.GREY), marker=markers[name], lw=0, alpha=0.85)
    return [
        Line2D([], [], ls="", ms=7, marker=markers[n], color=colors.get(n, style.GREY), label=n)
        for i, n in enumerate(e.labels)
        if (e.label == i).any()
    ]


def _spread_colors(count: int) -> np.ndarray:
    """(count, 4) RGBA colours as different as a rainbow allows; neighbours in the list lie far apart."""
    import matplotlib

    order = np.argsort(np.arange(count) * 0.618034 % 1)
    return matplotlib.colormaps["turbo"](np.linspace(0.03, 0.97, max(2, count)))[:count][np.argsort(order)]
