"""`propose --from-cells`: annotated cells and regions gathered, beside the annotations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from annotations.errors import UserError
from annotations.geometry.clusters import CLUSTER_LABEL, PART_LABEL
from tiling.boxes.run import annotate
from tiling.proposals.run import propose
from tiling.slide_file.read import SlideFile
from tiling.slide_file.write import SlideMeta, write_slide_file

SIDE = 224


def square(x: float, y: float, width: float, height: float) -> list[list[list[float]]]:
    return [[[x, y], [x + width, y], [x + width, y + height], [x, y + height], [x, y]]]


def feature(coordinates: list[Any], kind: str, name: str) -> dict[str, Any]:
    properties = {"objectType": kind, "classification": {"name": name}}
    return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": coordinates}, "properties": properties}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two tiles side by side; five cells across their border, one far off; two touching regions, one alone."""
    meta = SlideMeta("a", tmp_path / "a.svs", 1000, 1000, 0.5, 0.5, SIDE, parameters={"x": 1})
    write_slide_file(tmp_path / "out" / "a.h5", meta=meta, coords=np.array([(0, 0), (SIDE, 0)]))
    cells = [(180 + 20 * i, 100) for i in range(5)] + [(20, 200)]
    features = [feature(square(x, y, 16, 16), "cell", "tumour" if i % 2 else "immune") for i, (x, y) in enumerate(cells)]
    regions = [(0, 0, 60, 50), (60, 0, 40, 30), (300, 120, 50, 60)]
    features += [feature(square(*region), "annotation", "stroma") for region in regions]
    (tmp_path / "a.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return tmp_path / "out"


def shown(path: Path, label: str) -> list[list[list[float]]]:
    """Boxes of one label, tile by tile."""
    with SlideFile(path) as file:
        objects, boxes = file.objects_table(), file.boxes_table()
        is_label = objects["label"][boxes["object"]] == objects["labels"].index(label)
        rows = [range(*boxes["offsets"][i : i + 2]) for i in range(len(file))]
        return [[boxes["xyxy"][row].round(1).tolist() for row in rows if is_label[row]] for rows in rows]


@pytest.mark.parametrize("polygons", [False, True])
def test_clusters_and_parts_are_added_and_annotations_stay(folder: Path, polygons: bool) -> None:
    annotate(folder, folder.parent / "a.geojson", workers=1, polygons=polygons)
    path = folder / "a.h5"
    with SlideFile(path) as file:
        before, boxes_before = file.objects_table(), file.boxes_table()
        outlines = [file.polygon(row) for row in range(len(boxes_before["object"]))] if polygons else []
    (outcome,) = propose(folder, workers=1, from_cells=True)
    assert (outcome.ok, outcome.info["clusters"], outcome.info["parts"]) == (True, 1, 1), outcome.message
    assert shown(path, CLUSTER_LABEL) == [[[180, 100, 224, 116]], [[0, 100, 276 - 224, 116]]]
    assert shown(path, PART_LABEL) == [[[pytest.approx(v, abs=1) for v in (0, 0, 100, 50)]], []]
    with SlideFile(path) as file:
        objects, boxes = file.objects_table(), file.boxes_table()
        annotated = objects["kind"][boxes["object"]] != 2
        assert np.array_equal(boxes["xyxy"][annotated], boxes_before["xyxy"])
        assert objects["id"][: len(before["id"])].tolist() == before["id"].tolist()
        assert (objects["kind"][len(before["id"]) :] == 2).all()
        assert file.has_polygons == polygons
        for row, outline in zip(np.flatnonzero(annotated), outlines, strict=polygons):
            assert all(np.array_equal(a, b) for a, b in zip(file.polygon(int(row)), outline, strict=True))
    (again,) = propose(folder, workers=1, from_cells=True)
    assert (again.skipped, again.info) == (True, outcome.info)


@pytest.mark.parametrize("polygons", [False, True])
def test_groups_are_made_anew_and_not_twice(folder: Path, polygons: bool) -> None:
    from annotations.geometry.clusters import ClusterSettings
    from tiling.proposals.from_annotations import propose_from_annotations

    annotate(folder, folder.parent / "a.geojson", workers=1, polygons=polygons)
    path = folder / "a.h5"
    first = propose_from_annotations(path)
    none = propose_from_annotations(path, ClusterSettings(members=9))
    assert none.info["clusters"] == 0
    assert shown(path, CLUSTER_LABEL) == [[], []]
    assert propose_from_annotations(path) == first
    with SlideFile(path) as file:
        assert len(set(file.objects_table()["id"])) == len(file.objects_table()["id"])
        assert file.objects_table()["labels"].count(CLUSTER_LABEL) == 1


def test_without_annotations_it_says_what_to_do(folder: Path) -> None:
    (outcome,) = propose(folder, workers=1, from_cells=True)
    assert not outcome.ok
    assert "run annotate first" in outcome.message
    with pytest.raises(UserError, match="give one of them"):
        propose(folder, replace=True, from_cells=True)
