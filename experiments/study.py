"""When does object-level self-distillation pay, and when not: arms, corpora and seeds, one row a finished run.

    python experiments/study.py run --data DATA --work WORK                   # the main comparison; goes on where it stopped
    python experiments/study.py run --size smoke --work WORK                  # two minutes, on pictures drawn here, for tests
    python experiments/study.py run --corpora cells --arms odis,ibot --seeds 0,1,2 --data DATA --work WORK
    python experiments/study.py table                                         # scores, paired differences, intervals
    python experiments/study.py pack study.tar --size gpu --data DATA --work WORK   # what a GPU machine needs, <= 60 MB; there:
    python experiments/study.py run --size gpu --packed study.tar --work WORK       # six runs in ten minutes

DATA holds brca_m2c and crc5 (see study_corpora.py). All arms of a corpus and seed have the same tiles, held-out patients, start
weights, views, steps and batch; they differ in the keys of ARMS. Judged on held-out patients, on the objects of COMPARED sets:
k-NN (k = 20, cosine, features z-scored on the compared objects) and logistic regression (C = 0.1 after z-scoring), balanced
accuracy. Modes are those of `embed`, of a window around the object for cells and of the tile elsewhere.
"""

from __future__ import annotations

import argparse
import json
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from study_corpora import Corpus, Objects, corpus
from study_table import table

from odis_path.config import PretrainConfig, load_config
from odis_path.data.dataset import kinds_of
from odis_path.data.tile_index import held_out_patients, index_tiles
from odis_path.embedding.encoder import FrozenEncoder, batches, load_encoder
from odis_path.evaluation.metrics import balanced_accuracy, confusion_matrix
from odis_path.evaluation.pixel_baselines import cut_box, grey_texture, rgb_mean
from odis_path.evaluation.probes.knn import knn_scores
from odis_path.training.loop import pretrain
from odis_path.training.setup import build_student
from tiling.storage.atomic import atomic_path

PACKED_MB = 60
ROWS = Path(__file__).parent / "results" / "study.jsonl"
FREE = ["target.crop=false", "target.mask=false"]
NO_PATCHES = ["loss.patch_weight=0", "mim.probability=0"]
PATCHES = ["loss.patch_weight=0.3", "mim.probability=0.5"]
ARMS: dict[str, list[str] | None] = {
    "untrained": None,
    "colour": None,
    "texture": None,
    "dino": [*FREE, *NO_PATCHES],
    "ibot": [*FREE, *PATCHES],
    "crop_only": ["target.mask=false", *NO_PATCHES],
    "mask_only": ["target.crop=false", *NO_PATCHES],
    "odis": NO_PATCHES,
    "odis_patches": PATCHES,
    "linear_pool": [*NO_PATCHES, "model.pool=linear"],
    "multi_obj_2": [*NO_PATCHES, "target.objects=2"],
    "multi_obj_4": [*NO_PATCHES, "target.objects=4"],
    "readonly_4": [*NO_PATCHES, "target.objects=4", "model.read_only=true"],
    "jittered_boxes": [*NO_PATCHES, "target.noise_jitter=0.3"],
    "random_boxes": [*NO_PATCHES, "target.noise_drop=1", "target.noise_false=1"],
    "stain_swap": [*NO_PATCHES, "views.stain_swap_p=0.5"],
    "tile_center": [*NO_PATCHES, "target.objects=4", "loss.tile_center=1"],
    "tile_objects": [*NO_PATCHES, "target.objects=4"],
    "sinkhorn": [*NO_PATCHES, "loss.centering=sinkhorn"],
    "whole_half": [*NO_PATCHES, "target.whole_tile_p=0.5"],
}
ONE_WINDOW_A_TILE = ("multi_obj_2", "multi_obj_4", "readonly_4")  # several tokens need one picture: not in windows
DEFAULTS = {  # corpora, arms and seeds of a size
    "smoke": ("cells,mosaic-1", "untrained,odis", "0,1"),
    "cpu": ("cells,mosaic-1", "untrained,odis,crop_only,dino", "0,1,2,3,4"),
    "gpu": ("mosaic-1", "odis,dino", "0,1,2"),
}
COLOURS = [
    "views.turns=dihedral",
    "views.brightness=0.3",
    "views.contrast=0.2",
    "views.saturation=0.2",
    "views.hue=0.1",
    "views.gray_p=0.3",
    "views.blur_p=[0.5,0.5,0.5]",
    "views.solarise_p=0",
    "views.stain_p=0.9",
    "views.stain_scale=0.5",
    "views.stain_shift=0.25",
]
SHAPE = "model.kwargs={{img_size: {px}, patch_size: 8, embed_dim: {dim}, depth: {depth}, num_heads: {heads}}}"


