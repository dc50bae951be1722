"""Damage of every sort: one clear line, or a counted repair; never a crash, a wait or a silent loss."""

from __future__ import annotations

import gzip
import json
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import shapely

from annotations import UserError, clip_to_tiles, read_annotations
from annotations.geometry.rings import is_star_shaped
from annotations.readers import detect

SQUARE = [[0, 0], [10, 0], [10, 10], [0, 10], [0, 0]]
POLYGON = {"type": "Polygon", "coordinates": [SQUARE]}
FEATURE = {"type": "Feature", "id": "a", "geometry": POLYGON, "properties": {"classification": {"name": "Krebs Ä"}}}
TEXT = json.dumps([FEATURE], ensure_ascii=False)


@pytest.fixture
def read(tmp_path: Path):
    def run(document: object, name: str = "a.geojson", **options):
        path = tmp_path / name
        path.write_bytes(document if isinstance(document, bytes) else json.dumps(document).encode())
        return read_annotations(path, **options)

    return run


@pytest.fixture
def refused(read):
    def run(document: object, name: str = "a.geojson") -> str:
        with pytest.raises(UserError) as error:
            read(document, name)
        assert "\n" not in str(error.value)
        assert name in str(error.value)
        return str(error.value)

    return run


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_unicode_of_any_form_is_read(read, encoding):
    table = read(TEXT.encode(encoding))
    assert (len(table), table.labels) == (1, ("Krebs Ä",))


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "mac-roman"])
def test_another_encoding_is_named(refused, encoding):
    assert "not JSON in utf-8 text" in (message := refused(TEXT.encode(encoding)))
    assert f"at byte {TEXT.index('Ä')}: save it as UTF-8" in message


@pytest.mark.parametrize("key", ["coordinates", "geometry", "features", "geometries"])
def test_a_key_that_comes_twice_is_refused_where_outlines_would_go(refused, key):
    documents = {
        "coordinates": '[{"type": "Feature", "geometry": {"type": "Polygon", "coordinates": %s, "coordinates": %s}}]',
        "geometry": '[{"type": "Feature", "geometry": {"type": "Polygon", "coordinates": %s}, "geometry": '
        '{"type": "Polygon", "coordinates": %s}}]',
        "features": '{"type": "FeatureCollection", "features": [{"type": "Polygon", "coordinates": %s}], "features": '
        '[{"type": "Polygon", "coordinates": %s}]}',
        "geometries": '{"type": "GeometryCollection", "geometries": [{"type": "Polygon", "coordinates": %s}], "geometries": '
        '[{"type": "Polygon", "coordinates": %s}]}',
    }
    text = documents[key] % (json.dumps([SQUARE]), json.dumps([SQUARE]))
    assert f"{key!r} twice" in refused(text.encode())


def test_keys_that_may_come_twice(read):
    nucleus = '"nucleusGeometry": {"type": "Polygon", "coordinates": [[[1, 1], [2, 1], [2, 2]]]}'
    twice = '"properties": {"metadata": {}, "metadata": {}}'
    cell = f'{{"type": "Feature", "geometry": {json.dumps(POLYGON)}, {nucleus}, {twice}}}'
    assert len(read(f"[{cell}, {cell}]".encode())) == 2
    assert len(read([{**FEATURE, "properties": {"coordinates": [1, 2], "geometry": 3}}])) == 1
    # Nothing is lost here, whichever way a file is read: a NaN sends it another way.
    for number in ("1", "NaN"):
        ring = f"[[0, 0], [9, 0], [9, {number}], [9, 9]]"
        empty = f'{{"type": "Polygon", "coordinates": [], "coordinates": [{ring}]}}'
        assert len(read(f'[{{"type": "Feature", "geometry": null, "geometry": {empty}}}]'.encode())) == 1


