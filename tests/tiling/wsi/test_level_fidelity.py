"""Fewer coefficients of a JPEG only where they are an average; patches and stored tiles of any size in bounded memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import tifffile
from scipy.ndimage import gaussian_filter

from annotations.errors import UserError
from tiling.wsi import patches, slide
from tiling.wsi.backends.tiff_direct import MOST_CHECKED_PX, DirectReader, NotDirectError, stored_pages
from tiling.wsi.level_fidelity import MAX_DEVIATION
from tiling.wsi.patches import map_patches
from tiling.wsi.slide import Slide

SIDE = 256
SAMPLING = {"444": (1, 1), "422": (2, 1), "420": (2, 2)}


def stained(sigma: float, height: int = 768, width: int = 1024) -> np.ndarray:
    """uint8 (h, w, 3): blobs of two stains, as sharp in their colours as sigma (pixels) says, glass on the right."""
    random = np.random.default_rng(2)
    layers = [gaussian_filter(random.normal(size=(height, width)), sigma) * sigma * 3 for _ in range(2)]
    depth = np.clip(np.stack(layers, axis=-1), 0, 2) @ np.array([[0.5, 1.2, 0.3], [1.1, 0.3, 0.2]])
    depth[:, width * 3 // 4 :] = 0
    return (240 * np.exp(-depth)).round().astype(np.uint8)


def write(path: Path, rgb: np.ndarray, sampling: str = "444", side: int = SIDE) -> Path:
    """One level of stored JPEG tiles, its sides multiples of theirs."""
    pieces = (
        simplejpeg.encode_jpeg(np.ascontiguousarray(rgb[y : y + side, x : x + side]), quality=90, colorsubsampling=sampling)
        for y in range(0, rgb.shape[0], side)
        for x in range(0, rgb.shape[1], side)
    )
    tifffile.imwrite(
        path,
        pieces,
        shape=rgb.shape,
        dtype=np.uint8,
        tile=(side, side),
        compression="jpeg",
        photometric="ycbcr",
        subsampling=SAMPLING[sampling],
        metadata=None,
        description="Aperio Image Library v11\nx|MPP = 0.25",
    )
    return path


def cut(path: Path, ratio: int, resample: str = "fast", threads: int = 1, px: int = 64) -> tuple[np.ndarray, int]:
    """All patches side by side, (N, px, px, 3), and the scale at which they are decoded."""
    with Slide.open(path, resample=resample) as opened:
        size = px * ratio
        width, height = opened.info.width_l0, opened.info.height_l0
        coords = np.array([(x, y) for y in range(0, height - size + 1, size) for x in range(0, width - size + 1, size)])
        results = list(map_patches(opened, coords, float(size), px, np.copy, threads))
        assert not any(problem for _, problem in results)
        boxes = np.concatenate([coords, coords + size], axis=1)
        return np.stack([pixels for pixels, _ in results]), opened.choose_view(float(ratio), boxes).scale


@pytest.mark.parametrize("ratio", [2, 4])
@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("sigma", [0.7, 12.0])
def test_every_patch_is_within_two_grey_levels_of_its_average(tmp_path: Path, sampling: str, sigma: float, ratio: int) -> None:
    """As few coefficients as that allows: colours at full resolution allow all, sharp ones at half the width none."""
    path = write(tmp_path / "s.svs", stained(sigma), sampling)
    fast, scale = cut(path, ratio)
    exact, _ = cut(path, ratio, "exact")
    assert np.abs(fast.astype(int) - exact).mean((1, 2, 3)).max() <= 2
    assert scale == (ratio if sampling == "444" else 1 if sigma < 1 else min(ratio, {"422": 2, "420": 4}[sampling]))
    if scale < ratio:  # what it would have been
        assert np.abs(cut(path, ratio, "pyramid")[0].astype(int) - exact).mean((1, 2, 3)).max() > MAX_DEVIATION


def test_a_torn_tile_of_many_bytes_says_nothing_about_scales(tmp_path: Path) -> None:
    path = write(tmp_path / "s.svs", stained(12.0), "422")
    with Slide.open(path) as opened:
        assert isinstance(opened.reader, DirectReader)
        page = opened.reader.pages[0]
        page.counts[0, 0] = page.counts.max() + 1000  # more than the stream: behind its end come other bytes
        page.offsets[0, 0] = path.stat().st_size - 10
        assert opened.is_faithful_scale(0, 2)


@pytest.mark.parametrize("kind", ["direct", "openslide"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_patch_larger_than_a_block_is_cut_in_bands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, threads: int
) -> None:
    rgb = stained(3.0)
    path = write(tmp_path / "s.svs", rgb)
    if kind == "openslide":
        tifffile.imwrite(path, rgb, tile=(SIDE, SIDE), compression="deflate", photometric="rgb", metadata=None)
    whole, _ = cut(path, 12, "exact")
    pieces: list[int] = []
    plain = Slide.read_block

    def counted(
        self: Slide, view: slide.LevelView, edges: tuple[int, int, int, int], read: slide.Read | None = None
    ) -> np.ndarray:
        pieces.append((edges[2] - edges[0]) * (edges[3] - edges[1]))
        return plain(self, view, edges, read)

    monkeypatch.setattr(patches, "BLOCK_PIXELS", 100_000)
    monkeypatch.setattr(Slide, "read_block", counted)
    banded, _ = cut(path, 12, "exact", threads)
    assert len(whole) == 1
    assert max(pieces) <= 100_000 / (threads if kind == "direct" else 1)
    assert np.abs(banded.astype(int) - whole).max() <= 1  # rounded in float32


def test_many_threads_decode_no_stored_tile_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "s.svs", stained(3.0))
    monkeypatch.setattr(patches, "BLOCK_PIXELS", 1_000_000)
    calls: list[tuple[int, ...]] = []
    plain = DirectReader.decode_tile
    with Slide.open(path, resample="exact") as opened:
        monkeypatch.setattr(DirectReader, "decode_tile", lambda self, *where: calls.append(where) or plain(self, *where))
        coords = np.array([(x, y) for y in (0, 384) for x in (0, 384)])
        assert len(list(map_patches(opened, coords, 384.0, 192, np.copy, threads=32))) == 4
    assert len(calls) == len(set(calls)) == 9


def test_a_stored_tile_larger_than_all_room_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "s.svs", stained(3.0, 1024, 1024), side=1024)
    monkeypatch.setattr(patches, "KEPT_BYTES", 1000)
    calls: list[tuple] = []
    plain = DirectReader.decode_tile
    with Slide.open(path) as opened:
        monkeypatch.setattr(DirectReader, "decode_tile", lambda self, *where: calls.append(where) or plain(self, *where))
        coords = np.array([(x, y) for y in range(0, 1024, 128) for x in range(0, 1024, 128)])
        assert len(list(map_patches(opened, coords, 128.0, 128, np.copy))) == 64
    assert calls == [(0, 1, 0, 0)]


def test_opening_compares_no_more_than_a_part_of_a_large_stored_tile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiling.wsi.backends.openslide import OpenSlideReader

    path = write(tmp_path / "s.svs", stained(3.0, 2048, 2048), side=2048)
    asked: list[tuple[int, int]] = []
    plain = OpenSlideReader.read

    def counted(self: OpenSlideReader, level: int, x: int, y: int, w: int, h: int, scale: int = 1) -> np.ndarray:
        asked.append((w, h))
        return plain(self, level, x, y, w, h, scale)

    monkeypatch.setattr(OpenSlideReader, "read", counted)
    DirectReader(path).close()
    assert asked == [(MOST_CHECKED_PX, MOST_CHECKED_PX)]


def test_a_loop_of_directories_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "s.svs", stained(3.0))
    with tifffile.TiffFile(path) as file:
        first = file.pages[0].offset
    data = bytearray(path.read_bytes())
    where = first + 2 + 12 * int.from_bytes(data[first : first + 2], "little")
    assert data[where : where + 4] == bytes(4)  # the last of the chain
    data[where : where + 4] = first.to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(NotDirectError, match="form a loop"):
        stored_pages(path, path.stat().st_size, path.stat().st_mtime_ns)
    for reader in ("auto", "tiffslide", "image"):
        with pytest.raises(UserError, match="not a readable slide: its directories form a loop"):
            Slide.open(path, reader=reader)
