"""Cost of object-level training: against iBOT, free crops and the network alone, and for K objects a tile.

    python experiments/bench_train.py --json experiments/results/train.json            # CPU size on a CPU, ViT-S/16 on a GPU
    python experiments/bench_train.py --model vit_small_patch16_224 --global-px 224    # any size anywhere

Five parts, each a ratio of two things timed in turn in the same process (medians):
  step       a whole optimisation step of ODIS / of iBOT, on the same tiles and crop sizes            limit 1.01
  sampling   a tile's object-aware crops, from reading to cut pixels / its free crops                 limit 1.05
  floor      a step with loading, views, losses, optimizer, EMA / the networks' forward and backward  limit 1.25 (GPU 1.10)
  objects    K read-only objects a tile / one, in training and in embedding; beside the token count   limit 1.10 x tokens
  attention  the row mask / [OBJ] attention apart from the patches', of one block
The tiles are generated. On a GPU also: images a second, share of time waiting for data, model FLOP/s and the share of what
a large matrix product reaches.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from odis_path.config import PretrainConfig
from odis_path.data.dataset import TileSamples
from odis_path.data.sampler import Batch, StepSampler, collate, next_batch
from odis_path.distributed import Ranks, start_ranks
from odis_path.model.layers import additive, attention_kernels
from odis_path.model.network import Views
from odis_path.model.vit import attention_mask, build_encoder
from odis_path.training.compile import compiles
from odis_path.training.log.meter import StepMeter
from odis_path.training.log.rows import Row
from odis_path.training.optim import set_schedule, step_values
from odis_path.training.setup import Run, batch_loader, prepare
from odis_path.training.step import apply_gradients, forward_backward, make_views, train_step
from tiling.slide_file.write import SlideMeta, write_slide_file
from tiling.wsi.codec import encode_jpeg


def write_tiles(folder: Path, count: int, side: int, boxes: int) -> Path:
    """A slide file of textured tiles with `boxes` boxes each, a quarter to three quarters of a side wide."""
    rng = np.random.default_rng(0)
    coarse = rng.uniform(60, 230, (count, side // 8, side // 8, 3)).repeat(8, 1).repeat(8, 2)
    pixels = [encode_jpeg(np.clip(tile + rng.normal(0, 12, tile.shape), 0, 255).astype(np.uint8)) for tile in coarse]
    size = rng.uniform(side / 4, side * 3 / 4, (count * boxes, 2))
    corner = rng.uniform(0, 1, size.shape) * (side - size)
    columns = int(np.ceil(np.sqrt(count)))
    coords = np.array([(i % columns * side, i // columns * side) for i in range(count)], dtype=np.int64)
    meta = SlideMeta(
        slide_id="bench",
        source=folder / "bench.png",
        width_l0=columns * side,
        height_l0=columns * side,
        mpp=0.5,
        mpp_level0=0.5,
        patch_px=side,
        patient_id="none",
    )
    meta.source.touch()
    rows = count * boxes
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
            "offsets": np.arange(0, rows + 1, boxes, dtype=np.int64),
            "object": np.arange(rows, dtype=np.int32),
            "visible": np.ones(rows, np.float32),
        },
    }
    write_slide_file(folder / "bench.h5", meta=meta, coords=coords, pixels=pixels, groups=groups)
    return folder


COMPILE: dict[str, Any] = {"auto": "auto", "on": True, "off": False}


class Bench:
    """Runs of several configurations on the same tiles, and fair timing of any of their parts."""

    def __init__(self, options: argparse.Namespace, folder: Path, ranks: Ranks) -> None:
        self.options, self.folder, self.ranks = options, folder, ranks

    def config(self, **sections: dict[str, Any]) -> PretrainConfig:
        """The benchmark's sizes with some keys replaced."""
        options = self.options
        values: dict[str, Any] = {
            "data": {"tiles": str(self.folder), "holdout": 0.0, "workers": options.workers},
            "views": {"global_size": options.global_px, "local_size": options.local_px, "local_count": options.locals},
            "model": {
                "name": options.model,
                "kwargs": {"img_size": options.global_px},
                "compile_blocks": COMPILE[options.compile],
            },
            "head": {"out_dim": options.prototypes},
            "optim": {"batch_size": options.batch, "epochs": 1000, "warmup_epochs": 0},
            "run": {"out": str(self.folder / "run"), "device": str(self.ranks.device)},
        }
        for name, keys in sections.items():
            values[name] = {**values.get(name, {}), **keys}
        return PretrainConfig.model_validate(values)

    def prepare(self, **sections: dict[str, Any]) -> tuple[Run, Batch]:
        """A run and one collated batch of it."""
        config = self.config(**sections)
        run = prepare(config, self.ranks)
        samples = TileSamples(run.train, config, run.student.encoder.patch_px)
        sampler = StepSampler(len(run.train), config.optim.batch_size, seed=0, first_step=0, last_step=1, rank=0, world=1)
        return run, collate([samples[key] for key in next(iter(sampler))])

    def ratio(self, first: Callable[[], object], second: Callable[[], object], runs: int) -> tuple[float, float, float]:
        """Median seconds of both, timed in turn, and the median of the ratios of neighbours."""
        one, other = [], []
        for turn in range(runs + 2):
            pair = [self.seconds(work) for work in ((first, second) if turn % 2 else (second, first))]
            if turn >= 2:  # the first calls warm up
                one.append(pair[0 if turn % 2 else 1])
                other.append(pair[1 if turn % 2 else 0])
        return (
            statistics.median(one),
            statistics.median(other),
            statistics.median(a / b for a, b in zip(one, other, strict=True)),
        )

    def seconds(self, work: Callable[[], object]) -> float:
        self.wait()
        begin = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - begin

    def wait(self) -> None:
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()


