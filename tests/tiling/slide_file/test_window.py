"""Windows that cross the borders of tiles: each pixel of a painted slide says where it lies."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tiling.slide_file.read import SlideFile
from tiling.slide_file.window import TileWindows
from tiling.slide_file.write import SlideMeta, write_slide_file

SIDE, WIDTH, HEIGHT = 32, 150, 110  # the last columns and rows of the slide lie in no tile


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def painted(width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """A slide of which red is the column and green the row of a pixel."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x, y, (x * 7 + y * 13) % 256], axis=2).astype(np.uint8)


def write(
    folder: Path,
    *,
    stored: bool = True,
    slide: bool = True,
    leave_out: tuple[int, ...] = (),
    boxes_l0: list[list[float]] | None = None,
    groups: dict[str, object] | None = None,
    black: tuple[int, ...] = (),
) -> Path:
    """A slide file of 4 x 3 tiles with lossless pixels; objects are boxes in slide pixels, cut at the borders of tiles."""
    image = painted()
    if slide:
        Image.fromarray(image).save(folder / "slide.png")
    coords = np.array([(x * SIDE, y * SIDE) for y in range(3) for x in range(4)], np.int64)
    coords = np.delete(coords, leave_out, axis=0)
    meta = SlideMeta("slide", folder / "slide.png", WIDTH, HEIGHT, 0.5, 0.5, SIDE, patient_id="P")
    tiles = [image[y : y + SIDE, x : x + SIDE] for x, y in coords]
    for row in black:
        tiles[row] = np.zeros_like(tiles[row])
    contents: dict[str, object] = dict(groups or {})
    if black:
        contents["bad_tiles"] = np.array(black, np.int64)
    parts = [
        (row, number, np.clip(np.array(box) - np.tile(corner, 2), 0, SIDE))
        for row, corner in enumerate(coords)
        for number, box in enumerate(boxes_l0 or [])
    ]
    parts = [part for part in parts if (part[2][2:] > part[2][:2]).all()]
    if boxes_l0:
        count = len(boxes_l0)
        contents["objects"] = {
            "id": [str(i) for i in range(count)],
            "label": np.zeros(count, np.int16),
            "kind": np.ones(count, np.uint8),
            "area_um2": np.ones(count, np.float32),
            "attrs": {"labels": ["cell"]},
        }
        x0, y0, x1, y1 = np.array([box for _, _, box in parts]).T
        corners = np.stack([x0, y0, x1, y0, x1, y1, x0, y1], 1).reshape(-1, 2)
        contents["boxes"] = {
            "xyxy": np.array([box for _, _, box in parts], np.float32),
            "offsets": np.searchsorted([row for row, _, _ in parts], np.arange(len(coords) + 1)).astype(np.int64),
            "object": np.array([number for _, number, _ in parts], np.int32),
            "visible": np.ones(len(parts), np.float32),
            "polygon": {
                "xy": corners,
                "ring_offsets": 4 * np.arange(len(parts) + 1, dtype=np.int64),
                "offsets": np.arange(len(parts) + 1, dtype=np.int64),
            },
        }
    path = folder / "slide.h5"
    pixels = [png(tile) for tile in tiles] if stored else None
    write_slide_file(path, meta=meta, coords=coords, pixels=pixels, groups=contents)  # type: ignore[arg-type]
    return path


def at(image: np.ndarray, tile_xy: tuple[int, int], x: int, y: int, side: int) -> np.ndarray:
    return image[tile_xy[1] + y : tile_xy[1] + y + side, tile_xy[0] + x : tile_xy[0] + x + side]


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize(("tile", "x", "y"), [(5, 3, 4), (5, -9, -8), (5, 20, 17), (0, 25, 3), (6, -20, 30)])
def test_every_pixel_of_a_window_is_where_the_slide_has_it(tmp_path: Path, stored: bool, tile: int, x: int, y: int) -> None:
    with SlideFile(write(tmp_path, stored=stored, slide=not stored)) as file:
        corner = tuple(file.coords[tile].tolist())
        assert np.array_equal(TileWindows(file).read(tile, x, y, 24), at(painted(), corner, x, y, 24))


def test_a_window_larger_than_a_tile_is_put_together_of_all_that_it_covers(tmp_path: Path) -> None:
    with SlideFile(write(tmp_path, slide=False)) as file:
        assert np.array_equal(TileWindows(file).read(5, -30, -25, 89), at(painted(), (32, 32), -30, -25, 89))


