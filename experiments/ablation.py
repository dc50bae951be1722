"""The paper's ablations and this project's open choices, side by side on one cohort.

    odis-path demo --out demo_out                                     # or any folder of annotated slide files
    python experiments/ablation.py demo_out/tiles --out ablation --json experiments/results/ablation.json
    python experiments/ablation.py demo_out/tiles --out ablation --variants p0,p25,p50,p75   # whole tile as target

Every variant is the base recipe with a few keys replaced, trained from one seed on the same patients, and judged by k-NN on
the held-out ones: tiles seen whole, tissue objects by masked attention, and tissue objects cut out. One run each,
and other seeds hold out other patients: with the demo's ten patients, figures of different seeds differ by 0.1 and more, so
compare variants within a seed, and over several of them (--seed) before you believe a small difference.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

VARIANTS: dict[str, list[str]] = {
    "odis": [],
    "crop_only": ["target.mask=false"],
    "mask_only": ["target.crop=false"],
    "ibot": ["target.crop=false", "target.mask=false"],
    "dino": ["target.crop=false", "target.mask=false", "loss.patch_weight=0", "mim.probability=0"],
    "linear_pool": ["model.pool=linear"],
    "multi_obj_2": ["target.objects=2"],
    "multi_obj_4": ["target.objects=4"],
    "readonly_4": ["target.objects=4", "model.read_only=true"],
    "crop_first": ["target.order=crop_first"],
    "image_term": ["loss.image_weight=0.5"],
    "sinkhorn": ["loss.centering=sinkhorn"],
    "koleo": ["loss.koleo_weight=0.1"],
    "p0": ["target.whole_tile_p=0"],
    "p25": ["target.whole_tile_p=0.25"],
    "p50": ["target.whole_tile_p=0.5"],
    "p75": ["target.whole_tile_p=0.75"],
}
LEVELS = {"tile, full": ("tile", "full"), "object, masked": ("object", "masked"), "object, crop": ("object", "crop")}


def odis_path(arguments: list[str], log: Path) -> None:
    """One command in a process of one thread, its output appended to a log."""
    with log.open("a") as file:
        done = subprocess.run(
            [sys.executable, "-m", "odis_path", *arguments],
            stdout=file,
            stderr=file,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    if done.returncode:
        raise SystemExit(f"odis-path {arguments[0]} ended with code {done.returncode}: see {log}")


def run_variant(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train, embed and evaluate one variant; return balanced accuracy by level. Finished parts are skipped."""
    out = options.out / name
    out.mkdir(parents=True, exist_ok=True)
    log, tiles = out / "log.txt", str(options.tiles)
    common = [f"data.tiles={tiles}", f"run.out={out / 'run'}", f"run.seed={options.seed}", "eval.every_epochs=0"]
    odis_path(["pretrain", options.base, *common, *options.override, *VARIANTS[name]], log)
    accuracy: dict[str, Any] = {}
    for title, (level, mode) in LEVELS.items():
        features, results = str(out / f"{level}-{mode}"), out / f"knn-{level}-{mode}"
        kinds = ["--kinds", "tissue"] if level == "object" else []
        embed = ["embed", tiles, "--checkpoint", str(out / "run"), "--out", features, "--level", level, "--mode", mode]
        odis_path([*embed, *kinds], log)
        evaluate = ["evaluate", features, "--labels", "annotations", "--probe", "knn", "--level", level]
        split = ["--groups", "patient_id", "--split", str(out / "run" / "split.csv")]
        odis_path([*evaluate, *split, "--out", str(results)], log)
        accuracy[title] = json.loads((results / "results.json").read_text())["headline"]["balanced_accuracy"]
    print(name, {title: round(value["point"], 3) for title, value in accuracy.items()}, flush=True)
    return accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tiles", type=Path, help="folder of annotated slide files")
    parser.add_argument("--out", type=Path, default=Path("ablation"))
    parser.add_argument("--base", default="demo", help="recipe that the variants change")
    parser.add_argument("--override", action="append", default=[], help="key.sub=value for all variants; repeatable")
    parser.add_argument("--variants", default="odis,crop_only,mask_only,ibot,dino,linear_pool,multi_obj_2,readonly_4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="variants at a time")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    names = options.variants.split(",")
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise SystemExit(f"--variants: no such variant {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
    with ThreadPoolExecutor(options.jobs) as pool:
        variants = dict(zip(names, pool.map(lambda name: run_variant(name, options), names), strict=True))
    print(f"\n{'k-NN, balanced accuracy':<16}" + "".join(f"{title:>26}" for title in LEVELS))
    for name, row in variants.items():
        cells = "".join(f"{v['point']:>10.3f} ({v['low']:.3f}-{v['high']:.3f})" for v in row.values())
        print(f"{name:<16}{cells}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        settings = {"base": options.base, "override": options.override, "seed": options.seed}
        options.json.write_text(json.dumps({**settings, "variants": variants}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
