"""Damage to a slide file is told when it is read, and what made the file makes it anew."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from annotations.errors import UserError
from tiling.boxes.run import annotate
from tiling.images.run import import_images
from tiling.jobs.outcome import Outcome
from tiling.proposals.run import propose
from tiling.slide_file.read import SlideFile, list_slide_files
from tiling.slide_file.write import SlideMeta, replace_groups, write_slide_file
from tiling.storage.checksums import DamagedError
from tiling.tiles.run import tile


@pytest.fixture(scope="module")
def slide(make_slide: Callable[..., Path], picture: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    grain = np.random.default_rng(0).integers(-25, 25, picture.shape)
    return make_slide(tmp_path_factory.mktemp("slides") / "S.svs", np.clip(picture + grain, 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def annotated(slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide file with pixels, objects, boxes and outlines."""
    folder = tmp_path_factory.mktemp("annotated")
    assert tiled(slide, folder).ok
    annotate(folder, outlines(folder), polygons=True)
    return folder / "S.h5"


def tiled(slide: Path, out: Path) -> Outcome:
    (outcome,) = tile([slide], out, 0.5, 64, workers=1)
    return outcome


def outlines(folder: Path) -> Path:
    rings = {
        "Tumor": [[300, 200], [600, 220], [580, 520], [320, 500], [300, 200]],
        "Stroma": [[500, 300], [800, 300], [800, 600]],
    }
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [[*ring, ring[0]]]},
            "properties": {"classification": {"name": name}},
        }
        for name, ring in rings.items()
    ]
    path = folder / "S.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def contents(path: Path) -> dict[str, Any]:
    """Every value of an HDF5 file."""
    contents: dict[str, Any] = {}
    with h5py.File(path, locking=False) as file:
        file.visititems(
            lambda name, node: contents.update({name: node[...].tolist()}) if isinstance(node, h5py.Dataset) else None
        )
        for name in ("/", *contents, "objects", "boxes", "thumbnail"):
            if name in file:
                contents[f"{name}@"] = {key: np.asarray(value).tolist() for key, value in file[name].attrs.items()}
    return contents


def place(path: Path, name: str) -> int:
    """Where the values of a dataset begin in the file."""
    with h5py.File(path, locking=False) as file:
        node = file[name]
        return int(node.id.get_offset() if node.chunks is None else node.id.get_chunk_info(0).byte_offset)


def all_outlines(file: SlideFile) -> list[Any]:
    return [file.polygon(row) for row in range(len(file.boxes_table()["object"]))]


def flip(path: Path, at: int, bit: int = 2) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


