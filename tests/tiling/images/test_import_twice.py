"""Imports at the same time share the work or are refused; and every image that is scanned is imported, or told."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from annotations.errors import UserError
from tests.tiling.jobs.test_dask import ROOT, Cluster
from tiling import SlideFile, import_images
from tiling.cohort.find_slides import IMAGE_EXTENSIONS, SLIDE_EXTENSIONS
from tiling.cohort.scan import scan
from tiling.images.listing import IMAGE_EXTENSIONS as IMPORTED
from tiling.images.listing import find_images
from tiling.storage.locks import lock_file

FITS = {"tiles": ["--size", "32"], "crop": ["--fit", "crop", "--size", "32", "--shard", "2"]}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two class folders of 20 images."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(40):
        path = folder / "AB"[number % 2] / f"i{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    return folder


def started(*words: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "odis_path", "import", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def counts(stdout: str) -> tuple[int, int, int]:
    """done, skipped and failed of a summary."""
    row = next(line for line in stdout.splitlines() if line.startswith("│"))
    done, skipped, failed = (int(cell) for cell in row.split("│")[1:4])
    return done, skipped, failed


def wait_for(condition: Callable[[], object], run: subprocess.Popen[str], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < end, "did not come about in time"
        time.sleep(0.01)


@pytest.mark.parametrize("fit", FITS)
def test_two_imports_at_once_do_the_work_once(fit: str, images: Path, tmp_path: Path) -> None:
    words = [images, "--mpp", "0.5", *FITS[fit]]
    both = [started(*words, "--out", tmp_path / "out") for _ in range(2)]
    ends = [run.communicate(timeout=300) for run in both]
    assert [run.returncode for run in both] == [0, 0], ends
    (done, skipped, failed), (done_too, skipped_too, failed_too) = (counts(stdout) for stdout, _ in ends)
    files = 40 if fit == "tiles" else 20
    assert (done + done_too, skipped + skipped_too, failed + failed_too) == (files, files, 0)
    alone = import_images(images, tmp_path / "alone", mpp=0.5, size=32, **({} if fit == "tiles" else {"fit": fit, "shard": 2}))
    assert len(alone) == files
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        path.name for path in (tmp_path / "alone").iterdir()
    )
    assert (tmp_path / "out" / "labels.csv").read_text() == (tmp_path / "alone" / "labels.csv").read_text()


OTHER: dict[str, tuple[str, list[str]]] = {
    "mpp": ("tiles", ["--mpp", "0.25", "--size", "32"]),
    "size_px": ("tiles", ["--mpp", "0.5", "--size", "16"]),
    "fit": ("tiles", ["--mpp", "0.5", *FITS["crop"]]),
    "shard": ("crop", ["--mpp", "0.5", "--fit", "crop", "--size", "32", "--shard", "3"]),
    "images": ("crop", ["--mpp", "0.5", *FITS["crop"]]),
    "manifest": ("tiles", ["--mpp", "0.5", "--size", "32", "--manifest", "M"]),
}


@pytest.mark.parametrize("what", OTHER)
def test_an_import_with_other_settings_is_refused_while_one_is_at_work(what: str, images: Path, tmp_path: Path) -> None:
    fit, other = OTHER[what]
    out, manifest = tmp_path / "out", tmp_path / "m.csv"
    manifest.write_text("image,patient_id\ni00.png,P1\n")
    given = images
    if what == "images":
        given = tmp_path / "others"
        for name in "AB":
            (given / name).mkdir(parents=True)
            (given / name / "x.png").write_bytes((images / "A" / "i00.png").read_bytes())
    last = out / ("i39.h5" if fit == "tiles" else "B-0009.h5")
    with lock_file(last):  # so that the first run is not done before this test lets it
        first = started(images, "--mpp", "0.5", *FITS[fit], "--out", out)
        wait_for(lambda: len(list(out.glob("*.h5"))) == (39 if fit == "tiles" else 19), first)
        second = started(given, *(word.replace("M", str(manifest)) for word in other), "--out", out)
        stdout, stderr = second.communicate(timeout=300)
        assert (second.returncode, stdout) == (2, ""), stderr
        assert re.search(rf"another run of odis-path import is at work here with other settings \(.*\b{what} ", stderr), stderr
        assert len(stderr.splitlines()) == 1
        assert first.stderr is not None
        assert any("waiting for another run" in line for line in first.stderr)  # it says so before this test lets it go on
    stdout, stderr = first.communicate(timeout=300)
    assert first.returncode == 0, stderr
    assert counts(stdout) == ((40 if fit == "tiles" else 20), 0, 0)


def test_parts_of_a_cohort_may_be_imported_side_by_side_but_not_images_of_one_name(images: Path, tmp_path: Path) -> None:
    """Without classes there is nothing that all images of a run decide; what another folder's image has made stays."""
    out = tmp_path / "out"
    both = [started(images / name, "--mpp", "0.5", "--size", "32", "--out", out) for name in "AB"]
    ends = [run.communicate(timeout=300) for run in both]
    assert [run.returncode for run in both] == [0, 0], ends
    assert len(list(out.glob("*.h5"))) == 40
    twin = tmp_path / "twin" / "i00.png"
    twin.parent.mkdir()
    twin.write_bytes((images / "B" / "i01.png").read_bytes())
    before = (out / "i00.h5").read_bytes()
    (outcome,) = import_images(twin.parent, out, mpp=0.5, size=32)
    assert not outcome.ok
    assert f"holds the tiles of another slide of this name, {images / 'A' / 'i00.png'}: give one of them" in outcome.message
    assert (out / "i00.h5").read_bytes() == before


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    pytest.importorskip("distributed")
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    cluster.worker("--no-nanny")
    yield cluster
    cluster.close()


