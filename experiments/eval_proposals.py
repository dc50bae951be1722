"""Precision, recall and F1 of the boxes of `odis-path propose` for nuclei at a box IoU, by group of images.

Data: a folder with images/, labels/ (instance masks of the same names) and groups.json (group -> names), such as the
stained-tissue images of the 2018 Data Science Bowl. Each group is halved by a seeded draw: what is tuned (settings, and
the weights of tiling/proposals/outlines.py, with --fit) is tuned on one half, and both are reported. Run:

    python experiments/eval_proposals.py DATA --mpp 0.35 --out results.json
    python experiments/eval_proposals.py DATA --mpp 0.35 --fit weights.json    # the numbers of tiling/proposals/outlines.py
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tiling.proposals.nuclei import nucleus_outlines, segment_nuclei
from tiling.proposals.outlines import products
from tiling.proposals.regions import boxes_of
from tiling.proposals.stain import ProposalSettings
from tiling.wsi.codec import decode

HALVES = ("tuned", "unseen")
IOU_RANGE = (0.3, 0.8)  # where the quality of an outline goes from 0 to 1
RIDGE = 10.0


def matches(proposed: np.ndarray, truth: np.ndarray, iou: float) -> int:
    """Pairs of boxes (k, 4) and (m, 4) with an IoU of at least `iou`, each box used once, as many as possible."""
    from scipy.optimize import linear_sum_assignment

    if not len(proposed) or not len(truth):
        return 0
    pairs = box_iou(proposed, truth) >= iou
    rows, columns = linear_sum_assignment(pairs, maximize=True)
    return int(pairs[rows, columns].sum())


def box_iou(proposed: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """IoU (k, m) of boxes (k, 4) and (m, 4)."""
    low = np.maximum(proposed[:, None, :2], truth[None, :, :2])
    high = np.minimum(proposed[:, None, 2:], truth[None, :, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=2)
    areas = [np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) for boxes in (proposed, truth)]
    iou: np.ndarray = shared / (areas[0][:, None] + areas[1][None, :] - shared)
    return iou


def halves(data: Path, seed: int = 0) -> dict[str, dict[str, list[str]]]:
    """group -> its names, shuffled by the seed and cut in two: "tuned" (the smaller half) and "unseen"."""
    random = np.random.default_rng(seed)
    groups: dict[str, dict[str, list[str]]] = {}
    for group, names in json.loads((data / "groups.json").read_text()).items():
        shuffled = [names[i] for i in random.permutation(len(names))]
        groups[group] = {"tuned": shuffled[: len(names) // 2], "unseen": shuffled[len(names) // 2 :]}
    return groups


def load(data: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The picture uint8 (h, w, 3) and its instance labels int32 (h, w)."""
    import tifffile

    image, mask = (next((data / kind).glob(f"{name}.*")) for kind in ("images", "labels"))
    labels = tifffile.imread(mask) if mask.suffix in (".tif", ".tiff") else _png_labels(mask)
    return decode(image.read_bytes()), labels.astype(np.int32)


def evaluate(data: Path, mpp: float, iou: float) -> dict[str, dict[str, Any]]:
    """group -> images, nuclei, found, precision, recall, f1, cpu_ms_per_image, and the same of its halves under their names."""
    results: dict[str, dict[str, Any]] = {}
    for group, parts in halves(data).items():
        rows = {half: _counted(data, names, mpp, iou) for half, names in parts.items()}
        total = {key: sum(row[key] for row in rows.values()) for key in rows["tuned"]}
        results[group] = {**_scores(total), **{half: _scores(row) for half, row in rows.items()}}
    return results


def _counted(data: Path, names: list[str], mpp: float, iou: float) -> dict[str, float]:
    counts = dict.fromkeys(("images", "nuclei", "found", "right", "seconds"), 0.0)
    for name in names:
        rgb, labels = load(data, name)
        begin = time.process_time()
        proposed, _ = boxes_of(segment_nuclei(rgb, mpp, ProposalSettings()))
        counts["seconds"] += time.process_time() - begin
        truth, _ = boxes_of(labels)
        counts["images"] += 1
        counts["nuclei"] += len(truth)
        counts["found"] += len(proposed)
        counts["right"] += matches(proposed, truth, iou)
    return counts