def zero_pixels(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(place(path, "pixels/data") + 500)
        file.write(bytes(20_000))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "20 kB of pixels zeroed": zero_pixels,
    "a bit of /coords": lambda path: flip(path, place(path, "coords") + 17),
    "a bit of tissue_fraction": lambda path: flip(path, place(path, "tissue_fraction") + 6),
    "a bit of the offsets": lambda path: flip(path, place(path, "pixels/offsets") + 9),
    "a bit of a checksum": lambda path: flip(path, place(path, "pixels/crc32") + 9),
    "a bit of the thumbnail": lambda path: flip(path, place(path, "thumbnail/jpeg") + 700),
    "a bit of the slide's id": lambda path: flip(path, path.read_bytes().index(b"odis-path") + 2),
    "cut off": lambda path: os.truncate(path, path.stat().st_size // 2),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_slide_file_is_made_anew_by_tile(what: str, slide: Path, tmp_path: Path) -> None:
    assert tiled(slide, tmp_path).ok
    before = contents(tmp_path / "S.h5")
    assert tiled(slide, tmp_path).skipped
    DAMAGES[what](tmp_path / "S.h5")
    again = tiled(slide, tmp_path)
    assert (again.ok, again.skipped, again.redone) == (True, False, "the file was damaged")
    assert contents(tmp_path / "S.h5") == before
    assert tiled(slide, tmp_path).skipped


def test_a_value_changed_by_another_hdf5_program_is_damage_too(slide: Path, tmp_path: Path) -> None:
    tiled(slide, tmp_path)
    for name, rows in (("pixels/data", slice(500, 20_500)), ("coords", slice(3, 4))):
        with h5py.File(tmp_path / "S.h5", "r+") as file:
            file[name][rows] = 0
        with SlideFile(tmp_path / "S.h5") as file, pytest.raises(DamagedError, match="does not match its checksum"):
            file.check()
        assert tiled(slide, tmp_path).redone == "the file was damaged"


def test_a_damaged_tile_is_told_with_its_number_and_what_to_do(slide: Path, tmp_path: Path) -> None:
    tiled(slide, tmp_path)
    zero_pixels(tmp_path / "S.h5")
    with SlideFile(tmp_path / "S.h5") as file:
        wrong = []
        for i in range(len(file)):
            try:
                file.tile(i)
            except DamagedError as error:
                wrong.append(str(error))
        assert 0 < len(wrong) < len(file)
    assert wrong[0].endswith(
        "S.h5: damaged (tile 0 does not match its checksum): "
        "run odis-path tile again (import, for imported images): it is made anew"
    )


def test_damage_that_changed_no_time_is_seen_when_it_is_met_and_then_made_anew(slide: Path, tmp_path: Path) -> None:
    path = tmp_path / "S.h5"
    tiled(slide, tmp_path)
    times = path.stat().st_mtime_ns
    zero_pixels(path)
    os.utime(path, ns=(times, times))  # a disk that fails changes no time
    assert tiled(slide, tmp_path).skipped, "not all pixels of a cohort are read to see that it is done"
    with SlideFile(path) as file, pytest.raises(DamagedError):
        file.tile(0)
    assert tiled(slide, tmp_path).redone == "the file was damaged"


@pytest.mark.parametrize("name", ["boxes/xyxy", "boxes/object", "boxes/visible", "objects/label", "objects/area_um2"])
def test_damaged_boxes_are_told_and_made_anew_by_annotate(name: str, annotated: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(annotated, tmp_path / "S.h5"))
    before = contents(path)
    (outcome,) = annotate(tmp_path, annotated.parent / "S.geojson", polygons=True)
    assert outcome.skipped
    flip(path, place(path, name) + 1)
    with SlideFile(path) as file, pytest.raises(DamagedError, match=rf"/{name} .*run odis-path annotate \(or propose\) again"):
        file.check()
    (outcome,) = annotate(tmp_path, annotated.parent / "S.geojson", polygons=True)
    assert outcome.redone == "the file was damaged"
    assert contents(path) == before


def test_a_damaged_outline_is_told(annotated: Path, tmp_path: Path) -> None:
    for name in ("xy", "ring_offsets", "offsets", "crc32"):
        path = Path(shutil.copy(annotated, tmp_path / "S.h5"))
        flip(path, place(path, f"boxes/polygon/{name}") + 16)
        with SlideFile(path) as file, pytest.raises(DamagedError, match=r"polygon|outline"):
            all_outlines(file)


def test_damaged_proposals_are_made_anew_by_propose(slide: Path, tmp_path: Path) -> None:
    tiled(slide, tmp_path)
    propose(tmp_path)
    before = contents(tmp_path / "S.h5")
    flip(tmp_path / "S.h5", place(tmp_path / "S.h5", "boxes/xyxy") + 2)
    (outcome,) = propose(tmp_path)
    assert outcome.redone == "the file was damaged"
    assert contents(tmp_path / "S.h5") == before


def test_a_damaged_import_is_made_anew(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "im").mkdir()
    for number in range(3):
        Image.fromarray(np.full((128, 128, 3), 99 + number, np.uint8)).save(tmp_path / "im" / f"{number}.png")
    for fit in ("tiles", "crop"):
        out = tmp_path / fit
        import_images(tmp_path / "im", out, mpp=0.5, size=64, fit=fit)
        path = list_slide_files(out)[0]
        before = contents(path)
        assert all(outcome.skipped for outcome in import_images(tmp_path / "im", out, mpp=0.5, size=64, fit=fit))
        flip(path, place(path, "pixels/data") + 200)
        assert not all(outcome.skipped for outcome in import_images(tmp_path / "im", out, mpp=0.5, size=64, fit=fit))
        assert contents(path) == before


def test_a_copy_keeps_the_checksums_of_what_was_damaged(annotated: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(annotated, tmp_path / "S.h5"))
    zero_pixels(path)
    flip(path, path.read_bytes().index(b"Tumor"))  # a class name
    replace_groups(path, {"quality": None}, root_attrs={"patient_id": "P1"})
    with SlideFile(path) as file:
        assert file.patient_id == "P1"
        with pytest.raises(DamagedError, match="tile 0"):
            file.tile(0)
        with pytest.raises(DamagedError, match="labels of /objects"):
            file.objects_table()


def test_an_attribute_that_a_program_sets_is_no_damage(annotated: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(annotated, tmp_path / "S.h5"))
    with h5py.File(path, "r+") as file:
        file.attrs["patient_id"] = "set by hand"
        file.attrs["ours"] = "a note of somebody"
        file["coords"].attrs["name"] = "T"
    with SlideFile(path) as file:
        file.check()
        assert file.patient_id == "set by hand"


def test_a_file_of_an_earlier_version_is_read_and_annotated(annotated: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(annotated, tmp_path / "S.h5"))
    with h5py.File(path, "r+") as file:
        names: list[str] = []
        file.visit(names.append)
        for name in ("/", *names):
            for key in ("crc32", "attrs_crc32"):
                file[name].attrs.pop(key, None)
        del file["pixels/crc32"], file["boxes/polygon/crc32"]
    with SlideFile(path) as file:
        assert not file.has_checksums
        file.check()
        assert file.tile(0).shape == (64, 64, 3)
        assert file.polygon(0)
    (outcome,) = annotate(tmp_path, annotated.parent / "S.geojson", polygons=True)
    assert outcome.ok


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("objects/label", 99, "/objects/label does not fit"),
        ("objects/label", -2, "/objects/label does not fit"),
        ("boxes/object", 10_000, "/boxes/object does not fit"),
        ("boxes/offsets", 10_000, "/boxes/offsets does not fit"),
        ("pixels/offsets", 1 << 40, "/pixels/offsets does not fit"),
    ],
)
def test_numbers_that_point_beyond_are_told_without_checksums_too(
    name: str, value: int, says: str, annotated: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copy(annotated, tmp_path / "S.h5"))
    with h5py.File(path, "r+") as file:
        file[name][1] = value
        del file[name].attrs["crc32"]
    with SlideFile(path) as file, pytest.raises(DamagedError, match=says):
        file.check()


