"""The slide file: DESIGN's table, safety of writing, speed and errors of reading."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from annotations.errors import UserError
from tiling.slide_file.read import SlideFile, list_slide_files
from tiling.slide_file.tile_labels import tile_labels
from tiling.slide_file.write import CHUNK_BYTES, SlideFileWriter, SlideMeta, replace_groups, write_slide_file
from tiling.storage.atomic import atomic_path
from tiling.wsi import codec


def meta(source: Path, slide_id: str = "a", patch_px: int = 64) -> SlideMeta:
    return SlideMeta(
        slide_id=slide_id,
        source=source,
        width_l0=1000,
        height_l0=800,
        mpp=0.5,
        mpp_level0=0.2281,
        patch_px=patch_px,
        overlap_px=8,
        patient_id="P1",
        parameters={"b": 2, "a": [1]},
    )


def grid(columns: int, rows: int, step: int = 100) -> np.ndarray:
    return np.array([(x * step, y * step) for y in range(rows) for x in range(columns)], np.int64).reshape(-1, 2)


BOXES = {
    "xyxy": np.array([[0, 0, 64, 64], [1, 2, 3, 4], [0, 0, 64, 32]], np.float32),
    "offsets": np.array([0, 1, 3], np.int64),
    "object": np.array([0, 1, 0], np.int32),
    "visible": np.array([0.5, 1.0, 0.25], np.float32),
}
AREA = (64 * 0.5) ** 2 * 2
OBJECTS = {
    "id": ["first", "zweites-ß"],
    "label": np.array([1, 0], np.int16),
    "kind": np.array([0, 1], np.uint8),
    "area_um2": np.array([AREA, 9], np.float32),
    "attrs": {"labels": ["stroma", "tumour"]},
}


@pytest.fixture
def file_path(tmp_path: Path) -> Path:
    source = tmp_path / "a.svs"
    source.write_bytes(b"0123456789")
    path = tmp_path / "out" / "a.h5"
    tiles = [codec.encode_jpeg(np.full((64, 64, 3), 50 * i, np.uint8)) for i in (1, 2)]
    groups = {"boxes": BOXES, "objects": OBJECTS}
    write_slide_file(path, meta=meta(source), coords=grid(2, 1), pixels=iter(tiles), groups=groups)
    return path


def test_the_file_is_laid_out_as_the_design_says(file_path: Path, tmp_path: Path) -> None:
    expected = {
        "coords": (np.int64, (2, 2)),
        "tissue_fraction": (np.float32, (2,)),
        "pixels/data": (np.uint8, None),
        "pixels/offsets": (np.int64, (3,)),
        "boxes/xyxy": (np.float32, (3, 4)),
        "boxes/offsets": (np.int64, (3,)),
        "boxes/object": (np.int32, (3,)),
        "boxes/visible": (np.float32, (3,)),
        "objects/label": (np.int16, (2,)),
        "objects/kind": (np.uint8, (2,)),
        "objects/area_um2": (np.float32, (2,)),
    }
    with h5py.File(file_path) as file:
        for name, (dtype, shape) in expected.items():
            assert file[name].dtype == dtype, name
            assert shape is None or file[name].shape == shape, name
        assert h5py.check_string_dtype(file["objects/id"].dtype).encoding == "utf-8"
        assert list(file["objects"].attrs["labels"]) == ["stroma", "tumour"]
        offsets = file["pixels/offsets"][...]
        assert offsets[0] == 0
        assert offsets[-1] == file["pixels/data"].shape[0]
        attrs = dict(file["coords"].attrs)
        assert attrs["patch_size"] == 64
        assert isinstance(attrs["patch_size_level0"], np.integer)
        assert attrs["patch_size_level0"] == round(64 * 0.5 / 0.2281)
        footprint = attrs["patch_size"] * attrs["level0_magnification"] / attrs["target_magnification"]
        assert footprint == pytest.approx(64 * 0.5 / 0.2281)
        assert (attrs["overlap"], attrs["name"]) == (8, "a")
        assert (attrs["level0_width"], attrs["level0_height"]) == (1000, 800)
        assert (attrs["mpp"], attrs["mpp_level0"]) == (0.5, 0.2281)
        root = dict(file.attrs)
        assert (root["format"], root["format_version"]) == ("odis-path", 1)
        assert (root["slide_id"], root["patient_id"]) == ("a", "P1")
        source = tmp_path / "a.svs"
        assert root["source"] == str(source)
        assert root["source_size"] == 10
        assert root["source_mtime_ns"] == source.stat().st_mtime_ns
        assert root["parameters"] == json.dumps({"a": [1], "b": 2})
        assert root["parameters_sha256"] == hashlib.sha256(root["parameters"].encode()).hexdigest()
        assert root["software_version"]


def test_chunks_hold_about_a_mebibyte_and_never_one_row(tmp_path: Path) -> None:
    count = 60_000
    tile = bytes(200)
    coords = np.stack([np.arange(count), np.zeros(count)], axis=1)
    wide = {"features": np.zeros((3000, 1536), np.float16)}
    write_slide_file(tmp_path / "a.h5", meta=meta(tmp_path), coords=coords, pixels=(tile for _ in range(count)), groups=wide)
    seen = []
    with h5py.File(tmp_path / "a.h5") as file:
        file.visititems(
            lambda name, node: seen.append((name, node.chunks, node.dtype, node.nbytes)) if hasattr(node, "chunks") else None
        )
    assert {"coords", "pixels/data", "features"} <= {name for name, *_ in seen}
    for name, chunks, dtype, nbytes in seen:
        if chunks is None:
            assert nbytes <= CHUNK_BYTES, name
            continue
        assert chunks[0] > 1, name
        assert CHUNK_BYTES // 2 <= np.prod(chunks) * dtype.itemsize <= CHUNK_BYTES, name


def test_a_slide_without_tissue_is_a_valid_file(tmp_path: Path) -> None:
    for number, pixels in enumerate((iter(()), None)):
        path = tmp_path / f"{number}.h5"
        write_slide_file(path, meta=meta(tmp_path), coords=np.zeros((0, 2)), pixels=pixels)
        with SlideFile(path) as file:
            assert len(file) == 0
            assert file.coords.shape == (0, 2)
            assert file.tissue_fraction.shape == (0,)
            assert file.boxes_table()["offsets"].tolist() == [0]
            assert tile_labels(file)[0].shape == (0,)
            with pytest.raises(IndexError):
                file.tile(0)


def test_tiles_and_boxes_are_read_back(file_path: Path) -> None:
    with SlideFile(file_path) as file:
        assert (file.slide_id, file.patient_id, len(file), file.patch_size) == ("a", "P1", 2, 64)
        assert file.size_l0 == pytest.approx(140.29, abs=0.01)
        assert file.tile(1).shape == (64, 64, 3)
        assert abs(int(file.tile(1).mean()) - 100) <= 1
        assert file.tile_bytes(0)[:2] == b"\xff\xd8"
        assert file.box_rows(1) == slice(1, 3)
        np.testing.assert_array_equal(file.boxes(1), BOXES["xyxy"][1:])
        table = file.objects_table()
        assert table["labels"] == ["stroma", "tumour"]
        assert table["id"].tolist() == ["first", "zweites-ß"]


def test_each_box_has_its_tile_its_place_on_the_slide_and_the_class_of_its_object(file_path: Path) -> None:
    with SlideFile(file_path) as file:
        assert file.box_tiles.tolist() == [0, 1, 1]
        scale = 0.5 / 0.2281  # level-0 pixels in one of a tile
        assert np.allclose(
            file.box_bounds_l0,
            [
                np.multiply(box, scale) + corner
                for box, corner in zip(BOXES["xyxy"], ([0, 0, 0, 0], [100, 0, 100, 0], [100, 0, 100, 0]), strict=True)
            ],
        )
        assert file.object_classes().tolist() == ["tumour", "stroma"]
    replace_groups(file_path, {"objects": OBJECTS | {"label": np.array([-1, 1], np.int16)}})
    with SlideFile(file_path) as file:
        assert file.object_classes("no class").tolist() == ["no class", "tumour"]
    replace_groups(file_path, {"objects": None, "boxes": None})
    with SlideFile(file_path) as file:
        assert (file.box_tiles.shape, file.box_bounds_l0.shape, file.object_classes().shape) == ((0,), (0, 4), (0,))


def test_tile_labels_take_tissue_that_covers_half_of_the_tile(file_path: Path) -> None:
    with SlideFile(file_path) as file:
        labels, names = tile_labels(file)
        assert names == ["stroma", "tumour"]
        assert labels.tolist() == [1, 1]  # half of 2 tiles' area, then a quarter of it: 100% and 50% of a tile
        assert tile_labels(file, min_share=0.6)[0].tolist() == [1, -1]


def test_replacing_groups_keeps_the_rest_and_carries_no_dead_space(file_path: Path) -> None:
    with SlideFile(file_path) as file:
        before = (file.tile(1), file.coords_attrs, file.attrs)
    size = file_path.stat().st_size
    for _ in range(5):
        replace_groups(file_path, {"boxes": BOXES, "objects": OBJECTS}, root_attrs={"patient_id": "P2"})
    assert file_path.stat().st_size <= size + 4096
    replace_groups(file_path, {"boxes": None, "objects": None, "tile_label": (np.zeros(2, np.int16), {"labels": []})})
    with SlideFile(file_path) as file:
        assert not file.has_boxes
        assert file.patient_id == "P2"
        np.testing.assert_array_equal(file.tile(1), before[0])
        assert file.coords_attrs == before[1]
        assert file.attrs == before[2] | {"patient_id": "P2"}
        assert file.group_attrs("tile_label")["labels"].shape == (0,)


def test_a_crash_while_writing_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    def tiles():
        yield b"one"
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_slide_file(tmp_path / "a.h5", meta=meta(tmp_path), coords=grid(2, 1), pixels=tiles())
    assert list(tmp_path.iterdir()) == []


def test_the_writer_stores_the_blur_and_the_bad_tiles_of_what_was_added_before_the_groups(tmp_path: Path) -> None:
    with SlideFileWriter(tmp_path / "a.h5", meta(tmp_path), grid(3, 1), has_pixels=True) as out:
        for data, blur, problem in ((b"0", 0.25, ""), (b"1", float("nan"), "torn"), (b"2", 1.0, "")):
            out.add_tile(data, blur=blur, problem=problem)
        out.add_group("quality", {"blur": out.blur})
        with pytest.raises(ValueError, match="none after its groups"):
            out.add_tile(b"3")
        assert out.problems == {1: "torn"}
        assert not out.path.exists()
    with SlideFile(out.path) as file:
        assert [file.tile_bytes(i) for i in range(3)] == [b"0", b"1", b"2"]
        np.testing.assert_array_equal(file.blur, np.array([0.25, np.nan, 1.0], np.float32))
        assert file.bad_tiles.tolist() == [1]


def test_a_writer_that_got_too_few_tiles_or_died_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write_slide_file(path, meta=meta(tmp_path), coords=grid(1, 1))
    old = path.read_bytes()
    with (
        pytest.raises(ValueError, match="1 tiles of pixels for 2 coords"),
        SlideFileWriter(path, meta(tmp_path), grid(2, 1), has_pixels=True) as out,
    ):
        out.add_tile(b"0")
    with pytest.raises(KeyboardInterrupt), SlideFileWriter(path, meta(tmp_path), grid(2, 1), has_pixels=True):
        raise KeyboardInterrupt
    with (
        pytest.raises(ValueError, match="takes no tiles"),
        SlideFileWriter(path, meta(tmp_path), grid(2, 1), has_pixels=False) as out,
    ):
        out.add_tile(b"0")
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_a_crash_while_replacing_leaves_the_old_file(file_path: Path) -> None:
    old = file_path.read_bytes()
    with pytest.raises(TypeError):
        replace_groups(file_path, {"boxes": {"xyxy": object()}})
    assert file_path.read_bytes() == old
    assert [path.name for path in file_path.parent.iterdir()] == ["a.h5"]


def test_atomic_path_removes_its_temporary_name(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "x.txt"
    with atomic_path(final) as temporary:
        temporary.write_text("new")
        assert not final.exists()

    def interrupted() -> None:
        with atomic_path(final) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert final.read_text() == "new"
    assert [path.name for path in final.parent.iterdir()] == ["x.txt"]


def test_too_few_pixels_and_coords_out_of_order_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 tiles of pixels for 2 coords"):
        write_slide_file(tmp_path / "a.h5", meta=meta(tmp_path), coords=grid(2, 1), pixels=[b"x"])
    with pytest.raises(ValueError, match="row-major"):
        write_slide_file(tmp_path / "a.h5", meta=meta(tmp_path), coords=grid(2, 2)[::-1])


def test_a_file_that_may_not_be_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(13, "Unable to synchronously open file (unable to open file: name = 'a.h5', errno = 13)")

    monkeypatch.setattr(h5py, "File", forbidden)
    with pytest.raises(UserError, match=r"a\.h5: cannot be read: Permission denied: ask for the right to read it$"):
        SlideFile(tmp_path / "a.h5")


def test_files_that_are_not_ours_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.h5").write_text("no HDF5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    for name, says in (("text.h5", "not a readable HDF5"), ("other.h5", "not a slide file"), ("gone.h5", "no such slide file")):
        with pytest.raises(UserError, match=says) as error:
            SlideFile(tmp_path / name)
        assert name in str(error.value)
        assert "\n" not in str(error.value)
    (tmp_path / "text.h5").unlink()
    with pytest.raises(UserError, match="holds no slide file"):
        list_slide_files(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        list_slide_files(tmp_path / "nowhere")
    write_slide_file(tmp_path / "mine.h5", meta=meta(tmp_path), coords=grid(1, 1))
    (tmp_path / "torn.h5").write_bytes((tmp_path / "mine.h5").read_bytes()[:500])
    # A torn file is listed, so that whoever opens it reports it, and so is another program's; what is hidden is not.
    (tmp_path / "._mine.h5").write_text("what macOS leaves on other file systems")
    assert [path.name for path in list_slide_files(tmp_path)] == ["mine.h5", "other.h5", "torn.h5"]
