"""Slides behind a URL: a web server of this machine that gives ranges of bytes, and fsspec's own stores."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from annotations.errors import UserError
from tiling.cohort.find_slides import find_slides
from tiling.cohort.manifest import read_manifest
from tiling.cohort.scan import scan
from tiling.slide_file.read import SlideFile
from tiling.storage.paths import parse_path, restore_slashes, url_of, url_stamp
from tiling.storage.slide_id import slide_stem
from tiling.tiles.run import tile
from tiling.wsi.slide import Slide

OPTIONS: dict[str, Any] = {"mpp": 1.0, "size": 96, "workers": 1}


class Handler(SimpleHTTPRequestHandler):
    """Files of a folder, and parts of them, as shops of objects give them."""

    def log_message(self, *args: object) -> None:
        """Nothing."""

    def send_head(self) -> Any:
        path = Path(self.translate_path(self.path))
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None or not path.is_file():
            return super().send_head()
        size = path.stat().st_size
        start, stop = int(match[1]), min(size, int(match[2]) + 1) if match[2] else size
        self.send_response(206)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.end_headers()
        file = path.open("rb")
        file.seek(start)
        self.wfile.write(file.read(stop - start))
        file.close()
        return None


@pytest.fixture
def served(slide_path: Path, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Address and folder of a server with two slides, a/S.svs and b/S.svs."""
    pytest.importorskip("aiohttp", reason="fsspec reads http through it: pip install 'odis-path[http]'")
    folder = tmp_path / "www"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        shutil.copy(slide_path, folder / name / "S.svs")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    server.server_close()


def tiles_of(path: Path) -> np.ndarray:
    with SlideFile(path) as file:
        return np.stack([file.tile(i) for i in range(len(file))])


def test_scan_then_tile_from_a_web_server(served: tuple[str, Path], slide_path: Path, tmp_path: Path) -> None:
    server, _ = served
    manifest, out = tmp_path / "m.csv", tmp_path / "out"
    odis = [sys.executable, "-m", "odis_path"]
    urls = [f"{server}/a/S.svs", f"{server}/b/S.svs"]
    subprocess.run([*odis, "scan", *urls, "--out", manifest], check=True, capture_output=True)
    with manifest.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == urls
    assert [(row["slide_id"], row["reader"], row["mpp"], row["problem"]) for row in rows] == [
        ("a_S", "tiffslide", "0.5", ""),
        ("b_S", "tiffslide", "0.5", ""),
    ]
    words = ["tile", manifest, "--out", out, "--mpp", "1.0", "--size", "96", "--workers", "2"]
    subprocess.run([*odis, *words], check=True, capture_output=True)
    tile([slide_path], tmp_path / "local", reader="tiffslide", **OPTIONS)
    assert (tiles_of(out / "a_S.h5") == tiles_of(tmp_path / "local" / "painted.h5")).all()
    with SlideFile(out / "a_S.h5") as file:
        assert file.attrs["source"] == urls[0]
        assert file.attrs["source_size"] == slide_path.stat().st_size
    outcomes = tile([manifest], out, **OPTIONS)
    assert [outcome.skipped for outcome in outcomes] == [True, True]


def test_a_slide_that_changed_on_the_server_is_done_again(served: tuple[str, Path], tmp_path: Path) -> None:
    server, folder = served
    url = f"{server}/a/S.svs"
    (first,) = tile([url], tmp_path / "out", **OPTIONS)
    (second,) = tile([url], tmp_path / "out", **OPTIONS)
    os.utime(folder / "a" / "S.svs", (1, 1))  # same size, other Last-Modified
    (third,) = tile([url], tmp_path / "out", **OPTIONS)
    assert (first.ok, second.skipped, third.ok, third.skipped) == (True, True, True, False)
    assert third.redone == "the slide file changed"
    (other,) = tile([f"{server}/b/S.svs"], tmp_path / "out", **OPTIONS)  # equal size, another slide
    assert other.ok
    assert "changed" in other.redone


def test_a_folder_and_a_pattern_on_a_server_are_listed(served: tuple[str, Path]) -> None:
    server, folder = served
    (folder / "b" / "notes.txt").touch()
    items = find_slides([f"{server}/"])
    assert [(url_of(item.path), item.slide_id) for item in items] == [
        (f"{server}/a/S.svs", "a_S"),
        (f"{server}/b/S.svs", "b_S"),
    ]
    assert [url_of(item.path) for item in find_slides([f"{server}/b/*"])] == [f"{server}/b/S.svs"]
    for url, says in {f"{server}/none": "no slide is listed there", "nosuch://host": "cannot be listed"}.items():
        with pytest.raises(UserError, match=re.escape(f"{url}: {says}")):
            find_slides([url])


