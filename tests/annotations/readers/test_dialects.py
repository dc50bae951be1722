"""Json of cell detectors, COCO, GeoParquet, label images: small files as their programs lay them out, exact outlines."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import shapely

from annotations import Kind, SlideContext, UserError, concatenate, read_annotations, read_classmap
from annotations.geometry.trace_mask import trace_outlines
from annotations.readers.detect import ALWAYS_FINE

SQUARE = [[0, 0], [10, 0], [10, 10], [0, 10]]
SLIDE = SlideContext("slide", (4000, 3000), 0.25)
BOX = shapely.box(0, 0, 10, 10)


def moved(dx: float, dy: float = 0.0) -> list[list[float]]:
    return [[x + dx, y + dy] for x, y in SQUARE]


def save(path: Path, document: object) -> Path:
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def labels(table) -> list:
    return [table.labels[i] if i >= 0 else None for i in table.label]


def same(geometry, expected) -> bool:
    return bool(shapely.equals(geometry, expected).all())


# --- cells

HOVERNET = {
    "mag": 20,
    "nuc": {
        "1": {"bbox": [[0, 0], [10, 10]], "centroid": [5, 5], "contour": SQUARE, "type": 1, "type_prob": 0.75},
        "7": {"bbox": [[0, 0], [9, 9]], "centroid": [5, 5], "contour": moved(100, 50), "type": 4, "type_prob": 0.5},
        "9": {"bbox": [[0, 0], [9, 9]], "centroid": [1, 1], "contour": [[1, 1], [2, 2]], "type": 4, "type_prob": None},
    },
}


def test_hovernet_is_scaled_from_its_magnification(tmp_path: Path) -> None:
    path = save(tmp_path / "slide.json", HOVERNET)
    table = read_annotations(path, slide=SLIDE)
    assert same(table.geometry, [shapely.box(0, 0, 20, 20), shapely.box(200, 100, 220, 120)])
    assert (table.id.tolist(), labels(table), table.kind.tolist()) == (["1", "7"], ["1", "4"], [Kind.CELL, Kind.CELL])
    assert table.confidence.tolist() == [0.75, 0.5]
    assert table.counts == {"features": 3, "invalid_dropped": 1}
    assert table.log.skipped == {("4", "invalid_dropped"): 1}
    assert table.log.notes == ("HoVer-Net at 20x, the slide taken as 40x: scaled by 2",)
    # A scanner's 40x is rarely 0.25 exactly, and HoVer-Net goes by the 40.
    assert same(read_annotations(path, slide=SlideContext("s", (9, 9), 0.2277)).geometry, table.geometry)
    assert same(read_annotations(path, scale=1).geometry[0], BOX)
    with pytest.raises(UserError, match="unknown mpp"):
        read_annotations(path)
    assert same(read_annotations(save(path, {**HOVERNET, "mag": None})).geometry[0], BOX)


def test_cellvit_json(tmp_path: Path) -> None:
    cells = [
        {
            "bbox": [[0, 0], [10, 10]],
            "centroid": [5, 5],
            "contour": SQUARE,
            "type": 1,
            "type_prob": 0.9,
            "edge_position": False,
        },
        {"bbox": [[20, 30], [40, 60]], "centroid": [45, 30], "type": 2},
        {"centroid": [45, 30], "type": 2},
        {"contour": [[0, 0], [8, None], [8, 0], [8, 8, 1], "x", [0, 8]], "type": 9},
    ]
    document = {
        "wsi_metadata": {"mpp": 0.25},
        "type_map": {"0": "Background", "1": "Neoplastic", "2": "Inflammatory"},
        "cells": cells,
    }
    table = read_annotations(save(tmp_path / "cells.json", document), kind="tissue")
    assert same(table.geometry, [BOX, shapely.box(30, 20, 60, 40), shapely.box(0, 0, 8, 8)])
    assert labels(table) == ["Neoplastic", "Inflammatory", "9"]
    assert table.kind.tolist() == [Kind.TISSUE] * 3
    assert np.array_equal(table.confidence, np.array([0.9, np.nan, np.nan], np.float32), equal_nan=True)
    assert table.counts == {"features": 4, "empty": 1, "boxes": 1, "vertices_dropped": 2}
    assert table.source.tolist() == ["cells.json"] * 3


POLYGON = {"type": "Polygon", "coordinates": [[*SQUARE, SQUARE[0]]]}
NUCLEUS = {"type": "Polygon", "coordinates": [[[2, 2], [4, 2], [4, 4], [2, 4], [2, 2]]]}


def test_instanseg_and_stardist_with_measurements(tmp_path: Path) -> None:
    instanseg = {
        "type": "Feature",
        "geometry": POLYGON,
        "properties": {"object_type": "detection", "classification": "Nuclei", "measurements": [{"name": "Area", "value": 7}]},
    }
    measured = {"Detection probability": 0.81, "Area": "NaN", "Solidity": 0.5}
    stardist = {
        "type": "Feature",
        "id": "6423a977-ffff-48db-affc-cd11632010f0",
        "geometry": POLYGON,
        "nucleusGeometry": NUCLEUS,
        "properties": {"objectType": "cell", "measurements": measured},
    }
    both = {"type": "Feature", "geometry": {"type": "GeometryCollection", "geometries": [POLYGON, NUCLEUS]}, "properties": {}}
    path = save(tmp_path / "a.geojson", [both, instanseg, stardist])
    plain = read_annotations(path)
    assert plain.measurements is None
    assert np.array_equal(plain.confidence, np.array([np.nan] * 3 + [0.81], np.float32), equal_nan=True)
    table = read_annotations(path, measurements=True)
    assert same(table.geometry, [BOX, shapely.box(2, 2, 4, 4), BOX, BOX])
    assert labels(table) == [None, None, "Nuclei", None]
    assert list(table.measurements) == ["Area", "Detection probability", "Solidity"]
    nan = np.nan
    assert np.array_equal(table.measurements["Area"], [nan, nan, 7, nan], equal_nan=True)
    assert np.array_equal(table.confidence, np.array([nan, nan, nan, 0.81], np.float32), equal_nan=True)
    nuclei = read_annotations(path, nuclei=True)
    assert shapely.area(nuclei.geometry).tolist() == [100, 4, 100, 4]
    # A literal NaN sends the file down the tolerant way; the rows must still be the same.
    text = json.dumps(
        [both, instanseg, {**stardist, "properties": {"objectType": "cell", "measurements": {"Area": float("nan")}}}]
    )
    again = read_annotations(save(path, text), measurements=True)
    assert np.array_equal(again.measurements["Area"], [nan, nan, 7, nan], equal_nan=True)
    assert again.confidence is None


def test_tiatoolbox_geojson(tmp_path: Path) -> None:
    item = {
        "type": "Feature",
        "objectType": "detection",
        "geometry": POLYGON,
        "properties": {"type": "Neoplastic", "prob": 0.5},
    }
    path = save(tmp_path / "a.geojson", {"type": "FeatureCollection", "features": [item]})
    table = read_annotations(path, measurements=True)
    assert (labels(table), table.kind.tolist(), table.confidence.tolist()) == (["Neoplastic"], [Kind.CELL], [0.5])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"SQLite format 3\x00....", "AnnotationStore.to_geojson"),
        (b"\x80\x04\x95abc", "could run code"),
        (b"\xac\xed\x00\x05qupath", "export the objects as GeoJSON"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"PAR1 but no parquet", "not a readable Parquet"),
        (b"\x89PNG\r\n\x1a\n" + b"\1" * 40, "says it has"),
        (b"II*\x00\xff\xff\xff\xff", "not a readable image"),
        (b'{"nuc": {"1": {"contour": 5, "type": []}}}', "HoVer-Net"),
        (b'{"cells": [3]}', "CellViT"),
        (b'{"images": 3, "annotations": []}', "not COCO json"),
        (b'[{"image_id": 1, "bbox": "x"}]', "COCO detections"),
    ],
)
def test_what_cannot_be_read_says_what_to_do(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.dat").write_bytes(content)
    with pytest.raises(UserError, match=reason) as error:
        read_annotations(tmp_path / "a.dat", slide=SLIDE)
    assert "\n" not in str(error.value)


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    press = zlib.compressobj(9, wbits=31)
    block = b" " * (1 << 20)
    with (tmp_path / "a.geojson.gz").open("wb") as file:
        for _ in range(ALWAYS_FINE // len(block) + 40):
            file.write(press.compress(block))
        file.write(press.flush())
    with pytest.raises(UserError, match=r"unpacks to more than \d+ times"):
        read_annotations(tmp_path / "a.geojson.gz")


# --- COCO

COCO = {
    "images": [{"id": 1, "file_name": "x/slide.svs", "width": 2000, "height": 1500}, {"id": 2, "file_name": "other.svs"}],
    "annotations": [
        {"id": 5, "image_id": 1, "category_id": 3, "bbox": [0, 0, 5, 5], "score": 0.25},
        {"id": 6, "image_id": 1, "category_id": 3, "segmentation": [[10, 10, 20, 10, 20, 20, 10, 20]], "bbox": [1, 1, 1, 1]},
        {"id": 7, "image_id": 2, "category_id": 3, "bbox": [1, 1, 2, 2]},
    ],
    "categories": [{"id": 3, "name": "nucleus"}],
}


def test_coco_of_a_slide(tmp_path: Path) -> None:
    path = save(tmp_path / "slide.json", COCO)
    table = read_annotations(path, slide=SLIDE)
    assert same(table.geometry, [BOX, shapely.box(20, 20, 40, 40)])
    assert (labels(table), table.id.tolist()) == (["nucleus"] * 2, ["5", "6"])
    assert np.array_equal(table.confidence, np.array([0.25, np.nan], np.float32), equal_nan=True)
    assert "scaled by 2" in table.log.notes[0]
    assert same(read_annotations(path, slide=SLIDE, scale=1).geometry[0], shapely.box(0, 0, 5, 5))
    with pytest.raises(UserError, match="2 images"):
        read_annotations(path)
    with pytest.raises(UserError, match="no reduced copy"):
        read_annotations(path, slide=SlideContext("slide", (4000, 4000), 0.25))


def test_bare_detections(tmp_path: Path) -> None:
    detections = [{"image_id": "slide", "category_id": 1, "bbox": [0, 0, 10, 10], "score": 0.5}]
    table = read_annotations(save(tmp_path / "a.json", detections), kind="tissue")
    assert same(table.geometry, [BOX])
    assert (labels(table), table.kind.tolist(), table.confidence.tolist()) == (["1"], [Kind.TISSUE], [0.5])


def test_bare_detections_with_their_mask_first(tmp_path: Path) -> None:
    runs = {"size": [75, 100], "counts": [10 * 75 + 10, *[20, 55] * 19, 20, 75 * 100 - 10 * 75 - 10 - 19 * 75 - 20]}
    items = [{"segmentation": runs, "bbox": [1, 1, 2, 2], "image_id": 3, "category_id": 1, "score": 0.5}]
    table = read_annotations(save(tmp_path / "a.json", items), slide=SlideContext("a", (200, 150), 0.25))
    assert same(table.geometry, [shapely.box(20, 20, 60, 60)])
    with pytest.raises(UserError, match=r"annotation without an id, number 1: .*image_id"):
        read_annotations(save(tmp_path / "a.json", [{"segmentation": runs}]))


# --- GeoParquet and GeoDataFrame


def test_geodataframe_and_back_through_geoparquet(tmp_path: Path) -> None:
    geopandas = pytest.importorskip("geopandas")
    items = [
        {"type": "Feature", "id": "t", "geometry": POLYGON, "properties": {"classification": {"name": "Tumor"}}},
        {"type": "Feature", "id": "c", "geometry": NUCLEUS, "properties": {"objectType": "cell", "measurements": {"Area": 4}}},
    ]
    table = read_annotations(save(tmp_path / "a.geojson", items), measurements=True)
    rows = table.to_geodataframe()
    assert isinstance(rows, geopandas.GeoDataFrame)
    assert rows.crs is None
    assert list(rows.columns) == ["id", "label", "kind", "source", "confidence", "Area", "geometry"]
    assert rows["kind"].tolist() == ["tissue", "cell"]
    rows.to_parquet(tmp_path / "a.parquet")
    back = read_annotations(tmp_path / "a.parquet")
    assert same(back.geometry, table.geometry)
    assert (labels(back), back.id.tolist(), back.kind.tolist()) == (["Tumor", None], ["t", "c"], [Kind.TISSUE, Kind.CELL])
    assert np.array_equal(back.measurements["Area"], [np.nan, 4], equal_nan=True)
    assert len(table.take(np.zeros(2, bool)).to_geodataframe()) == 0


def test_geoparquet_of_others(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    hole = shapely.box(0, 0, 9, 9).difference(shapely.box(1, 1, 2, 2))
    geometry = [
        shapely.MultiPolygon([BOX, shapely.box(20, 0, 30, 10)]),
        hole,
        shapely.Point(5, 6),
        shapely.LineString([(0, 0), (1, 1)]),
        None,
        shapely.Polygon(),
        shapely.Polygon([(0, 0), (10, 10), (10, 0), (0, 10)]),
        shapely.box(np.nan, 0, 1, 1),
    ]
    n = len(geometry)
    columns = {
        "outline": [None if g is None else shapely.to_wkb(g) for g in geometry],
        "classification": ['{"name": "Tumor", "color": [1, 2, 3]}', "Stroma", *[None] * (n - 2)],
        "objectType": ["cell", "annotation", *[None] * (n - 2)],
        "score": [0.5] * n,
    }
    geo = {"primary_column": "outline", "columns": {"outline": {"encoding": "WKB"}}}
    data = pa.table(columns).replace_schema_metadata({"geo": json.dumps(geo)})
    pq.write_table(data, tmp_path / "a.parquet")
    table = read_annotations(tmp_path / "a.parquet", point_size_l0=2, scale=2)
    assert shapely.area(table.geometry).tolist() == [400, 400, 320, 4, 200]
    assert labels(table) == ["Tumor", "Tumor", "Stroma", None, None]
    assert table.kind.tolist() == [Kind.CELL, Kind.CELL, Kind.TISSUE, Kind.CELL, Kind.TISSUE]
    assert shapely.bounds(table.geometry[3]).tolist() == [9, 11, 11, 13]
    assert table.id.tolist() == ["0/0", "0/1", "1", "2", "6"]
    wanted = {"features": 8, "lines_skipped": 1, "malformed": 2, "empty": 1, "repaired": 1, "exploded": 1}
    assert table.counts == wanted
    pq.write_table(pa.table({"x": [1]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="no column 'geometry'"):
        read_annotations(tmp_path / "b.parquet")


# --- label images


@pytest.mark.parametrize("values", [2, 3, 5])
def test_outlines_of_labels_hold_exactly_their_pixels(values: int) -> None:
    mask = np.random.default_rng(values).integers(0, values, (23, 31)).astype(np.int32)
    y, x = np.mgrid[:23, :31] + 0.5
    numbers, outlines = trace_outlines(mask)
    assert numbers.tolist() == list(range(1, values))
    assert shapely.is_valid(outlines).all()
    for value, outline in zip(numbers, outlines, strict=True):
        assert (shapely.contains_xy(outline, x, y) == (mask == value)).all()
        assert outline.area == (mask == value).sum()


@pytest.fixture
def mask() -> np.ndarray:
    mask = np.zeros((300, 400), np.uint16)
    mask[10:20, 30:50] = 1
    mask[12:14, 32:34] = 0
    mask[100:110, 0:5] = 1000
    mask[0, 399] = 7
    return mask


@pytest.mark.parametrize("name", ["slide.png", "slide.tif", "slide.ome.tif"])
def test_label_image(tmp_path: Path, mask: np.ndarray, name: str) -> None:
    imagecodecs, tifffile = pytest.importorskip("imagecodecs"), pytest.importorskip("tifffile")
    if name.endswith("png"):
        (tmp_path / name).write_bytes(imagecodecs.png_encode(mask))
    else:
        tifffile.imwrite(tmp_path / name, mask, compression="zlib")
    table = read_annotations(tmp_path / name, slide=SLIDE)
    ring = shapely.box(300, 100, 500, 200).difference(shapely.box(320, 120, 340, 140))
    assert same(table.geometry, [ring, shapely.box(3990, 0, 4000, 10), shapely.box(0, 1000, 50, 1100)])
    assert (table.id.tolist(), table.kind.tolist(), labels(table)) == (["1", "7", "1000"], [Kind.CELL] * 3, [None] * 3)
    assert "scaled by 10" in table.log.notes[0]
    save(tmp_path / "slide.classes.json", {"classes": {"1": "gland", "1000": "vessel"}, "mpp": 0.5})
    table = read_annotations(tmp_path / name, slide=SLIDE)
    assert labels(table) == ["gland", None, "vessel"]
    assert table.geometry[1].bounds == (798, 0, 800, 2)
    save(tmp_path / "slide.classes.json", [1])
    with pytest.raises(UserError, match="not classes of a mask"):
        read_annotations(tmp_path / name, slide=SLIDE)


def test_a_label_image_that_is_stored_turned_is_refused(tmp_path: Path, mask: np.ndarray) -> None:
    tifffile = pytest.importorskip("tifffile")
    for orientation in (1, 6):
        tifffile.imwrite(tmp_path / f"{orientation}.tif", mask, extratags=[(274, 3, 1, orientation, True)])
    assert len(read_annotations(tmp_path / "1.tif", slide=SLIDE)) == 3
    with pytest.raises(UserError, match=r"6\.tif: is stored turned \(its tag Orientation is not 1\): save the mask upright"):
        read_annotations(tmp_path / "6.tif", slide=SLIDE)


def test_images_that_are_no_labels(tmp_path: Path, mask: np.ndarray) -> None:
    imagecodecs = pytest.importorskip("imagecodecs")
    path = tmp_path / "a.png"
    path.write_bytes(imagecodecs.png_encode(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)))
    with pytest.raises(UserError, match="no label image"):
        read_annotations(path, scale=1)
    path.write_bytes(imagecodecs.png_encode(mask))
    with pytest.raises(UserError, match="unknown size"):
        read_annotations(path)
    with pytest.raises(UserError, match="no reduced copy"):
        read_annotations(path, slide=SlideContext("a", (4000, 2000), 0.25))
    for size in ((0, 4), (1 << 20, 1 << 20)):  # of a PNG of no height, and of one that claims to be huge
        data = bytearray(imagecodecs.png_encode(mask))
        data[16:24] = struct.pack(">II", *size)
        path.write_bytes(data)
        with pytest.raises(UserError, match="says it has"):
            read_annotations(path, slide=SLIDE)
    # An image reduced by 32 and rounded down is still of the whole slide.
    assert SlideContext("a", (12815, 9614), 0.25).scale_of_image(400, 300, "a") == 32


# --- the table


def test_optional_columns_are_joined(tmp_path: Path) -> None:
    nuclei = read_annotations(save(tmp_path / "a.json", HOVERNET), slide=SLIDE)
    region = read_annotations(save(tmp_path / "b.geojson", POLYGON), measurements=True)
    both = concatenate([nuclei, region])
    assert both.source.tolist() == ["a.json", "a.json", "b.geojson"]
    assert np.array_equal(both.confidence, np.array([0.75, 0.5, np.nan], np.float32), equal_nan=True)
    assert both.measurements == {}
    assert both.log.notes == nuclei.log.notes
    assert Kind.PROPOSAL not in both.kind
    assert both.take(both.kind == Kind.TISSUE).source.tolist() == ["b.geojson"]


def test_repairs_and_losses_are_told_by_class(tmp_path: Path) -> None:
    def feature(ring, name, uid):
        return {
            "type": "Feature",
            "id": uid,
            "geometry": {"type": "Polygon", "coordinates": [ring]},
            "properties": {"classification": name},
        }

    bow = [[0, 0], [10, 10], [10, 0], [0, 10], [0, 0]]
    point = {"type": "Feature", "geometry": {"type": "Point", "coordinates": [1, 1]}, "properties": {"classification": "TUM"}}
    items = [feature(bow, "tumor", "b"), feature(bow, "TUM", "c"), feature([[0, 0], [1, 1]], "tumor", "d"), point]
    table = read_annotations(save(tmp_path / "a.geojson", [*items, feature([[0, 0], [5, 0], [9, 0], [0, 0]], None, "e")]))
    assert table.log.repaired == {"tumor": 1, "TUM": 1}
    assert table.log.skipped == {("tumor", "invalid_dropped"): 1, ("TUM", "points_skipped"): 1, ("", "zero_area"): 1}
    assert [line.split("[")[0] for line in table.log.repairs] == ["b: Self-intersection", "c: Self-intersection"]
    mapped = read_classmap(save(tmp_path / "map.yaml", "Tumour: [tumor, TUM]")).applied(table)
    assert mapped.log.repaired == {"Tumour": 2}
    assert mapped.log.skipped == {("Tumour", "invalid_dropped"): 1, ("Tumour", "points_skipped"): 1, ("", "zero_area"): 1}


def test_genuine_qupath_export(test_data: Path) -> None:
    path = test_data / "geojson" / "dlup_qupath05.geojson"
    if not path.is_file():
        pytest.skip(f"{path.name} not found")
    features = json.loads(path.read_text())["features"]
    table = read_annotations(path, point_size_l0=10)
    outlines = [item for item in features if item["geometry"]["type"] in ("Polygon", "MultiPolygon")]
    of_id = dict(zip(table.id, table.geometry, strict=True))
    for item in outlines:
        assert of_id[item["id"]].symmetric_difference(shapely.make_valid(shapely.geometry.shape(item["geometry"]))).area < 1e-6
    assert len(table) == table.counts["features"] + table.counts.get("exploded", 0)