def test_collections_in_collections(read):
    inner = {"type": "GeometryCollection", "geometries": [POLYGON, {"type": "Point", "coordinates": [1, 1]}]}
    outer = {"type": "GeometryCollection", "geometries": [inner, POLYGON, {"type": "GeometryCollection", "geometries": []}]}
    table = read([{**FEATURE, "geometry": outer}, {**FEATURE, "geometry": {"type": "GeometryCollection", "geometries": []}}])
    assert len(table) == 2
    assert table.counts == {"features": 5, "points_skipped": 1, "empty": 2}
    for odd in (5, None, {}, "x", [None]):
        assert len(read([FEATURE, {**FEATURE, "geometry": {"type": "GeometryCollection", "geometries": odd}}])) == 1


def test_an_item_that_is_no_feature_is_counted(read, refused):
    table = read([FEATURE, 5, {"a": 1}, FEATURE])
    assert (len(table), table.counts) == (2, {"features": 4, "malformed": 1, "empty": 1})
    assert "item 0 of the list is no Feature" in refused([5, FEATURE])


@pytest.mark.parametrize("value", ["1e308", "-1e308", "NaN", "1e999", "9" * 400, "1e10"])
def test_coordinates_that_no_slide_has(read, value):
    far = json.dumps({**FEATURE, "geometry": {"type": "Polygon", "coordinates": [[[-7, 0], [-7, 5], [-7, 9]]]}})
    table = read(f"[{json.dumps(FEATURE)}, {far.replace('-7', value)}]".encode())
    assert len(table) == 1
    assert table.counts["features"] == 2
    assert table.counts["vertices_dropped"] == 3
    assert table.counts["invalid_dropped"] == 1


def test_a_number_of_too_many_digits(read):
    text = json.dumps([{**FEATURE, "properties": {"note": -7}}, FEATURE]).replace("-7", "1" * 5000)
    assert (len(read(text.encode())), read(text.encode()).counts) == (2, {"features": 2})


def test_deep_nesting(refused):
    deep = FEATURE
    for _ in range(150):
        deep = {**FEATURE, "properties": {"childObjects": [deep]}}
    text = json.dumps([deep])
    refused(b'{"type": "GeometryCollection", "geometries": [' * 50_000)
    refused(b"[" * 200_000 + b"]" * 200_000)
    refused(text.replace("}]", "}]" * 1).encode()[:-7])
    for _ in range(3000):
        text = '[{"type": "Feature", "properties": {"childObjects": ' + text + "}}]"
    assert "nested too deeply" in refused(text.encode())


def test_half_a_pair_of_surrogates_does_not_get_into_a_file(read):
    text = json.dumps([{**FEATURE, "id": "i\ud800", "properties": {"classification": {"names": ["\udfff", "b"]}}}])
    table = read(text.encode())
    assert (table.id.tolist(), table.labels) == (["i?"], ("?: b",))


def test_rings_of_two_points_are_counted(read):
    table = read([FEATURE, {**FEATURE, "geometry": {"type": "Polygon", "coordinates": [[[0, 0], [5, 5]]]}}])
    assert table.counts == {"features": 2, "invalid_dropped": 1}


def test_a_polygon_of_200_000_vertices(read):
    angle = np.linspace(0, 2 * np.pi, 200_000, endpoint=False)
    radius = 5000 + 100 * np.sin(900 * angle)
    ring = np.stack([9000 + radius * np.cos(angle), 9000 + radius * np.sin(angle)], 1)
    ring[[70, 71]] = ring[[71, 70]]  # invalid in one place
    begin = time.process_time()
    table = read([{**FEATURE, "geometry": {"type": "Polygon", "coordinates": [ring.tolist()]}}])
    assert time.process_time() - begin < 20
    assert table.counts == {"features": 1, "repaired": 1}
    assert shapely.area(table.geometry)[0] == pytest.approx(np.pi * (5000**2 + 100**2 / 2), rel=1e-3)


def test_a_scribble_of_200_000_vertices_is_left_out_and_counted(read):
    """Its lines cross each other thousands of millions of times: to repair it would take days."""
    ring = np.random.default_rng(0).integers(0, 10_000, (200_000, 2))
    begin = time.process_time()
    table = read([FEATURE, {**FEATURE, "geometry": {"type": "Polygon", "coordinates": [ring.tolist()]}}])
    assert time.process_time() - begin < 20
    assert (len(table), table.counts) == (1, {"features": 2, "invalid_dropped": 1})