def test_a_bad_url_is_one_line(served: tuple[str, Path], tmp_path: Path) -> None:
    server, folder = served
    (folder / "broken.svs").write_bytes(b"IJrE" * 40)
    bad = {
        f"{server}/gone.svs": "is it there",
        f"{server}/broken.svs": "not a readable slide",
        "http://127.0.0.1:9/x.svs": "not a readable slide",
        "nosuch://host/y.svs": "not a readable slide",
    }
    for run in (partial(scan, out=tmp_path / "m.csv"), partial(tile, out=tmp_path / "out", **OPTIONS)):
        outcomes = run([f"{server}/a/S.svs", *bad])
        assert [outcome.ok for outcome in outcomes] == [True, False, False, False, False]
        for (url, says), outcome in zip(bad.items(), outcomes[1:], strict=True):
            assert outcome.message.startswith(f"{url}: ")
            assert says in outcome.message
            assert "\n" not in outcome.message


def test_tiles_are_read_from_the_url_where_none_are_stored(served: tuple[str, Path], tmp_path: Path) -> None:
    server, folder = served
    url = f"{server}/a/S.svs"
    tile([url], tmp_path / "stored", **OPTIONS)
    tile([url], tmp_path / "coords", pixels="none", **OPTIONS)
    assert np.abs(tiles_of(tmp_path / "coords" / "S.h5").astype(int) - tiles_of(tmp_path / "stored" / "S.h5")).mean() < 2
    (folder / "a" / "S.svs").unlink()
    with SlideFile(tmp_path / "coords" / "S.h5") as file, pytest.raises(UserError, match=re.escape(url)):
        file.tile(0)


def test_stores_without_a_server_and_files_by_url(slide_path: Path, tmp_path: Path) -> None:
    import fsspec

    for name in ("one.svs", "two.svs"):
        with fsspec.open(f"memory://cohort/{name}", "wb") as file:
            file.write(slide_path.read_bytes())
    assert [item.slide_id for item in find_slides(["memory://cohort/"])] == ["one", "two"]
    outcomes = tile(["memory://cohort/*.svs"], tmp_path / "out", **OPTIONS)
    assert [outcome.ok for outcome in outcomes] == [True, True]
    assert all(outcome.skipped for outcome in tile(["memory://cohort/"], tmp_path / "out", **OPTIONS))
    (outcome,) = tile([f"file://{slide_path}"], tmp_path / "local", **OPTIONS)
    assert outcome.info["reader"] == "direct"  # a file of this machine is one, however it is named
    manifest = tmp_path / "m.csv"
    manifest.write_text(f"path,slide_id\nmemory://cohort/one.svs,\nfile://{slide_path},\n")
    assert [(item.slide_id, str(item.path)) for item in read_manifest(manifest)][1] == ("painted", str(slide_path))
    assert url_of(read_manifest(manifest)[0].path) == "memory:///cohort/one.svs"


def test_names_times_and_messages_of_urls() -> None:
    import fsspec

    assert slide_stem(Path("https://host/x/S1.svs?signature=a.b/c")) == "S1"
    assert parse_path("file:///x/a.svs") == Path("/x/a.svs")
    assert restore_slashes("http:/h/a.svs: bad (s3:/b/c), C:/x, a:/b, https://h/d") == (
        "http://h/a.svs: bad (s3://b/c), C:/x, a:/b, https://h/d"
    )
    assert url_stamp("memory://nothing/here.svs") == url_stamp("nosuch://x/y.svs") == (-1, -1)
    with fsspec.open("memory://a/stamp.svs", "wb") as file:
        file.write(b"1234")
    first = url_stamp("memory://a/stamp.svs")
    with fsspec.open("memory://a/stamp.svs", "wb") as file:
        file.write(b"5678")
    again = url_stamp("memory://a/stamp.svs")
    assert first[0] == again[0] == 4
    assert first[1] != again[1]
    with pytest.raises(UserError, match=r"memory:///a/stamp\.svs"):
        Slide.open("memory://a/stamp.svs")
