"""Damaged annotation files by the hundred thousand: each is read, or refused in one line; nothing crashes or goes missing.

    python experiments/fuzz_annotations.py --inputs 100000 --seed 0

Half of the inputs are documents that hypothesis grows (GeoJSON with anything anywhere), half are sound files of every
dialect with bytes, tokens and keys cut, doubled, swapped and replaced. Of each it is checked that
- reading ends with a table or a UserError of one line, within SLOW_S seconds;
- outlines are valid and have area; every feature is a row or is counted;
- the same file cut into parts (as large ones are) gives the same objects and boxes, or is refused as well;
- the groups of a slide file can be written (every seventh).
Prints what was found, each kind of failure once with an input that shows it, and ends with 1 where there was one.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import random
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import shapely
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as with_seed
from hypothesis import strategies as st

from annotations.errors import UserError
from annotations.objects import KindOption
from annotations.readers.geojson import large_file
from annotations.readers.geojson.large_file import split_features
from annotations.readers.options import ReadOptions
from annotations.readers.read import read_annotations
from annotations.slide_groups import annotation_groups
from tiling.slide_file.write import write_group

SLOW_S = 5.0
LOSSES = (
    "ignored",
    "points_skipped",
    "lines_skipped",
    "empty",
    "malformed",
    "invalid_dropped",
    "zero_area",
    "beyond",
    "vertices_dropped",
    "tangled",
    "repeated",
    "unlisted_image",
    "holes",
    "holes_dropped",
)
KINDS: tuple[KindOption, ...] = ("auto", "cell", "tissue")
GRID = large_file.Grid(np.array([[x, y] for y in (0, 40, 80) for x in (0, 40, 80)]), 50.0, 32, (200.0, 200.0), polygons=True)
TOKENS = (
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b"1e308",
    b"-1e400",
    b"null",
    b"true",
    b"[]",
    b"{}",
    b'""',
    b"0",
    b"-0.0",
    b"1" * 5000,
    b"[",
    b"]",
    b"{",
    b"}",
    b",",
    b":",
    b'"',
    b"\\",
    b"\\u0000",
    b"\\ud800",
    b"\x00",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xe9",
    b'"type"',
    b'"Feature"',
    b'"geometry"',
    b'"features"',
    b'"coordinates"',
    b'"Polygon"',
    b'"Point"',
    b'"GeometryCollection"',
    b'"geometries"',
    b'"properties"',
    b'"childObjects"',
    b'"id"',
    b'"classification"',
    b"<",
    b"&a;",
    b"[[[[[[[[",
    b"1,2",
)


def polygon(x: float, y: float, side: float = 20) -> dict[str, Any]:
    ring = [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]
    return {"type": "Polygon", "coordinates": [ring]}


def xml_seeds() -> list[bytes]:
    """Sound files of ASAP, ImageScope, HALO and NDPA."""
    texts = []
    corners = "".join(f'<Coordinate Order="{i}" X="{x}" Y="{y},5"/>' for i, (x, y) in enumerate([(5, 5), (50, 5), (50, 50)]))
    asap = f'<ASAP_Annotations><Annotations><Annotation Name="a" Type="Polygon" PartOfGroup="Tumor"><Coordinates>{corners}'
    texts.append(f"{asap}</Coordinates></Annotation></Annotations></ASAP_Annotations>".encode())
    corners = "".join(f'<Vertex X="{x}" Y="{y}"/>' for x, y in [(5, 5), (50, 5), (50, 50)])
    scope = f'<Annotations><Annotation Name="Tumor"><Regions><Region NegativeROA="0"><Vertices>{corners}</Vertices></Region>'
    texts.append(f"{scope}</Regions></Annotation></Annotations>".encode())
    corners = '<V X="5" Y="5"/><V X="50" Y="50"/>'
    halo = f'<Annotations><Annotation Name="Tumor"><Regions><Region Type="Ellipse"><Vertices>{corners}</Vertices></Region>'
    halo += f'<Region Type="Rectangle" NegativeROA="1"><Vertices>{corners}</Vertices></Region>'
    texts.append(f"{halo}</Regions></Annotation></Annotations>".encode())
    corners = "".join(f"<point><x>{x}</x><y>{y}</y></point>" for x, y in [(5, 5), (50, 5), (50, 50)])
    ndpa = f'<annotation type="freehand"><pointlist>{corners}</pointlist></annotation>'
    ndpa = f'<ndpviewstate id="1"><title>Tumor</title><coordformat>pixels</coordformat>{ndpa}</ndpviewstate>'
    texts.append(f"<annotations>{ndpa}</annotations>".encode())
    return texts


def seeds() -> list[bytes]:
    """Sound files of every dialect."""

    def feature(geometry: Any, **more: Any) -> dict[str, Any]:
        properties = {"objectType": "detection", "classification": {"name": "Tumor", "color": [200, 0, 0]}}
        return {"type": "Feature", "id": "a1", "geometry": geometry, "properties": properties, **more}

    multi = {"type": "MultiPolygon", "coordinates": [polygon(5, 5)["coordinates"], polygon(60, 30)["coordinates"]]}
    hole = {"type": "Polygon", "coordinates": [polygon(0, 0, 90)["coordinates"][0], polygon(10, 10)["coordinates"][0]]}
    points = {"type": "MultiPoint", "coordinates": [[3, 4], [50, 60]]}
    nested = {
        "type": "GeometryCollection",
        "geometries": [polygon(1, 1), {"type": "GeometryCollection", "geometries": [points]}],
    }
    plain = [feature(polygon(10 * i, 7 * i)) for i in range(8)]
    mixed = [feature(multi), feature(hole), feature(points), feature(None), feature(nested), feature(polygon(1, 2), id=None)]
    parent = feature(polygon(0, 0, 50))
    parent["properties"]["childObjects"] = [feature(polygon(3, 3)), feature(polygon(9, 9), nucleusGeometry=polygon(12, 12, 5))]
    cells = [{"bbox": [[5, 5], [25, 25]], "contour": polygon(5, 5)["coordinates"][0], "type": 1, "type_prob": 0.9}]
    nuc = {"1": {"bbox": [[5, 5], [25, 25]], "centroid": [15, 15], "contour": [[5, 5], [25, 5], [25, 25]], "type": 1}}
    boxes = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 20, 20], "segmentation": [[5, 5, 25, 5, 25, 25]]}]
    runs = {"size": [200, 200], "counts": [2010, *[20, 180] * 20, 20, 200 * 200 - 2010 - 200 * 20 - 20]}
    masks = [{**boxes[0], "id": 2, "segmentation": runs}]
    masks.append({**masks[0], "id": 3, "segmentation": {"size": [20, 20], "counts": "T23a0"}})
    masks.append({"id": 4, "image_id": 9, "iscrowd": 1})
    coco = {"images": [{"id": 1, "file_name": "s.svs", "width": 200, "height": 200}], "annotations": boxes + masks}
    documents: list[Any] = [
        {"type": "FeatureCollection", "features": plain},
        plain,
        {"type": "FeatureCollection", "features": mixed},
        mixed,
        parent,
        {"type": "FeatureCollection", "features": [parent, *plain]},
        nested,
        {"cells": cells, "type_map": {"1": "Tumor"}},
        {"mag": 40, "nuc": nuc},
        {**coco, "categories": [{"id": 1, "name": "nucleus"}]},
    ]
    sets = [feature(multi), feature({**multi, "coordinates": multi["coordinates"][:1]})]  # CellViT's cells.geojson
    for one, name in zip(sets, ("Neoplastic", "Dead"), strict=True):
        one["properties"] = {"objectType": "annotation", "classification": {"name": name, "color": [1, 2, 3]}}
    sure = [feature(polygon(5, 5)), feature(polygon(40, 5)), feature(polygon(5, 40))]
    sure[0]["properties"] |= {"measurements": {"Area": 7.5, "Detection probability": 0.8}}
    sure[1]["properties"] |= {"measurements": [{"name": "Score", "value": "NaN"}], "prob": 0.5}
    sure[2]["properties"] |= {"score": 0.25}
    packed_class = feature(polygon(5, 5))
    packed_class["properties"] |= {"classification": '{ "name": "Tumor", "color": [ 1, 2, 3 ] }', "measurements": '{"Area": 7}'}
    documents += [{"type": "FeatureCollection", "features": [packed_class] * 3}]
    documents += [sets, sure, [{"image_id": 1, "category_id": 2, "bbox": [5, 5, 20, 20], "score": 0.5}]]
    text = [json.dumps(document).encode() for document in documents]
    text += [json.dumps(documents[0], indent=1).encode(), json.dumps(documents[0], separators=(",", ":")).encode()]
    text += xml_seeds()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.geojson", text[0])
    return [*text, gzip.compress(text[0], mtime=0), packed.getvalue(), text[0].decode().encode("utf-16")]


def damaged(data: bytes, rng: random.Random) -> bytes:
    """A file with one to six accidents."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        a, b = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
        b = min(b, a + rng.choice((1, 4, 30, 300)))
        token = rng.choice(TOKENS)
        at = data.find(rng.choice(TOKENS), a)
        kind = rng.randrange(8)
        if kind == 0:
            data = data[:a]
        elif kind == 1:
            data = data[:a] + data[b:]
        elif kind == 2:
            data = data[:b] + data[a:b] * rng.choice((1, 2, 5)) + data[b:]
        elif kind == 3:
            data = data[:a] + token + data[b:]
        elif kind == 4:
            data = data[:a] + token + data[a:]
        elif kind == 5 and at >= 0:
            data = data[:at] + token + data[at + rng.randrange(12) :]
        elif kind == 6 and data:
            data = data[:a] + bytes([rng.randrange(256)]) + data[a + 1 :]
        else:
            numbers = [i for i in range(a, min(len(data), a + 400)) if data[i : i + 1].isdigit()]
            if numbers:
                i = rng.choice(numbers)
                data = (
                    data[:i]
                    + rng.choice((b"NaN", b"1e308", b"-5", b"1e9", b"0.1", b"null", b'"7"', b"9" * 400))
                    + data[i + 1 :]
                )
    return data