@dataclass(frozen=True)
class Scale:
    """A network and a length of training."""

    steps: int
    batch: int
    dim: int
    depth: int
    heads: int
    device: str = "cpu"


SCALES = {"smoke": Scale(3, 8, 32, 2, 2), "cpu": Scale(120, 32, 128, 4, 4), "gpu": Scale(800, 512, 384, 12, 6, "cuda")}
VIEWS = {"cells": (40, "[0.46,1]"), "mosaic": (48, "[0.2,0.6]"), "crc5": (64, "[0.3,1]")}  # px of a view, area of its crop


def config_of(name: str, corpus_: Corpus, arm: list[str], scale: Scale, seed: int, out: Path) -> PretrainConfig:
    """The configuration of a run; its length in steps, whatever the number of tiles."""
    px, area = VIEWS.get(name.partition("-")[0], VIEWS["crc5"])
    keys = [
        *COLOURS,
        "views.window_um=0",
        *corpus_.overrides,
        f"data.tiles={corpus_.tiles}",
        f"run.out={out}",
        f"run.seed={seed}",
        f"run.device={scale.device}",
        f"data.workers={0 if scale.device == 'cpu' else 12}",
        f"views.global_size={px}",
        f"views.global_scale={area}",
        "target.whole_tile_p=0",
        "target.min_patches=4",
        f"optim.batch_size={scale.batch}",
        SHAPE.format(px=px, dim=scale.dim, depth=scale.depth, heads=scale.heads),
        *arm,
    ]
    config = load_config("cells_cpu", keys)
    index = index_tiles(config.data.tiles, need_boxes=kinds_of(config) if config.data.boxless == "drop" else None)
    away = held_out_patients(index, config.data.holdout, config.data.holdout_patients, seed)
    an_epoch = len(index.of_patients(away, inside=False)) // scale.batch
    if an_epoch == 0:
        raise SystemExit(f"{name}: fewer than {scale.batch} tiles to train on")
    epochs = scale.steps / an_epoch
    lengths = [f"optim.epochs={epochs}", f"optim.warmup_epochs={epochs / 10}", f"run.save_every_epochs={epochs + 1}"]
    return load_config("cells_cpu", [*keys, *lengths])


def embed(encoder: FrozenEncoder, objects: Objects, mode: str, px: int, cells: bool) -> np.ndarray:
    """Embeddings float32 (n, D). Windows, and what is cut out, are resized to the views' side; tiles are seen as they are."""
    sized = replace(encoder, resize_px=px if cells or mode == "crop" else None)
    parts = [sized.encode(objects.pixels[s], objects.boxes[s], mode) for s in batches(len(objects.pixels), 256)]  # type: ignore[arg-type]
    return np.concatenate(parts)


def hand_made(arm: str, objects: Objects, mode: str) -> np.ndarray:
    """Mean colour or grey texture of the box or (mode full) of all that is seen around it."""
    measure = rgb_mean if arm == "colour" else grey_texture
    seen = zip(objects.pixels, objects.boxes, strict=True)
    return np.stack([measure(pixels if mode == "full" else cut_box(pixels, box)) for pixels, box in seen])


