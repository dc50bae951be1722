"""Which reader a file gets, and why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import simplejpeg
import tifffile

from annotations.errors import UserError
from tiling.slide_file.read import SlideFile
from tiling.storage.paths import url_of
from tiling.tiles.run import tile
from tiling.wsi.backends.openslide import OpenSlideReader
from tiling.wsi.slide import Slide


@pytest.mark.parametrize(
    ("name", "reader", "why"),
    [
        ("CMU-1-Small-Region.svs", "direct", "its stored JPEG tiles are read directly"),
        ("TCGA-CR-7395-01A-01-TS1.svs", "direct", "its stored JPEG 2000 tiles are read directly"),
        ("test3-DAPI.ndpi", "openslide", "direct: "),
        ("camelyon_jp2k.dcm", "openslide", "direct: no TIFF"),
    ],
)
def test_real_slides_and_who_reads_them(test_data: Path, name: str, reader: str, why: str) -> None:
    with Slide.open(test_data / "slides" / name) as slide:
        assert slide.info.reader == reader
        assert why in slide.info.reader_why


def test_a_reader_can_be_asked_for(slide_path: Path, tmp_path: Path) -> None:
    names = ("direct", "openslide", "tiffslide", "image")
    shown = []
    for name in names:
        with Slide.open(slide_path, reader=name) as slide:
            assert (slide.info.reader, slide.info.reader_why) == (name, "asked for")
            shown.append(slide.read_region(100, 100, 300, 300, 150, 150).astype(int))
    assert max(np.abs(pixels - shown[0]).mean() for pixels in shown) < 1
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match=r"a\.png: not a readable slide \(direct: no TIFF.*leave out --reader"):
        Slide.open(tmp_path / "a.png", reader="direct")
    with pytest.raises(UserError, match="--reader quick: choose among auto, direct, openslide"):
        Slide.open(slide_path, reader="quick")
    with pytest.raises(UserError, match="--resample best: choose among fast, exact"):
        Slide.open(slide_path, resample="best")


def test_tile_takes_a_reader_and_a_way_to_resample(slide_path: Path, tmp_path: Path) -> None:
    def run(**options: str) -> tuple[str, bool]:
        (outcome,) = tile([slide_path], tmp_path, 1.0, 64, workers=1, **options)  # type: ignore[arg-type]
        assert outcome.ok, outcome.message
        return outcome.info.get("reader", ""), outcome.skipped

    assert run() == ("direct", False)
    assert run(reader="openslide") == ("openslide", False)
    assert run(reader="openslide", resample="exact") == ("openslide", False)
    assert run(reader="openslide", resample="exact")[1]
    for options, says in (
        ({"reader": "x"}, "--reader x"),
        ({"resample": "x"}, "--resample x"),
        ({"pixels": "x"}, "--pixels x"),
    ):
        with pytest.raises(UserError, match=says):
            run(**options)


def test_one_torn_tile_costs_openslide_only_that_tile(
    make_slide: Callable[..., Path], tmp_path: Path, picture: np.ndarray
) -> None:
    path = make_slide(tmp_path / "a.svs", picture, levels=1)
    with tifffile.TiffFile(path) as file:
        offset, count = file.pages[0].dataoffsets[5], file.pages[0].databytecounts[5]
    with path.open("r+b") as raw:
        raw.seek(offset)
        raw.write(bytes(count))
    bad_rows = {}
    for reader in ("openslide", "direct"):
        (outcome,) = tile([path], tmp_path / reader, 1.0, 128, tissue="none", workers=1, reader=reader)
        assert outcome.ok, outcome.message
        with SlideFile(tmp_path / reader / "a.h5") as file:
            bad_rows[reader] = file._file["bad_tiles"][...].tolist()
            assert file.tile(bad_rows[reader][0]).max() < 20
            assert all(file.tile(i).mean() > 60 for i in range(len(file)) if i not in bad_rows[reader])
    assert bad_rows["openslide"] == bad_rows["direct"] == [5]


def test_urls_are_read_through_tiffslide(slide_path: Path) -> None:
    import fsspec

    assert url_of("s3://bucket/a.svs") == url_of(Path("s3://bucket/a.svs")) == "s3://bucket/a.svs"
    assert url_of(Path("file:///x/a.svs")) == "file:///x/a.svs"
    assert url_of("/x/a:b.svs") is None
    with fsspec.open("memory://a.svs", "wb") as file:
        file.write(slide_path.read_bytes())
    with Slide.open(slide_path) as local:
        expected = local.read_region(100, 100, 256, 256, 256, 256)
        for url in (f"file://{slide_path}", "memory://a.svs"):
            with Slide.open(url) as slide:
                assert (slide.info.reader, slide.info.reader_why) == ("tiffslide", "a URL")
                assert slide.info.mpp == 0.5
                assert np.abs(slide.read_region(100, 100, 256, 256, 256, 256).astype(int) - expected).max() <= 1


def test_what_openslide_leaves_transparent_has_the_background_colour(slide_path: Path) -> None:
    from PIL import Image

    reader = OpenSlideReader(slide_path)
    reader.background = np.array([230, 220, 210], np.uint8)
    image = np.full((2, 3, 4), (100, 20, 30, 255), np.uint8)
    image[0, 0], image[0, 1] = (0, 0, 0, 0), (100, 20, 30, 128)
    reader._slide = SimpleNamespace(read_region=lambda *where: Image.fromarray(image))
    pixels = reader.read(0, 0, 0, 3, 2)
    assert pixels[0, 0].tolist() == [230, 220, 210]
    assert np.abs(pixels[0, 1].astype(int) - [165, 120, 120]).max() <= 1
    assert (pixels[1] == [100, 20, 30]).all()


def test_an_unscanned_tile_is_white_through_every_reader_and_no_tissue(tmp_path: Path, picture: np.ndarray) -> None:
    tiles = [
        simplejpeg.encode_jpeg(np.ascontiguousarray(picture[y : y + 256, x : x + 256])) for y in (256, 512) for x in (256, 512)
    ]
    tiles[1] = b""
    tifffile.imwrite(
        tmp_path / "a.svs",
        iter(tiles),
        shape=(512, 512, 3),
        dtype=np.uint8,
        tile=(256, 256),
        compression="jpeg",
        photometric="ycbcr",
        subsampling=(2, 2),
        metadata=None,
        description="Aperio Image Library v11|MPP = 0.5",
    )
    for reader in ("direct", "openslide"):
        with Slide.open(tmp_path / "a.svs", reader=reader) as slide:
            assert (slide.read_region(256, 0, 256, 256, 128, 128) == 255).all()
        (outcome,) = tile([tmp_path / "a.svs"], tmp_path / reader, 0.5, 256, min_tissue=0.5, workers=1, reader=reader)
        assert outcome.info["tiles"] == 3, outcome.message


def test_transparent_images_lie_on_white(tmp_path: Path) -> None:
    from PIL import Image

    rgba = np.full((64, 64, 4), (120, 40, 60, 255), np.uint8)
    rgba[:32, :, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "a.png")
    with Slide.open(tmp_path / "a.png", assume_mpp=0.5) as slide:
        pixels = slide.read_region(0, 0, 64, 64, 64, 64)
    assert (pixels[:32] == 255).all()
    assert (pixels[32:] == [120, 40, 60]).all()


def test_channels_that_are_not_shown_are_told(tmp_path: Path, picture: np.ndarray) -> None:
    grey = np.ascontiguousarray(picture[..., 1])
    options = {"tile": (256, 256), "photometric": "minisblack"}
    tifffile.imwrite(tmp_path / "five.tif", np.stack([grey] * 5), **options)
    tifffile.imwrite(tmp_path / "one.tif", grey, **options)
    messages = []
    for name in ("five.tif", "one.tif"):
        (outcome,) = tile([tmp_path / name], tmp_path / "out", 0.5, 256, assume_mpp=0.5, tissue="none", workers=1)
        messages.append(outcome.message)
    assert messages == ["shows the first of its 5 channels or planes only", ""]


def test_16_bit_pictures_are_read_and_floats_refused(tmp_path: Path, picture: np.ndarray) -> None:
    tifffile.imwrite(tmp_path / "deep.tif", picture.astype(np.uint16) * 257, photometric="rgb", tile=(256, 256))
    tifffile.imwrite(tmp_path / "float.tif", picture.astype(np.float32), photometric="rgb", tile=(256, 256))
    with Slide.open(tmp_path / "deep.tif") as slide:
        assert np.abs(slide.read_region(0, 0, 256, 256, 256, 256).astype(int) - picture[:256, :256]).max() <= 1
    with pytest.raises(UserError, match=r"float\.tif: not a readable slide"):
        Slide.open(tmp_path / "float.tif")
