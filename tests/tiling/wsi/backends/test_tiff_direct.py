"""Tiled JPEG read without a slide library: the same pixels, nothing lost in silence, nothing decoded twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import openslide
import pytest
import simplejpeg
import tifffile

from annotations.errors import UserError
from tiling.slide_file.read import SlideFile
from tiling.tiles.run import tile
from tiling.wsi import patches
from tiling.wsi.backends.tiff_direct import DirectReader, NotDirectError, stored_pages
from tiling.wsi.patches import map_patches
from tiling.wsi.slide import Slide

SIDE = 256


@pytest.fixture(scope="module")
def texture() -> np.ndarray:
    """uint8 (1000, 1300, 3): stained blobs of many sizes on a bright ground, as sharp as a scan in focus."""
    from scipy.ndimage import gaussian_filter

    random = np.random.default_rng(5)
    layers = [gaussian_filter(random.normal(size=(1000, 1300)), sigma) * sigma for sigma in (2.0, 4.0, 9.0)]
    depth = np.clip(sum(layers) / 1.2, 0, 3)[..., None]
    return (235 * np.exp(-depth * np.array([0.9, 1.2, 0.5]))).round().astype(np.uint8)


def jpeg_tiles(rgb: np.ndarray, colours: str, side: int = SIDE) -> Iterator[bytes]:
    """Encoded tiles of a picture, its edge tiles filled up: colours "ycbcr" or "rgb" (stored without a transform)."""
    height, width = rgb.shape[:2]
    filled = np.pad(rgb, ((0, -height % side), (0, -width % side), (0, 0)))
    for y in range(0, height, side):
        for x in range(0, width, side):
            tile = np.ascontiguousarray(filled[y : y + side, x : x + side])
            if colours == "ycbcr":
                yield simplejpeg.encode_jpeg(tile, quality=92, colorsubsampling="420")
            else:
                import imagecodecs

                yield imagecodecs.jpeg8_encode(tile, level=92, colorspace="rgb", outcolorspace="rgb")


def abbreviated(stream: bytes) -> tuple[bytes, bytes]:
    """A JPEG as TIFF's pair of tables and stream without them."""
    tables, body, at = b"\xff\xd8", b"\xff\xd8", 2
    while stream[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
        if stream[at + 1] in (0xDB, 0xC4):
            tables += stream[at:end]
        elif stream[at + 1] != 0xE0:
            body += stream[at:end]
        at = end
    return tables + b"\xff\xd9", body + stream[at:]


def write(
    path: Path,
    rgb: np.ndarray,
    colours: str = "ycbcr",
    *,
    stated: str = "",
    tables: bool = False,
    aperio: bool = True,
    change: Callable[[list[bytes]], list[bytes]] | None = None,
    mpp: float = 0.25,
    **options: bool,
) -> Path:
    """One level of stored tiles; `change` may put others in their place before they are written."""
    tiles = list(jpeg_tiles(rgb, colours))
    extra: list[tuple] = []
    if tables:
        pairs = [abbreviated(tile) for tile in tiles]
        tiles = [body for _, body in pairs]
        extra = [(347, 7, len(pairs[0][0]), pairs[0][0], True)]
    height, width = rgb.shape[:2]
    text = f"Aperio Image Library v11\n{width}x{height} [0,0 {width}x{height}] (256x256) JPEG/RGB Q=92|MPP = {mpp}"
    with tifffile.TiffWriter(path, **options) as file:
        file.write(
            iter(change(tiles) if change else tiles),
            shape=rgb.shape,
            dtype=np.uint8,
            tile=(SIDE, SIDE),
            compression="jpeg",
            photometric=stated or colours,
            subsampling=(2, 2) if (stated or colours) == "ycbcr" else None,
            metadata=None,
            description=text if aperio else None,
            extratags=extra,
        )
    return path


def torn(number: int) -> Callable[[list[bytes]], list[bytes]]:
    """Zeroes from the middle of one stored tile on."""

    def change(tiles: list[bytes]) -> list[bytes]:
        half = len(tiles[number]) // 2
        tiles[number] = tiles[number][:half] + bytes(len(tiles[number]) - half)
        return list(tiles)

    return change


def openslide_pixels(path: Path) -> np.ndarray:
    with openslide.OpenSlide(str(path)) as slide:
        return np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))