def test_no_raw_text_of_the_library_is_shown(annotated: Path, tmp_path: Path) -> None:
    """Of 200 files with a block of noise each none ends in anything but a line with the file and the remedy."""
    rng = np.random.default_rng(1)
    data = annotated.read_bytes()
    path = tmp_path / "S.h5"
    whole = contents(annotated)
    for _ in range(200):
        changed = bytearray(data)
        at = int(rng.integers(0, len(data)))
        changed[at : at + 16] = rng.bytes(len(changed[at : at + 16]))
        path.write_bytes(changed)
        try:
            with SlideFile(path) as file:
                file.check()
                all_outlines(file)
        except UserError as error:
            text = str(error)
        else:
            assert contents(path) == whole
            continue
        assert text.startswith(f"{path}: ")
        assert "again" in text
        assert "\n" not in text
        assert "synchronously" not in text


def test_a_file_without_tiles_has_checksums(tmp_path: Path) -> None:
    meta = SlideMeta("a", tmp_path / "a.svs", 100, 100, 0.5, 0.5, 64)
    write_slide_file(tmp_path / "a.h5", meta=meta, coords=np.zeros((0, 2), np.int64), pixels=[])
    with SlideFile(tmp_path / "a.h5") as file:
        file.check()
        assert file.has_checksums


def test_no_damage_to_texts_makes_hdf5_loop(annotated: Path, tmp_path: Path) -> None:
    """A damaged size in a heap of texts would: every 8 bytes of them are set to what makes the next one begin at itself."""
    data = annotated.read_bytes()
    with h5py.File(annotated, locking=False) as file:
        heaps = file.attrs["heaps"].tolist()
    assert heaps
    path, damaged_count = tmp_path / "S.h5", 0
    for address, size, _ in heaps:
        for at in range(address + 8, address + min(size, 2000), 8):
            path.write_bytes(data[:at] + (-16 % 2**64).to_bytes(8, "little") + data[at + 8 :])
            damaged_count += is_damaged(path)
    assert damaged_count > 100


def is_damaged(path: Path) -> bool:
    try:
        with SlideFile(path) as file:
            file.check()
    except DamagedError:
        return True
    return False