numbers = st.one_of(st.integers(-50, 250), st.floats(), st.integers(), st.sampled_from([1e308, -1e9, 1e9, 1e-300]))
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=5)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
position = st.one_of(
    st.tuples(numbers, numbers), st.tuples(st.integers(0, 99), st.integers(0, 99)), st.lists(numbers, max_size=4)
)
ring = st.one_of(
    st.lists(position, max_size=8), st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), min_size=3, max_size=9)
)
rings = st.lists(ring, max_size=3)
coordinates = {
    "Point": position,
    "MultiPoint": ring,
    "LineString": ring,
    "MultiLineString": rings,
    "Polygon": rings,
    "MultiPolygon": st.lists(rings, max_size=3),
}
simple = st.one_of(
    *(st.fixed_dictionaries({"type": st.just(name), "coordinates": value | anything}) for name, value in coordinates.items())
)
geometry = st.recursive(
    simple,
    lambda inner: st.fixed_dictionaries({"type": st.just("GeometryCollection"), "geometries": st.lists(inner, max_size=3)}),
    max_leaves=4,
)
name = st.one_of(st.text(max_size=4), st.sampled_from(["Tumor", "annotation", "cell", "tile", "root"]), anything)
sure_name = st.sampled_from(["Detection probability", "score", "Area"])
properties = st.fixed_dictionaries(
    {},
    optional={
        "objectType": name,
        "type": name,
        "classification": st.fixed_dictionaries({"name": name}) | name,
        "names": anything,
        "measurements": st.dictionaries(sure_name, numbers | anything, max_size=3) | anything,
        "score": numbers | anything,
        "prob": anything,
    },
)
feature = st.fixed_dictionaries(
    {"type": st.just("Feature"), "geometry": geometry | anything, "properties": properties | anything},
    optional={
        "id": st.one_of(st.text(max_size=3), st.integers(), st.sampled_from(["PathCellObject", "TMACoreObject"]), anything)
    },
)
features = st.lists(feature | anything, max_size=6) | st.lists(feature, max_size=6)
document = st.one_of(
    st.fixed_dictionaries({"type": st.just("FeatureCollection"), "features": features}), features, feature, geometry, anything
)


