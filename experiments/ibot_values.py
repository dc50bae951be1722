"""iBOT's published values for slides, each alone and all together, against this project's on one set of tiles.

    odis-path import TILES --out tiles72 --no-mpp --size 72 --fit squash --shard 100      # class folders
    python experiments/ibot_values.py tiles72 --seeds 0,1 --json experiments/results/ibot_values.json

A small ViT with the colours of the demo on free crops, minutes on a CPU a run; k-NN of the teacher on tiles of slide files
that it did not train on. Runs this small tell what breaks, not what is best by a point: the difference is to the first row, the
mean over seeds, and its standard error is over tiles alone.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from odis_path.config import load_config
from odis_path.data.tile_index import index_tiles
from odis_path.embedding.encoder import batches, load_encoder
from odis_path.evaluation.probes.knn import knn_scores
from odis_path.training.knn_monitor import read_tiles
from odis_path.training.loop import pretrain

SMALL = [
    "target.crop=false",
    "target.mask=false",
    "data.boxless=keep",
    "data.workers=0",
    "loss.patch_weight=1",
    "views.global_size=36",
    "views.global_scale=[0.3,1]",
    "model.kwargs={img_size: 36, patch_size: 4, embed_dim: 64, depth: 4, num_heads: 4}",
    "eval.every_epochs=0",
    "run.save_every_epochs=1000",
    "run.device=cpu",
]
GAIN = ["head.norm_last_layer=false", "optim.decay_gain=true"]
VARIANTS: dict[str, list[str]] = {
    "this project's values": [],
    "views.hue_space=hsv": ["views.hue_space=hsv"],
    "mim.blocks=ibot": ["mim.blocks=ibot"],
    "loss.patch_center=all": ["loss.patch_center=all"],
    "head.prototype_init=uniform": ["head.prototype_init=uniform"],
    "the gain trained and decayed": GAIN,
}
VARIANTS["all of iBOT's"] = [key for keys in list(VARIANTS.values()) for key in keys]


def labels_of(folder: Path) -> dict[tuple[str, int, int], str]:
    """The class of each tile by slide id, x and y."""
    with (folder / "labels.csv").open(newline="", encoding="utf-8") as file:
        return {(row["slide_id"], int(row["x"]), int(row["y"])): row["label"] for row in csv.DictReader(file)}


def run(tiles: Path, keys: list[str], seed: int, epochs: float, away: list[str]) -> tuple[np.ndarray, float]:
    """Train one variant: which of the held-out tiles its k-NN gets right, bool (n,), and CPU seconds."""
    from tiling.slide_file.read import SlideFile

    begin = time.process_time()
    with tempfile.TemporaryDirectory() as out:
        fixed = [f"data.tiles={tiles}", f"run.out={out}", f"run.seed={seed}", f"optim.epochs={epochs}"]
        config = load_config("demo", [*SMALL, *fixed, f"data.holdout_patients={json.dumps(away)}", *keys])
        encoder = load_encoder(str(pretrain(config)), device="cpu")
    index, label_of = index_tiles(tiles), labels_of(tiles)
    parts = []
    for inside in (False, True):
        part = index.of_patients(set(away), inside=inside)
        labels = []
        for slide, row in zip(part.slide, part.row, strict=True):
            with SlideFile(part.paths[slide]) as file:
                x, y = file.coords[row].tolist()
                labels.append(label_of[file.slide_id, x, y])
        pixels = read_tiles(part)
        parts.append((np.concatenate([encoder.encode(pixels[s]) for s in batches(len(pixels), 64)]), np.array(labels)))
    (gallery, gallery_labels), (queries, truth) = parts
    classes, numbers = np.unique(gallery_labels, return_inverse=True)
    chosen = classes[knn_scores(gallery, numbers, queries, len(classes), 20).argmax(1)]
    return chosen == truth, time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tiles", type=Path, help="folder of slide files of a class-folder import, with its labels.csv")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--variants", help="some of: " + "; ".join(VARIANTS) + " (separated by ;)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    slides = sorted(index_tiles(options.tiles).slide_ids)
    away = slides[::4]
    names = options.variants.split(";") if options.variants else list(VARIANTS)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    variants: dict[str, Any] = {}
    right: dict[str, np.ndarray] = {}
    for name in names:
        runs = [run(options.tiles, VARIANTS[name], seed, options.epochs, away) for seed in seeds]
        right[name] = np.stack([hits for hits, _ in runs])
        gap = (right[name].astype(float) - right[names[0]]).mean(0)
        variants[name] = {
            "accuracy": right[name].mean(1).tolist(),
            "difference": float(gap.mean()),
            "error": float(gap.std() / len(gap) ** 0.5),
            "cpu_seconds": [seconds for _, seconds in runs],
        }
        row = variants[name]
        points = " ".join(f"{value:.3f}" for value in row["accuracy"])
        spent = sum(row["cpu_seconds"])
        print(f"{name:<30} {points}   {row['difference']:+.3f} +- {row['error']:.3f}   {spent:.0f} s", flush=True)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            content = {"epochs": options.epochs, "seeds": seeds, "variants": variants}
            options.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
