"""Tiles a second that reach training on one core, from stored pixels and straight from slides.

    python experiments/bench_loader.py --work /tmp/bench_loader --json experiments/results/loader.json

Slides are generated once and kept in the work folder (Aperio's dialect, 0.25 um per pixel, drawn H&E) and tiled twice, 256 px
at 0.5 um: with pixels and with coords only, each with 8 boxes a tile. Tiles are taken in random order over all slides. In turn,
in one process of one thread, by its CPU time, medians:
  limit    the same JPEG bytes through the decoder, from memory, and nothing else (from slides: the stored tiles that a tile
           lies on, at half scale)
  tile     SlideFile.tile: finding, reading, decoding, cutting
  sample   a loader worker's share: tile, target, crops, masks and colours drawn
  views    the same, collated, and every view cut, turned, blurred and coloured on this core, which a GPU does otherwise
and by the clock, a DataLoader with one worker. Beyond decoding, reading a stored tile may cost 50 us.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from bench_tiling import write_slide

from odis_path.config import PretrainConfig
from odis_path.data.dataset import TileSamples
from odis_path.data.sampler import StepSampler, collate
from odis_path.data.tile_index import index_tiles
from odis_path.training.step import make_views
from tiling.slide_file.read import SlideFile
from tiling.slide_file.write import replace_groups
from tiling.tiles.run import tile
from tiling.wsi.backends.tiff_direct import DirectReader
from tiling.wsi.codec import decode, decode_jpeg
from tiling.wsi.level_view import pixel_bounds
from tiling.wsi.slide import Slide

MPP, TILE_PX, BOXES, PATCH_PX = 0.5, 256, 8, 16
BEYOND_DECODING_US = 50.0


def prepare(work: Path, slides: int, side: int) -> tuple[Path, Path]:
    """Folders of slide files with and without pixels."""
    paths = []
    for number in range(slides):
        path = work / f"slide{number}_{side}.svs"
        paths.append(path if path.exists() else write_slide(path, side, side))
    folders = work / f"stored_{slides}_{side}", work / f"coords_{slides}_{side}"
    for folder, pixels in zip(folders, ("jpeg", "none"), strict=True):
        for outcome in tile(paths, folder, MPP, TILE_PX, tissue="none", pixels=pixels):
            if not outcome.ok:
                raise SystemExit(f"{outcome.item}: {outcome.message}")
            if not outcome.skipped:
                add_boxes(folder / f"{outcome.item}.h5")
    return folders


def add_boxes(path: Path) -> None:
    """Random boxes, a quarter to three quarters of a tile wide."""
    rng = np.random.default_rng(0)
    with SlideFile(path) as file:
        tiles = len(file)
    rows = tiles * BOXES
    size = rng.uniform(TILE_PX / 4, TILE_PX * 3 / 4, (rows, 2))
    corner = rng.uniform(0, 1, size.shape) * (TILE_PX - size)
    objects = {
        "id": [str(i) for i in range(rows)],
        "label": np.zeros(rows, np.int16),
        "kind": np.ones(rows, np.uint8),
        "area_um2": np.ones(rows, np.float32),
        "attrs": {"labels": ["cell"]},
    }
    boxes = {
        "xyxy": np.concatenate([corner, corner + size], axis=1).astype(np.float32),
        "offsets": np.arange(0, rows + 1, BOXES, dtype=np.int64),
        "object": np.arange(rows, dtype=np.int32),
        "visible": np.ones(rows, np.float32),
    }
    replace_groups(path, {"objects": objects, "boxes": boxes})


def samples_of(folder: Path, out: Path) -> TileSamples:
    """Training samples under the default recipe's crops."""
    values: dict[str, Any] = {"data": {"tiles": str(folder)}, "run": {"out": str(out), "device": "cpu"}}
    return TileSamples(index_tiles(folder), PretrainConfig.model_validate(values), PATCH_PX)


def stored_streams(samples: TileSamples, rows: list[int]) -> Callable[[], None]:
    """Decode the stored JPEGs of these tiles from memory."""
    index = samples.index
    data = [samples.files[int(index.slide[i])].tile_bytes(int(index.row[i])) for i in rows]

    def work() -> None:
        for jpeg in data:
            decode(jpeg)

    return work