def area(rgb: np.ndarray, x: float, y: float, size: float, out: int) -> np.ndarray:
    """The area average in float64, by exact cover of pixels."""
    averages = []
    for start, length in ((y, rgb.shape[0]), (x, rgb.shape[1])):
        low = start + size / out * np.arange(out)[:, None]
        pixel = np.arange(length)[None]
        averages.append(np.clip(np.minimum(low + size / out, pixel + 1) - np.maximum(low, pixel), 0, None) * out / size)
    return np.einsum("ij,jkc,lk->ilc", averages[0], rgb.astype(np.float64), averages[1], optimize=True)


@pytest.mark.parametrize(
    "layout",
    [
        {"colours": "ycbcr"},
        {"colours": "rgb"},
        {"colours": "ycbcr", "tables": True},
        {"colours": "ycbcr", "aperio": False},
        {"colours": "ycbcr", "bigtiff": True},
        {"colours": "ycbcr", "stated": "rgb"},  # a file that lies about its colours looks the same everywhere
    ],
)
def test_level_0_is_openslides_to_one_grey_level(tmp_path: Path, texture: np.ndarray, layout: dict) -> None:
    path = write(tmp_path / "a.svs", texture, **layout)
    with Slide.open(path, assume_mpp=0.25) as slide:
        assert slide.info.reader == "direct", slide.info.reader_why
        pixels = slide.read_region(0, 0, 1300, 1000, 1300, 1000)
    assert np.abs(pixels.astype(int) - openslide_pixels(path)).max() <= 1


def write_j2k(path: Path, rgb: np.ndarray, compression: int, change: Callable = list) -> Path:
    """Aperio's JPEG 2000: 33005 of RGB, 33003 of luminance and colour differences that the reader turns into RGB."""
    import imagecodecs
    from PIL import Image

    colours = np.asarray(Image.fromarray(rgb).convert("YCbCr")) if compression == 33003 else rgb
    height, width = rgb.shape[:2]
    filled = np.pad(colours, ((0, -height % SIDE), (0, -width % SIDE), (0, 0)))
    parts = [filled[y : y + SIDE, x : x + SIDE] for y in range(0, height, SIDE) for x in range(0, width, SIDE)]
    tiles = [imagecodecs.jpeg2k_encode(np.ascontiguousarray(part), level=40, codecformat="j2k", mct=False) for part in parts]
    text = f"Aperio Image Library v11\n{width}x{height} (256x256) J2K/KDU Q=70|MPP = 0.25"
    with tifffile.TiffWriter(path) as file:
        file.write(
            iter(change(tiles)),
            shape=rgb.shape,
            dtype=np.uint8,
            tile=(SIDE, SIDE),
            compression=compression,
            photometric="rgb",
            metadata=None,
            description=text,
        )
    return path


@pytest.mark.parametrize("compression", [33003, 33005])
def test_jpeg_2000_is_read_directly_and_is_openslides(tmp_path: Path, texture: np.ndarray, compression: int) -> None:
    path = write_j2k(tmp_path / "a.svs", texture, compression)
    height, width = texture.shape[:2]
    with Slide.open(path) as slide:
        assert (slide.info.reader, slide.info.reader_why) == ("direct", "its stored JPEG 2000 tiles are read directly")
        pixels = slide.read_region(0, 0, width, height, width, height)
        smaller = slide.read_region(100, 90, 800, 800, 200, 200)
    assert np.abs(pixels.astype(int) - openslide_pixels(path)).max() <= 1
    assert np.abs(smaller - area(pixels[90:890, 100:900], 0, 0, 800, 200)).max() <= 1


def test_a_torn_jpeg_2000_tile_is_marked_and_none_is_copied(tmp_path: Path, texture: np.ndarray) -> None:
    path = write_j2k(tmp_path / "a.svs", texture, 33005, torn(6))
    (outcome,) = tile([path], tmp_path, 0.25, SIDE, tissue="none", workers=1, pixels="copy")
    assert outcome.ok, outcome.message
    assert "recoded at quality 90" in outcome.message
    with SlideFile(tmp_path / "a.h5") as file:
        row = file.bad_tiles.tolist()
        assert (file.coords[row] == np.array([[0, SIDE]])).all()
        assert file.tile(row[0]).max() < 20
        assert all(file.tile(i).mean() > 60 for i in range(len(file)) if i not in row)