def check(path: Path, options: ReadOptions, store: bool) -> str:
    """What became of one file: "read" or "refused". Raises AssertionError, or whatever got loose."""
    whole = read_or_refuse(lambda: large_file.clip_file(path, GRID, options))
    chunks = split_features(path, chunk_bytes=200)
    if chunks is not None:
        parts = [part for chunk in chunks if (part := large_file.clip_chunk(chunk, GRID, options)) is not None]
        if len(parts) == len(chunks):
            # The text of what is passed over is looked at only where something else in the file is odd.
            if isinstance(whole, str) and "not JSON in utf-8" in whole:
                return "refused"
            assert not isinstance(whole, str), f"refused whole ({whole}), read in parts"
            same(whole, large_file.join_chunks(parts, GRID))
    if isinstance(whole, str):
        return "refused"
    table = read_annotations(path, options)
    assert shapely.is_valid(table.geometry).all(), "an outline is not valid"
    assert (shapely.area(table.geometry) > 0).all(), "an outline has no area"
    assert np.isin(shapely.get_type_id(table.geometry), (3, 6)).all(), "an outline is no polygon"
    counts = table.counts
    rows = len(table) - counts.get("exploded", 0)
    assert rows + sum(counts.get(key, 0) for key in LOSSES) >= counts.get("features", 0), (
        f"features went missing: {len(table)}, {counts}"
    )
    if not store:
        return "read"
    groups = annotation_groups(whole.table, whole.boxes[0], 0.25)
    with h5py.File("fuzz", "w", driver="core", backing_store=False) as file:
        for key, content in groups.items():
            write_group(file, key, content)
    return "read"


