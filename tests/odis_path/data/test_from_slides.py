"""Training and embedding straight from slides, without stored pixels: the same samples, the same features."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from annotations.errors import UserError
from odis_path.data.dataset import TileSamples
from odis_path.data.sampler import StepSampler, collate
from odis_path.data.tile_index import OpenSlides, index_tiles, open_files
from odis_path.embedding.run import embed
from odis_path.features.read import read_features
from odis_path.training import loop
from tests.odis_path.conftest import assert_same_sample, tiny_config
from tiling.proposals.run import propose
from tiling.slide_file.read import SlideFile
from tiling.tiles.run import tile


def write_slide(path: Path, seed: int, width: int = 768, height: int = 512) -> Path:
    """An Aperio-style pyramid of pink tissue with dark dots, at 0.25 mpp."""
    import tifffile

    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = 0.5 + 0.5 * np.sin(x / rng.uniform(9, 15)) * np.sin(y / rng.uniform(9, 15))
    rgb = np.where(waves[..., None] > 0.8, (90, 50, 130), (215, 140, 190)) + rng.normal(0, 4, (height, width, 1))
    rgb = rgb.clip(0, 255).astype(np.uint8)
    options = {
        "tile": (256, 256),
        "compression": "jpeg",
        "compressionargs": {"level": 92},
        "photometric": "rgb",
        "metadata": None,
    }
    with tifffile.TiffWriter(path) as file:
        for number, level in enumerate((rgb, rgb.reshape(height // 2, 2, width // 2, 2, 3).mean(axis=(1, 3)).astype(np.uint8))):
            size = f"{level.shape[1]}x{level.shape[0]}"
            text = f"Aperio Image Library v11\n{size} [0,0 {size}] (256x256) JPEG/RGB Q=92|AppMag = 40|MPP = 0.25"
            file.write(level, description=text, subfiletype=1 if number else 0, **options)
    return path


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two folders of slide files of the same four slides: with pixels, and with coords only; both with boxes."""
    folder = tmp_path_factory.mktemp("slides")
    slides = [write_slide(folder / f"S{seed}.svs", seed) for seed in range(4)]
    stored, bare = folder / "stored", folder / "bare"
    for out, pixels in ((stored, "jpeg"), (bare, "none")):
        outcomes = [*tile(slides, out, 0.5, 64, pixels=pixels, quality=98, workers=1)]
        outcomes += propose(out, workers=1)
        assert all(outcome.ok for outcome in outcomes), [outcome.message for outcome in outcomes]
    return stored, bare


def samples(folder: Path, out: Path, **sections: dict) -> TileSamples:
    return TileSamples(index_tiles(folder), tiny_config(folder, out, **sections), 8)


def test_samples_from_slides_are_those_from_stored_pixels(both: tuple[Path, Path], tmp_path: Path) -> None:
    free = {"target": {"crop": False, "mask": False}}
    from_pixels, from_slides = (samples(folder, tmp_path, **free) for folder in both)
    assert len(from_pixels) == len(from_slides) == 4 * 24
    for i in (0, 17, 95):
        stored, read = from_pixels[2, i], from_slides[2, i]
        assert np.abs(stored.pixels.astype(int) - read.pixels).mean() < 2
        assert_same_sample(stored, read, pixels=False)


def test_workers_read_slides_of_their_own_in_any_order(both: tuple[Path, Path], tmp_path: Path) -> None:
    data = samples(both[1], tmp_path)
    expected = [data[0, i].pixels for i in range(len(data))]  # the parent's slides are open before the workers start
    sampler = StepSampler(len(data), 16, seed=5, first_step=0, last_step=6, rank=0, world=1)
    loader = torch.utils.data.DataLoader(data, batch_sampler=sampler, collate_fn=collate, num_workers=2)
    seen = 0
    for keys, batch in zip(sampler, loader, strict=True):
        for (_, i), pixels in zip(keys, batch.pixels.numpy(), strict=True):
            np.testing.assert_array_equal(pixels, expected[i])
            seen += 1
    assert seen == 96


def test_a_model_trains_and_embeds_from_coords_alone(both: tuple[Path, Path], tmp_path: Path) -> None:
    config = tiny_config(both[1], tmp_path / "run", optim={"epochs": 0.5}, eval={"every_epochs": 0}, data={"workers": 2})
    run = loop.pretrain(config).parent
    for folder, name in zip(both, ("stored", "bare"), strict=True):
        assert all(outcome.ok for outcome in embed(folder, str(run), tmp_path / name, dtype="float32", batch=7))
    from_pixels, from_slides = (read_features(tmp_path / name / "S1.h5").x for name in ("stored", "bare"))
    assert from_pixels.shape == from_slides.shape == (24, 32)
    cosine = (from_pixels * from_slides).sum(1) / np.linalg.norm(from_pixels, axis=1) / np.linalg.norm(from_slides, axis=1)
    assert cosine.min() > 0.98


def test_tiles_read_together_are_tiles_read_alone(both: tuple[Path, Path]) -> None:
    for folder in both:
        with SlideFile(folder / "S0.h5") as file:
            for numbers in ([0, 1, 2, 7, 23], [5], [9, 3, 9], []):
                pixels = file.tiles(np.array(numbers, dtype=np.int64))
                assert pixels.shape == (len(numbers), 64, 64, 3)
                for tile, i in zip(pixels, numbers, strict=True):
                    np.testing.assert_array_equal(tile, file.tile(i))
            with pytest.raises(IndexError, match="tile 24 of 24"):
                file.tiles(np.array([3, 24]))


def test_a_slide_that_is_gone_or_another_one_is_told_before_training(both: tuple[Path, Path], tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "A.svs", 9)
    tile([slide], tmp_path / "bare", 0.5, 64, pixels="none", workers=1)
    assert len(index_tiles(tmp_path / "bare")) == 24
    with slide.open("ab") as file:
        file.write(b"more")
    with pytest.raises(UserError, match=r"A\.h5: its slide .*A\.svs has \d+ bytes, \d+ when it was tiled: run odis-path tile"):
        index_tiles(tmp_path / "bare")
    os.remove(slide)
    with pytest.raises(
        UserError, match=re.escape(f"{slide} is gone: bring the slide back or tile again with --pixels")
    ) as error:
        loop.pretrain(tiny_config(tmp_path / "bare", tmp_path / "run"))
    assert "\n" not in str(error.value)


def test_slides_stay_open_and_the_oldest_is_closed_first(both: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert 8 <= open_files() <= 512
    monkeypatch.setattr("odis_path.data.tile_index.open_files", lambda: 2)
    index = index_tiles(both[1])
    opened = OpenSlides(index.paths)
    first = opened[0]
    assert opened[1] is opened[1]
    assert opened[0] is first
    opened[2]
    assert opened[0] is first
    assert list(opened._open) == [2, 0]