@pytest.mark.parametrize("fit", FITS)
def test_on_a_cluster_it_is_the_same(fit: str, images: Path, cluster: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [images, "--mpp", "0.5", *FITS[fit], "--out", out, "--scheduler", cluster.address]
    both = [started(*words) for _ in range(2)]
    ends = [run.communicate(timeout=300) for run in both]
    assert [run.returncode for run in both] == [0, 0], ends
    files = 40 if fit == "tiles" else 20
    assert sum(counts(stdout)[0] for stdout, _ in ends) == files
    assert len(list(out.glob("*.h5"))) == files


# --- which images are read


def saved(folder: Path) -> dict[str, Path]:
    """An image of 32 pixels of each kind that is imported, by its suffix; what Pillow here cannot write is left out."""
    Image.init()
    rgb = Image.fromarray(np.random.default_rng(1).integers(0, 255, (4, 4, 3), dtype=np.uint8)).resize((32, 32))
    paths = {}
    for suffix in sorted(IMPORTED):
        path = folder / f"of{suffix[1:]}{suffix}"
        form = Image.registered_extensions().get(suffix, "TIFF")
        mode = {".pbm": "1", ".pgm": "L"}.get(suffix, "RGB")
        if (form == "WEBP" and not features.check("webp")) or (form == "AVIF" and not features.check("avif")):
            continue
        options: dict[str, Any] = {"lossless": True} if form == "WEBP" else {}
        rgb.convert(mode).save(path, form, **options)
        paths[suffix] = path
    return paths


@pytest.mark.parametrize("fit", ["tiles", "crop"])
def test_every_image_that_scan_reads_is_imported(fit: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert IMAGE_EXTENSIONS < IMPORTED
    (tmp_path / "in").mkdir()
    paths = saved(tmp_path / "in")
    assert {".webp", ".jp2", ".bmp", ".gif", ".btf", ".jfif"} <= paths.keys()
    assert all(row.ok for row in scan(list(paths.values()), tmp_path / "m.csv", workers=1))
    options: dict[str, Any] = {"fit": fit} if fit == "crop" else {}
    outcomes = import_images(tmp_path / "in", tmp_path / "out", mpp=0.5, size=32, **options)
    assert all(outcome.ok for outcome in outcomes), [outcome.message for outcome in outcomes]
    assert sum(outcome.info["tiles"] for outcome in outcomes) == len(paths)
    assert "left out" not in capsys.readouterr().err
    if fit == "tiles":
        with SlideFile(tmp_path / "out" / "ofwebp.h5") as file:
            wanted = np.asarray(Image.open(paths[".webp"])).astype(int)
            assert np.abs(file.tile(0).astype(int) - wanted).mean() < 3


def test_what_is_no_image_that_is_read_is_told_and_what_lies_beside_is_not(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    (folder / "below").mkdir(parents=True)
    for name in ("a.svs", "b.SVS", "below/c.heic", "d.xml", "e.json", "Thumbs.db", "README", ".hidden.heic"):
        (folder / name).touch()
    looked = " ".join(sorted(IMPORTED))
    with pytest.raises(UserError) as refused:
        find_images(folder)
    left_out = "left out: 1 .heic, 2 .svs (slides are cut by odis-path tile)"
    assert str(refused.value) == f"{folder}: holds no image (looked for {looked}, in its folders too); {left_out}"
    (folder / "x.png").write_bytes((images / "A" / "i00.png").read_bytes())
    assert [item.path.name for item in find_images(folder)] == ["x.png"]
    assert capsys.readouterr().err == f"{folder}: {left_out}\n"
    assert {".tif", ".tiff", ".btf"} == SLIDE_EXTENSIONS & IMPORTED
    with pytest.raises(UserError, match=r"a\.svs: not a PNG, JPEG, TIFF or other image"):
        find_images(folder / "a.svs")