def read_or_refuse(read: Callable[[], large_file.Clipped]) -> Any:
    """What was read, or the line that it was refused with."""
    try:
        return read()
    except UserError as error:
        message = str(error)
        assert "\n" not in message, f"a message of several lines: {message!r}"
        assert len(message) < 1000, f"a message of {len(message)} characters"
        message.encode()
        return message


def same(whole: large_file.Clipped, parts: large_file.Clipped) -> None:
    a, b = whole.table, parts.table
    assert a.id.tolist() == [key.replace("\0", "\ufffd") for key in b.id.tolist()], "ids differ when read in parts"
    assert a.label.tolist() == b.label.tolist(), "labels differ when read in parts"
    assert a.kind.tolist() == b.kind.tolist(), "kinds differ when read in parts"
    nothing = np.full(len(a), np.nan, np.float32)
    first, second = (nothing if table.confidence is None else table.confidence for table in (a, b))
    assert np.array_equal(first, second, equal_nan=True), "confidence differs when read in parts"
    assert a.log.notes == b.log.notes, "notes differ when read in parts"
    assert a.counts == b.counts, f"counts differ when read in parts: {a.counts} {b.counts}"
    assert np.array_equal(whole.boxes[0].xyxy, parts.boxes[0].xyxy), "boxes differ when read in parts"
    assert np.array_equal(whole.boxes[0].object, parts.boxes[0].object), "objects of boxes differ when read in parts"


class Outcomes:
    """Outcomes counted; each kind of failure once, with the input."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "a.geojson"
        self.counts: Counter[str] = Counter()
        self.failures: dict[str, tuple[bytes, str]] = {}
        self.slowest = 0.0

    def take(self, data: bytes, number: int) -> None:
        self.path.write_bytes(data)
        options = ReadOptions(kind=KINDS[number % 3], point_size_l0=(None, 4.0)[number % 2])
        begin = time.perf_counter()
        try:
            self.counts[check(self.path, options, store=number % 7 == 0)] += 1
        except Exception as error:
            frames = [f"{Path(f.filename).name}:{f.name}" for f in traceback.extract_tb(error.__traceback__)]
            key = f"{type(error).__name__} in {' > '.join(frames[-3:])}"
            self.counts["failed"] += 1
            if key not in self.failures or len(data) < len(self.failures[key][0]):
                self.failures[key] = (data, str(error)[:300])
        seconds = time.perf_counter() - begin
        self.slowest = max(self.slowest, seconds)
        if seconds > SLOW_S:
            self.failures.setdefault("slow", (data, f"{seconds:.1f} s"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("error", RuntimeWarning)
    begin = time.perf_counter()
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        outcomes = Outcomes(Path(folder))
        sound, rng = seeds(), random.Random(options.seed)
        for data in sound:
            outcomes.take(data, 0)
        assert outcomes.counts["failed"] == 0, outcomes.failures
        for number in range(options.inputs // 2):
            outcomes.take(damaged(rng.choice(sound), rng), number)
        grown = 0

        @with_seed(options.seed)
        @settings(
            max_examples=options.inputs - options.inputs // 2,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(document)
        def grow(value: Any) -> None:
            nonlocal grown
            grown += 1
            outcomes.take(json.dumps(value).encode(), grown)

        grow()
    total = options.inputs // 2 + grown
    print(f"{total:,} inputs (and {len(sound)} sound ones), seed {options.seed}, {time.perf_counter() - begin:.0f} s", end="; ")
    print(", ".join(f"{n:,} {what}" for what, n in outcomes.counts.items()), f"; slowest {outcomes.slowest:.2f} s")
    for key, (data, message) in outcomes.failures.items():
        print(f"FAILED {key}: {message}\n   {data[:2000]!r}")
    return 1 if outcomes.failures else 0


if __name__ == "__main__":
    sys.exit(main())
