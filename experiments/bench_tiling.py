"""Speed of reading and storing tiles, against the usual loop, the decoder's own limit and other programs.

    python experiments/bench_tiling.py --work /tmp/bench_tiling --json experiments/results/tiling.json   # 40960 x 32768
    python experiments/bench_tiling.py --work /tmp/bench_tiling --side 8192                              # to try it out

A slide is generated once and kept in the work folder: Aperio's dialect, 0.25 um per pixel, 256-px JPEG tiles (4:2:2, quality
85) of drawn H&E. Cut from it: tiles of 256 px at 0.5 um. All with the same number of workers, timed in turn, medians:
  limit      the stored bytes through the decoder at half scale and nothing else, in threads
  openslide  processes that read_region one tile after the other, convert it to RGB and resize it
  read       our reading of the same tiles, one process with threads; also with one worker
  tile       `odis-path tile`'s function, pixels encoded and written, tissue search off
  lazyslide  LazySlide's tiles through its data loader (nothing written), where it is installed: here, or for the Python that
             --lazyslide names, so that its many dependencies need not be ours:
                 python -m venv lazy && lazy/bin/pip install lazyslide    # then: --lazyslide lazy/bin/python
Level-0 megapixels a second, ratios, and the peak memory of a process that tiles.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

TILE_PX = 256
MPP, TARGET_MPP, PATCH_PX = 0.25, 0.5, 256
FIELD_PX, FIELDS = 2048, 3
QUALITY = 85
LIMITS = {
    "read_vs_openslide": 6.0,
    "tile_vs_openslide": 4.0,
    "read_vs_limit": 0.7,
    "read_scaling": 1.8,
    "read_vs_lazyslide": 8.0,  # it reads and writes nothing: tile_vs_lazyslide, where we write, has no limit
}
MEMORY_LIMIT_MB = 600


def write_slide(path: Path, width: int, height: int) -> Path:
    """A pyramid of encoded tiles, drawn in a few fields and dealt out over level 0; every tile is stored anew."""
    import simplejpeg
    import tifffile
    from PIL import Image

    from odis_path.synthetic.slides import draw_slide

    encode = partial(simplejpeg.encode_jpeg, quality=QUALITY, colorspace="RGB", colorsubsampling="422")
    fields = [draw_slide(np.random.default_rng(seed), FIELD_PX, MPP).pixels for seed in range(FIELDS)]
    temporary = path.with_suffix(".part")
    stock = [tile for field in fields for tile in _tiles(field)]
    rows, columns = (-(-side // TILE_PX) for side in (height, width))
    order = np.random.default_rng(1).integers(0, len(stock), (rows, columns))
    with tifffile.TiffWriter(temporary, bigtiff=True) as file:
        for downsample in (1, 4, 16):
            w, h = width // downsample, height // downsample
            size = f"{width}x{height} [0,0 {width}x{height}] ({TILE_PX}x{TILE_PX})"
            text = f"Aperio Image Library v11.2.1\r\n{size} JPEG/RGB Q={QUALITY}|AppMag = 40|MPP = {MPP}"
            small = [np.asarray(Image.fromarray(tile).reduce(downsample)) for tile in stock]
            tiles: Iterator[bytes] = map(encode, _put_together(small, order, downsample))
            if downsample == 1:
                encoded = [encode(tile) for tile in stock]
                tiles = (encoded[i] for i in order.ravel())
            file.write(
                tiles,
                shape=(h, w, 3),
                dtype=np.uint8,
                tile=(TILE_PX, TILE_PX),
                photometric="ycbcr",
                subsampling=(2, 1),
                compression="jpeg",
                subfiletype=1 if downsample > 1 else 0,
                description=text,
                metadata=None,
            )
    os.replace(temporary, path)
    return path


def _tiles(picture: np.ndarray) -> list[np.ndarray]:
    """The picture's whole tiles."""
    rows, columns = picture.shape[0] // TILE_PX, picture.shape[1] // TILE_PX
    corners = [(y * TILE_PX, x * TILE_PX) for y in range(rows) for x in range(columns)]
    return [np.ascontiguousarray(picture[y : y + TILE_PX, x : x + TILE_PX]) for y, x in corners]


def _put_together(small: list[np.ndarray], order: np.ndarray, count: int) -> Iterator[np.ndarray]:
    """Tiles of a level: each holds count x count tiles of level 0, made small; what lies beyond the slide is white."""
    rows, columns = order.shape
    side = TILE_PX // count
    for top in range(0, rows, count):
        for left in range(0, columns, count):
            tile = np.full((TILE_PX, TILE_PX, 3), 255, np.uint8)
            for (row, column), i in np.ndenumerate(order[top : top + count, left : left + count]):
                tile[row * side : (row + 1) * side, column * side : (column + 1) * side] = small[i]
            yield tile


