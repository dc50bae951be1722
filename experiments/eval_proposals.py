"""How good are the boxes of `odis-path propose` for nuclei? Precision, recall and F1 at a box IoU, by group of images.

Data: a folder with images/, labels/ (instance masks of the same names) and groups.json (group -> names), such as the
stained-tissue images of the 2018 Data Science Bowl. Run:

    python experiments/eval_proposals.py DATA --mpp 0.35 --out results.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from tiling.codec import decode
from tiling.nuclei import ProposalSettings, boxes_of, segment_nuclei


def matches(found: np.ndarray, truth: np.ndarray, iou: float) -> int:
    """Pairs of boxes (k, 4) and (m, 4) with an IoU of at least `iou`, each box used once, as many as possible."""
    from scipy.optimize import linear_sum_assignment

    if not len(found) or not len(truth):
        return 0
    low = np.maximum(found[:, None, :2], truth[None, :, :2])
    high = np.minimum(found[:, None, 2:], truth[None, :, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=2)
    areas = [np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) for boxes in (found, truth)]
    pairs = shared / (areas[0][:, None] + areas[1][None, :] - shared) >= iou
    rows, columns = linear_sum_assignment(pairs, maximize=True)
    return int(pairs[rows, columns].sum())


def evaluate(data: Path, mpp: float, iou: float) -> dict[str, dict[str, float]]:
    """group -> images, nuclei, found, precision, recall, f1, ms_per_image."""
    import tifffile

    results: dict[str, dict[str, float]] = {}
    for group, names in json.loads((data / "groups.json").read_text()).items():
        right = proposed = nuclei = 0
        seconds = 0.0
        for name in names:
            image, mask = (next((data / kind).glob(f"{name}.*")) for kind in ("images", "labels"))
            labels = tifffile.imread(mask) if mask.suffix in (".tif", ".tiff") else _png_labels(mask)
            rgb = decode(image.read_bytes())
            begin = time.perf_counter()
            found, _ = boxes_of(segment_nuclei(rgb, mpp, ProposalSettings()))
            seconds += time.perf_counter() - begin
            truth, _ = boxes_of(labels.astype(np.int32))
            right, proposed, nuclei = right + matches(found, truth, iou), proposed + len(found), nuclei + len(truth)
        precision, recall = right / max(proposed, 1), right / max(nuclei, 1)
        f1 = 2 * right / max(proposed + nuclei, 1)
        scores = {"precision": precision, "recall": recall, "f1": f1, "ms_per_image": 1000 * seconds / len(names)}
        results[group] = {"images": len(names), "nuclei": nuclei, "found": proposed, **scores}
    return results


def _png_labels(path: Path) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--mpp", type=float, default=0.35, help="the images state none; lymphocytes there suggest 0.35")
    parser.add_argument("--iou", type=float, default=0.5)
    parser.add_argument("--out", type=Path, default=Path("eval_proposals.json"))
    arguments = parser.parse_args()
    results = evaluate(arguments.data, arguments.mpp, arguments.iou)
    print(f"{'group':<12} images nuclei  found  precision  recall     F1  ms/image")
    for group, row in results.items():
        counts = f"{row['images']:6.0f} {row['nuclei']:6.0f} {row['found']:6.0f}"
        print(f"{group:<12} {counts}  {row['precision']:9.3f} {row['recall']:7.3f} {row['f1']:6.3f} {row['ms_per_image']:9.0f}")
    settings = {"mpp": arguments.mpp, "iou": arguments.iou}
    arguments.out.write_text(json.dumps({"settings": settings, "groups": results}, indent=1) + "\n")
    print(f"output: {arguments.out}")


if __name__ == "__main__":
    main()
