"""What users give to scan and tile: their slides, manifests and folders, and what must not become of them."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from annotations.errors import UserError
from tiling.cohort import find_slides as find
from tiling.cohort.find_slides import find_slides, series_uid
from tiling.cohort.manifest import read_manifest
from tiling.cohort.scan import scan, slide_items
from tiling.jobs.dask import run_dask
from tiling.jobs.outcome import Job, Outcome
from tiling.slide_file.read import SlideFile
from tiling.storage.atomic import atomic_path
from tiling.storage.paths import parse_path
from tiling.tiles.run import tile

OPTIONS = {"mpp": 1.0, "size": 64, "workers": 1}
DRAWN = {
    "type": "FeatureCollection",
    "features": [
        {
            "type": "Feature",
            "properties": {},
            "geometry": {"type": "Polygon", "coordinates": [[[200, 200], [800, 200], [800, 600], [200, 600], [200, 200]]]},
        }
    ],
}


def tiled(slide: Path | str, out: Path, **options: object) -> Outcome:
    (outcome,) = tile([slide], out, **(OPTIONS | options))
    return outcome


def ids(*inputs: Path | str) -> list[str]:
    return [item.slide_id for item in find_slides(inputs)]


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """A folder with an outline of the slide `painted`, drawn by hand."""
    (tmp_path / "drawn").mkdir()
    (tmp_path / "drawn" / "painted.geojson").write_text(json.dumps(DRAWN))
    return tmp_path / "drawn"


# --- outlines of the tissue stay the user's


@pytest.mark.parametrize("option", ["tissue", "exclude"])
def test_tissue_is_not_written_where_outlines_are_read(slide_path: Path, drawn: Path, tmp_path: Path, option: str) -> None:
    (tmp_path / "link").symlink_to(drawn)
    with pytest.raises(UserError, match=f"--tissue-out .*: is the folder of --{option}"):
        tiled(slide_path, tmp_path / "out", tissue_out=tmp_path / "link", **{option: drawn})
    assert json.loads((drawn / "painted.geojson").read_text()) == DRAWN


def test_what_was_drawn_by_hand_is_neither_overwritten_nor_removed(slide_path: Path, drawn: Path, tmp_path: Path) -> None:
    outcome = tiled(slide_path, tmp_path / "out", tissue_out=drawn)
    assert not outcome.ok
    assert f"{drawn / 'painted.geojson'}: is not what this run writes" in outcome.message
    assert json.loads((drawn / "painted.geojson").read_text()) == DRAWN
    assert not (tmp_path / "out" / "painted.h5").exists()


def test_outlines_of_a_run_are_replaced_by_the_next_unless_they_were_corrected(slide_path: Path, tmp_path: Path) -> None:
    out, outlines = tmp_path / "out", tmp_path / "outlines"
    target = outlines / "painted.geojson"
    assert tiled(slide_path, out, tissue_out=outlines).ok
    content = target.read_bytes()
    assert tiled(slide_path, out, tissue_out=outlines, min_tissue=0.2).ok  # the same tissue
    assert target.read_bytes() == content
    shutil.rmtree(out)
    assert tiled(slide_path, out, tissue_out=outlines).ok  # nothing vouches for it, but the same is to be written
    exclude = tmp_path / "exclude"
    exclude.mkdir()
    (exclude / "painted.geojson").write_text(json.dumps(DRAWN))
    assert tiled(slide_path, out, tissue_out=outlines, exclude=exclude).ok  # other tissue: the slide file vouches
    assert target.read_bytes() != content
    target.write_text(json.dumps(DRAWN))
    assert not tiled(slide_path, out, tissue_out=outlines).ok
    assert json.loads(target.read_text()) == DRAWN


def test_outlines_are_the_same_after_a_run_that_ended_before_them(
    slide_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide, out, outlines = shutil.copy(slide_path, tmp_path / "painted.svs"), tmp_path / "out", tmp_path / "outlines"
    assert tiled(slide, out, tissue_out=outlines).ok
    content = (outlines / "painted.geojson").read_bytes()
    for part in ("SlideFileWriter", "write_tissue"):
        with monkeypatch.context() as patch:
            patch.setattr(f"tiling.tiles.run.{part}", lambda *_, **__: 1 / 0)
            os.utime(slide)
            assert not tiled(slide, out, tissue_out=outlines).ok
        assert tiled(slide, out, tissue_out=outlines).ok
        assert (outlines / "painted.geojson").read_bytes() == content


def test_a_file_in_place_of_the_folder_for_outlines_is_told_before_any_work(slide_path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--tissue-out .*file: cannot be the output folder"):
        tiled(slide_path, tmp_path / "out", tissue_out=tmp_path / "file")


def test_an_outline_that_cannot_be_read_is_one_line(
    slide_path: Path, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "read_bytes", denied)
    outcome = tiled(slide_path, tmp_path / "out", tissue=drawn)
    assert outcome.message.startswith(f"{drawn / 'painted.geojson'}: cannot be read: Permission denied")


def denied(path: Path, *_: object, **__: object) -> None:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


# --- relative paths


def test_relative_folders_and_slides_are_those_of_the_command(
    slide_path: Path, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(slide_path, tmp_path / "painted.svs")
    (tmp_path / "m.csv").write_text("path\npainted.svs\n")
    seen: list[tuple] = []
    monkeypatch.setattr("tiling.tiles.run.run_cohort", lambda items, work, **_: seen.append((items, work)) or [])
    monkeypatch.chdir(tmp_path)
    for inputs in (["painted.svs"], ["m.csv"]):
        tile(inputs, "out", 1.0, 64, tissue="drawn", exclude="drawn", tissue_out="new", scheduler="tcp://nobody")
        tile(inputs, "out", 1.0, 64)
    (tmp_path / "worker").mkdir()
    monkeypatch.chdir(tmp_path / "worker")
    for items, work in seen:
        assert [item.path for item in items] == [tmp_path / "painted.svs"]
        settings = work.keywords["settings"]
        if settings.tissue == "auto":
            assert settings.exclude == settings.tissue_out == ""
            continue
        assert [settings.tissue, settings.exclude] == [str(drawn)] * 2
        assert settings.tissue_out == str(tmp_path / "new")


@pytest.mark.parametrize("absolute", [False, True])
def test_a_manifest_is_tiled_from_anywhere(
    slide_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absolute: bool
) -> None:
    slide = tmp_path / "t" / "x.svs"
    slide.parent.mkdir()
    shutil.copy(slide_path, slide)
    (tmp_path / "else" / "where").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    given = slide if absolute else "t/x.svs"
    written = {}
    for manifest in ("m.csv", "else/where/m.csv", "t/m.csv", "else/../up.csv"):
        assert scan([given], manifest)[0].ok
        with (tmp_path / manifest).open() as file:
            written[manifest] = next(csv.DictReader(file))["path"]
    monkeypatch.chdir(tmp_path / "else")
    for manifest in written:
        (item,) = read_manifest(Path("..") / manifest)
        assert item.path.resolve() == slide
    short = {"m.csv": "t/x.svs", "t/m.csv": "x.svs"}  # a folder of slides and their manifest may be moved
    assert written == {name: str(slide) if absolute else short.get(name, str(slide)) for name in written}


# --- DICOM


def element(tag: int, kind: bytes, value: bytes, length: int | None = None) -> bytes:
    head = struct.pack("<HH2s", tag >> 16, tag & 0xFFFF, kind)
    size = len(value) if length is None else length
    return head + (struct.pack("<HI", 0, size) if kind in (b"SQ", b"OB", b"UN") else struct.pack("<H", size)) + value


def dicom(series: bytes, syntax: bytes = b"1.2.840.10008.1.2.1") -> bytes:
    """The first elements of a DICOM file; before the series it refers to another one, in a sequence of unknown length."""
    other = element(0x0020000E, b"UI", b"9.9.9.9\0")
    item = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF) + other + struct.pack("<HHI", 0xFFFE, 0xE00D, 0)
    sequence = element(0x00081115, b"SQ", item + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0), 0xFFFFFFFF)
    known = element(0x00081140, b"SQ", struct.pack("<HHI", 0xFFFE, 0xE000, len(other)) + other)
    meta = element(0x00020010, b"UI", syntax.ljust(20, b"\0"))
    return (
        bytes(128) + b"DICM" + meta + sequence + known + element(0x0020000E, b"UI", series) + element(0x00200010, b"SH", b"1 ")
    )


def test_a_dicom_series_is_one_slide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, series in {"a/1.dcm": b"1.2.3\0", "a/2.dcm": b"1.2.3\0", "a/3.dcm": b"1.2.4\0", "b/1.dcm": b"1.2.3\0"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(dicom(series))
    (tmp_path / "a" / "none.dcm").write_bytes(b"no DICOM")
    (tmp_path / "a" / "zero.dcm").write_bytes(bytes(128) + b"DICM" + bytes(5 << 20))
    assert ids(tmp_path) == ["a_1", "3", "none", "zero", "b_1"]
    assert capsys.readouterr().err == "1 of 6 files left out: each belongs to the DICOM series of another and is read with it\n"
    assert ids(tmp_path / "a" / "2.dcm", tmp_path / "a" / "1.dcm") == ["2"]


def test_the_series_of_a_dicom_file_is_what_openslide_says(test_data: Path) -> None:
    openslide = pytest.importorskip("openslide")
    path = test_data / "slides" / "camelyon_jp2k.dcm"
    with openslide.OpenSlide(str(path)) as slide:
        assert series_uid(path) == slide.properties["dicom.SeriesInstanceUID"]


def test_headers_of_lone_dicom_files_and_others_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiling.cohort.find_slides.series_uid", lambda _: 1 / 0)
    for name in ("a.svs", "b.svs", "c.dcm"):
        (tmp_path / name).touch()
    assert ids(tmp_path) == ["a", "b", "c"]


# --- names


def test_names_come_of_the_folders_that_are_meant_and_are_never_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("g/x.svs", "g/A/x.svs", "g/.h/y.svs", "g/z/y.svs", "g/.w.svs"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path / "g" / "A")
    assert ids("../x.svs", "x.svs") == ["g_x", "A_x"]
    assert ids("x.svs", "../A/x.svs", tmp_path / "g" / "A") == ["x"]
    assert ids("../.h/y.svs", "../z/y.svs") == ["h_y", "z_y"]
    assert ids("../.w.svs") == ["w"]


def test_a_slide_that_lies_in_the_folder_under_another_name_is_told(slide_path: Path, tmp_path: Path) -> None:
    one, other, out = tmp_path / "g" / "A" / "x.svs", tmp_path / "g" / "B" / "x.svs", tmp_path / "out"
    for slide in (one, other):
        slide.parent.mkdir(parents=True)
        shutil.copy(slide_path, slide)
    assert tiled(one, out).message == ""
    first, second = tile([one, other], out, **OPTIONS)
    assert f"{out / 'x.h5'} and {out / 'A_x.h5'} are of the same slide, {one}" in first.message
    assert (second.ok, second.message) == (True, "")


def test_a_path_of_a_url_is_decoded() -> None:
    assert parse_path("file:///a/x%20y.svs") == Path("/a/x y.svs")
    assert str(parse_path("https://host/x%20y.svs")).endswith("x%20y.svs")


def test_a_folder_of_images_is_told_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.png").touch()
    with pytest.raises(UserError, match=r"holds no slide .*odis-path import; .*'.*/p/\*\.png'"):
        find_slides([tmp_path])
    (tmp_path / "p" / "a.png").unlink()
    with pytest.raises(UserError, match=r"in its folders too\)$"):
        find_slides([tmp_path])


# --- manifests


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("path,patient_id\na.svs,Müller\n".encode("cp1252"), "line 2: is not UTF-8: save it as CSV UTF-8"),
        ("path\na.svs\n".encode("utf-16"), "line 1: is not UTF-8: save it as CSV UTF-8"),
        ("path\na.svs\n".encode("utf-16-le"), "line 1: holds a NUL: save it as CSV UTF-8"),
        (b'path\n"' + b"a" * 200_000, "after line 1: field larger than field limit"),
        (b'path,slide_id\na.svs,"a\nb"\n', "slide_id a b cannot be a file name"),
        (b"path,slide_id\na.svs,.b\n", "slide_id .b cannot be a file name"),
        (b"path,slide_id\na.svs," + b"b" * 201, "is 201 bytes long"),
        (b"path,mpp\na.svs,0.5\nb.svs,\na.svs,0.25\n", "lines 2 and 4: slide_id a stands there twice with other values"),
        (b"path,patient_id\na.svs,P1\na.svs,P2\n", "lines 2 and 3: slide_id a stands there twice"),
    ],
)
def test_a_manifest_that_cannot_be_is_one_line(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "m.csv").write_bytes(content)
    with pytest.raises(UserError) as error:
        slide_items([tmp_path / "m.csv"])
    assert f"{tmp_path / 'm.csv'}: " in str(error.value)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_manifest_that_cannot_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UserError, match=r"folder\.csv: cannot be read: Is a directory"):
        read_manifest(tmp_path / "folder.csv")
    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(UserError, match=r"m\.csv: cannot be read: Permission denied"):
        read_manifest(tmp_path / "m.csv")


def test_rows_that_say_the_same_twice_are_one(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("path,mpp\na.svs,0.5\nb.svs,\na.svs,0.50\nb.svs,\n")
    assert [item.slide_id for item in read_manifest(tmp_path / "m.csv")] == ["a", "b"]


# --- folders without the right to them


def test_a_folder_that_may_not_be_searched_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_dir", denied)
    with pytest.raises(UserError, match=r"a\.svs: cannot be looked into: Permission denied"):
        find.find_slides([tmp_path / "secret" / "a.svs"])


def test_scan_finds_out_that_it_cannot_write_before_it_reads(
    slide_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiling.cohort.scan.run_cohort", lambda *_, **__: pytest.fail("slides were read"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"m\.csv: cannot be written: .*(exists|directory)"):
        scan([slide_path], tmp_path / "file" / "m.csv")
    monkeypatch.setattr(Path, "touch", denied)
    with pytest.raises(UserError, match=r"m\.csv: cannot be written: Permission denied"):
        scan([slide_path], tmp_path / "m.csv")


def test_a_file_that_cannot_be_opened_for_writing_is_one_line(
    slide_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        pytest.raises(UserError, match=r"a\.txt: cannot be written: Permission denied"),
        atomic_path(tmp_path / "a.txt") as new,
    ):
        denied(new)
    with pytest.raises(PermissionError), atomic_path(tmp_path / "a.txt"):
        denied(tmp_path / "what the block reads")
    monkeypatch.setattr("tiling.storage.hdf5._Sink", denied)
    outcome = tiled(slide_path, tmp_path / "out")
    assert outcome.message.startswith(f"{tmp_path / 'out' / 'painted.h5'}: cannot be written: Permission denied")


# --- what else cannot be


@pytest.mark.parametrize("content", [b'{"a": 1}', b'{"address": 3}', b"[]", b"not json", b"\xff\xfe"])
def test_a_file_that_names_no_scheduler_is_one_line(tmp_path: Path, content: bytes) -> None:
    pytest.importorskip("distributed")
    (tmp_path / "s.json").write_bytes(content)
    with pytest.raises(UserError, match=r"--scheduler .*s\.json: names no scheduler"):
        run_dask(Job([], [], dict, None, print), str(tmp_path / "s.json"))  # type: ignore[arg-type]


@pytest.mark.parametrize("reader", ["direct", "openslide"])
def test_a_tile_wider_than_any_memory_is_one_line(
    make_slide: Callable[..., Path], picture: np.ndarray, tmp_path: Path, reader: str
) -> None:
    slide = make_slide(tmp_path / "s.svs", picture)
    outcome = tiled(slide, tmp_path / "out", mpp=1e9, reader=reader)
    assert outcome.ok, outcome.message
    assert "no tiles: one is 128000000000 level-0 pixels wide, the slide 1024 x 768" in outcome.message
    with SlideFile(tmp_path / "out" / "s.h5") as file:
        assert len(file) == 0
