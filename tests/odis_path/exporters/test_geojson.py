"""export --to geojson: what QuPath needs of a file, where things lie, and that it is read back."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import numpy as np
import pytest
import shapely
from typer.testing import CliRunner

from annotations import Kind, UserError, read_annotations, table_features, write_geojson
from odis_path.cli.app import app
from odis_path.exporters.geojson import export_geojson
from tiling import SlideMeta, write_slide_file
from tiling.boxes.run import annotate
from tiling.wsi.codec import encode_jpeg

RING = [[150, 20], [250, 20], [250, 60], [150, 60], [150, 20]]


def slide_file(folder: Path, *, bounds: tuple[int, int] = (0, 0), slide_id: str = "a") -> Path:
    """4 x 2 tiles of 100 level-0 pixels (50 target pixels), an overview of 20 x 15 at 50, tissue on a part of it."""
    coords = np.array([(x * 100, y * 100) for y in range(2) for x in range(4)])
    mask = np.zeros((15, 20), bool)
    mask[:4, :8] = True
    mask[1, 1] = False
    mask[10, 10] = True
    meta = SlideMeta(slide_id, folder / "none.svs", 1000, 740, 0.5, 0.25, 50, bounds_xy=bounds)
    jpeg = np.frombuffer(encode_jpeg(np.full((15, 20, 3), 200, np.uint8)), np.uint8)
    overview = {"jpeg": jpeg, "tissue": mask, "attrs": {"downsample": 50.0}}
    path = folder / f"{slide_id}.h5"
    write_slide_file(path, meta=meta, coords=coords, groups={"thumbnail": overview})
    return path


def annotated(tmp_path: Path, **options) -> Path:
    path = slide_file(tmp_path / "s", **options)
    items = [
        {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": properties}
        for ring, properties in (
            (RING, {"classification": "Tumor"}),
            ([[10, 10], [20, 10], [20, 30], [10, 30], [10, 10]], {"objectType": "cell"}),
        )
    ]
    (tmp_path / "a.geojson").write_text(json.dumps(items))
    assert annotate(tmp_path / "s", tmp_path / "a.geojson", origin="level0")[0].ok
    return path


def features(path: Path, kind: str | None = None) -> list[dict]:
    document = json.loads(path.read_text())
    assert document["type"] == "FeatureCollection"
    return [item for item in document["features"] if kind in (None, item["properties"]["objectType"])]


def test_everything_is_where_it_was_and_is_read_back(tmp_path: Path) -> None:
    annotated(tmp_path)
    (outcome,) = export_geojson(tmp_path / "s", tmp_path / "out")
    assert outcome.ok, outcome.message
    assert outcome.info == {"tissue": 2, "tiles": 8, "boxes": 3}
    path = tmp_path / "out" / "a.geojson"
    items = features(path)
    assert len({uuid.UUID(item["id"]) for item in items}) == 13
    for item in items:
        assert shapely.is_valid(shapely.geometry.shape(item["geometry"]))
        for name in {"classification"} & item["properties"].keys():
            assert len(item["properties"][name]["color"]) == 3
    tiles = features(path, "tile")
    assert [shapely.geometry.shape(item["geometry"]).bounds for item in tiles[:2]] == [(0, 0, 100, 100), (100, 0, 200, 100)]
    assert tiles[0]["properties"]["measurements"] == {"tissue fraction": 1.0}
    table = read_annotations(path)
    assert table.counts == {"features": 13, "ignored": 8}
    tissue = shapely.box(0, 0, 400, 200).difference(shapely.box(50, 50, 100, 100))
    boxes = [(10, 10, 20, 30), (150, 20, 200, 60), (200, 20, 250, 60)]
    expected = [tissue, shapely.box(500, 500, 550, 550), *(shapely.box(*box) for box in boxes)]
    assert shapely.equals(table.geometry, expected).all()
    assert [table.class_names()[i] for i in range(5)] == ["Tissue", "Tissue", None, "Tumor", "Tumor"]
    assert table.kind.tolist() == [Kind.TISSUE, Kind.TISSUE, Kind.CELL, Kind.TISSUE, Kind.TISSUE]
    first = path.read_bytes()
    export_geojson(tmp_path / "s", tmp_path / "out")
    assert path.read_bytes() == first


def test_slides_with_bounds_count_as_qupath_does(tmp_path: Path) -> None:
    annotated(tmp_path, bounds=(100, 10))
    (outcome,) = export_geojson(tmp_path / "s", tmp_path / "out", ["boxes"])
    assert "corner (100, 10)" in outcome.message
    assert shapely.geometry.shape(features(tmp_path / "out" / "a.geojson")[1]["geometry"]).bounds == (50, 10, 100, 50)
    export_geojson(tmp_path / "s", tmp_path / "out", ["boxes"], origin="level0")
    assert shapely.geometry.shape(features(tmp_path / "out" / "a.geojson")[1]["geometry"]).bounds == (150, 20, 200, 60)


HEAD = "slide_id,patient_id,x,y,object,label,predicted,fold,score Tumor,score Stroma\n"


def test_predicted_labels_of_tiles_and_boxes(tmp_path: Path) -> None:
    annotated(tmp_path)
    csv = tmp_path / "predictions.csv"
    csv.write_text(HEAD + "a,p,100,0,-1,Tumor,Stroma,0,0.25,0.75\na,p,0,100,-1,Stroma,Stroma,0,0,1\n")
    (outcome,) = export_geojson(tmp_path / "s", tmp_path / "out", predictions=csv)
    assert outcome.info == {"tissue": 2, "labels": 2}
    feature, _ = features(tmp_path / "out" / "a.geojson", "tile")
    assert shapely.geometry.shape(feature["geometry"]).bounds == (100, 0, 200, 100)
    assert feature["properties"]["classification"]["name"] == "Stroma"
    assert feature["properties"]["name"] == "true: Tumor"
    assert feature["properties"]["measurements"] == {"score Tumor": 0.25, "score Stroma": 0.75}
    csv.write_text(HEAD + "a,p,200,0,0,Tumor,Tumor,0,1,0\n")
    export_geojson(tmp_path / "s", tmp_path / "out", ["labels"], predictions=csv)
    (feature,) = features(tmp_path / "out" / "a.geojson")
    assert shapely.geometry.shape(feature["geometry"]).bounds == (200, 20, 250, 60)
    assert feature["properties"]["objectType"] == "detection"
    for row, words in (
        ("a,p,77,0,-1,Tumor,Tumor,0,1,0", "no tile at 77, 0"),
        ("a,p,0,0,0,Tumor,Tumor,0,1,0", "no box of object 0"),
    ):
        csv.write_text(f"{HEAD}{row}\n")
        (outcome,) = export_geojson(tmp_path / "s", tmp_path / "out", predictions=csv)
        assert words in outcome.message
        assert not outcome.ok


def test_what_cannot_be(tmp_path: Path) -> None:
    annotated(tmp_path)
    csv = tmp_path / "p.csv"
    for text, words in (
        ("x,y\n1,2\n", "lacks the columns"),
        (HEAD + "a,p,-1,-1,-1,b,c,0,1,0\n", "whole slides"),
        (HEAD + "a,p,one,0,-1,b,c,0,1,0\n", "one"),
        (HEAD + "z,p,0,0,-1,b,c,0,1,0\n", "no slide of"),
    ):
        csv.write_text(text)
        with pytest.raises(UserError, match=words):
            export_geojson(tmp_path / "s", tmp_path / "out", predictions=csv)
    with pytest.raises(UserError, match="go together"):
        export_geojson(tmp_path / "s", tmp_path / "out", ["labels"])
    with pytest.raises(UserError, match="--what pens: take some of"):
        export_geojson(tmp_path / "s", tmp_path / "out", ["tissue", "pens"])
    with pytest.raises(UserError, match="--origin corner"):
        export_geojson(tmp_path / "s", tmp_path / "out", origin="corner")


def test_the_command(tmp_path: Path) -> None:
    annotated(tmp_path)
    run = CliRunner()
    result = run.invoke(
        app, ["export", str(tmp_path / "s"), "--to", "geojson", "--out", str(tmp_path / "out"), "--what", "tiles"]
    )
    assert result.exit_code == 0, result.output
    assert len(features(tmp_path / "out" / "a.geojson")) == 8
    for arguments, words in (
        (["--to", "xml"], "there is: timm, geojson, trident"),
        (["--to", "timm", "--what", "tiles"], "takes no --what"),
    ):
        result = run.invoke(app, ["export", str(tmp_path / "s"), "--out", str(tmp_path / "o"), *arguments])
        assert words in str(result.exception)


def test_a_table_is_written_and_read_back_with_its_measurements(tmp_path: Path) -> None:
    item = {
        "type": "Feature",
        "id": "cell 1",
        "geometry": {"type": "Polygon", "coordinates": [RING]},
        "properties": {"objectType": "cell", "classification": "x", "measurements": {"Area": 4.5, "Bad": "NaN", "score": 0.5}},
    }
    (tmp_path / "in.geojson").write_text(json.dumps([item]))
    table = read_annotations(tmp_path / "in.geojson", measurements=True)
    write_geojson(tmp_path / "a.geojson", table_features(table))
    back = read_annotations(tmp_path / "a.geojson", measurements=True)
    assert shapely.equals(back.geometry, table.geometry).all()
    assert (back.labels, back.kind.tolist(), back.confidence.tolist()) == (("x",), [Kind.CELL], [0.5])
    assert back.measurements["Area"].tolist() == [4.5]
    assert "Bad" not in back.measurements


def test_features_lead_to_their_slides(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    path = annotated(tmp_path)
    (tmp_path / "f").mkdir()
    with h5py.File(tmp_path / "f" / "a.h5", "w") as file:
        file.attrs.update({"format": "odis-path-features", "source": str(path)})
    assert export_geojson(tmp_path / "f", tmp_path / "out", ["tiles"])[0].info == {"tiles": 8}
    path.unlink()
    with pytest.raises(UserError, match="is gone"):
        export_geojson(tmp_path / "f", tmp_path / "out", ["tiles"])