@pytest.mark.parametrize("made", ["average", "sharpened"])
def test_a_level_that_is_no_average_is_not_read(tmp_path: Path, texture: np.ndarray, made: str) -> None:
    from PIL import Image, ImageFilter

    picture = np.asarray(Image.fromarray(texture[:334, :427]).resize((1280, 1000), Image.Resampling.BICUBIC))
    average = Image.fromarray(picture).reduce(2)
    coarse = average if made == "average" else average.filter(ImageFilter.UnsharpMask(2, 150, 0))
    with tifffile.TiffWriter(tmp_path / "a.svs") as file:
        for level, rgb in enumerate((picture, np.asarray(coarse))):
            file.write(
                rgb,
                tile=(SIDE, SIDE),
                compression="jpeg",
                photometric="rgb",
                compressionargs={"level": 95},
                metadata=None,
                description="Aperio Image Library|MPP = 0.25",
                subfiletype=level,
            )
    with Slide.open(tmp_path / "a.svs") as slide:
        assert slide.info.reader == "direct"
        assert slide.faithful_level(2.0) == (1 if made == "average" else 0)
        pixels = slide.read_region(101, 99, 800, 800, 400, 400)
        level0 = slide.read_region(101, 99, 800, 800, 800, 800)
        assert slide.faithful_level(2.0) == (1 if made == "average" else 0)
    with Slide.open(tmp_path / "a.svs", resample="pyramid") as slide:
        assert slide.choose_level(2.0) == 1
    assert np.abs(pixels - area(level0, 0, 0, 800, 400)).mean() <= 2
    (outcome,) = tile([tmp_path / "a.svs"], tmp_path, 0.5, 128, tissue="none", workers=1)
    assert ("its level of 1/2 is no average of level 0, so a finer one is read" in outcome.message) == (made != "average")


def test_levels_that_are_no_whole_part_are_read_directly(tmp_path: Path, texture: np.ndarray) -> None:
    """As scanners cut them: 1300 x 1000 pixels, then 649 x 499, 2.003 times smaller."""
    from PIL import Image

    path = tmp_path / "a.svs"
    with tifffile.TiffWriter(path) as file:
        for number, size in enumerate(((1300, 1000), (649, 499))):
            picture = np.asarray(Image.fromarray(texture).resize(size, Image.Resampling.BOX))
            text = f"Aperio Image Library v11\n1300x1000 (256x256) -> {size[0]}x{size[1]} JPEG/RGB Q=92|MPP = 0.25"
            file.write(
                picture,
                tile=(SIDE, SIDE),
                compression="jpeg",
                photometric="rgb",
                metadata=None,
                description=text,
                subfiletype=number,
                compressionargs={"level": 92},
            )
    with Slide.open(path) as slide:
        assert (slide.info.reader, slide.info.level_downsamples[1].is_integer()) == ("direct", False)
        pixels = slide.reader.read(1, 0, 0, 649, 499)
    assert np.abs(pixels.astype(int) - picture).mean() <= 5  # of its JPEG


def test_grey_levels_and_real_slides_are_openslides(tmp_path: Path, texture: np.ndarray, test_data: Path) -> None:
    grey = tmp_path / "grey.tif"
    tifffile.imwrite(grey, texture[..., 1], tile=(SIDE, SIDE), compression="jpeg", photometric="minisblack")
    for path in (grey, test_data / "slides" / "CMU-1-Small-Region.svs"):
        with Slide.open(path, assume_mpp=0.5, reader="direct") as slide:
            pixels = slide.read_region(0, 0, 900, 900, 900, 900)
        assert np.abs(pixels.astype(int) - openslide_pixels(path)[:900, :900]).max() <= 1


@pytest.mark.parametrize("size", [512.0, 526.5, 500.3, 512.128, 290.0, 768.0, 800.0])
@pytest.mark.parametrize("out", [256, 128])
def test_smaller_patches_are_area_averages(tmp_path: Path, texture: np.ndarray, size: float, out: int) -> None:
    path = write(tmp_path / "a.svs", texture, "rgb")
    level0 = openslide_pixels(path)
    for x, y in ((0, 0), (256, 128), (173, 91)):
        expected = area(level0, x, y, size, out)
        with Slide.open(path) as fast, Slide.open(path, resample="exact") as exact:
            for slide, most in ((fast, 2.0), (exact, 0.51)):
                assert np.abs(slide.read_region(x, y, size, size, out, out) - expected).mean() <= most