def judge(compared: np.ndarray, judged: np.ndarray, c: Corpus) -> dict[str, Any]:
    """Balanced accuracies, and by patient the confusion of each probe, flat: for intervals over patients."""
    from sklearn.linear_model import LogisticRegression

    mean, spread = compared.mean(0), compared.std(0)
    x, z = ((part - mean) / np.where(spread > 0, spread, 1) for part in (compared, judged))
    y, truth = c.compared.labels, c.judged.labels
    linear = LogisticRegression(C=0.1, max_iter=500).fit(x, y)
    predicted = {"knn": knn_scores(x, y, z, c.classes, min(20, len(x))).argmax(1), "linear": linear.predict(z)}
    row: dict[str, Any] = {}
    for probe, chosen in predicted.items():
        by_patient = {
            int(group): confusion_matrix(truth[rows], chosen[rows], c.classes).ravel().tolist()
            for group in np.unique(c.judged.groups)
            for rows in [c.judged.groups == group]
        }
        row[probe] = {"balanced_accuracy": float(balanced_accuracy(truth, chosen, c.classes)), "by_patient": by_patient}
    return row


def share_explained(x: np.ndarray, groups: np.ndarray) -> float:
    """The share of the variance of unit embeddings that lies between groups."""
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)
    total = unit - unit.mean(0)
    between = sum((groups == g).sum() * ((unit[groups == g].mean(0) - unit.mean(0)) ** 2).sum() for g in np.unique(groups))
    return float(between / (total**2).sum())


def finished(rows: Path) -> list[dict[str, Any]]:
    """The rows so far."""
    return [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()] if rows.exists() else []


def append(rows: Path, row: dict[str, Any]) -> None:
    """Add a row: the file is the old one or the new one, whenever the process ends."""
    lines = [json.dumps(one, separators=(",", ":")) for one in [*finished(rows), row]]
    with atomic_path(rows) as path:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def run_one(name: str, arm: str, seed: int, c: Corpus, scale: Scale, size: str, modes: Sequence[str]) -> dict[str, Any]:
    """Train and judge one arm of a corpus and seed."""
    begin, cells = time.process_time(), name == "cells"
    px = VIEWS.get(name.partition("-")[0], VIEWS["crc5"])[0]
    figures: dict[str, Any] = {}
    trained = 0.0
    if arm in ("colour", "texture"):
        parts = {mode: [hand_made(arm, objects, mode) for objects in (c.compared, c.judged)] for mode in ("masked", "full")}
    else:
        with tempfile.TemporaryDirectory() as out:
            config = config_of(name, c, ARMS[arm] or NO_PATCHES, scale, seed, Path(out))
            if ARMS[arm] is None:
                torch.manual_seed(seed)
                network = build_student(config, None)[1].encoder.eval()
                encoder = FrozenEncoder(network, arm, config.data.mean, config.data.std, torch.device("cpu"), px)
            else:
                encoder = load_encoder(str(pretrain(config)), device=scale.device)
            trained = time.process_time() - begin
        parts = {mode: [embed(encoder, objects, mode, px, cells) for objects in (c.compared, c.judged)] for mode in modes}
        judged = parts["masked"][1]
        figures = {
            "patient_share": share_explained(judged, c.judged.groups),
            "class_share": share_explained(judged, c.judged.labels),
        }
    scores = {mode: judge(*both, c) for mode, both in parts.items()}
    seconds = {"cpu_s_training": round(trained, 1), "cpu_s": round(time.process_time() - begin, 1)}
    settings = {"steps": scale.steps, "batch": scale.batch, "keys": ARMS[arm]}
    key = {"size": size, "corpus": name, "arm": arm, "seed": seed}
    return {**key, **seconds, **settings, **{k: round(v, 4) for k, v in figures.items()}, "scores": scores}