def slide_streams(samples: TileSamples, rows: list[int]) -> Callable[[], None]:
    """Decode, from memory and at half scale, the slides' stored tiles that these tiles lie on."""
    index, data = samples.index, []
    for number in np.unique(index.slide[rows]):
        file = samples.files[int(number)]
        corners = file.coords[index.row[[i for i in rows if index.slide[i] == number]]]
        boxes = np.concatenate([corners, corners + file.size_l0], axis=1)
        with Slide.open(file.source) as slide:
            reader, view = slide.reader, slide.choose_view(file.size_l0 / file.patch_size, boxes)
            if not isinstance(reader, DirectReader):
                raise SystemExit(f"{file.source}: is read by {reader.name}, which has no decoder's limit of its own")
            side = reader.pages[view.level].tile_w // view.scale
            for left, top, right, bottom in pixel_bounds(view, boxes).tolist():
                tiles = product(range(top // side, -(-bottom // side)), range(left // side, -(-right // side)))
                data += [jpeg for tile in tiles if (jpeg := reader.tile_bytes(view.level, *tile)) is not None]

    def work() -> None:
        for jpeg in data:
            decode_jpeg(jpeg, side, side)

    return work


def stages(samples: TileSamples, rows: list[int], limit: Callable[[], None]) -> dict[str, Callable[[], object]]:
    """The work on these tiles, stage by stage."""
    index, batch = samples.index, 16

    def tiles() -> None:
        for i in rows:
            samples.files[int(index.slide[i])].tile(int(index.row[i]))

    def views() -> None:
        with torch.no_grad():
            for start in range(0, len(rows), batch):
                collated = collate([samples[0, i] for i in rows[start : start + batch]])
                make_views(collated, samples.config, torch.device("cpu"))

    return {"limit": limit, "tile": tiles, "sample": lambda: [samples[0, i] for i in rows], "views": views}


def loader_rate(samples: TileSamples, steps: int, batch: int = 64) -> float:
    """Tiles a second of a DataLoader with one worker, by the clock, once it runs."""
    sampler = StepSampler(len(samples), batch, seed=1, first_step=0, last_step=steps, rank=0, world=1)
    loader = iter(torch.utils.data.DataLoader(samples, batch_sampler=sampler, collate_fn=collate, num_workers=1))
    next(loader)
    begin = time.perf_counter()
    tiles = sum(len(batch.pixels) for batch in loader)
    return tiles / (time.perf_counter() - begin)


def measure(samples: TileSamples, limit: Callable[..., Callable[[], None]], count: int, runs: int) -> dict[str, float]:
    """Microseconds a tile of each stage, what reading costs beyond decoding, tiles a second, shares of the limit."""
    rows = np.random.default_rng(0).permutation(len(samples))[:count].tolist()
    works = stages(samples, rows, limit(samples, rows))
    spent: dict[str, list[float]] = {name: [] for name in works}
    for run in range(runs + 1):
        for name, work in works.items():
            begin = time.process_time()
            work()
            if run:  # the first warms up
                spent[name].append((time.process_time() - begin) / count * 1e6)
    figures = {f"{name}_us": statistics.median(values) for name, values in spent.items()}
    beyond = [tile - least for tile, least in zip(spent["tile"], spent["limit"], strict=True)]
    figures["beyond_decoding_us"] = statistics.median(beyond)
    for name in ("tile", "sample", "views"):
        figures[f"{name}_per_s"] = 1e6 / figures[f"{name}_us"]
        figures[f"{name}_share"] = statistics.median(a / b for a, b in zip(spent["limit"], spent[name], strict=True))
    figures["loader_per_s"] = loader_rate(samples, min(len(samples) // 64, 2 + 2 * runs))
    return figures


def print_source(name: str, row: dict[str, float]) -> None:
    """A line a stage."""
    print(f"from {name}: decoder's limit {row['limit_us']:.0f} us a tile, {1e6 / row['limit_us']:.0f} tiles/s a core")
    for stage in ("tile", "sample", "views"):
        us, rate, share = (row[f"{stage}_{unit}"] for unit in ("us", "per_s", "share"))
        print(f"  {stage:<7} {us:6.0f} us  {rate:6.0f} tiles/s  {share:.2f} of the limit")
    print(f"  DataLoader with one worker, by the clock: {row['loader_per_s']:.0f} tiles/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the slides, kept")
    parser.add_argument("--slides", type=int, default=4)
    parser.add_argument("--side", type=int, default=8192, help="level-0 pixels of a slide's side")
    parser.add_argument("--tiles", type=int, default=256, help="tiles a run")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    folders = prepare(options.work, options.slides, options.side)
    figures: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "slides": options.slides,
        "side": options.side,
    }
    print(
        f"{figures['machine']}; {options.slides} slides of {options.side} px, tiles of {TILE_PX} px at {MPP} um, random order"
    )
    for name, folder, limit in zip(("stored pixels", "slides"), folders, (stored_streams, slide_streams), strict=True):
        figures[name] = measure(samples_of(folder, options.work / "run"), limit, options.tiles, options.runs)
        print_source(name, figures[name])
    beyond = figures["stored pixels"]["beyond_decoding_us"]
    verdict = "ok" if beyond <= BEYOND_DECODING_US else "MISSED"
    print(f"stored pixels, beyond decoding: {beyond:.0f} us a tile, limit {BEYOND_DECODING_US:.0f} {verdict}")
    figures["slides_vs_stored"] = figures["slides"]["sample_per_s"] / figures["stored pixels"]["sample_per_s"]
    print(f"a loader worker from slides / from stored pixels: {figures['slides_vs_stored']:.2f}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
