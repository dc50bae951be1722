"""What a training sample costs where its slide file is open, and where it has to be opened first.

    python experiments/bench_open.py --json experiments/results/open.json

A loader worker keeps at most 512 slide files open (fewer where the system allows fewer); tiles come in random order over all
slides, so a cohort of many more slides opens a file for nearly every tile. One slide file is generated: `--tiles` tiles of
256 px with `--boxes` boxes each. In turn, in one process of one thread, by its CPU time, medians, from the page cache:
  open     a tile and its boxes of a file that is open
  closed   the same of a file that is not: opening, offsets, boxes and checksums of the whole slide with it
and, on Linux, the megabytes that are read for each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tiling.slide_file.read import SlideFile
from tiling.slide_file.write import SlideMeta, write_slide_file
from tiling.wsi.codec import encode_jpeg

TILE_PX = 256


def write_slide(folder: Path, tiles: int, boxes: int) -> Path:
    """Write a slide file of `tiles` textured tiles (16 pictures, again and again) with `boxes` random boxes each."""
    rng = np.random.default_rng(0)
    coarse = rng.uniform(60, 230, (16, TILE_PX // 8, TILE_PX // 8, 3)).repeat(8, 1).repeat(8, 2)
    pictures = [encode_jpeg(np.clip(tile + rng.normal(0, 12, tile.shape), 0, 255).astype(np.uint8)) for tile in coarse]
    columns, rows = int(np.ceil(np.sqrt(tiles))), tiles * boxes
    size = rng.uniform(TILE_PX / 4, TILE_PX * 3 / 4, (rows, 2))
    corner = rng.uniform(0, 1, size.shape) * (TILE_PX - size)
    source = folder / "bench.png"
    source.touch()
    groups: dict[str, Any] = {
        "objects": {
            "id": [str(i) for i in range(rows)],
            "label": np.zeros(rows, np.int16),
            "kind": np.ones(rows, np.uint8),
            "area_um2": np.ones(rows, np.float32),
            "attrs": {"labels": ["cell"]},
        },
        "boxes": {
            "xyxy": np.concatenate([corner, corner + size], axis=1).astype(np.float32),
            "offsets": np.arange(0, rows + 1, max(boxes, 1), dtype=np.int64) if boxes else np.zeros(tiles + 1, np.int64),
            "object": np.arange(rows, dtype=np.int32),
            "visible": np.ones(rows, np.float32),
        },
    }
    meta = SlideMeta(
        slide_id="bench",
        source=source,
        width_l0=columns * TILE_PX,
        height_l0=columns * TILE_PX,
        mpp=0.5,
        mpp_level0=0.5,
        patch_px=TILE_PX,
        patient_id="none",
    )
    coords = np.array([(i % columns * TILE_PX, i // columns * TILE_PX) for i in range(tiles)], dtype=np.int64)
    pixels = (pictures[i % len(pictures)] for i in range(tiles))
    write_slide_file(folder / "bench.h5", meta=meta, coords=coords, pixels=pixels, groups=groups)
    return folder / "bench.h5"


def median_us(work: Callable[[int], object], rows: list[int]) -> float:
    """Median CPU microseconds of `work` on each row."""
    spent = []
    for row in rows:
        begin = time.process_time()
        work(row)
        spent.append((time.process_time() - begin) * 1e6)
    return statistics.median(spent)


def read_mb() -> float:
    """Megabytes that this process has read so far, from the page cache too; NaN where the system does not tell."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return float("nan")
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar")) / 1e6


def measure(path: Path, runs: int) -> dict[str, float]:
    """Return microseconds of a tile with its boxes, its file open and closed, those of opening alone, and what that reads."""
    with SlideFile(path) as file:
        rows = np.random.default_rng(1).integers(0, len(file), runs).tolist()
        file.tile(0)
        file.boxes(0)
        begin = read_mb()
        open_us = median_us(lambda row: (file.tile(row), file.boxes(row)), rows)
        open_mb = (read_mb() - begin) / runs

    def opened_anew(row: int) -> None:
        with SlideFile(path) as again:
            again.tile(row)
            again.boxes(row)

    begin = read_mb()
    closed_us = median_us(opened_anew, rows)
    opening_mb = (read_mb() - begin) / runs - open_mb
    return {"open_us": open_us, "closed_us": closed_us, "opening_us": closed_us - open_us, "opening_mb": opening_mb}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=10_000, help="tiles of the slide")
    parser.add_argument("--boxes", type=int, default=8, help="boxes a tile")
    parser.add_argument("--runs", type=int, default=201)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(write_slide(Path(folder), options.tiles, options.boxes), options.runs)
    print(f"a slide of {options.tiles:,} tiles with {options.boxes} boxes each: a tile and its boxes")
    print(f"  its file open    {figures['open_us']:7.0f} us")
    print(
        f"  its file closed  {figures['closed_us']:7.0f} us (opening alone {figures['opening_us']:.0f} us,"
        f" {figures['opening_mb']:.2f} MB)"
    )
    if options.json:
        result = {"tiles": options.tiles, "boxes": options.boxes, **figures}
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