def test_what_is_said_can_be_printed(refused):
    """JSON can hold half a pair of surrogates, a terminal cannot."""
    refused(b'{"\\ud800cells": [], "type_map": {}}').encode()


def test_many_cells_in_one_multipolygon_are_no_scribble(read):
    corner = np.random.default_rng(0).permutation(10_000)
    squares = [[[[x, y] for x, y in np.add(SQUARE, [i % 100 * 20, i // 100 * 20]).tolist()]] for i in corner.tolist()]
    feature = {**FEATURE, "geometry": {"type": "MultiPolygon", "coordinates": squares}}
    table = read({"type": "FeatureCollection", "features": [feature]})
    assert (shapely.area(table.geometry).tolist(), table.counts) == ([1e6], {"features": 1})


@pytest.mark.parametrize("pad", ["spaces", "one string", "flat numbers", "truncated", "quotes"])
def test_time_grows_no_faster_than_a_line(read, pad):
    """Stands for a line of 2 GB: what is quadratic takes minutes already at 24 MB."""
    n = 24_000_000
    text = {
        "spaces": b"[" + b" " * n + json.dumps(FEATURE).encode() + b"]",
        "one string": TEXT.replace("Krebs", "x" * n).encode(),
        "flat numbers": b'[{"type": "Polygon", "coordinates": [' + b"1," * (n // 2) + b"1]}]",
        "truncated": TEXT.replace("Krebs", "x" * n).encode()[:-40],
        "quotes": b'[{"type": "Feature", "id": "' + b'},{"id":' * (n // 8) + b'"}]',
    }[pad]
    begin = time.process_time()
    with suppress(UserError):
        read(text)
    assert time.process_time() - begin < 20


@pytest.mark.parametrize("form", ["gz", "zip"])
def test_a_bomb_is_not_unpacked(tmp_path, refused, form, monkeypatch):
    monkeypatch.setattr(detect, "ALWAYS_FINE", 1 << 22)  # 256 MB otherwise
    monkeypatch.setattr(detect, "_STEP", 1 << 20)
    path = tmp_path / "bomb"
    step = b" " * (1 << 20)
    if form == "gz":
        with gzip.open(path, "wb", compresslevel=9) as file:
            for _ in range(40):
                file.write(step)
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.geojson", "w") as member:
            for _ in range(40):
                member.write(step)
    begin = time.process_time()
    assert "times its size" in refused(path.read_bytes(), f"a.geojson.{form}")
    assert time.process_time() - begin < 10


def test_every_cut_of_a_file_is_refused(tmp_path):
    path = tmp_path / "a.geojson"
    whole = json.dumps({"type": "FeatureCollection", "features": [FEATURE]}).encode()
    for stop in range(len(whole)):
        path.write_bytes(whole[:stop])
        with pytest.raises(UserError) as error:
            read_annotations(path)
        assert "\n" not in str(error.value)


def test_what_is_called_star_shaped_is_valid():
    rng = np.random.default_rng(4)
    rings = [rng.integers(0, 6, (n, 2)) for n in rng.integers(3, 8, 20_000)]
    for n in rng.integers(3, 30, 3000).tolist():
        angle = np.sort(rng.uniform(0, 2 * np.pi * rng.integers(1, 3), n)) * rng.choice([-1, 1])
        rings.append(np.stack([np.cos(angle), np.sin(angle)], 1) * rng.uniform(1, 9, (n, 1)) + rng.choice([0, 1e5, 1e9]))
    polygons = np.array(
        [shapely.Polygon(ring) for ring in rings] + [shapely.box(0, 0, 9, 9).buffer(3).exterior, shapely.Polygon()]
    )
    sure, valid = is_star_shaped(polygons), shapely.is_valid(polygons)
    assert not (sure & ~valid).any()
    assert (sure & valid)[20_000:].sum() > 300
    assert valid[~sure].any()
    turning_twice = shapely.Polygon([(3, 0), (-2, 3), (-2, -3), (4, 0), (-3, 4), (-3, -4)])
    hole = shapely.box(0, 0, 9, 9).difference(shapely.box(1, 1, 2, 2))
    assert is_star_shaped(np.array([turning_twice, hole, shapely.box(0, 0, 1, 1)])).tolist() == [False, False, True]


# A repair that leaves something invalid, and a piece that GEOS cannot cut out: both found by experiments/fuzz_annotations.py.
KNOT = [[24, 42], [42, 39], [42, 29], [2, 94], [90, 39], [90, 55], [42, 29], [2, 94], [1, 0]]
LACE = [
    [[4, 39], [34, 12], [71, 45], [1, 47], [39, 31], [38, 35], [8, 78], [29, 20], [41, 6]],
    [[4, 31], [38, 35], [84, 66], [5, 16], [4, 28], [40, 35], [34, 69], [34, 25]],
    [[4, 39], [34, 12], [71, 45], [1, 47], [39, 31], [34, 25], [8, 78], [29, 20], [41, 6]],
]


@pytest.mark.parametrize("rings", [[KNOT], LACE])
def test_repairs_are_valid_and_can_be_cut(read, rings):
    table = read([{**FEATURE, "geometry": {"type": "Polygon", "coordinates": rings}}])
    assert table.counts == {"features": 1, "repaired": 1}
    assert shapely.is_valid(table.geometry).all()
    corner = np.array([[x, y] for y in range(0, 100, 20) for x in range(0, 100, 20)])
    assert clip_to_tiles(table.geometry, corner, 20.0, 32).visible.sum() == pytest.approx(1, rel=1e-5)


def test_what_geos_cannot_clip_is_intersected(monkeypatch):
    def fails(*_):
        raise shapely.GEOSException("IllegalArgumentException")

    geometry, corner = np.array([shapely.Polygon([(0, 0), (20, 0), (0, 20)])]), np.array([[5, 5], [12, 2]])
    wanted = clip_to_tiles(geometry, corner, 10.0, 10)
    monkeypatch.setattr(shapely, "clip_by_rect", fails)
    boxes = clip_to_tiles(geometry, corner, 10.0, 10)
    assert boxes.xyxy.tolist() == wanted.xyxy.tolist() == [[0, 0, 10, 10], [0, 0, 6, 6]]


FAR = [[-1e300, -1e300], [1e300, -1e300], [1e300, 1e300], [-1e300, 1e300], [-1e300, -1e300]]


def test_a_rectangle_beyond_any_slide_is_called_that_in_every_dialect(tmp_path):
    import geopandas

    named = {"classification": {"name": "Tumor"}}
    geometry = {"type": "Polygon", "coordinates": [FAR]}
    (tmp_path / "a.geojson").write_text(json.dumps({"type": "Feature", "geometry": geometry, "properties": named}))
    polygon = shapely.Polygon(FAR)
    geopandas.GeoDataFrame({"classification": ["Tumor"]}, geometry=[polygon]).to_parquet(tmp_path / "a.parquet")
    corners = "".join(f'<Coordinate Order="{i}" X="{x}" Y="{y}"/>' for i, (x, y) in enumerate(FAR))
    (tmp_path / "a.xml").write_text(
        '<ASAP_Annotations><Annotations><Annotation Name="1" Type="Polygon" PartOfGroup="Tumor">'
        f"<Coordinates>{corners}</Coordinates></Annotation></Annotations></ASAP_Annotations>"
    )
    for form in ("geojson", "parquet", "xml"):
        table = read_annotations(tmp_path / f"a.{form}")
        assert len(table) == 0
        assert table.log.skipped == {("Tumor", "beyond"): 1}, form


def test_a_box_beyond_any_image_is_called_that(tmp_path):
    from annotations.readers.xml.voc import read_voc

    box = "".join(
        f"<{name}>{value}</{name}>" for name, value in zip(("xmin", "ymin", "xmax", "ymax"), (-1e300, 0, 1e300, 5), strict=True)
    )
    (tmp_path / "a.xml").write_text(f"<annotation><object><name>Tumor</name><bndbox>{box}</bndbox></object></annotation>")
    assert read_voc(tmp_path / "a.xml")[0].log.skipped == {("Tumor", "beyond"): 1}
