"""Scaling on paper: what loading, storage and a training step take, from measured terms, and which of them is first to limit.

    python experiments/scaling.py            # the tables of docs/scaling.md
    python experiments/scaling.py hours      # the table of docs/guide.md: hours for 100, 1,000 and 10,000 slides
    python experiments/scaling.py paper      # the table of experiments/paper_in1k.md
    python experiments/scaling.py --full-step-ms 180 --loader-us 500     # with your own terms

Nothing here is timed: every term is a field of `Terms`, with where it comes from. Put in those of your machine: bench_train.py
measures the step, bench_loader.py and bench_open.py the loader.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from math import floor, inf, log10
from typing import Any

HOUR_S, MEGA = 3600.0, 1e6


def term(value: float, unit: str, where: str, source: str) -> Any:
    """A field of `Terms`: its value, unit, where it was measured (GPU, CPU, ...) and the source of it."""
    return field(default=value, metadata={"unit": unit, "where": where, "source": source})


@dataclass(frozen=True)
class Terms:
    """What the tables are made of.

    GPU: one H200, ViT-S/16 at 224 px, ten local views of 96 px, bf16. CPU: one core of a machine of two.
    """

    full_step_ms: float = term(153, "ms", "GPU", "a step of 256 tiles, with loading (results)")
    full_step_tiles: float = term(256, "tiles", "GPU", "that step")
    least_step_ms: float = term(94, "ms", "GPU", "a step of 128 tiles, which waits for Python (results)")
    full_step_gib: float = term(33, "GiB", "GPU", "its peak memory (results)")
    workers_per_gpu: float = term(12, "", "GPU", "loader workers in that run, on 16 cores")
    loader_us: float = term(763, "µs", "CPU", "a stored tile of 256 px through one worker: 1,310 tiles/s (results)")
    decode_us: float = term(214, "µs", "CPU", "reading and decoding in it (`results/loader.json`)")
    opening_us: float = term(9110, "µs", "CPU", "opening a slide file of 10,000 tiles, 8 boxes each (results)")
    opening_mb: float = term(3.58, "MB", "CPU", "what that reads (results)")
    files_open: float = term(512, "", "code", "slide files that a worker keeps open, where `ulimit -n` is 2,048 or more")
    held_mb: float = term(1.48, "MB", "code", "of such a file in memory: its boxes, offsets and checksums")
    jpeg_mpx_s: float = term(100, "Mpx/s", "CPU", "level 0 read at exactly half the scale, JPEG (results)")
    fractional_mpx_s: float = term(56, "Mpx/s", "CPU", "the same at 0.2431 to 0.5 µm (results)")
    jp2_mpx_s: float = term(14, "Mpx/s", "CPU", "the same, JPEG 2000 (results)")
    encode_us: float = term(352, "µs", "CPU", "coding and writing a tile of 256 px (`results/tiling.json`)")
    propose_us: float = term(80_600, "µs", "CPU", "`propose`, a tile of 256 px (results)")
    embed_us: float = term(132_000, "µs", "CPU", "`embed`, ViT-S/16 at 224 px, a tile (results)")
    annotate_us: float = term(10.7, "µs", "CPU", "`annotate`, an outline of 20 vertices (results)")
    tile_kb: float = term(30.1, "kB", "data", "a stored tile of 256 px of two real slides (results)")
    gradient_mb: float = term(117.1, "MB", "arithmetic", "29.27 million parameters of student and head in float32")
    order_bytes: float = term(16, "bytes", "code", "a tile of a rank's index (8) and of the order of its epoch (8)")
    inside_gb_s: float = term(450, "GB/s", "data sheet", "NVLink of one GPU, one direction: not measured here")
    between_gb_s: float = term(50, "GB/s", "assumed", "400 Gbit/s a GPU between machines: not measured here")
    gpus_a_machine: float = term(8, "", "assumed", "joined by NVLink")
    cores_a_machine: float = term(16, "", "assumed", "what tiles, clips, proposes")
    tiles_a_slide: float = term(10_000, "tiles", "assumed", "256 px at 0.5 µm: 164 mm² of tissue")
    objects_a_tile: float = term(8, "", "assumed", "outlines to clip")
    level0_mpp: float = term(0.25, "µm", "assumed", "of the slides; tiles are 256 px at 0.5")


@dataclass(frozen=True)
class Model:
    """A vision transformer's shape; 16-px patches."""

    name: str
    dim: int
    depth: int

    def macs(self, side_px: int) -> float:
        """Multiply-adds of the blocks for one view of `side_px`."""
        tokens = 1 + (side_px // 16) ** 2
        return self.depth * (12 * self.dim**2 * tokens + 2 * self.dim * tokens**2)

    @property
    def step_macs(self) -> float:
        """Multiply-adds of a tile: teacher on two views of 224 px; student, 3 x with backward, on those and ten of 96 px."""
        return 2 * self.macs(224) + 3 * (2 * self.macs(224) + 10 * self.macs(96))


SMALL, BASE, LARGE = Model("ViT-S/16", 384, 12), Model("ViT-B/16", 768, 12), Model("ViT-L/16", 1024, 24)


@dataclass(frozen=True)
class Step:
    """One optimisation step: milliseconds of what runs side by side, and of the gradients' sum if nothing hides it."""

    gpu_ms: float
    python_ms: float
    loader_ms: float
    gradients_ms: float

    @property
    def ms(self) -> float:
        """The slowest of what runs side by side, then the gradients."""
        return max(self.gpu_ms, self.python_ms, self.loader_ms) + self.gradients_ms

    @property
    def first_limit(self) -> str:
        """What the step waits for."""
        side_by_side = {"GPU": self.gpu_ms, "Python": self.python_ms, "loader": self.loader_ms, "gradients": self.gradients_ms}
        return max(side_by_side, key=lambda name: side_by_side[name])


def loader_us(terms: Terms, slides: float) -> float:
    """CPU microseconds of a worker for a stored tile; tiles of slides beyond those kept open pay for opening one."""
    return terms.loader_us + opened_share(terms, slides) * terms.opening_us


def opened_share(terms: Terms, slides: float) -> float:
    """Share of tiles, drawn at random over all slides, whose file has to be opened first."""
    return max(0.0, 1 - terms.files_open / slides)


def gradients_ms(terms: Terms, gpus: int, model: Model = SMALL) -> float:
    """Milliseconds of a ring all-reduce of the gradients; the slowest link counts."""
    link = terms.inside_gb_s if gpus <= terms.gpus_a_machine else terms.between_gb_s
    megabytes = terms.gradient_mb * (model.depth * model.dim**2) / (SMALL.depth * SMALL.dim**2)
    return 2 * (gpus - 1) / gpus * megabytes / link


def step(terms: Terms, gpus: int, batch: int, slides: float, model: Model = SMALL) -> Step:
    """A step of `batch` tiles over all GPUs, in micro-batches of at most 256 tiles a GPU."""
    tiles = batch / gpus
    passes = -(-tiles // terms.full_step_tiles)
    return Step(
        gpu_ms=terms.full_step_ms * tiles / terms.full_step_tiles * model.step_macs / SMALL.step_macs,
        python_ms=terms.least_step_ms * passes * model.depth / SMALL.depth,
        loader_ms=tiles * loader_us(terms, slides) / terms.workers_per_gpu / 1e3,
        gradients_ms=gradients_ms(terms, gpus, model),
    )


def epoch_hours(terms: Terms, tiles: float, gpus: int, batch: int, slides: float, model: Model = SMALL) -> float:
    """Hours of one epoch; tiles that fill no whole batch are left out."""
    return tiles // batch * step(terms, gpus, batch, slides, model).ms / 1e3 / HOUR_S


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def short(value: float) -> str:
    """Three significant digits, thousands with commas."""
    if value == 0:
        return "0"
    digits = 2 - floor(log10(abs(value)))
    return f"{round(value, digits):,.{max(digits, 0)}f}"


UNITS = ((1 / 60, "s", 1 / HOUR_S), (1, "min", 1 / 60), (48, "h", 1.0), (inf, "days", 24.0))  # below so many hours


def duration(hours: float) -> str:
    """Seconds, minutes, hours or days, whichever reads best."""
    value, unit = next((hours / size, unit) for most, unit, size in UNITS if hours < most)
    return f"{value:,.0f} {unit}" if value >= 9.95 else f"{value:.1f} {unit}"


def of_terms(terms: Terms) -> str:
    """Every term: value, where it is from."""
    rows = [
        [f"`{f.name}`", f"{getattr(terms, f.name):,g} {f.metadata['unit']}".strip(), f.metadata["where"], f.metadata["source"]]
        for f in fields(terms)
    ]
    return table(["term", "value", "from", "what it is"], rows)


COHORTS = (1e6, 1e8)  # tiles
GPUS = (1, 8, 64)


def of_steps(terms: Terms) -> str:
    """Step time by cohort, GPUs and batch, the time of an epoch, and what limits."""
    rows = []
    for tiles in COHORTS:
        slides = tiles / terms.tiles_a_slide
        for gpus in GPUS:
            for batch in sorted({int(terms.full_step_tiles) * gpus, 1024}):
                one = step(terms, gpus, batch, slides)
                parts = (one.gpu_ms, one.python_ms, one.loader_ms, one.gradients_ms, one.ms)
                hours = epoch_hours(terms, tiles, gpus, batch, slides)
                rate = batch / one.ms * 1e3
                names = [f"{tiles / MEGA:,.0f} M", str(gpus), f"{batch:,}"]
                rows.append([*names, *map(short, parts), short(rate), short(hours), one.first_limit])
    parts_ms = ["GPU ms", "Python ms", "loader ms", "gradients ms", "step ms"]
    head = ["tiles", "GPUs", "batch", *parts_ms, "tiles/s", "an epoch, hours", "limit"]
    return table(head, rows)


def memory_gb(terms: Terms, tiles: float, ranks: int) -> float:
    """Memory of a machine: index and order of each rank, and the slide files that its workers keep open."""
    files = min(terms.files_open, tiles / terms.tiles_a_slide)
    return ranks * (tiles * terms.order_bytes / 1e9 + terms.workers_per_gpu * files * terms.held_mb / 1e3)


def of_storage(terms: Terms) -> str:
    """What is stored, and at 256 tiles a GPU what is read a second, for tiles and for opening their files; memory."""
    rows = []
    for tiles in COHORTS:
        slides = tiles / terms.tiles_a_slide
        for gpus in GPUS:
            batch = int(terms.full_step_tiles) * gpus
            rate, ranks = batch / step(terms, gpus, batch, slides).ms * 1e3, min(gpus, int(terms.gpus_a_machine))
            opening_mb_s = rate * opened_share(terms, slides) * terms.opening_mb
            memory = memory_gb(terms, tiles, ranks)
            figures = (tiles * terms.tile_kb / 1e6, rate, rate * terms.tile_kb / 1e3, opening_mb_s, memory)
            rows.append([f"{tiles / MEGA:,.0f} M", str(gpus), *map(short, figures)])
    return table(["tiles", "GPUs", "stored GB", "tiles/s", "MB/s of tiles", "MB/s of opening", "memory, GB a machine"], rows)


def of_sources(terms: Terms) -> str:
    """Where a worker gets tiles from: its time, and the cores that keep one GPU busy."""
    side_l0 = 256 * 0.5 / terms.level0_mpp
    drawing_us = terms.loader_us - terms.decode_us
    costs = {
        "stored pixels": terms.loader_us,
        f"stored pixels, {COHORTS[1] / terms.tiles_a_slide:,.0f} slides": loader_us(terms, COHORTS[1] / terms.tiles_a_slide),
        "JPEG slides at half scale": drawing_us + side_l0**2 / terms.jpeg_mpx_s,
        "JPEG slides, 0.2431 µm": drawing_us + 526.5**2 / terms.fractional_mpx_s,
        "JPEG 2000 slides": drawing_us + side_l0**2 / terms.jp2_mpx_s,
    }
    need = terms.full_step_tiles / terms.full_step_ms * 1e3
    rows = [[name, short(us), short(1e6 / us), short(need * us / 1e6)] for name, us in costs.items()]
    return table(["tiles from", "µs a tile", "tiles/s a worker", "workers for one GPU"], rows)


def tile_core_us(terms: Terms, mpx_s: float) -> float:
    """CPU microseconds to cut and store a tile of 256 px at 0.5 µm."""
    return (256 * 0.5 / terms.level0_mpp) ** 2 / mpx_s + terms.encode_us


def of_hours(terms: Terms) -> str:
    """Time that each command takes for 100, 1,000 and 10,000 slides."""
    cores = f"{terms.cores_a_machine:.0f} cores"
    core_us = {
        "`tile`, JPEG slides": tile_core_us(terms, terms.jpeg_mpx_s),
        "`tile`, JPEG 2000 slides": tile_core_us(terms, terms.jp2_mpx_s),
        "`annotate`": terms.annotate_us * terms.objects_a_tile,
        "`propose`": terms.propose_us,
        "`embed`, without a GPU": terms.embed_us,
    }
    gpu_us = terms.full_step_ms * 1e3 / terms.full_step_tiles
    costs = [(name, cores, us / terms.cores_a_machine) for name, us in core_us.items()]
    costs += [("`embed`, at most", "1 GPU", gpu_us), ("`pretrain`, an epoch", "1 GPU", gpu_us)]
    cohorts = [slides * terms.tiles_a_slide for slides in (100, 1_000, 10_000)]
    rows = [[name, machine, *(duration(tiles * us / MEGA / HOUR_S) for tiles in cohorts)] for name, machine, us in costs]
    rows.append(["`pretrain`, 100 million tiles seen", "1 GPU", *[duration(1e8 * gpu_us / MEGA / HOUR_S)] * len(cohorts)])
    return table(["command", "on", "100 slides", "1,000 slides", "10,000 slides"], rows)


@dataclass(frozen=True)
class PaperRun:
    """A run of experiments/paper_in1k.md."""

    recipes: str
    model: Model
    data: str
    images: int
    epochs: int


IMAGENET, COCO = 1_281_167, 118_287
PAPER = (
    PaperRun("`dino_in1k`, `ibot_in1k`, `odis_in1k`, each", SMALL, "ImageNet", IMAGENET, 800),
    PaperRun("`ibot_in1k`, `odis_in1k`, each", BASE, "ImageNet", IMAGENET, 400),
    PaperRun("`ibot_in1k`, `odis_in1k`, each", LARGE, "ImageNet", IMAGENET, 250),
    PaperRun("`ibot_in1k`, `odis_in1k`, each", SMALL, "COCO", COCO, 800),
)


def of_paper(terms: Terms) -> str:
    """Expected cost of the paper's runs on 8 GPUs at batch 1,024; one file per 1,000 images."""
    rows = []
    for run in PAPER:
        gpus, batch, files = 8, 1024, run.images / 1000
        one = step(terms, gpus, batch, files, run.model)
        hours = run.epochs * epoch_hours(terms, run.images, gpus, batch, files, run.model)
        width = run.model.dim * run.model.depth / (SMALL.dim * SMALL.depth)
        memory = terms.full_step_gib * batch / gpus / terms.full_step_tiles * width
        figures = [short(one.ms), one.first_limit, short(memory), short(hours), short(hours * gpus)]
        rows.append([run.recipes, run.model.name, run.data, str(run.epochs), *figures])
    head = ["recipes", "model", "on", "epochs", "step ms", "limit", "GiB a GPU", "hours", "GPU hours"]
    return table(head, rows)


PARTS: dict[str, tuple[Callable[[Terms], str], ...]] = {
    "scaling": (of_terms, of_steps, of_storage, of_sources),
    "hours": (of_hours,),
    "paper": (of_paper,),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", default="scaling", choices=PARTS)
    for f in fields(Terms):
        about = f"{f.metadata['source']} [{f.default:g} {f.metadata['unit']}; {f.metadata['where']}]".strip()
        parser.add_argument(f"--{f.name.replace('_', '-')}", type=float, default=f.default, help=about.replace("%", "%%"))
    options = vars(parser.parse_args())
    part = PARTS[options.pop("part")]
    terms = Terms(**options)
    print("\n\n".join(make(terms) for make in part))


if __name__ == "__main__":
    main()
