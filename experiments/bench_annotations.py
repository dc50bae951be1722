"""Time and memory of turning annotations into boxes, beside geopandas and shapely on the same cells.

    python experiments/bench_annotations.py --cells 1000000 --json experiments/results/annotations.json

Cells of 20 vertices on a slide of 40,960 x 32,768 pixels at 0.25 um, tiles of 256 px at 0.5 um. Every figure comes from a
process of its own, in turn, --rounds times; the best of each counts. `geopandas` has to be installed for this (it is no
dependency). Prints each figure with its limit, and ok or MISSED; with --json, writes them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

WIDTH, HEIGHT, SIDE_L0, PATCH_PX, MPP, MPP_L0 = 40_960, 32_768, 512, 256, 0.5, 0.25
CLASSES = ("Tumor", "Lymphocyte", "Stroma", "Necrosis", "Epithelial")
PROPERTIES = '{"objectType":"detection","classification":{"name":"%s","color":[200,0,0]},"measurements":{"Area":123.45}}'
TILE_READS, COHORT_SLIDES = 20_000, 100
COHORT_SHARE = 0.85  # of the cores times the seconds: what is left is the start of the processes


def write_cells(path: Path, n: int, seed: int) -> None:
    """n cells as QuPath writes them, one feature a line."""
    rng = np.random.default_rng(seed)
    angle = np.linspace(0, 2 * np.pi, 20, endpoint=False)
    around = np.stack([np.cos(angle), np.sin(angle)], -1)
    with path.open("w") as file:
        file.write('{"type":"FeatureCollection","features":[')
        for start in range(0, n, 20_000):
            k = min(20_000, n - start)
            radius = rng.uniform(8, 16, (k, 1, 1)) * (1 + 0.15 * rng.uniform(-1, 1, (k, 20, 1)))
            xy = rng.uniform([20, 20], [WIDTH - 20, HEIGHT - 20], (k, 1, 2)) + radius * around
            rings = np.concatenate([xy, xy[:, :1]], axis=1).round(2).tolist()
            ids, label = rng.bytes(16 * k).hex(), rng.integers(0, len(CLASSES), k).tolist()
            lines = []
            for i, ring in enumerate(rings):
                u = ids[32 * i : 32 * i + 32]
                name = f"{u[:8]}-{u[8:12]}-{u[12:16]}-{u[16:20]}-{u[20:]}"
                outline = f'{{"type":"Polygon","coordinates":[{ring}]}}'.replace(" ", "")
                lines.append(
                    f'{{"type":"Feature","id":"{name}","geometry":{outline},"properties":{PROPERTIES % CLASSES[label[i]]}}}'
                )
            file.write((",\n" if start else "") + ",\n".join(lines))
        file.write("]}\n")


def corners() -> np.ndarray:
    """int64 (N, 2): the tiles of the slide, level-0 pixels."""
    x, y = np.meshgrid(np.arange(0, WIDTH, SIDE_L0), np.arange(0, HEIGHT, SIDE_L0))
    return np.stack([x, y], axis=-1).reshape(-1, 2)


def write_slide(path: Path) -> None:
    """A slide file with the tiles and nothing else."""
    from tiling import SlideMeta, write_slide_file

    meta = SlideMeta(path.stem, path.with_suffix(".svs"), WIDTH, HEIGHT, MPP, MPP_L0, PATCH_PX)
    write_slide_file(path, meta=meta, coords=corners())


def run_ours(file: Path, stream: bool) -> dict[str, Any]:
    """Read, clip and write, as odis-path annotate does for one slide."""
    import shapely  # noqa: F401  neither side is charged for its imports

    import annotations.readers.geojson.large_file  # noqa: F401
    from tiling.boxes.run import annotate_slide
    from tiling.boxes.settings import AnnotateSettings

    slide = file.with_suffix(".h5")
    write_slide(slide)
    begin = time.perf_counter()
    processes = 1 if stream else len(os.sched_getaffinity(0))
    result = annotate_slide((slide, (file,)), AnnotateSettings(), stream=stream, processes=processes)
    return {"seconds": time.perf_counter() - begin, "boxes": result.info["boxes"]}


def run_geopandas(file: Path) -> dict[str, Any]:
    """Read with geopandas, find pairs with a tree, cut every pair; nothing is written."""
    import geopandas
    import shapely

    begin = time.perf_counter()
    geometry = np.asarray(geopandas.read_file(file).geometry.values)
    read = time.perf_counter() - begin
    corner = corners()
    tiles = shapely.box(corner[:, 0], corner[:, 1], corner[:, 0] + SIDE_L0, corner[:, 1] + SIDE_L0)
    obj, tile = shapely.STRtree(tiles).query(geometry)
    pieces = shapely.intersection(geometry[obj], tiles[tile])
    bounds, area = shapely.bounds(pieces), shapely.area(pieces)
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "read_s": read, "boxes": int((area > 0).sum()), "pairs": len(bounds)}


def run_msgspec(file: Path) -> dict[str, Any]:
    """Decode the file into typed structs and do nothing with them; the cyclic collector is off, as in ours."""
    import msgspec

    names: dict[str, Any] = {"gc": False}
    polygon = msgspec.defstruct(
        "Polygon", [("coordinates", list[list[tuple[float, float]]])], tag_field="type", tag="Polygon", **names
    )
    classification = msgspec.defstruct("Classification", [("name", str | None, None)], **names)
    fields: list[Any] = [("objectType", str | None, None), ("classification", classification | None, None)]
    properties = msgspec.defstruct("Properties", fields, **names)
    feature_fields: list[Any] = [("geometry", polygon), ("properties", properties), ("id", str)]
    feature = msgspec.defstruct("Feature", feature_fields, tag_field="type", tag="Feature", **names)
    collection = msgspec.defstruct("FeatureCollection", [("features", list[feature])], **names)  # type: ignore[valid-type]
    decoder = msgspec.json.Decoder(collection)
    gc.disable()
    begin = time.perf_counter()
    document = decoder.decode(file.read_bytes())
    return {"seconds": time.perf_counter() - begin, "features": len(document.features)}  # type: ignore[attr-defined]


def run_tiles(file: Path) -> dict[str, Any]:
    """Median microseconds for the boxes of a random tile; the first one, which reads the table, apart."""
    from tiling import SlideFile

    with SlideFile(file.with_suffix(".h5")) as slide:
        rows = np.random.default_rng(0).integers(0, len(slide), TILE_READS).tolist()
        begin = time.perf_counter()
        slide.boxes(rows[0])
        first = time.perf_counter() - begin
        took = []
        for row in rows:
            begin = time.perf_counter()
            slide.boxes(row)
            took.append(time.perf_counter() - begin)
    return {
        "seconds": float(np.sum(took)),
        "us": 1e6 * float(np.median(took)),
        "mean_us": 1e6 * float(np.mean(took)),
        "first_s": first,
    }


def run_cohort_of_slides(file: Path, cells: int) -> dict[str, Any]:
    """A folder of slides with one file each: seconds, and how many were at work at a time."""
    from tiling.boxes.run import annotate

    folder = file.parent / "cohort"
    folder.mkdir()
    write_cells(file.parent / "cells.geojson", cells, 1)
    for i in range(COHORT_SLIDES):
        write_slide(folder / f"s{i:03d}.h5")
        (folder / f"s{i:03d}.geojson").hardlink_to(file.parent / "cells.geojson")
    begin = time.perf_counter()
    outcomes = annotate(folder, folder)
    seconds = time.perf_counter() - begin
    assert all(outcome.ok for outcome in outcomes), [outcome.message for outcome in outcomes if not outcome.ok][:1]
    cores = len(os.sched_getaffinity(0))
    return {"seconds": seconds, "at_work": sum(outcome.seconds for outcome in outcomes) / seconds, "cores": cores}


def measure_here(what: str, file: Path, cells: int) -> dict[str, Any]:
    """Take one measurement in this process, with its peak memory in GB (every child process counted as the largest)."""
    runs = {
        "ours": lambda: run_ours(file, stream=False),
        "stream": lambda: run_ours(file, stream=True),
        "geopandas": lambda: run_geopandas(file),
        "msgspec": lambda: run_msgspec(file),
        "tiles": lambda: run_tiles(file),
        "cohort": lambda: run_cohort_of_slides(file, max(1, cells // COHORT_SLIDES)),
    }
    result = runs[what]()
    result["cpu_s"] = sum(os.times()[:4])  # imports and helpers included
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    helpers = len(os.sched_getaffinity(0)) - 1
    peak += helpers * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {**result, "peak_gb": peak / (1 << 20)}


def measure(what: str, file: Path, cells: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", what, "--file", str(file), "--cells", str(cells)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def rows_of(best: dict[str, dict[str, Any]]) -> list[tuple[str, float, str, float]]:
    """Return the figures with "<=" or ">=" and their limits."""
    ours = best["ours"]["seconds"]
    cohort = best["cohort"]
    return [
        ("times as fast as geopandas and shapely", best["geopandas"]["seconds"] / ours, ">=", 5.0),
        ("seconds per second of msgspec alone", ours / best["msgspec"]["seconds"], "<=", 2.5),
        ("peak memory, GB", best["ours"]["peak_gb"], "<=", 5.0),
        ("peak memory with --stream, GB", best["stream"]["peak_gb"], "<=", 1.5),
        ("boxes of a random tile, us", best["tiles"]["us"], "<=", 30.0),
        ("slides of a cohort at work, per core", cohort["at_work"] / cohort["cores"], ">=", COHORT_SHARE),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure_here(options.one, options.file, options.cells)))
        return
    load = [os.getloadavg()[0]]
    best: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cells.geojson"
        write_cells(file, options.cells, 0)
        megabytes = file.stat().st_size / 1e6
        for _ in range(options.rounds):
            for what in ("ours", "geopandas", "msgspec", "stream"):
                result = measure(what, file, options.cells)
                print(
                    f"  {what:<10}{result['seconds']:8.2f} s  {result['cpu_s']:8.2f} s of CPU{result['peak_gb']:7.2f} GB",
                    flush=True,
                )
                if what not in best or result["seconds"] < best[what]["seconds"]:
                    best[what] = result
        for what in ("tiles", "cohort"):
            best[what] = measure(what, file, options.cells)
    load.append(os.getloadavg()[0])
    assert best["ours"]["boxes"] == best["geopandas"]["boxes"] == best["stream"]["boxes"], "the boxes differ in number"
    rows = rows_of(best)
    cpu = {what: result["cpu_s"] for what, result in best.items()}
    print(
        f"CPU: geopandas {cpu['geopandas'] / cpu['ours']:.2f} times ours, ours {cpu['ours'] / cpu['msgspec']:.2f} times msgspec"
    )
    print(
        f"{options.cells:,} cells, {megabytes:.0f} MB, {os.cpu_count()} cores, load {load[0]:.1f} before, {load[1]:.1f} after"
    )
    for name, value, sign, limit in rows:
        held = value <= limit if sign == "<=" else value >= limit
        print(f"{name:<42}{value:9.2f}  {sign} {limit:<6g}{'ok' if held else 'MISSED'}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        figures = {name: {"value": value, "limit": f"{sign} {limit:g}"} for name, value, sign, limit in rows}
        about = {"cells": options.cells, "megabytes": megabytes, "cores": os.cpu_count(), "load": load}
        options.json.write_text(json.dumps({**about, "figures": figures, "best": best}, indent=2) + "\n")


if __name__ == "__main__":
    main()
