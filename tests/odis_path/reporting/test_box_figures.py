"""Boxes over pixels at three scales: each panel has the boxes exactly where the pixels are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import shapely

from annotations import ObjectTable, annotation_groups, clip_to_tiles
from odis_path.reporting.figures import boxes as box_figures
from odis_path.reporting.figures.boxes import close_up, draw_boxes, read_boxes
from tiling import SlideMeta, write_slide_file
from tiling.wsi.codec import encode_jpeg

SIDE, STEP = 128, 256  # a tile of 128 pixels is 256 of level 0
CELLS = [(300, 290, 340, 320), (400, 310, 424, 330), (250, 280, 262, 300), (40, 40, 56, 60), (30, 400, 60, 460)]


def slide_file(folder: Path, *, polygons: bool = False, pixels: bool = True) -> Path:
    """2 x 2 tiles, white, with black cells; their boxes."""
    level0 = np.full((2 * STEP, 2 * STEP, 3), 255, np.uint8)
    for x0, y0, x1, y1 in CELLS:
        level0[y0:y1, x0:x1] = 0
    small = level0.reshape(2 * SIDE, 2, 2 * SIDE, 2, 3).mean(axis=(1, 3)).astype(np.uint8)
    coords = np.array([(x, y) for y in (0, STEP) for x in (0, STEP)])
    tiles = [encode_jpeg(small[y // 2 :, x // 2 :][:SIDE, :SIDE], 100) for x, y in coords.tolist()]
    geometry = np.array([shapely.box(*cell) for cell in CELLS], dtype=object)
    n = len(CELLS)
    table = ObjectTable(geometry, np.arange(n).astype(str).astype(object), np.zeros(n, np.int16), np.ones(n, np.uint8), ("a",))
    boxes = clip_to_tiles(geometry, coords, STEP, SIDE, polygons=polygons)
    groups = annotation_groups(table, boxes, 0.25)
    if boxes.polygons is not None:
        groups["boxes"]["polygon"] = boxes.polygons.arrays()
    if pixels:
        offsets = np.cumsum([0, *map(len, tiles)])
        groups["pixels"] = {"data": np.frombuffer(b"".join(tiles), np.uint8), "offsets": offsets.astype(np.int64)}
    meta = SlideMeta("a", folder / "none.svs", 2 * STEP, 2 * STEP, 0.5, 0.25, SIDE)
    path = folder / "a.h5"
    folder.mkdir(exist_ok=True)
    write_slide_file(path, meta=meta, coords=coords, groups=groups)
    return path


@pytest.mark.parametrize("polygons", [False, True])
@pytest.mark.parametrize("tile_side_px", [SIDE, SIDE // 2])
def test_boxes_lie_on_what_they_are_of_in_every_view(tmp_path, monkeypatch, polygons, tile_side_px):
    monkeypatch.setattr(box_figures, "TILE_SIDE_PX", tile_side_px)
    picture = read_boxes(slide_file(tmp_path / "s", polygons=polygons))
    assert picture.row == 3  # two whole cells and a part of one
    assert [panel.side for panel in picture.panels] == [2 * SIDE, SIDE, SIDE / 4]
    assert [len(panel.boxes) for panel in picture.panels] == [6, 3, 1]
    for panel in picture.panels:
        step = panel.side / len(panel.image)
        expected = np.zeros(panel.image.shape[:2], bool)
        for box in panel.boxes:
            x0, y0, x1, y1 = np.clip(np.round(box / step), 0, len(panel.image)).astype(int)
            expected[y0:y1, x0:x1] = True
        grey = panel.image.mean(axis=2)
        assert (grey[expected] < 140).all()  # a border in the middle of a reduced pixel is grey
        assert (grey[~expected] > 120).all()
        assert bool(panel.rings) == (polygons and panel is not picture.panels[0])
    wide, tile, close = picture.panels
    assert wide.frame.tolist() == [SIDE, SIDE, 2 * SIDE, 2 * SIDE]
    x, y = tile.frame[:2].astype(int)
    assert np.array_equal(tile.image[y : y + SIDE // 4, x : x + SIDE // 4], close.image)
    figure = draw_boxes(picture, {"a": "#0072B2"})
    assert len(figure.axes) == 3


def test_the_closest_view_holds_a_box_or_an_edge():
    boxes = np.array([[0, 0, 100, 100], [60, 60, 64, 65], [10, 90, 20, 100.0]])
    assert close_up(boxes, 100).tolist() == [49, 50]
    assert close_up(boxes[:1], 100).tolist() == [75, 75]  # the only edges are the tile's own
    assert close_up(np.array([[0, 30, 100, 100.0]]), 100).tolist() == [75, 17]


def test_nothing_where_there_is_nothing_to_show(tmp_path):
    path = tmp_path / "a.h5"
    meta = SlideMeta("a", tmp_path / "none.svs", STEP, STEP, 0.5, 0.25, SIDE)
    write_slide_file(path, meta=meta, coords=np.array([[0, 0]]))
    assert read_boxes(path) is None