def grid(width: int, height: int) -> tuple[np.ndarray, float]:
    """Coords of all tiles and their side, in level-0 pixels."""
    from tiling.grid import plan_grid

    plan = plan_grid(width, height, MPP, TARGET_MPP, PATCH_PX)
    return plan.coords, plan.size_l0


def decoder_limit(path: Path, workers: int) -> float:
    """Seconds to decode every stored tile of level 0 at half scale from memory: no file, no cutting, no order."""
    import tifffile

    from tiling.wsi.codec import decode_jpeg

    with tifffile.TiffFile(path) as file:
        page = file.pages[0].aspage()
        data = path.read_bytes()
        tiles = [data[a : a + n] for a, n in zip(page.dataoffsets, page.databytecounts, strict=True)]
    del data

    def decode(part: list[bytes]) -> None:
        for tile in part:
            decode_jpeg(tile, TILE_PX // 2, TILE_PX // 2)

    begin = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(decode, [tiles[i::workers] for i in range(workers)]))
    return time.perf_counter() - begin


def openslide_part(path: Path, coords: np.ndarray, size_l0: float) -> None:
    """The usual loop: a region a tile, converted, resized."""
    import openslide
    from PIL import Image

    side = round(size_l0)
    with openslide.OpenSlide(str(path)) as slide:
        for x, y in coords.tolist():
            region = slide.read_region((x, y), 0, (side, side)).convert("RGB")
            np.asarray(region.resize((PATCH_PX, PATCH_PX), Image.Resampling.BILINEAR))


def openslide_loop(path: Path, workers: int, share: float) -> float:
    """Seconds of the usual loop over the first `share` of the tiles, scaled to all; processes start before the clock does."""
    coords, size_l0 = grid(*size_of(path))
    part = coords[: max(workers, round(len(coords) * share))]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.starmap(openslide_part, [(path, part[:1], size_l0)] * workers, chunksize=1)
        begin = time.perf_counter()
        pool.starmap(openslide_part, [(path, piece, size_l0) for piece in np.array_split(part, workers)], chunksize=1)
        seconds = time.perf_counter() - begin
    return seconds * len(coords) / len(part)


def read_ours(path: Path, threads: int) -> float:
    """Seconds to open the slide and read all tiles."""
    from tiling.wsi.patches import map_patches
    from tiling.wsi.slide import Slide

    begin = time.perf_counter()
    with Slide.open(path) as slide:
        coords, size_l0 = grid(slide.info.width_l0, slide.info.height_l0)
        count = sum(1 for _ in map_patches(slide, coords, size_l0, PATCH_PX, lambda tile: tile, threads))
    assert count == len(coords)
    return time.perf_counter() - begin


def tile_ours(path: Path, out: Path, workers: int) -> float:
    """Seconds of a whole `tile` with pixels written."""
    from tiling.tiles.run import tile

    (out / f"{path.stem}.h5").unlink(missing_ok=True)
    begin = time.perf_counter()
    (outcome,) = tile([path], out, TARGET_MPP, PATCH_PX, tissue="none", workers=workers)
    assert outcome.ok, outcome.message
    return time.perf_counter() - begin


LAZYSLIDE = """
import resource, sys, time
import lazyslide, wsidata
from torch.utils.data import DataLoader
path, workers, patch_px, mpp = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
wsi = wsidata.open_wsi(path)
lazyslide.pp.tile_tissues(wsi, patch_px, mpp=mpp, background_filter=False, tissue_key=None)
def cpu():
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
begin, begin_cpu, count = time.perf_counter(), cpu(), 0
for batch in DataLoader(wsi.ds.tile_images(), batch_size=32, num_workers=workers):
    count += len(batch["image"])
right = tuple(batch["image"].shape[1:3]) == (patch_px, patch_px)
print(lazyslide.__version__, count, right, time.perf_counter() - begin, cpu() - begin_cpu)
"""


