"""Damaged files of every kind that odis-path reads, by the hundred: each is read as it was, or refused in one line.

    python experiments/fuzz_files.py --mutants 500 --seed 0

Of a slide file, a feature file, slides.parquet, a checkpoint, start weights, exported weights, train.jsonl, config.yaml,
results.json, predictions.csv and a manifest each, MUTANTS copies have bits flipped, blocks zeroed, filled with noise, swapped,
doubled, taken out or put in, or their end cut off. Each is read as the commands read it, in a process of its own. Of each it is
checked that
- reading ends within SLOW_S seconds with what the whole file gives, or with a UserError of one line that begins with the file
  (a traceback, a crash of a library, a hang are failures);
- nothing that has a checksum comes out changed. Files of text have none: there another value is no failure.
Prints a line a kind and every failure once, and ends with 1 where there was one. Of results.json, a whole report each, it is a
tenth of MUTANTS.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from annotations.errors import UserError
from odis_path.checkpoint import load_checkpoint
from odis_path.config import PretrainConfig, load_config
from odis_path.data.tile_index import index_tiles
from odis_path.exporters.geojson import read_predictions
from odis_path.exporters.timm import export_timm
from odis_path.features.read import read_features, read_slides_parquet
from odis_path.features.write import write_features, write_slides_parquet
from odis_path.model.pretrained import load_weights
from odis_path.model.vit import build_encoder
from odis_path.reporting.build import report
from odis_path.reporting.inventory import find_outputs
from odis_path.training import loop
from odis_path.training.log.run_log import RunLog
from tiling.cohort.manifest import read_manifest
from tiling.slide_file.read import SlideFile
from tiling.slide_file.tile_labels import tile_labels
from tiling.slide_file.write import SlideMeta, write_slide_file
from tiling.wsi import codec

SLOW_S = 120
SIDE_PX = 32
FINE = ("as it was", "refused", "another value")
MODEL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}


@dataclass(frozen=True)
class Kind:
    """A kind of file. read: gives all its values; guarded: they have checksums, none may come out changed; one_in: a mutant of
    so many is tried."""

    name: str
    path: Path
    read: Callable[[Path], Any]
    guarded: bool = True
    one_in: int = 1


def digest(value: Any, into: Any = None) -> str:
    """One hash of arrays, tensors, texts and numbers in dicts and lists."""
    sums = into or hashlib.sha256()
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            digest([str(key), value[key]], sums)
    elif isinstance(value, list | tuple):
        sums.update(f"{len(value)}".encode())
        for part in value:
            digest(part, sums)
    elif isinstance(value, torch.Tensor):
        digest(value.float().numpy(), sums)
    elif isinstance(value, np.ndarray) and value.dtype != object:
        sums.update(f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    elif isinstance(value, np.ndarray):
        digest(value.tolist(), sums)
    else:
        sums.update(repr(value).encode("utf-8", "surrogateescape"))
    return str(sums.hexdigest())


# --- the files


def write_slide(path: Path, seed: int) -> Path:
    """A slide file of 24 tiles with two boxes in each, outlines, an overview and tissue."""
    rng = np.random.default_rng(seed)
    n = 24
    coords = np.stack([np.arange(n) % 6, np.arange(n) // 6], 1) * SIDE_PX
    pictures = rng.integers(60, 240, (n, SIDE_PX, SIDE_PX, 3)).astype(np.uint8)
    low = rng.uniform(1, 10, (2 * n, 2))
    boxes = np.concatenate([low, low + rng.uniform(6, 20, (2 * n, 2))], 1).astype(np.float32)
    x0, y0, x1, y1 = boxes.T
    rings = np.stack([np.stack(pair, 1) for pair in ((x0, y0), (x1, y0), (x1, y1))], 1).reshape(-1, 2)
    groups: dict[str, Any] = {
        "objects": {
            "id": [f"object {i}" for i in range(2 * n)],
            "label": (np.arange(2 * n) % 2).astype(np.int16),
            "kind": np.zeros(2 * n, np.uint8),
            "area_um2": np.full(2 * n, 400, np.float32),
            "attrs": {"labels": ["Tumor", "Stroma"]},
        },
        "boxes": {
            "xyxy": boxes,
            "offsets": np.arange(0, 2 * n + 1, 2),
            "object": np.arange(2 * n, dtype=np.int32),
            "visible": np.ones(2 * n, np.float32),
            "polygon": {"xy": rings, "ring_offsets": 3 * np.arange(2 * n + 1), "offsets": np.arange(2 * n + 1)},
        },
        "thumbnail": {
            "jpeg": np.frombuffer(codec.encode_jpeg(pictures[0], 90), np.uint8),
            "tissue": np.ones((32, 32), np.uint8),
            "attrs": {"downsample": 6.0},
        },
        "quality": {"pen": np.zeros(n, np.float32), "blur": np.zeros(n, np.float32)},
    }
    meta = SlideMeta(path.stem, path.with_suffix(".svs"), 6 * SIDE_PX, 4 * SIDE_PX, 0.5, 0.5, SIDE_PX, patient_id=f"P{seed}")
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = (codec.encode_jpeg(picture, 90) for picture in pictures)
    write_slide_file(path, meta=meta, coords=coords, pixels=encoded, groups=groups)
    return path


def make_features(folder: Path, slide: Path) -> Path:
    rng = np.random.default_rng(5)
    path = folder / slide.name
    with SlideFile(slide) as file:
        for level, rows in (("tile", 24), ("object", 48)):
            values = rng.normal(size=(rows, 16))
            write_features(path, level=level, features=values, slide_file=file, encoder="e", mode="full", parameters={"a": 1})
    return path


def make_run(folder: Path, tiles: Path) -> Path:
    """A run of two steps; returns its checkpoint."""
    config = PretrainConfig.model_validate(
        {
            "data": {"tiles": str(tiles), "workers": 0, "holdout": 0},
            "views": {"global_size": 32, "local_size": 16, "local_count": 2},
            "model": {"name": "Ti/16", "kwargs": {k: v for k, v in MODEL.items() if k != "img_size"}},
            "head": {"out_dim": 32, "hidden_dim": 32, "bottleneck_dim": 16},
            "optim": {"batch_size": 16, "epochs": 1},
            "eval": {"every_epochs": 0},
            "run": {"out": str(folder), "device": "cpu", "log_every_steps": 1},
        }
    )
    return loop.pretrain(config)


def write_evaluation(folder: Path) -> Path:
    """A results.json such as `evaluate` writes."""
    folder.mkdir(parents=True)
    score = {"value": 0.8, "low": 0.7, "high": 0.9}
    results = {
        "format": "odis-path-evaluation",
        "format_version": 1,
        "probe": "knn",
        "level": "tile",
        "mode": "full",
        "encoder": "e",
        "labels": ["Tumor", "Stroma"],
        "n": 48,
        "n_patients": 2,
        "groups": "patient_id",
        "split": "5 folds",
        "headline": {"balanced_accuracy": score, "auroc": score},
        "confusion": [[20, 4], [5, 19]],
        "per_class": [{"label": name, "n": 24, "recall": 0.8, "precision": 0.8, "f1": 0.8} for name in ("Tumor", "Stroma")],
        "per_k": {"1": 0.7, "5": 0.8},
        "chosen_k": 5,
        "baselines": {"majority": {"balanced_accuracy": score}},
        "warnings": [],
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    return folder / "results.json"


def make_kinds(base: Path) -> list[Kind]:
    """One sound file of every kind, each in a folder of its own."""
    tiles = [write_slide(base / "tiles" / f"S{i}.h5", i) for i in range(3)]
    features = make_features(base / "features", tiles[0])
    rows = [
        {
            "slide_id": f"S{i}",
            "patient_id": f"P{i}",
            "n_tiles": 24,
            "encoder": "e",
            "mode": "full",
            "features": np.random.default_rng(i).normal(size=16),
        }
        for i in range(6)
    ]
    embeddings = write_slides_parquet(base / "features" / "slides.parquet", rows)
    checkpoint = make_run(base / "run", base / "tiles")
    weights = base / "weights.pth"
    torch.save(build_encoder("Ti/16", MODEL).vit.state_dict(), weights)
    export_timm(checkpoint, base / "exported.safetensors")
    predictions = base / "predictions.csv"
    lines = "".join(f"S0,{32 * i},0,-1,Tumor,Stroma,0.{i}\n" for i in range(9))
    predictions.write_text("slide_id,x,y,object,label,predicted,score Tumor\n" + lines)
    manifest = base / "manifest.csv"
    manifest.write_text("slide_id,path,patient_id,mpp\n" + "".join(f"S{i},S{i}.svs,P{i},0.5\n" for i in range(9)))
    return [
        Kind("slide file", tiles[0], read_slide),
        Kind("slide file, training", tiles[0], read_training),
        Kind("feature file", features, lambda path: [_set(read_features(path, level)) for level in ("tile", "object")]),
        Kind("slides.parquet", embeddings, lambda path: _set(read_slides_parquet(path))),
        Kind("checkpoint", checkpoint, lambda path: _without_names(vars(load_checkpoint(path).state))),
        Kind("start weights", weights, read_weights),
        Kind("exported weights", base / "exported.safetensors", read_weights),
        Kind("train.jsonl", base / "run" / "train.jsonl", read_log, guarded=False),
        Kind("config.yaml", base / "run" / "config.yaml", lambda path: load_config(path).model_dump(), guarded=False),
        Kind("results.json", write_evaluation(base / "evaluation"), read_report, guarded=False, one_in=10),
        Kind("predictions.csv", predictions, lambda path: len(read_predictions(path)), guarded=False),
        Kind("manifest.csv", manifest, lambda path: len(read_manifest(path)), guarded=False),
    ]


# --- reading


def read_slide(path: Path) -> Any:
    """All that a slide file holds, by all the ways to it."""
    with SlideFile(path) as file:
        rows = range(len(file.boxes_table()["object"]))
        return [
            file.attrs,
            file.coords_attrs,
            file.coords,
            file.tissue_fraction,
            file.pen_share,
            file.blur,
            file.bad_tiles,
            file.parameters,
            [file.tile_bytes(i) for i in range(len(file))],
            file.boxes_table(),
            file.objects_table(),
            [file.polygon(row) for row in rows],
            file.thumbnail(),
            file.tissue_mask(),
            tile_labels(file),
            [file.group_attrs(name) for name in ("objects", "boxes", "thumbnail")],
        ]


def read_training(path: Path) -> Any:
    """What training takes from a folder of slide files."""
    index = index_tiles(path.parent)
    with SlideFile(path) as file:
        return [index.row, index.slide_ids, index.patients, index.mpp, file.tiles(np.arange(len(file)))]


def read_weights(path: Path) -> Any:
    torch.manual_seed(0)
    vit: Any = build_encoder("Ti/16", MODEL).vit
    load_weights(vit, path)
    return dict(vit.state_dict())


def read_log(path: Path) -> Any:
    """As the report reads it, and as a run does that goes on."""
    if not (path.parent / "config.yaml").exists():
        (path.parent / "config.yaml").write_text(yaml.safe_dump(PretrainConfig().model_dump(mode="json")))
    rows = find_outputs(path.parent).runs[0].rows
    RunLog(path.parent, 10, active=True, first_step=1, title="fuzz").close()
    return rows


def read_report(path: Path) -> Any:
    report(path.parent, path.parent / "report.html")
    return 0


def _set(features: Any) -> Any:
    return {**vars(features), "sources": sorted(map(str, features.sources)), "parameters": dict(features.parameters)}


def _without_names(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key != "optimizer"} | {"optimizer": repr(state["optimizer"])}


# --- mutants


def mutant(data: bytes, rng: np.random.Generator) -> bytes:
    """A damaged copy."""
    out = bytearray(data)
    for _ in range(int(rng.choice([1, 1, 1, 2, 8]))):
        start = int(rng.integers(0, max(1, len(out))))
        size = min(int(rng.choice([1, 4, 16, 512, 4096, 20_000])), len(out) - start)
        damage = rng.integers(0, 9)
        if damage <= 2 and out:
            out[start] ^= 1 << int(rng.integers(0, 8))
        elif damage == 3:
            out[start : start + size] = bytes(size)
        elif damage == 4:
            out[start : start + size] = rng.bytes(size)
        elif damage == 5:
            del out[start : start + size]
        elif damage == 6:
            out[start:start] = out[start : start + size]
        elif damage == 7 and out:
            other = int(rng.integers(0, len(out)))
            length = min(size, len(out) - max(start, other))
            out[start : start + length], out[other : other + length] = out[other : other + length], out[start : start + length]
        elif damage == 8:
            del out[start:]
    return bytes(out)


def in_child(work: Callable[[], Any]) -> tuple[str, str]:
    """What a piece of work gives in a forked process: (value | refused | failure, text)."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        signal.alarm(SLOW_S)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        try:
            result = ("value", digest(work()))
        except UserError as error:
            result = ("refused", str(error))
        except BaseException:
            result = ("failure", traceback.format_exc())
        with os.fdopen(write_end, "wb") as pipe:
            pickle.dump(result, pipe)
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(child, 0)
    if data:
        kind, text = pickle.loads(data)
        return str(kind), str(text)
    return "failure", f"the process ended by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "the process ended"


