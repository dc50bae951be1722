"""Speed of torch's attention kernels on this machine, unmasked and with the [OBJ] row's mask.

    python experiments/bench_kernels.py                                     # ViT-S/16 at 224 px with ten locals of 96 px
    python experiments/bench_kernels.py --batch 8 --device cpu              # to try it out

Forward and backward of scaled_dot_product_attention over the tokens of global and of local views, timed in turn (medians), each
kernel that takes the shape: torch's own choice first. The mask is what training makes: additive, one row of it, made once. What
masking costs is the masked figure against the quickest unmasked one: ODIS can come no closer to iBOT than that.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from odis_path.model.layers import additive
from odis_path.model.vit import attention_mask

KERNELS = {
    "torch's choice": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def attention(kernel: SDPBackend | None, images: int, heads: int, grid: int, device: str, masked: bool) -> Callable[[], None]:
    """Forward and backward over images x heads of 1 + grid^2 tokens of 64 values, bf16 on a GPU."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shape = (images, heads, 1 + grid**2, 64)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    inside = torch.rand(images, grid**2, device=device) < 0.3
    inside[:, 0] = True
    mask = additive(attention_mask(inside, 0), q) if masked else None

    def work() -> None:
        with nullcontext() if kernel is None else sdpa_kernel([kernel]):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out.sum().backward()

    return work


def seconds(work: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure(images: int, heads: int, grid: int, device: str, runs: int) -> dict[str, dict[str, float]]:
    """Median microseconds by kernel, unmasked and masked; a kernel that refuses the shape is left out."""
    works: dict[tuple[str, str], Callable[[], None]] = {}
    for name, kernel in KERNELS.items():
        for masked in (False, True):
            work = attention(kernel, images, heads, grid, device, masked)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch says at length why each kernel does not take a shape
                try:
                    work()
                except RuntimeError:
                    continue
            works[name, "masked" if masked else "unmasked"] = work
    spent: dict[tuple[str, str], list[float]] = {key: [] for key in works}
    for _ in range(runs):
        for key, work in works.items():
            spent[key].append(1e6 * seconds(work, device))
    microseconds: dict[str, dict[str, float]] = {}
    for (name, kind), values in spent.items():
        microseconds.setdefault(name, {})[kind] = statistics.median(values)
    return microseconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=256, help="tiles; two global views and --locals local ones of each")
    parser.add_argument("--locals", type=int, default=10)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{device}; {options.batch} tiles, {options.heads} heads; microseconds forward and backward")
    microseconds = {}
    for view, images, grid in (("global", 2 * options.batch, 14), ("local", options.locals * options.batch, 6)):
        microseconds[view] = measure(images, options.heads, grid, options.device, options.runs)
        least = min(row["unmasked"] for row in microseconds[view].values() if "unmasked" in row)
        for name, row in microseconds[view].items():
            cells = "".join(f"{kind:>10} {row[kind]:>9.0f} {row[kind] / least:>6.3f}" for kind in row)
            print(f"{view:<8}{1 + grid**2:>4} tokens  {name:<15}{cells}", flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        content = {"device": device, "batch": options.batch, "microseconds": microseconds}
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
