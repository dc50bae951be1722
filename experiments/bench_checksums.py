"""Cost of checksums: the same files read with and without them, turn by turn in one run.

    python experiments/bench_checksums.py --runs 41

A slide file of noisy tissue (224 px, quality 90), its features and a checkpoint are made in a temporary folder, and read from
the page cache. Times are CPU times of this process, as others may be at work; each is the median of the runs. `cost` is the
median over the runs of with/without - 1, as the two are timed one right after the other.
- tile: read and decode a tile (what training and embed do); tile bytes: read it alone, from the page cache
- slide file: open it, and read coords, boxes and classes; features: read_features of a folder
- checkpoint: load it. CRC-32 of all members, then torch.load
Prints a table and, with --json, writes it. Ends with 1 where a tile costs more than LIMIT.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import h5py
import numpy as np
import torch

from odis_path import checkpoint
from odis_path.config import PretrainConfig
from odis_path.features.read import read_features
from odis_path.features.write import write_features
from tiling.slide_file.read import SlideFile
from tiling.slide_file.write import SlideMeta, write_slide_file
from tiling.wsi import codec

LIMIT = 0.03  # of reading a tile
SIDE_PX, TILES, TILES_A_RUN, DIM = 224, 1500, 200, 768


def make(folder: Path) -> None:
    """A slide file, its features in a folder, and a checkpoint; each a second time without checksums."""
    rng = np.random.default_rng(0)
    smooth = rng.uniform(90, 230, (40, SIDE_PX // 8, SIDE_PX // 8, 3)).repeat(8, 1).repeat(8, 2)
    pictures = np.clip(smooth + rng.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)
    encoded = [codec.encode_jpeg(picture, 90) for picture in pictures]
    coords = np.stack([np.arange(TILES) % 50, np.arange(TILES) // 50], 1) * SIDE_PX
    meta = SlideMeta("S", folder / "S.svs", 50 * SIDE_PX, 30 * SIDE_PX, 0.5, 0.5, SIDE_PX)
    boxes = 4 * TILES
    groups = {
        "objects": {
            "id": [f"object-{i}" for i in range(boxes)],
            "label": np.zeros(boxes, np.int16),
            "kind": np.zeros(boxes, np.uint8),
            "area_um2": np.ones(boxes, np.float32),
            "attrs": {"labels": ["Tumor"]},
        },
        "boxes": {
            "xyxy": np.tile(np.array([10, 10, 90, 90], np.float32), (boxes, 1)),
            "object": np.arange(boxes, dtype=np.int32),
            "offsets": np.arange(0, boxes + 1, 4),
            "visible": np.ones(boxes, np.float32),
        },
    }
    pixels = (encoded[i % len(encoded)] for i in range(TILES))
    write_slide_file(folder / "with.h5", meta=meta, coords=coords, pixels=pixels, groups=groups)
    features = rng.normal(size=(TILES, DIM))
    with SlideFile(folder / "with.h5") as file:
        write_features(folder / "f" / "with.h5", level="tile", features=features, slide_file=file, encoder="e", mode="full")
    for path in (folder / "with.h5", folder / "f" / "with.h5"):
        bare = (folder / "g" if path.parent.name == "f" else folder) / "without.h5"
        bare.parent.mkdir(exist_ok=True)
        bare.write_bytes(path.read_bytes())
        strip(bare)
    student, teacher = ({str(i): torch.randn(1000, 1000) for i in range(12)} for _ in range(2))
    state = checkpoint.TrainedState(student=student, teacher=teacher)
    checkpoint.save_checkpoint(folder / "run", 1, 1.0, PretrainConfig(), state, keep=1)


def strip(path: Path) -> None:
    """Make a file one of the version before checksums."""
    with h5py.File(path, "r+") as file:
        names: list[str] = ["/"]
        file.visit(names.append)
        for name in names:
            for key in {"crc32", "attrs_crc32"} & set(file[name].attrs):
                del file[name].attrs[key]
        if "pixels/crc32" in file:
            del file["pixels/crc32"]


def tiles(path: Path, *, decode: bool) -> Callable[[], None]:
    file = SlideFile(path)
    order = np.random.default_rng(1).permutation(TILES)[:TILES_A_RUN].tolist()
    read = file.tile if decode else file.tile_bytes

    def work() -> None:
        for i in order:
            read(i)

    return work


def slide(path: Path) -> Callable[[], None]:
    def work() -> None:
        for _ in range(20):
            with SlideFile(path) as file:
                _ = file.coords, file.attrs, file.boxes_table(), file.objects_table()

    return work


def load(path: Path, *, checked: bool) -> Callable[[], None]:
    def work() -> None:
        if checked:
            checkpoint.load_checkpoint(path)
        else:
            with mock.patch.object(checkpoint, "check_zip"):
                checkpoint.load_checkpoint(path)

    return work


def timed(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=41)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder)
        rows = {
            "tile": (tiles(folder / "with.h5", decode=True), tiles(folder / "without.h5", decode=True), TILES_A_RUN),
            "tile bytes": (tiles(folder / "with.h5", decode=False), tiles(folder / "without.h5", decode=False), TILES_A_RUN),
            "slide file": (slide(folder / "with.h5"), slide(folder / "without.h5"), 20),
            "features": (lambda: read_features(folder / "f"), lambda: read_features(folder / "g"), 1),
            "checkpoint": (load(folder / "run", checked=True), load(folder / "run", checked=False), 1),
        }
        result = {}
        for row, (with_, without, count) in rows.items():
            timed(with_), timed(without)
            pairs = []
            for number in range(arguments.runs):  # now the one first, now the other
                order = (with_, without) if number % 2 else (without, with_)
                times = {work: timed(work) for work in order}
                pairs.append((times[with_], times[without]))
            cost = statistics.median(a / b for a, b in pairs) - 1
            a, b = (statistics.median(seconds) / count * 1e6 for seconds in zip(*pairs, strict=True))
            result[row] = {"with_us": a, "without_us": b, "cost": cost}
    print(f"{'read':12} {'with us':>12} {'without us':>12} {'cost':>8}")
    for row, values in result.items():
        print(f"{row:12} {values['with_us']:12.1f} {values['without_us']:12.1f} {values['cost']:8.1%}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.exit(int(result["tile"]["cost"] > LIMIT))


if __name__ == "__main__":
    main()