def judge(kind: Kind, path: Path, whole: str, outcome: tuple[str, str]) -> str:
    """ "as it was", "refused", "another value" (where that is no failure), or what is wrong."""
    result, text = outcome
    if result == "value":
        return "as it was" if text == whole else "another value" if not kind.guarded else "a changed value came out"
    if result == "refused":
        named = str(path.parent) in text or not kind.guarded
        return "refused" if "\n" not in text and named else f"not one line that names the file: {text}"
    lines = text.strip().splitlines()
    place = next((line.strip() for line in reversed(lines) if "/odis_path/" in line or "/tiling/" in line), "")
    return f"{lines[-1]} {place}"


def fuzz(kind: Kind, mutants: int, seed: int, folder: Path) -> Counter[str]:
    """How many mutants of a kind came to what."""
    rng = np.random.default_rng([seed, *kind.name.encode()])
    data, path = kind.path.read_bytes(), folder / kind.path.name
    path.write_bytes(data)
    result, whole = in_child(lambda: kind.read(path))
    assert result == "value", f"{kind.name}: the sound file: {whole}"
    counts: Counter[str] = Counter()
    for _ in range(-(-mutants // kind.one_in)):
        path.write_bytes(mutant(data, rng))
        counts[judge(kind, path, whole, in_child(lambda: kind.read(path)))] += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="a part of the names of the kinds to take")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    wrong: Counter[str] = Counter()
    print(f"{'kind':24} " + " ".join(f"{word:>14}" for word in (*FINE, "failures")))
    with tempfile.TemporaryDirectory() as name:
        for number, kind in enumerate(make_kinds(Path(name) / "sound")):
            if arguments.only not in kind.name:
                continue
            folder = Path(name) / str(number)
            folder.mkdir()
            counts = fuzz(kind, arguments.mutants, arguments.seed, folder)
            bad = Counter({f"{kind.name}: {what}": n for what, n in counts.items() if what not in FINE})
            wrong += bad
            numbers = [*(counts[word] for word in FINE), bad.total()]
            print(f"{kind.name:24} " + " ".join(f"{n:14}" for n in numbers), flush=True)
    for what, n in wrong.most_common():
        print(f"FAILURE ({n} times) {what}")
    sys.exit(int(bool(wrong)))


if __name__ == "__main__":
    main()
