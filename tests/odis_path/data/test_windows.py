"""views.window_um: samples are windows around objects, across the borders of tiles, and masks follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from annotations.errors import UserError
from odis_path.config import load_config
from odis_path.data import crops
from odis_path.data.dataset import TileSample, TileSamples
from odis_path.data.sampler import collate
from odis_path.data.tile_index import index_tiles
from odis_path.data.windows import training_samples
from odis_path.embedding.encoder import load_encoder
from odis_path.embedding.run import embed
from odis_path.features.read import read_features
from odis_path.training import loop
from tests.odis_path.conftest import tiny_config
from tests.tiling.slide_file.test_window import png
from tiling.slide_file.read import SlideFile, list_slide_files
from tiling.slide_file.window import TileWindows
from tiling.slide_file.write import SlideMeta, write_slide_file

SIDE, COLUMNS, ROWS = 64, 4, 3
WINDOW = 40  # px, 20 µm
CELLS = [  # in slide px: inside a tile, over an edge of two tiles, over the corner of four, at the slide's edge
    [20, 20, 34, 33],
    [58, 90, 71, 104],
    [121, 57, 136, 70],
    [0, 150, 12, 163],
    [150, 20, 166, 33],
    [165, 40, 179, 55],
]


def paint(seed: int) -> np.ndarray:
    """A slide of dull noise in which the pixels of cell i, and no others, are (250, 10, 20 + i)."""
    rng = np.random.default_rng(seed)
    image = rng.integers(90, 160, (ROWS * SIDE, COLUMNS * SIDE, 3)).astype(np.uint8)
    for number, (x0, y0, x1, y1) in enumerate(CELLS):
        image[y0:y1, x0:x1] = (250, 10, 20 + number)
    return image


def write_painted(folder: Path, name: str, patient: str, seed: int, *, stored: bool = True) -> None:
    coords = np.array([(x * SIDE, y * SIDE) for y in range(ROWS) for x in range(COLUMNS)], np.int64)
    image = paint(seed)
    parts = [
        (row, number, np.clip(np.array(cell) - np.tile(corner, 2), 0, SIDE))
        for row, corner in enumerate(coords)
        for number, cell in enumerate(CELLS)
    ]
    parts = [part for part in parts if (part[2][2:] > part[2][:2]).all()]
    x0, y0, x1, y1 = np.array([box for _, _, box in parts]).T
    rings = np.arange(len(parts) + 1, dtype=np.int64)
    groups: dict[str, Any] = {
        "objects": {
            "id": [f"{name}-{i}" for i in range(len(CELLS))],
            "label": (np.arange(len(CELLS)) % 2).astype(np.int16),
            "kind": np.ones(len(CELLS), np.uint8),
            "area_um2": np.ones(len(CELLS), np.float32),
            "attrs": {"labels": ["round", "long"]},
        },
        "boxes": {
            "xyxy": np.array([box for _, _, box in parts], np.float32),
            "offsets": np.searchsorted([row for row, _, _ in parts], np.arange(len(coords) + 1)).astype(np.int64),
            "object": np.array([number for _, number, _ in parts], np.int32),
            "visible": np.ones(len(parts), np.float32),
            "polygon": {
                "xy": np.stack([x0, y0, x1, y0, x1, y1, x0, y1], 1).reshape(-1, 2).astype(np.float32),
                "ring_offsets": 4 * rings,
                "offsets": rings,
            },
        },
    }
    meta = SlideMeta(name, folder / f"{name}.png", COLUMNS * SIDE, ROWS * SIDE, 0.5, 0.5, SIDE, patient_id=patient)
    tiles = [png(image[y : y + SIDE, x : x + SIDE]) for x, y in coords]
    write_slide_file(folder / f"{name}.h5", meta=meta, coords=coords, pixels=tiles if stored else None, groups=groups)


@pytest.fixture(scope="module")
def painted_tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("painted")
    for number in range(3):
        write_painted(folder, f"S{number}", f"P{number}", number)
    return folder


def config_of(tiles: Path, out: str | Path = "unused", **sections: Any) -> Any:
    views = {"window_um": 20, "global_scale": [0.5, 1.0], **sections.pop("views", {})}
    target = {"min_patches": 1, **sections.pop("target", {})}
    data = {"boxless": "drop", **sections.pop("data", {})}
    return tiny_config(tiles, out, views=views, target=target, data=data, **sections)


def samples_of(tiles: Path, **sections: Any) -> TileSamples:
    config = config_of(tiles, **sections)
    return training_samples(index_tiles(tiles, need_boxes=np.array([1], np.uint8)), config, 8)


def cell_of(window: np.ndarray, box: np.ndarray) -> tuple[int, np.ndarray]:
    """Which cell lies at the middle of a box, and where its paint is in the window: x0, y0, x1, y1."""
    x, y = ((box[:2] + box[2:]) / 2).astype(int)
    assert tuple(window[y, x, :2]) == (250, 10)
    ys, xs = np.nonzero((window == window[y, x]).all(2))
    return int(window[y, x, 2]) - 20, np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], float)


@pytest.mark.parametrize("geometry", ["box", "polygon"])
def test_a_window_shows_the_whole_cell_in_its_middle_and_masks_are_where_its_paint_is(
    painted_tiles: Path, geometry: str
) -> None:
    samples = samples_of(painted_tiles, target={"geometry": geometry})
    met = set()
    for epoch in range(4):
        for i in range(len(samples)):
            sample = samples[(epoch, i)]
            assert isinstance(sample, TileSample)
            assert sample.pixels.shape == (WINDOW, WINDOW, 3)
            number, where = cell_of(sample.pixels, sample.target)
            met.add(number)
            x0, y0, x1, y1 = CELLS[number]
            assert (where[2:] - where[:2] == (x1 - x0, y1 - y0)).all()
            assert np.allclose(sample.target, where)
            if number != 3:  # at the slide's edge the window is moved into it
                assert (np.abs((where[:2] + where[2:]) / 2 - WINDOW / 2) <= 0.5).all()
            for rect, mask in zip(sample.views.rects[:2], sample.views.object_masks_global, strict=True):
                view = crops.Crop(*(int(v) for v in rect))
                assert view.x + view.w <= WINDOW
                assert crops.contains(view, where)
                assert np.array_equal(mask[0], crops.patch_mask(view, where, 4).ravel())
    assert met == set(range(len(CELLS)))


def test_a_window_holds_the_pixels_of_the_slide(painted_tiles: Path) -> None:
    samples = samples_of(painted_tiles)
    for i in range(len(samples)):
        sample = samples[(0, i)]
        assert isinstance(sample, TileSample)
        number, where = cell_of(sample.pixels, sample.target)
        x, y = (np.array(CELLS[number][:2]) - where[:2]).astype(int)
        assert np.array_equal(sample.pixels, paint(int(samples.index.slide[i]))[y : y + WINDOW, x : x + WINDOW])


def test_without_an_object_the_window_lies_anywhere_and_all_of_it_is_the_target(painted_tiles: Path) -> None:
    samples = samples_of(painted_tiles, target={"crop": False, "mask": False})
    tiles = []
    for epoch in range(6):
        sample = samples[(epoch, 0)]
        assert isinstance(sample, TileSample)
        assert sample.views.object_masks_global.all()
        assert sample.views.object_visible.all()
        tiles.append(sample.pixels.tobytes())
    assert len(set(tiles)) == 6


def test_several_objects_of_a_tile_come_in_windows_of_their_own(painted_tiles: Path) -> None:
    """Tile 2 holds parts of three cells: they come first, then some again, which do not count."""
    samples = samples_of(painted_tiles, target={"objects": 4, "mask": True})
    row = int(np.flatnonzero((samples.index.slide == 0) & (samples.index.row == 2))[0])
    windows = samples[(0, row)]
    assert isinstance(windows, list)
    assert [bool(window.views.object_visible.all()) for window in windows] == [True, True, True, False]
    assert len({cell_of(window.pixels, window.target)[0] for window in windows[:3]}) == 3
    batch = collate([windows, windows])
    assert batch.pixels.shape[0] == 8
    assert batch.views.object_masks_global.shape[:2] == (2, 8)


def test_a_window_is_drawn_from_seed_epoch_and_index_alone(painted_tiles: Path) -> None:
    first, second = samples_of(painted_tiles), samples_of(painted_tiles)
    _ = second[(0, 3)], second[(1, 1)]
    one, other = first[(1, 2)], second[(1, 2)]
    assert isinstance(one, TileSample)
    assert isinstance(other, TileSample)
    assert np.array_equal(one.pixels, other.pixels)
    assert all(np.array_equal(a, b) for a, b in zip(one.views, other.views, strict=True))


@pytest.mark.parametrize(
    ("sections", "what"),
    [
        ({"views": {"window_um": 2}}, "a window of 2 micrometres is 4 px at 0.5 micrometres per pixel: take 4 or more"),
        ({"target": {"order": "crop_first"}}, "views.window_um centres a window on a chosen object"),
        ({"loss": {"tile_center": 0.5}}, "set target.objects to 2 or more"),
    ],
)
def test_what_cannot_be_is_one_line(painted_tiles: Path, sections: dict[str, Any], what: str) -> None:
    with pytest.raises((UserError, ValueError), match=what):
        samples_of(painted_tiles, **sections)


@pytest.fixture(scope="module")
def window_run(painted_tiles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    config = config_of(
        painted_tiles,
        out,
        target={"objects": 2},
        loss={"tile_center": 1.0},
        optim={"batch_size": 4, "epochs": 1},
        views={"stain_swap_p": 0.5},
        eval={"every_epochs": 0},
    )
    return loop.pretrain(config)


def test_a_run_on_windows_has_one_obj_token_and_finite_weights(window_run: Path) -> None:
    encoder = load_encoder(str(window_run), device="cpu")
    assert encoder.window_um == 20
    assert encoder.module.more_obj is None
    assert all(torch.isfinite(p).all() for p in encoder.module.parameters())


def test_embed_in_windows_is_the_masked_token_of_the_window_around_the_whole_object(
    painted_tiles: Path, window_run: Path, tmp_path: Path
) -> None:
    embed(painted_tiles, window_run, tmp_path / "f", level="object", mode="window", dtype="float32", batch=5)
    encoder = load_encoder(str(window_run), device="cpu", resize=32)
    for number, path in enumerate(list_slide_files(painted_tiles)):
        features = read_features(tmp_path / "f" / path.name, "object")
        with SlideFile(path) as file:
            objects = file.boxes_table()["object"]
        for row, cell in enumerate(CELLS[i] for i in objects):
            x, y = (int(np.floor((cell[a] + cell[a + 2]) / 2 - WINDOW / 2 + 0.5)) for a in (0, 1))
            x, y = max(x, 0), max(y, 0)
            window = paint(number)[y : y + WINDOW, x : x + WINDOW]
            box = np.array([cell], float) - [x, y, x, y]
            assert np.allclose(features.x[row], encoder.encode(window[None], box, "masked")[0], atol=1e-5)


def test_embed_in_windows_needs_to_know_their_side(painted_tiles: Path, tmp_path: Path) -> None:
    config = tiny_config(painted_tiles, tmp_path / "run", optim={"batch_size": 8, "epochs": 0.01}, eval={"every_epochs": 0})
    run = loop.pretrain(config)
    with pytest.raises(UserError, match="was not trained on windows"):
        embed(painted_tiles, run, tmp_path / "f", level="object", mode="window")
    with pytest.raises(UserError, match="give --mode window with it"):
        embed(painted_tiles, run, tmp_path / "f", level="object", mode="masked", window_um=20)
    done = embed(painted_tiles, run, tmp_path / "f", level="object", mode="window", window_um=20)
    assert not done.failed
    assert read_features(tmp_path / "f" / "S0.h5", "object").mode == "window"


def test_recipes_have_no_window_unless_they_say_so() -> None:
    assert load_config("odis").views.window_um == 0


@pytest.fixture
def unstored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The painted slide without stored pixels, which cannot be decoded at tile 1."""
    folder = tmp_path / "unstored"
    folder.mkdir()
    write_painted(folder, "S0", "P0", 0, stored=False)
    Image.fromarray(paint(0)).save(folder / "S0.png")
    read = SlideFile.region

    def torn(self: SlideFile, i: int, x: int, y: int, side_px: int) -> np.ndarray:
        if i == 1:
            raise UserError("S0.png: cannot be decoded there")
        return read(self, i, x, y, side_px)

    monkeypatch.setattr(SlideFile, "region", torn)
    return folder


def test_where_a_slide_is_torn_a_window_of_the_next_tile_is_taken(unstored: Path) -> None:
    samples = training_samples(index_tiles(unstored), config_of(unstored), 8)
    for i in range(len(samples)):
        sample = samples[(0, i)]
        assert isinstance(sample, TileSample)
        assert sample.unreadable == (1 if i == 1 else None)


def test_a_window_that_cannot_be_read_is_embedded_black(unstored: Path, window_run: Path, tmp_path: Path) -> None:
    done = embed(unstored, window_run, tmp_path / "f", level="object", mode="window", dtype="float32")
    assert not done.failed
    features = read_features(tmp_path / "f" / "S0.h5", "object")
    black = load_encoder(str(window_run), device="cpu", resize=32)
    with SlideFile(unstored / "S0.h5") as file:
        rows = np.flatnonzero(file.box_tiles == 1)
        assert len(rows)
        for row in rows:
            box = TileWindows(file).whole_boxes(WINDOW)[row]
            corner = np.tile(TileWindows(file).corner(1, box, WINDOW), 2)
            expected = black.encode(np.zeros((1, WINDOW, WINDOW, 3), np.uint8), (box - corner)[None], "masked")
            assert np.allclose(features.x[row], expected[0], atol=1e-5)