def test_what_no_stored_tile_has_comes_from_the_slide(tmp_path: Path) -> None:
    """Tile 6 was left out by tiling; the last rows of the slide lie in no tile."""
    with SlideFile(write(tmp_path, leave_out=(6,))) as file:
        windows = TileWindows(file)
        assert np.array_equal(windows.read(5, 20, 3, 24), at(painted(), (32, 32), 20, 3, 24))
        last = len(file) - 1
        assert np.array_equal(windows.read(last, 24, 20, 24), at(painted(), tuple(file.coords[last].tolist()), 24, 20, 24))


def test_stored_pixels_go_before_the_slide(tmp_path: Path) -> None:
    path = write(tmp_path)
    Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(tmp_path / "slide.png")
    with SlideFile(path) as file:
        assert np.array_equal(TileWindows(file).read(5, -9, -8, 24), at(painted(), (32, 32), -9, -8, 24))


def test_without_the_slide_the_edges_of_the_tile_are_repeated(tmp_path: Path) -> None:
    with SlideFile(write(tmp_path, leave_out=(6,), slide=False)) as file:
        window = TileWindows(file).read(5, 20, 0, 24)  # 12 columns are in the tile, the next ones were tile 6
        assert np.array_equal(window[:, :12], at(painted(), (32, 32), 20, 0, 24)[:, :12])
        assert (window[:, 12:] == window[:, 11:12]).all()


def test_a_tile_that_could_not_be_decoded_completes_no_window(tmp_path: Path) -> None:
    with SlideFile(write(tmp_path, black=(6,))) as file:
        assert np.array_equal(TileWindows(file).read(5, 20, 3, 24), at(painted(), (32, 32), 20, 3, 24))


def test_images_beside_each_other_complete_no_window(tmp_path: Path) -> None:
    """Tiles of `import --fit` are images of their own: their neighbours, and the slide, are other images."""
    groups = {"images": {"name": [str(i) for i in range(12)], "attrs": {"fit": "crop", "failed": 0}}}
    with SlideFile(write(tmp_path, groups=groups)) as file:
        windows = TileWindows(file)
        assert windows.corner(5, np.array([0.0, 0, 2, 2]), 24) == (0, 0)
        assert np.array_equal(windows.read(5, *windows.corner(5, np.array([30.0, 30, 32, 32]), 24), 24), file.tile(5)[8:, 8:])


@pytest.mark.parametrize("box", [[3.0, 4, 9, 12], [0, 0, 32, 32], [14.5, 11.0, 17.5, 14.0]])
def test_a_window_is_centred_on_its_box_to_half_a_pixel(tmp_path: Path, box: list[float]) -> None:
    with SlideFile(write(tmp_path)) as file:
        x, y = TileWindows(file).corner(5, np.array(box), 25)
        assert abs(x + 12.5 - (box[0] + box[2]) / 2) <= 0.5
        assert abs(y + 12.5 - (box[1] + box[3]) / 2) <= 0.5


def test_a_window_moves_into_the_slide(tmp_path: Path) -> None:
    with SlideFile(write(tmp_path)) as file:
        windows = TileWindows(file)
        assert windows.corner(0, np.array([0.0, 0, 4, 4]), 24) == (0, 0)
        right, down = windows.corner(11, np.array([30.0, 30, 32, 32]), 60)
        assert tuple(file.coords[11] + (right + 60, down + 60)) == (WIDTH, HEIGHT)
        assert windows.corner(0, np.array([0.0, 0, 4, 4]), 200) == (-25, -45)  # larger than the slide: over its middle


def test_a_box_that_tiles_cut_is_whole_where_a_window_can_show_it(tmp_path: Path) -> None:
    boxes = [[28.0, 29, 41, 40], [5, 5, 15, 14], [2, 50, 120, 58]]  # over four tiles, in one, longer than a window
    with SlideFile(write(tmp_path, boxes_l0=boxes)) as file:
        table, whole = file.boxes_table(), TileWindows(file).whole_boxes(24)
        in_slide = whole + np.tile(file.coords[file.box_tiles], 2)
        assert (np.bincount(table["object"]) == [4, 1, 4]).all()
        for number, box in enumerate(boxes[:2]):
            assert np.allclose(in_slide[table["object"] == number], box)
        long = table["object"] == 2
        assert np.array_equal(whole[long], table["xyxy"][long].astype(np.float64))


def test_outlines_of_a_cut_object_come_with_its_parts_in_other_tiles(tmp_path: Path) -> None:
    with SlideFile(write(tmp_path, boxes_l0=[[28.0, 29, 41, 40]])) as file:
        for row in range(4):
            rings = np.concatenate([ring for part in TileWindows(file).outlines(row, 24) for ring in part])
            in_slide = rings + file.coords[file.box_tiles[row]]
            assert np.allclose([*in_slide.min(0), *in_slide.max(0)], [28, 29, 41, 40])
