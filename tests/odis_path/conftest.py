"""Tiny slide files and a tiny configuration for the learning tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from odis_path.config import PretrainConfig
from odis_path.data.dataset import TileSample
from odis_path.data.sampler import next_batch
from odis_path.training.optim import step_values
from odis_path.training.setup import Run, batch_loader
from odis_path.training.step import train_step
from tiling.slide_file.write import SlideMeta, write_slide_file
from tiling.wsi.codec import encode_jpeg

SIDE = 64
LABELS = ["stripes", "dots"]


def draw_tile(rng: np.random.Generator, label: int) -> np.ndarray:
    """A tile whose class is its texture: stripes or dots."""
    y, x = np.mgrid[:SIDE, :SIDE]
    wave = np.sin((x + y) / 3.0) if label == 0 else np.sin(x / 2.0) * np.sin(y / 2.0)
    tile = 160 + 50 * wave[:, :, None] + rng.normal(0, 8, (SIDE, SIDE, 3)) + rng.uniform(-20, 20, 3)
    return np.clip(tile, 0, 255).astype(np.uint8)


def write_tiny_slide(folder: Path, name: str, patient: str, tiles: int, seed: int, *, polygons: bool = True) -> Path:
    """A slide file with one tissue box and one small cell box in each tile; outlines are the diamonds in the boxes."""
    rng = np.random.default_rng(seed)
    columns = 4
    coords = np.array([(i % columns * SIDE, i // columns * SIDE) for i in range(tiles)], dtype=np.int64)
    labels = (np.arange(tiles) % 2).astype(np.int16)
    pixels = [encode_jpeg(draw_tile(rng, int(label))) for label in labels]
    corner = rng.uniform(4, 30, (tiles, 2))
    tissue = np.concatenate([np.zeros((tiles, 2)), np.full((tiles, 2), SIDE)], axis=1)
    cell = np.concatenate([corner, corner + rng.uniform(8, 24, (tiles, 2))], axis=1)
    xyxy = np.stack([tissue, cell], axis=1).reshape(-1, 4).astype(np.float32)
    area = (xyxy[:, 2] - xyxy[:, 0]) * (xyxy[:, 3] - xyxy[:, 1]) * 0.25
    meta = SlideMeta(
        slide_id=name,
        source=folder / f"{name}.png",
        width_l0=columns * SIDE,
        height_l0=-(-tiles // columns) * SIDE,
        mpp=0.5,
        mpp_level0=0.5,
        patch_px=SIDE,
        patient_id=patient,
    )
    path = folder / f"{name}.h5"
    x0, y0, x1, y1 = xyxy.T
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    diamonds = np.stack([np.stack([x, y0], 1), np.stack([x1, y], 1), np.stack([x, y1], 1), np.stack([x0, y], 1)], axis=1)
    rings = np.arange(2 * tiles + 1, dtype=np.int64)
    outlines = {"polygon": {"xy": diamonds.reshape(-1, 2), "ring_offsets": 4 * rings, "offsets": rings}}
    meta.source.touch()
    groups: dict[str, Any] = {
        "objects": {
            "id": [f"{name}-{i}" for i in range(2 * tiles)],
            "label": np.repeat(labels, 2),
            "kind": np.tile([0, 1], tiles).astype(np.uint8),
            "area_um2": area.astype(np.float32),
            "attrs": {"labels": LABELS},
        },
        "boxes": {
            "xyxy": xyxy,
            "offsets": np.arange(0, 2 * tiles + 1, 2, dtype=np.int64),
            "object": np.arange(2 * tiles, dtype=np.int32),
            "visible": np.ones(2 * tiles, dtype=np.float32),
            **(outlines if polygons else {}),
        },
    }
    write_slide_file(path, meta=meta, coords=coords, pixels=pixels, groups=groups)
    return path


@pytest.fixture(scope="session")
def tiny_tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six slides of three patients, twelve tiles each."""
    folder = tmp_path_factory.mktemp("tiles")
    for number in range(6):
        write_tiny_slide(folder, f"S{number}", f"P{number // 2}", 12, number)
    return folder


def tiny_values(tiles: Path | str, out: Path | str, **sections: dict[str, Any]) -> dict[str, Any]:
    """A configuration of a model of width 32 and depth 2, as a plain dict; `sections` replace single keys."""
    values: dict[str, Any] = {
        "data": {"tiles": str(tiles), "workers": 0, "holdout": 0.34},
        "views": {
            "global_size": 32,
            "local_count": 2,
            "local_size": 16,
            "turns": "dihedral",
            "stain_p": 0.5,
            "stain_scale": 0.2,
        },
        "model": {
            "name": "vit_tiny_patch16_224",
            "drop_path": 0.1,
            "kwargs": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
        },
        "head": {"out_dim": 64, "hidden_dim": 32, "bottleneck_dim": 16},
        "optim": {"batch_size": 8, "epochs": 2, "warmup_epochs": 0.5, "freeze_last_layer_epochs": 0.5},
        "eval": {"every_epochs": 1, "k": 5},
        "run": {"out": str(out), "log_every_steps": 1, "device": "cpu"},
    }
    for name, keys in sections.items():
        values[name] = {**values.get(name, {}), **keys}
    return values


def tiny_config(tiles: Path | str, out: Path | str, **sections: dict[str, Any]) -> PretrainConfig:
    """The same, checked."""
    return PretrainConfig.model_validate(tiny_values(tiles, out, **sections))


def assert_same_sample(a: TileSample, b: TileSample, *, pixels: bool = True) -> None:
    """Two samples are equal in every field, or in all but their pixels."""
    assert not pixels or np.array_equal(a.pixels, b.pixels)
    assert a.unreadable == b.unreadable
    np.testing.assert_array_equal(a.target, b.target)
    for field in a.views._fields:
        np.testing.assert_array_equal(getattr(a.views, field), getattr(b.views, field), err_msg=field)


def take_steps(run: Run, last: int | None = None) -> Iterator[dict[str, Tensor]]:
    """The steps of a run up to the last one, without log, scores and checkpoints; the figures of each."""
    batches = iter(batch_loader(run))
    for step in range(run.step, last or run.total_steps):
        values = step_values(run.config, step, run.steps_per_epoch, run.total_steps)
        figures = train_step(run, [next_batch(batches) for _ in range(run.config.optim.accumulate)], values)
        run.step = step + 1
        yield figures


class NoWaiting(TorchDispatchMode):
    """Fails at what reads a tensor's value on the host: item(), bool(), and shapes that depend on values."""

    waits = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal.default", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        assert not any(word in name for word in self.waits), f"{name} waits for the device"
        return func(*args, **(kwargs or {}))