def test_the_decoder_scales_where_boxes_hold_whole_pixels_of_it(tmp_path: Path, texture: np.ndarray) -> None:
    with Slide.open(write(tmp_path / "a.svs", texture)) as slide:
        whole, odd = np.array([[512.0, 0, 1024, 512]]), np.array([[513.0, 0, 1025, 512]])
        scales = [slide.choose_view(downsample, boxes).scale for downsample in (2, 4, 8, 2.06) for boxes in (whole, odd)]
    assert scales == [2, 1, 4, 1, 8, 2, 1, 1]


def test_patches_at_the_right_and_lower_edge_take_no_filling_in(tmp_path: Path, texture: np.ndarray) -> None:
    path = write(tmp_path / "a.svs", texture[:997, :1299])  # black filling in the stored tiles, sides of no even length
    with Slide.open(path) as slide:
        pixels = slide.read_region(1200, 900, 100, 100, 50, 50)
    expected = openslide_pixels(path)[900:996, 1200:1298].reshape(48, 2, 49, 2, 3).mean(axis=(1, 3))
    assert np.abs(pixels[:48, :49] - expected).mean() <= 2
    assert pixels.min() > 20
    np.testing.assert_array_equal(pixels[48, :49], pixels[47, :49])


def test_what_is_not_stored_is_background_and_is_counted(tmp_path: Path, texture: np.ndarray) -> None:
    path = write(tmp_path / "a.svs", texture, change=lambda tiles: [b"" if i == 7 else tile for i, tile in enumerate(tiles)])
    with tifffile.TiffFile(path) as file:
        assert file.pages[0].databytecounts[7] == 0
    with Slide.open(path) as slide:
        assert slide.info.reader == "direct"
        assert (slide.read_region(256, 256, 256, 256, 128, 128) == 255).all()
    (outcome,) = tile([path], tmp_path / "out", 0.5, 128, tissue="none", workers=1)
    assert "1 tiles reach into what was not scanned" in outcome.message


def test_a_tile_left_out_of_a_coarser_level_comes_from_the_finer_one(tmp_path: Path, texture: np.ndarray) -> None:
    picture = texture[:, :1280]
    coarse = picture.reshape(500, 2, 640, 2, 3).mean(axis=(1, 3)).round().astype(np.uint8)
    with tifffile.TiffWriter(tmp_path / "a.svs") as file:
        for level, rgb in enumerate((picture, coarse)):
            tiles = [b"" if level and i == 1 else tile for i, tile in enumerate(jpeg_tiles(rgb, "ycbcr"))]
            file.write(
                iter(tiles),
                shape=rgb.shape,
                dtype=np.uint8,
                tile=(SIDE, SIDE),
                compression="jpeg",
                photometric="ycbcr",
                subsampling=(2, 2),
                metadata=None,
                description="Aperio Image Library|MPP = 0.25",
                subfiletype=level,
            )
    with (
        Slide.open(tmp_path / "a.svs", resample="pyramid") as slide,
        openslide.OpenSlide(str(tmp_path / "a.svs")) as library,
    ):
        assert (slide.info.reader, slide.info.level_downsamples) == ("direct", (1.0, 2.0))
        pixels = slide.read_region(0, 0, 1280, 1000, 640, 500)
        expected = np.asarray(library.read_region((0, 0), 1, (640, 500)).convert("RGB"))
    assert np.abs(pixels.astype(int) - expected).mean() <= 1
    assert np.abs(pixels[:256, 256:512].astype(int) - coarse[:256, 256:512]).mean() <= 2


def test_a_torn_stored_tile_is_marked_and_the_others_are_as_before(tmp_path: Path, texture: np.ndarray) -> None:
    good = write(tmp_path / "good.svs", texture)
    bad = write(tmp_path / "bad.svs", texture, change=torn(8))
    for slide in (good, bad):
        for pixels in ("jpeg", "copy"):
            out = tmp_path / f"out_{pixels}"
            size, mpp = (128, 0.5) if pixels == "jpeg" else (256, 0.25)
            (outcome,) = tile([slide], out, mpp, size, tissue="none", pixels=pixels, workers=2)
            assert outcome.ok, outcome.message
            assert outcome.info["bad_tiles"] == (slide is bad)
            assert ("1 tiles cannot be decoded and are marked" in outcome.message) == (slide is bad)
    for out in (tmp_path / "out_jpeg", tmp_path / "out_copy"):
        with SlideFile(out / "good.h5") as before, SlideFile(out / "bad.h5") as after:
            (row,) = after._file["bad_tiles"][...].tolist()
            assert "bad_tiles" not in before._file
            assert after.coords[row].tolist() == [512, 256]
            assert after.tile(row).max() < 20
            for i in set(range(len(after))) - {row}:
                np.testing.assert_array_equal(after.tile(i), before.tile(i))