def lazyslide_loop(path: Path, workers: int, python: str, cpu: list[float]) -> float:
    """Seconds of LazySlide under another Python: its tiles of the whole slide through the loader it embeds them with.

    cpu: gets the seconds of CPU of its processes together.
    """
    words = [python, "-c", LAZYSLIDE, str(path), str(workers), str(PATCH_PX), str(TARGET_MPP)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    version, count, right_size, seconds, cpu_seconds = done.stdout.split()[-5:]
    with_ours = len(grid(*size_of(path))[0])
    assert int(count) == with_ours, f"LazySlide {version} cuts {count} tiles, we {with_ours}"
    assert right_size == "True", f"LazySlide {version} gives tiles of another size"
    cpu.append(float(cpu_seconds))
    return float(seconds)


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of level 0."""
    from tiling.wsi.slide import Slide

    with Slide.open(path) as slide:
        return slide.info.width_l0, slide.info.height_l0


def peak_memory_mb(path: Path, out: Path) -> float:
    """Most resident memory of a fresh process that tiles the slide alone, in MB."""
    code = (
        "import re, sys; from tiling.tiles.run import tile;"
        f"(outcome,) = tile([sys.argv[1]], sys.argv[2], {TARGET_MPP}, {PATCH_PX}, tissue='auto', workers=1);"
        "assert outcome.ok, outcome.message;"
        # Not ru_maxrss, which a child takes over from its parent.
        "print(int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024)"
    )
    (out / f"{path.stem}.h5").unlink(missing_ok=True)
    done = subprocess.run([sys.executable, "-c", code, str(path), str(out)], check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def measure(options: argparse.Namespace, path: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of every way, timed in turn; and seconds of CPU of those that run in this process."""
    ways: dict[str, Callable[[], float]] = {
        "limit": partial(decoder_limit, path, options.workers),
        "openslide": partial(openslide_loop, path, options.workers, options.openslide_share),
        "read": partial(read_ours, path, options.workers),
        "read_1": partial(read_ours, path, 1),
        "tile": partial(tile_ours, path, options.work / "out", options.workers),
    }
    seconds: dict[str, list[float]] = {name: [] for name in (*ways, *(["lazyslide"] if options.lazyslide else []))}
    in_process = ("limit", "read", "read_1")
    cpu: dict[str, list[float]] = {name: [] for name in (*in_process, *(["lazyslide"] if options.lazyslide else []))}
    if options.lazyslide:
        ways["lazyslide"] = partial(lazyslide_loop, path, options.workers, options.lazyslide, cpu["lazyslide"])
    for turn in range(options.runs):
        for name, way in list(ways.items())[:: 1 if turn % 2 else -1]:
            begin = time.process_time()
            seconds[name].append(way())
            if name in in_process:
                cpu[name].append(time.process_time() - begin)
    return medians(seconds), medians(cpu)


def medians(samples: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("bench_tiling_work"), help="keeps the slide and the output")
    parser.add_argument("--side", type=int, default=0, help="width of a square slide, to try it out; 0: 40960 x 32768")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--openslide-share", type=float, default=0.25, help="share of the tiles the slow loop is timed on")
    with_lazyslide = sys.executable if importlib.util.find_spec("lazyslide") else ""
    parser.add_argument("--lazyslide", metavar="PYTHON", default=with_lazyslide, help="a Python that has LazySlide installed")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    width, height = (options.side, options.side) if options.side else (40960, 32768)
    path = options.work / f"bench_{width}x{height}.svs"
    if not path.exists():
        write_slide(path, width, height)
    seconds, cpu = measure(options, path)
    coords, size_l0 = grid(width, height)
    megapixels = len(coords) * size_l0**2 / 1e6
    ratios = {
        "read_vs_openslide": seconds["openslide"] / seconds["read"],
        "tile_vs_openslide": seconds["openslide"] / seconds["tile"],
        "read_vs_limit": seconds["limit"] / seconds["read"],
        "read_scaling": seconds["read_1"] / seconds["read"],
    }
    if "lazyslide" in seconds:
        ratios["read_vs_lazyslide"] = seconds["lazyslide"] / seconds["read"]
        ratios["tile_vs_lazyslide"] = seconds["lazyslide"] / seconds["tile"]
    memory = peak_memory_mb(path, options.work / "out")
    print(f"{width} x {height} px, {path.stat().st_size / 1e6:.0f} MB, {len(coords)} tiles, {options.workers} workers")
    for name, value in seconds.items():
        print(f"{name:<12}{value:>9.2f} s{megapixels / value:>9.0f} level-0 megapixels/s")
    for name, value in ratios.items():
        limit = LIMITS.get(name)
        judged = "no limit" if limit is None else f"at least {limit:g}: {'met' if value >= limit else 'MISSED'}"
        print(f"{name:<20}{value:>7.2f}  ({judged})")
    print(f"of CPU time alone, reading takes {cpu['read_1'] / cpu['limit']:.2f} times the limit's")
    if "lazyslide" in cpu:
        ratio = cpu["lazyslide"] / cpu["read"]
        print(f"and LazySlide's processes together {ratio:.2f} times what our reading takes in as many threads")
    print(f"peak memory of a worker {memory:.0f} MB (at most {MEMORY_LIMIT_MB})")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "seconds": seconds,
            "cpu_seconds": cpu,
            "megapixels": megapixels,
            "ratios": ratios,
            "limits": LIMITS,
            "peak_memory_mb": memory,
        }
        machine = {"cores": os.cpu_count(), "machine": platform.machine(), "python": sys.version.split()[0]}
        options.json.write_text(json.dumps(result | machine | {"workers": options.workers}, indent=2) + "\n")


if __name__ == "__main__":
    main()
