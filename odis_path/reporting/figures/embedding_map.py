"""Maps of embeddings: t-SNE, coloured by class beside the same coloured by slide, and what their neighbourhoods hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from odis_path.figures import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

MAX_ROWS = 2000
NEIGHBOURS = 10


@dataclass(frozen=True)
class Embeddings:
    """A sample of n embeddings: features float32 (n, D), label and slide int (n,) into the names; of `total` labelled rows."""

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
    """Shares of the ten nearest neighbours of a point that are of its class and of its slide, and of random neighbours."""

    same_class: float
    same_slide: float
    chance_class: float
    chance_slide: float


def read_embeddings(folder: Path, level: str, seed: int = 0) -> Embeddings | None:
    """Read a seeded sample of at most `MAX_ROWS` labelled rows of a level; None where no row has a label.

    Raises UserError for embeddings that `odis_path.features.read` refuses (NaN, constant, mixed encoders).
    """
    from odis_path.features.read import FeatureSet, read_features

    labelled = np.zeros(0, dtype=np.int64)

    def choose(index: FeatureSet) -> np.ndarray:
        nonlocal labelled
        labelled = np.flatnonzero(index.label >= 0)
        return np.sort(np.random.default_rng(seed).choice(labelled, min(MAX_ROWS, len(labelled)), replace=False))

    features = read_features(folder, level, choose)
    if not len(labelled):
        return None
    slides, slide = np.unique(features.slide_id.astype(str), return_inverse=True)
    labels, label = np.unique(features.label, return_inverse=True)
    return Embeddings(
        encoder=features.encoder,
        mode=features.mode,
        features=features.x,
        label=label,
        labels=[features.labels[i] for i in labels],
        slide=slide,
        slides=slides.tolist(),
        total=len(labelled),
    )


def layout_2d(features: np.ndarray, seed: int = 0) -> np.ndarray:
    """Lay out (n, D) in (n, 2): unit length, PCA to 50, t-SNE; the same seed gives the same map. Needs n >= 4."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    from odis_path.evaluation.probes.knn import unit_rows

    unit = unit_rows(features)
    components = PCA(min(50, *unit.shape), random_state=seed).fit_transform(unit)
    perplexity = min(30.0, (len(components) - 1) / 3)
    xy: np.ndarray = TSNE(2, init="pca", perplexity=perplexity, random_state=seed, max_iter=750).fit_transform(components)
    return xy


def neighbourhood(embeddings: Embeddings) -> Neighbourhood:
    """Return the composition of the ten nearest neighbours (cosine, full dimensions), beside that of a random order."""
    from odis_path.evaluation.probes.knn import unit_rows

    unit = unit_rows(embeddings.features)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    k = min(NEIGHBOURS, len(unit) - 1)
    near = np.argpartition(-similarity, k - 1, axis=1)[:, :k]

    def shares(values: np.ndarray) -> tuple[float, float]:
        counts = np.bincount(values)
        chance = (counts * (counts - 1)).sum() / max(1, len(values) * (len(values) - 1))
        return float((values[near] == values[:, None]).mean()), float(chance)

    (same_class, chance_class), (same_slide, chance_slide) = shares(embeddings.label), shares(embeddings.slide)
    return Neighbourhood(same_class, same_slide, chance_class, chance_slide)


def draw_map(embeddings: Embeddings, xy: np.ndarray, colors: dict[str, str]) -> Figure:
    """Draw the map xy (n, 2) twice: coloured (and marked) by class, and coloured by slide."""
    figure = style.new_figure(style.WIDTH_IN, style.WIDTH_IN / 2 + 0.75)
    size = 16 if len(xy) > 800 else 26
    order = np.random.default_rng(0).permutation(len(xy))  # so that no class lies on top
    with style.styled():
        left, right = figure.subplots(1, 2)
        handles = _by_class(left, embeddings, xy, order, colors, size)
        slide_colors = _rainbow(len(embeddings.slides))
        right.scatter(*xy[order].T, s=size, c=slide_colors[embeddings.slide[order]], lw=0, alpha=0.85)
        by_slide = f"the same points, coloured by slide ({len(embeddings.slides)})"
        for axes, title in ((left, "coloured by class"), (right, by_slide)):
            style.picture_axes(axes)
            axes.set_title(title)
            axes.margins(0.03)
        figure.legend(handles=handles, loc="outside lower left", ncols=min(5, len(handles)), fontsize=9)
    return figure


def _by_class(
    axes: Any, embeddings: Embeddings, xy: np.ndarray, order: np.ndarray, colors: dict[str, str], size: int
) -> list[Line2D]:
    from matplotlib.lines import Line2D

    markers = style.class_markers(embeddings.labels)
    for part in np.array_split(order, 12):  # class after class in small helpings, for the same reason
        for i, name in enumerate(embeddings.labels):
            rows = part[embeddings.label[part] == i]
            axes.scatter(*xy[rows].T, s=size, color=colors.get(name, style.GREY), marker=markers[name], lw=0, alpha=0.85)
    return [
        Line2D([], [], ls="", ms=7, marker=markers[name], color=colors.get(name, style.GREY), label=name)
        for name in embeddings.labels
    ]


def _rainbow(count: int) -> np.ndarray:
    """Return (count, 4) RGBA colours as different as a rainbow allows; neighbours in the list lie far apart."""
    import matplotlib

    order = np.argsort(np.arange(count) * 0.618034 % 1)
    return matplotlib.colormaps["turbo"](np.linspace(0.03, 0.97, max(2, count)))[:count][np.argsort(order)]
