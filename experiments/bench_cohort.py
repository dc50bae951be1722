"""A cohort of thousands of slides to its end: time to the first file, growth of memory, time of a rerun.

    python experiments/bench_cohort.py --work FOLDER --json experiments/results/cohort.json    # 10,000 slides, some ten minutes
    python experiments/bench_cohort.py --work FOLDER --slides 200                              # to try it out

Tiny slides (512 x 384 pixels, drawn once, each a file of its own, in twenty folders), then the commands themselves: `scan` of
the folder, `tile` of the manifest, `tile` again. Memory is looked at all along, of the parent and of its workers.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

FOLDERS, KINDS = 20, 20
LOOK_EVERY_S = 0.25
START_LIMIT_S, GROWTH_LIMIT_MB = 10.0, 60.0
PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 2**20


def make_slides(folder: Path, count: int) -> None:
    """Files S00000.svs and so on, copies of a few drawn slides."""
    import tifffile

    from odis_path.synthetic.slides import draw_slide

    pixels = draw_slide(np.random.default_rng(0), 1024, 0.5).pixels
    kinds = folder.with_name("kinds")
    kinds.mkdir(parents=True, exist_ok=True)
    text = "Aperio Image Library v11\r\n512x384 [0,0 512x384] (256x256) JPEG/RGB Q=90|AppMag = 20|MPP = 0.5"
    for kind in range(KINDS):
        picture = np.full((384, 512, 3), 243, np.uint8)
        picture[16 : 320 + kind, 16:400] = pixels[kind * 8 : kind * 8 + 304 + kind, kind * 16 : kind * 16 + 384]
        tifffile.imwrite(
            kinds / f"{kind}.svs",
            picture,
            tile=(256, 256),
            compression="jpeg",
            photometric="rgb",
            metadata=None,
            description=text,
        )
    for number in range(count):
        path = folder / f"{number % FOLDERS:02d}" / f"S{number:05d}.svs"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            shutil.copyfile(kinds / f"{number % KINDS}.svs", path)


def memory_mb(pid: int) -> float:
    """Resident memory of a process, 0 where it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_MB
    except (OSError, IndexError):
        return 0.0


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def follow(words: list[str], out: Path) -> dict[str, Any]:
    """Run odis-path; return seconds, seconds to the first slide file, and memory (MB) in its first tenth and at most."""
    begin = time.perf_counter()
    samples: list[tuple[float, float, float]] = []
    first, fresh = None, not out.exists()
    with subprocess.Popen([sys.executable, "-m", "odis_path", *words], stdout=subprocess.DEVNULL) as run:
        while run.poll() is None:
            now = time.perf_counter() - begin
            if fresh and first is None and out.is_dir() and any(entry.name.endswith(".h5") for entry in os.scandir(out)):
                first = now
            workers = [memory_mb(pid) for pid in children(run.pid)]
            samples.append((now, memory_mb(run.pid), max(workers, default=0.0)))
            time.sleep(LOOK_EVERY_S)
    if run.returncode:
        raise SystemExit(f"odis-path {' '.join(words)}: exit code {run.returncode}")
    seconds = time.perf_counter() - begin
    table = np.array(samples)
    early = table[table[:, 0] < max(seconds / 10, 4.0)].max(axis=0)
    most = table.max(axis=0)
    return {
        "seconds": seconds,
        "first_s": first,
        "parent_early_mb": early[1],
        "parent_mb": most[1],
        "worker_early_mb": early[2],
        "worker_mb": most[2],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("bench_cohort_work"), help="for the slides and the output")
    parser.add_argument("--slides", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    slides, out, manifest = (options.work / name for name in ("slides", "out", "manifest.csv"))
    make_slides(slides, options.slides)
    shutil.rmtree(out, ignore_errors=True)
    workers = ["--workers", str(options.workers)]
    tile = ["tile", str(manifest), "--out", str(out), "--mpp", "0.5", "--size", "224", *workers]
    runs: dict[str, Any] = {
        "scan": follow(["scan", str(slides), "--out", str(manifest), *workers], out),
        "tile": follow(tile, out),
        "tile again": follow(tile, out),
    }
    assert len(list(out.glob("*.h5"))) == options.slides
    for name, figures in runs.items():
        rate = figures["seconds"] / options.slides * 1000
        parent, worker = (
            f"{process} {figures[f'{process}_mb']:.0f} MB ({figures[f'{process}_early_mb']:.0f} early)"
            for process in ("parent", "worker")
        )
        print(f"{name:<12}{figures['seconds']:>8.1f} s, {rate:.1f} ms a slide; {parent}, {worker}")
    tiled = runs["tile"]
    first = tiled["first_s"]
    grown = max(tiled["parent_mb"] - tiled["parent_early_mb"], tiled["worker_mb"] - tiled["worker_early_mb"])
    print(f"first slide file after {first:.1f} s (at most {START_LIMIT_S:g}: {'met' if first <= START_LIMIT_S else 'MISSED'})")
    print(f"memory grows by {grown:.0f} MB (at most {GROWTH_LIMIT_MB:g}: {'met' if grown <= GROWTH_LIMIT_MB else 'MISSED'})")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        result = runs | {"slides": options.slides, "workers": options.workers, "cores": os.cpu_count()}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