def test_a_region_over_a_torn_tile_is_refused(tmp_path: Path, texture: np.ndarray) -> None:
    path = write(tmp_path / "a.svs", texture, change=torn(8))
    with Slide.open(path) as slide:
        slide.read_region(0, 0, 500, 500, 250, 250)
        with pytest.raises(UserError, match=r"a\.svs: cannot decode pixels at level 0.*stored tile 2, 1"):
            slide.read_region(500, 300, 300, 300, 150, 150)


def test_a_slide_mostly_torn_fails(tmp_path: Path, texture: np.ndarray) -> None:
    def change(tiles: list[bytes]) -> list[bytes]:
        for i in set(range(len(tiles))) - {0, 12, 15}:
            torn(i)(tiles)
        return list(tiles)

    path = write(tmp_path / "a.svs", texture, change=change)
    (outcome,) = tile([path], tmp_path / "out", 0.5, 128, tissue="none", workers=1)
    assert not outcome.ok
    assert "tiles cannot be decoded" in outcome.message
    assert not list((tmp_path / "out").glob("*.h5"))


def test_stored_tiles_are_copied_where_they_are_the_tiles(tmp_path: Path, texture: np.ndarray) -> None:
    for colours in ("ycbcr", "rgb"):
        path = write(tmp_path / f"{colours}.svs", texture, colours)
        stored = list(jpeg_tiles(texture, colours))
        (outcome,) = tile([path], tmp_path / "out", 0.25, 256, tissue="none", pixels="copy", workers=1)
        assert outcome.message == ""
        level0 = openslide_pixels(path)
        with SlideFile(tmp_path / "out" / f"{colours}.h5") as file:
            assert len(file) == 15
            for i, (x, y) in enumerate(file.coords.tolist()):
                scan = stored[y // 256 * 6 + x // 256]
                assert file.tile_bytes(i)[-len(scan) // 2 :] == scan[-len(scan) // 2 :]
                away = np.abs(file.tile(i).astype(int) - level0[y : y + 256, x : x + 256])
                assert away.mean() < 0.5
                assert np.isfinite(file._file["quality/blur"][i])
        (outcome,) = tile([path], tmp_path / "other", 0.25, 256, 16, tissue="none", pixels="copy", workers=1)
        assert outcome.message.startswith("recoded at quality 90")


def test_threads_change_nothing_and_no_stored_tile_is_decoded_twice(
    tmp_path: Path, texture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.svs", texture)
    coords = np.array([(x, y) for y in range(0, 800, 98) for x in range(0, 1100, 98)], np.int64)
    decoded: Counter[tuple] = Counter()
    stored = DirectReader.decode_tile

    def counted(self: DirectReader, level: int, scale: int, row: int, column: int) -> np.ndarray | None:
        decoded[level, scale, row, column] += 1
        return stored(self, level, scale, row, column)

    with Slide.open(path) as slide:
        assert slide.is_faithful_scale(0, 2)  # looks at stored tiles of its own, once a slide
        monkeypatch.setattr(DirectReader, "decode_tile", counted)
        one = [tile for tile, _ in map_patches(slide, coords, 194.0, 97, lambda tile: tile)]
        assert len(decoded) == 20
        assert set(decoded.values()) == {1}
        three = [tile for tile, _ in map_patches(slide, coords, 194.0, 97, lambda tile: tile, threads=3)]
        monkeypatch.setattr(patches, "KEPT_BYTES", 300_000)
        little = [tile for tile, _ in map_patches(slide, coords, 194.0, 97, lambda tile: tile)]
        alone = [slide.read_region(int(x), int(y), 194.0, 194.0, 97, 97) for x, y in coords]
    for others in (three, little, alone):
        np.testing.assert_array_equal(np.array(one), np.array(others))


def test_patches_of_whole_stored_tiles_are_decoded_in_one_and_are_the_same(
    tmp_path: Path, texture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(tiles: list[bytes]) -> list[bytes]:
        torn(8)(tiles)
        return [b"" if i == 6 else tile for i, tile in enumerate(tiles)]

    coords = np.array([(x, y) for y in (0, 512) for x in (0, 512, 1024)], np.int64)
    whole = DirectReader.decode_stack
    calls: list[bool] = []

    def counted(self: DirectReader, *where: int) -> np.ndarray | None:
        decoded = whole(self, *where)
        calls.append(decoded is not None)
        return decoded

    for name, edit in (("good.svs", None), ("bad.svs", change)):
        with Slide.open(write(tmp_path / name, texture, change=edit)) as slide:
            monkeypatch.setattr(DirectReader, "decode_stack", counted)
            in_one = list(map_patches(slide, coords, 512.0, 256, lambda tile: tile, threads=2))
            monkeypatch.setattr(DirectReader, "decode_stack", lambda *_: None)
            single = list(map_patches(slide, coords, 512.0, 256, lambda tile: tile))
        for (pixels, problem), (expected, expected_problem) in zip(in_one, single, strict=True):
            np.testing.assert_array_equal(pixels, expected)
            assert problem == expected_problem
    # Of the good slide those that do not reach over its edge; of the other, one has a torn tile and one a tile left out.
    assert (len(calls), sum(calls)) == (12, 2)


def test_a_job_holds_few_patches_where_they_are_large(
    tmp_path: Path, texture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory does not grow with the patch: a job's patches are bounded in bytes, and by one patch at least."""
    coords = np.array([(x, 0) for x in range(0, 1000, 50)], np.int64)
    with Slide.open(write(tmp_path / "a.svs", texture)) as slide:
        assert isinstance(slide.reader, DirectReader)
        for room, most in ((3 * 97**2 * 100, patches.JOB_PATCHES), (3 * 97**2 * 2, 2), (1, 1)):
            monkeypatch.setattr(patches, "JOB_BYTES", room)
            reader = patches.StoredTilePatches(slide, slide.reader, coords, 97.0, 97, 1)
            sizes = [len(list(reader.read(rows))) for rows in reader.chunks]
            assert sum(sizes) == len(coords)
            assert max(sizes) == most


def test_decoded_tiles_are_let_go_after_their_last_use(tmp_path: Path, texture: np.ndarray) -> None:
    from tiling.wsi.level_view import pixel_bounds
    from tiling.wsi.patches import SharedTiles, count_tile_uses

    with Slide.open(write(tmp_path / "a.svs", texture)) as slide:
        boxes = np.array([(x, y, x + 300, y + 300) for y in (0, 250, 690) for x in (0, 150, 990, 5000)])
        view = slide.choose_view(1.0, boxes)
        edges = pixel_bounds(view, boxes)
        assert isinstance(slide.reader, DirectReader)
        uses = count_tile_uses(slide.reader, view, edges)
        shared = SharedTiles(slide.reader, view, uses.copy())
        for around in edges.tolist():
            slide.read_block(
                view,
                around,
                lambda x, y, w, h: slide.reader.read_region(0, 1, (x, y, x + w, y + h), shared.get)[0],  # type: ignore[union-attr]
            )
        assert not shared._kept
        assert (shared._uses_left == 0).all()
        assert uses.max() >= 4
        assert shared._free_bytes == patches.KEPT_BYTES


def test_headers_are_parsed_once_a_process(tmp_path: Path, texture: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.svs", texture)
    stored_pages.cache_clear()
    for _ in range(3):
        Slide.open(path).close()
    assert stored_pages.cache_info().misses == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tile": (SIDE, SIDE), "compression": "zlib"}, "not JPEG"),
        ({"compression": "jpeg"}, "not stored in tiles"),
    ],
)
def test_what_is_left_to_others_says_why(tmp_path: Path, texture: np.ndarray, options: dict, says: str) -> None:
    tifffile.imwrite(tmp_path / "a.tif", texture, photometric="rgb", **options)
    with pytest.raises(NotDirectError, match=says):
        DirectReader(tmp_path / "a.tif")


def test_a_file_whose_pixels_differ_from_openslides_is_left_to_it(
    tmp_path: Path, texture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.svs", texture)
    stored = DirectReader.decode_tile
    monkeypatch.setattr(DirectReader, "decode_tile", lambda *where: 255 - stored(*where))  # type: ignore[operator]
    with Slide.open(path) as slide:
        assert slide.info.reader == "openslide"
        assert "grey levels away from openslide's pixels" in slide.info.reader_why