def _scores(counts: dict[str, float]) -> dict[str, Any]:
    right, proposed, nuclei = counts["right"], counts["found"], counts["nuclei"]
    return {
        "images": int(counts["images"]),
        "nuclei": int(nuclei),
        "found": int(proposed),
        "precision": right / max(proposed, 1),
        "recall": right / max(nuclei, 1),
        "f1": 2 * right / max(proposed + nuclei, 1),
        "cpu_ms_per_image": 1000 * counts["seconds"] / max(counts["images"], 1),
    }


def fit(data: Path, mpp: float) -> dict[str, list[float]]:
    """mean, scale and weights of tiling/proposals/outlines.py from the tuned half: a ridge on products of features.

    The target is the IoU of an outline's box with its best nucleus, every group counting the same.
    """
    from sklearn.linear_model import Ridge

    features, targets, weights = [], [], []
    for parts in halves(data).values():
        rows = list(_outlines_of(data, parts["tuned"], mpp))
        features += [row[0] for row in rows]
        targets += [row[1] for row in rows]
        count = sum(len(row[1]) for row in rows)
        weights.append(np.full(count, 1 / count))
    table, weight = np.concatenate(features), np.concatenate(weights)
    weight *= len(weight) / weight.sum()
    low, high = IOU_RANGE
    target = np.clip((np.concatenate(targets) - low) / (high - low), 0, 1)
    mean, scale = np.average(table, axis=0, weights=weight), table.std(axis=0)
    terms = products((table - mean) / scale)
    model = Ridge(RIDGE, fit_intercept=False).fit(terms, target, weight)
    print(f"{len(target)} outlines, R2 {model.score(terms, target, weight):.3f}")
    return {name: np.round(array, 4).tolist() for name, array in (("mean", mean), ("scale", scale), ("weights", model.coef_))}


def _outlines_of(data: Path, names: list[str], mpp: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Features (k, f) and best IoU (k,) of the outlines of each image."""
    for name in names:
        rgb, labels = load(data, name)
        outlines = nucleus_outlines(rgb, mpp, ProposalSettings())
        truth, _ = boxes_of(labels)
        if len(outlines):
            iou = box_iou(outlines.box.astype(float), truth) if len(truth) else np.zeros((len(outlines), 1))
            yield outlines.features, iou.max(axis=1)


def _png_labels(path: Path) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--mpp", type=float, default=0.35, help="the images state none; lymphocytes there suggest 0.35")
    parser.add_argument("--iou", type=float, default=0.5)
    parser.add_argument("--fit", type=Path, help="fit the weights on the tuned halves, write them here, and stop")
    parser.add_argument("--out", type=Path, default=Path("eval_proposals.json"))
    arguments = parser.parse_args()
    if arguments.fit:
        arguments.fit.write_text(json.dumps(fit(arguments.data, arguments.mpp)) + "\n")
        print(f"output: {arguments.fit}")
        return
    results = evaluate(arguments.data, arguments.mpp, arguments.iou)
    print(f"{'group':<12} {'half':<7} images nuclei  found  precision  recall     F1  cpu ms/image")
    for group, whole in results.items():
        for half, row in [("all", whole), *((half, whole[half]) for half in HALVES)]:
            counts = f"{row['images']:6d} {row['nuclei']:6d} {row['found']:6d}"
            scores = f"{row['precision']:9.3f} {row['recall']:7.3f} {row['f1']:6.3f} {row['cpu_ms_per_image']:13.0f}"
            print(f"{group:<12} {half:<7} {counts}  {scores}")
    settings = {"mpp": arguments.mpp, "iou": arguments.iou}
    arguments.out.write_text(json.dumps({"settings": settings, "groups": results}, indent=1) + "\n")
    print(f"output: {arguments.out}")


if __name__ == "__main__":
    main()