def whole_step(run: Run, batch: Batch) -> Callable[[], None]:
    """A step as training does it, without loading."""
    values = step_values(run.config, 0, run.steps_per_epoch, run.total_steps)
    set_schedule(run.optimizer, values)

    def work() -> None:
        run.optimizer.zero_grad(set_to_none=True)
        forward_backward(run, batch, values, last=True)
        apply_gradients(run, values)

    return work


def networks_alone(run: Run, batch: Batch) -> Callable[[], None]:
    """Forward of teacher and student and backward of the student, on views that are there already."""
    with torch.no_grad():
        views: Views = make_views(batch, run.config, run.ranks.device, compiled=run.compiled)
    bf16 = run.ranks.device.type == "cuda"

    def work() -> None:
        run.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(run.ranks.device.type, torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                run.teacher(views, with_locals=False, mask_patches=False, patches=True)
            out = run.wrapped(views, with_locals=True, mask_patches=True, patches=True)
        (out.obj.float().mean() + out.patches.float().sum()).backward()

    return work


def bench_step(bench: Bench) -> dict[str, Any]:
    """ODIS against iBOT, on one batch: the same crops, colours and hidden patches, of which the heads see as many."""
    odis, batch = bench.prepare()
    ibot, _ = bench.prepare(target={"crop": False, "mask": False})
    odis_s, ibot_s, ratio = bench.ratio(whole_step(odis, batch), whole_step(ibot, batch), bench.options.runs)
    return {"odis_ms": 1e3 * odis_s, "ibot_ms": 1e3 * ibot_s, "ratio": ratio, "limit": 1.01}


def bench_sampling(bench: Bench) -> dict[str, Any]:
    """Per tile: reading, drawing crops and masks, cutting them (limit), and beside it drawing alone (geometry, no pixels)."""
    figures: dict[str, Any] = {}
    samples = []
    for target in ({}, {"crop": False, "mask": False}):
        config = bench.config(target=target)
        run = prepare(config, bench.ranks)
        samples.append(TileSamples(run.train, config, run.student.encoder.patch_px))
    rows = [(0, i) for i in range(min(64, len(samples[0])))]

    def draw(dataset: TileSamples) -> None:
        for epoch, i in rows:
            dataset.sample_views(np.random.default_rng([0, epoch, i]), dataset.files[0], 0, i)

    def crop(dataset: TileSamples) -> None:
        with torch.no_grad():
            make_views(collate([dataset[key] for key in rows]), dataset.config, bench.ranks.device)

    for name, work in (("crop", crop), ("draw", draw)):
        aware, free, ratio = bench.ratio(partial(work, samples[0]), partial(work, samples[1]), 2 * bench.options.runs)
        figures[name] = {"aware_us": 1e6 * aware / len(rows), "free_us": 1e6 * free / len(rows), "ratio": ratio}
    return {"whole": {**figures["crop"], "limit": 1.05}, "drawing alone": figures["draw"]}


def bench_floor(bench: Bench) -> dict[str, Any]:
    """Real training steps with the loader running, against the networks alone, in alternating stretches.

    While the networks run alone the loader fills its queue; as many steps are taken uncounted before each stretch.
    """
    gpu = bench.ranks.device.type == "cuda"
    stretch, rounds = (10, max(2, bench.options.runs // 8)) if gpu else (1, bench.options.runs)
    run, batch = bench.prepare()
    run.total_steps = 10**9
    alone = networks_alone(run, batch)
    batches, meter = iter(batch_loader(run)), StepMeter(run.config.optim.batch_size, run.ranks)
    queue = 2 * bench.options.workers

    def steps(count: int) -> Row:
        meter.restart()
        for _ in range(count):
            values = step_values(run.config, run.step, run.steps_per_epoch, run.total_steps)
            with meter.waiting():
                micro_batches = [next_batch(batches)]
            meter.count(micro_batches)
            figures = train_step(run, micro_batches, values)
            run.step += 1
        row = meter.figures(figures, values)
        bench.wait()
        return row

    steps(2 * stretch)
    whole, floor, waits = [], [], []
    for _ in range(rounds):
        steps(-(-queue // stretch) * stretch)
        begin = time.perf_counter()
        waits.append(steps(stretch)["data_wait_share"])
        whole.append((time.perf_counter() - begin) / stretch)
        floor.append(bench.seconds(lambda: [alone() for _ in range(stretch)]) / stretch)
    step = statistics.median(whole)
    figures = {
        "step_ms": 1e3 * step,
        "floor_ms": 1e3 * statistics.median(floor),
        "ratio": statistics.median(a / b for a, b in zip(whole, floor, strict=True)),
        "limit": 1.10 if gpu else 1.25,
        "images_per_s": run.config.optim.batch_size / step,
        "data_wait_share": statistics.median(waits),
    }
    if gpu:
        tflops = count_flops(alone) / step / 1e12
        peak = matrix_tflops()
        figures |= {"model_tflops_per_s": tflops, "matrix_tflops_per_s": peak, "utilisation": tflops / peak}
    return figures


def count_flops(work: Callable[[], None]) -> int:
    """Operations of the matrix products and attention of `work`; uncompiled, since counting would spoil compiled code."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def matrix_tflops(side: int = 8192) -> float:
    """What the GPU does in a large bf16 matrix product, the limit that utilisation is a share of."""
    a, b = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds: list[float] = []
    for _ in range(8):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        a @ b
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return 2 * side**3 / statistics.median(seconds) / 1e12


def bench_objects(bench: Bench) -> dict[str, Any]:
    """K read-only objects in one pass over a batch, against one; the share that the token count alone costs beside it."""
    options, figures = bench.options, {}
    encoder = build_encoder(options.model, {"img_size": options.global_px}, read_only=True).to(bench.ranks.device)
    grid = options.global_px // encoder.patch_px
    patches = grid * grid
    images = torch.randn(options.batch, 3, options.global_px, options.global_px, device=bench.ranks.device)
    generator = torch.Generator().manual_seed(0)

    def passes(objects: int, train: bool) -> Callable[[], None]:
        mask = (torch.rand(options.batch, objects, patches, generator=generator) < 0.3).to(images.device)
        mask[:, :, 0] = True

        def work() -> None:
            with torch.autocast(images.device.type, torch.bfloat16, enabled=images.device.type == "cuda"):
                if not train:
                    with torch.inference_mode():
                        encoder(images, mask)
                    return
                tokens = encoder(images, mask)
            (tokens.obj.float().mean() + tokens.patches.float().mean()).backward()
            encoder.zero_grad(set_to_none=True)

        return work

    for objects in (4, 16, 64):
        tokens = (objects + encoder.registers + patches) / (1 + encoder.registers + patches)
        for name, train in (("training", True), ("embedding", False)):
            encoder.train(train)
            _, _, ratio = bench.ratio(passes(objects, train), passes(1, train), options.runs)
            figures[f"{name} K={objects}"] = {
                "ratio": ratio,
                "tokens": tokens,
                "limit": 1.10 * tokens,
                "separate_passes": objects,
            }
    return figures


def bench_attention(bench: Bench) -> dict[str, Any]:
    """One block's attention with the row mask, against patches unmasked and [OBJ] apart: the same result, which is dearer?"""
    options = bench.options
    views = (
        ("global", options.global_px, options.batch),
        ("local", options.local_px, options.batch * max(1, options.locals // 2)),
    )
    return {name: attention_both_ways(bench, side, images) for name, side, images in views}


def attention_both_ways(bench: Bench, side_px: int, images: int) -> dict[str, float]:
    """Forward and backward in both forms, compiled where training is."""
    import torch.nn.functional as F

    encoder = build_encoder(bench.options.model, {"img_size": side_px}).to(bench.ranks.device)
    vit: Any = encoder.vit
    attention = vit.blocks[0].attn
    patches = (side_px // encoder.patch_px) ** 2
    x = torch.randn(images, 1 + patches, encoder.embed_dim, device=bench.ranks.device, requires_grad=True)
    inside = torch.rand(images, patches, device=x.device) < 0.3
    inside[:, 0] = True
    heads, bf16 = attention.num_heads, x.device.type == "cuda"
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        mask = additive(attention_mask(inside, 0), x)

    def masked(x: Tensor) -> Tensor:
        out: Tensor = attention(x, attn_mask=mask)
        return out

    def split(x: Tensor) -> Tensor:
        q, k, v = attention.qkv(x).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        obj = F.scaled_dot_product_attention(q[:, :, :1], k, v, attn_mask=mask[:, :, :1])
        others = F.scaled_dot_product_attention(q[:, :, 1:], k, v)
        out: Tensor = attention.proj(torch.cat([obj, others], 2).transpose(1, 2).flatten(2))
        return out

    def both_ways(forward: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        if compiles(bench.config(), bench.ranks):
            forward = torch.compile(forward, dynamic=False)

        def work() -> None:
            with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16), attention_kernels(x):
                out = forward(x)
            out.float().sum().backward()

        return work

    with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        assert torch.allclose(masked(x), split(x), atol=3e-2 if bf16 else 1e-4)
    row, apart, ratio = bench.ratio(both_ways(masked), both_ways(split), 4 * bench.options.runs)
    return {"row_mask_ms": 1e3 * row, "split_ms": 1e3 * apart, "ratio": ratio}


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "step": bench_step,
    "sampling": bench_sampling,
    "floor": bench_floor,
    "objects": bench_objects,
    "attention": bench_attention,
}


def print_part(name: str, figures: dict[str, Any]) -> None:
    """One line a ratio."""
    rows = {name: figures} if "ratio" in figures else {f"{name}, {key}": value for key, value in figures.items()}
    for title, row in rows.items():
        limit = f"  limit {row['limit']:.2f} {'ok' if row['ratio'] <= row['limit'] else 'MISSED'}" if "limit" in row else ""
        values = ", ".join(f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, float) and k not in ("ratio", "limit"))
        print(f"{title:<26} {row['ratio']:.3f}{limit}  ({values})", flush=True)


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of: " + ", ".join(PARTS))
    parser.add_argument("--model", default="vit_small_patch16_224" if gpu else "vit_tiny_patch16_224")
    parser.add_argument("--global-px", type=int, default=224 if gpu else 128)
    parser.add_argument("--local-px", type=int, default=96 if gpu else 64)
    parser.add_argument("--locals", type=int, default=10 if gpu else 4)
    parser.add_argument("--batch", type=int, default=256 if gpu else 16)
    parser.add_argument("--prototypes", type=int, default=8192 if gpu else 1024)
    parser.add_argument("--tile-px", type=int, default=256)
    parser.add_argument("--workers", type=int, default=12 if gpu else 1)
    parser.add_argument("--runs", type=int, default=30 if gpu else 15)
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto", help="auto: on a GPU")
    options = parser.parse_args()
    ranks = start_ranks("auto")
    device = torch.cuda.get_device_name() if gpu else f"CPU, {os.cpu_count()} cores"
    views = f"{options.global_px} px, {options.locals} locals of {options.local_px} px"
    print(f"{device}; {options.model}, {views}, batch {options.batch}")
    figures: dict[str, Any] = {"device": device, "settings": {k: v for k, v in vars(options).items() if k != "json"}}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, write_tiles(Path(folder), 8 * options.batch, options.tile_px, 8), ranks)
        for name in options.parts.split(","):
            figures[name] = PARTS[name](bench)
            print_part(name, figures[name])
            if options.json:  # after every part: a machine may be lent for a limited time
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