def run(options: argparse.Namespace) -> None:
    """Every run that has no row yet, seed by seed, so that whatever time there is every arm has as many seeds."""
    if options.packed:
        with tarfile.open(options.packed) as tar:
            tar.extractall(options.work, filter="data")
    scale = SCALES[options.size]
    if options.steps:
        scale = replace(scale, steps=options.steps)
    if scale.device == "cuda" and not torch.cuda.is_available():
        scale = replace(scale, device="cpu")
    rows = options.rows
    done = {(r["size"], r["corpus"], r["arm"], r["seed"]) for r in finished(rows) if r["steps"] == scale.steps}
    for seed in options.seeds:
        for name in options.corpora:
            arms = [arm for arm in options.arms if (options.size, name, arm, seed) not in done]
            arms = [arm for arm in arms if not (name == "cells" and arm in ONE_WINDOW_A_TILE)]
            if not arms:
                continue
            c = corpus(name, options.data, options.work / options.size, options.size, seed)
            for arm in arms:
                row = run_one(name, arm, seed, c, scale, options.size, options.modes.split(","))
                append(rows, row)
                short = {m: [round(s[p]["balanced_accuracy"], 3) for p in ("knn", "linear")] for m, s in row["scores"].items()}
                print(f"{name} {arm} seed {seed}: {short}, {row['cpu_s']:.0f} CPU s", flush=True)


def pack(options: argparse.Namespace) -> None:
    """Slide files of corpora and seeds in one file, whole or not there. An error where it is larger than PACKED_MB."""
    folder = options.work / options.size
    for seed in options.seeds:
        for name in options.corpora:
            corpus(name, options.data, folder, options.size, seed)
    with atomic_path(options.out) as path:
        with tarfile.open(path, "w") as tar:
            for slide_file in sorted(folder.rglob("*.h5")):
                tar.add(slide_file, arcname=str(slide_file.relative_to(options.work)))
        megabytes = path.stat().st_size / 1e6
        if megabytes > PACKED_MB:
            raise SystemExit(f"{options.out}: {megabytes:.0f} MB, more than {PACKED_MB}: pack fewer seeds or corpora")
    print(f"{options.out}: {megabytes:.1f} MB")


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table", "pack"])
    parser.add_argument("out", type=Path, nargs="?", help="of pack: the packed file")
    parser.add_argument("--size", choices=list(SCALES), default="cpu")
    parser.add_argument("--corpora", help="cells, mosaic-0, mosaic-0.5, mosaic-1, crc5, or folders of annotated slide files")
    parser.add_argument("--arms", help=", ".join(ARMS))
    parser.add_argument("--seeds", help="for example 0,1,2; what is not given has the size's own")
    parser.add_argument("--modes", default="masked,crop,full", help="judged in; masked, crop, full, blackout")
    parser.add_argument("--steps", type=int, help="of training, in place of those of the size")
    parser.add_argument("--data", type=Path, help="folder with brca_m2c and crc5")
    parser.add_argument("--work", type=Path, default=Path("study"), help="folder for slide files")
    parser.add_argument("--packed", type=Path, help="what `pack` made, unpacked into --work first")
    parser.add_argument("--rows", type=Path, default=ROWS, help="JSON lines, a finished run each")
    options = parser.parse_args()
    own = DEFAULTS[options.size]
    options.corpora, options.arms, seeds = (
        (given or default).split(",")
        for given, default in zip((options.corpora, options.arms, options.seeds), own, strict=True)
    )
    options.seeds = [int(seed) for seed in seeds]
    if unknown := [arm for arm in options.arms if arm not in ARMS]:
        raise SystemExit(f"--arms: no such arm {', '.join(unknown)}; there are {', '.join(ARMS)}")
    if options.what == "table":
        print(table(finished(options.rows)))
    elif options.what == "pack":
        if options.out is None:
            raise SystemExit("pack: give the file to write, for example study.tar")
        pack(options)
    else:
        run(options)


if __name__ == "__main__":
    main()
