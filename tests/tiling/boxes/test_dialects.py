"""annotate with files of other programs, class maps, scales and origins, and the table it ends with."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from typer.testing import CliRunner

from annotations import read_annotations
from annotations.errors import UserError
from odis_path.cli.app import app
from odis_path.exporters.geojson import export_geojson
from tiling import SlideFile, SlideMeta, write_slide_file
from tiling.boxes.result import class_rows
from tiling.boxes.run import annotate
from tiling.boxes.summary import read_results

RING = [[0, 0], [20, 0], [20, 20], [0, 20], [0, 0]]
BOW = [[0, 0], [20, 20], [20, 0], [0, 20], [0, 0]]


def slide_file(folder: Path, slide_id: str = "a", *, bounds: tuple[int, int] = (0, 0), offset: int = 0) -> Path:
    """4 x 2 tiles of 100 pixels at 0.25 mpp, the slide's own, on a slide of 2000 x 1500."""
    coords = np.array([(offset + x * 100, offset + y * 100) for y in range(2) for x in range(4)])
    meta = SlideMeta(slide_id, folder / "none.svs", 2000, 1500, 0.25, 0.25, 100, bounds_xy=bounds)
    write_slide_file(folder / f"{slide_id}.h5", meta=meta, coords=coords)
    return folder / f"{slide_id}.h5"


def shifted(ring: list, dx: float, dy: float = 0) -> list:
    return [[x + dx, y + dy] for x, y in ring]


def feature(ring: list, name: str | None, uid: str = "") -> dict:
    geometry = {"type": "Polygon", "coordinates": [ring]}
    return {"type": "Feature", "id": uid or None, "geometry": geometry, "properties": {"classification": name}}


def save(path: Path, document: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


POINT = {"type": "Feature", "geometry": {"type": "Point", "coordinates": [5, 5]}, "properties": {"classification": "TUM"}}
ITEMS = [
    feature(RING, "tumor", "one"),
    feature(shifted(BOW, 30), "TUM", "bow"),
    feature(shifted(RING, 90), " Stroma"),
    feature(shifted(RING, 900), "fat"),
    feature(shifted(RING, 3000), "fat"),
    feature(RING, None),
    POINT,
]
MAP = "Tumour: [tumor, TUM]\nStroma:\n"


def test_classes_are_mapped_and_told(tmp_path: Path) -> None:
    path = slide_file(tmp_path / "s")
    source, classes = save(tmp_path / "a.geojson", ITEMS), save(tmp_path / "map.yaml", MAP)
    (outcome,) = annotate(tmp_path / "s", source, classes=classes)
    assert "classes that --classes does not name: fat" in outcome.message
    assert "1 objects lie outside the slide" in outcome.message
    with SlideFile(path) as file:
        table = file.objects_table()
        assert table["labels"] == ["Tumour", "Stroma", "fat"]
        assert table["label"].tolist() == [0, 0, 1, 2, 2, -1]
    results = read_results(tmp_path / "s", [outcome])
    assert class_rows(results.values()) == [
        ("Tumour", 2, 2, 1, 1, "1 points without --point-size"),
        ("fat", 2, 0, 0, 2, "2 on no tile"),
        ("(unclassified)", 1, 1, 0, 0, ""),
        ("Stroma", 1, 2, 0, 0, ""),
    ]
    assert results["a"].repairs == ["bow: Self-intersection[40 10]"]
    assert annotate(tmp_path / "s", source, classes=classes)[0].skipped
    (outcome,) = annotate(tmp_path / "s", source, classes=classes, strict_classes=True)
    assert not outcome.ok
    assert outcome.message.startswith("fat: not named in ")
    with pytest.raises(UserError, match="--strict-classes: needs --classes"):
        annotate(tmp_path / "s", source, strict_classes=True)
    with pytest.raises(UserError, match="--annotation-mpp 0"):
        annotate(tmp_path / "s", source, annotation_mpp=0)


def test_the_command_ends_with_a_table_of_classes(tmp_path: Path) -> None:
    slide_file(tmp_path / "s")
    source, classes = save(tmp_path / "a.geojson", ITEMS), save(tmp_path / "map.yaml", MAP)
    command = ["annotate", str(tmp_path / "s"), "--annotations", str(source), "--classes", str(classes), "--verbose"]
    for _ in range(2):  # a second run has nothing to do, and says the same
        result = CliRunner().invoke(app, command, env={"COLUMNS": "160"})
        assert result.exit_code == 0, result.output
        line = next(line for line in result.output.splitlines() if "Tumour" in line)
        assert line.split()[1:10:2] == ["Tumour", "2", "2", "1", "1"]
        assert "repaired: a: bow: Self-intersection" in result.output


def test_coco_losses_are_in_the_table_and_named_by_their_ids(tmp_path: Path) -> None:
    path = slide_file(tmp_path / "s")
    runs = {"size": [150, 200], "counts": [0, 10 * 150, 190 * 150]}
    items = [
        {"id": 101, "image_id": 1, "category_id": 7, "segmentation": runs},
        {"id": 102, "image_id": 1, "category_id": 99, "bbox": [0, 0, 5, 5], "iscrowd": 1},
        {"id": 103, "image_id": 40, "category_id": 7, "bbox": [0, 0, 5, 5]},
        {"id": 104, "image_id": 1, "category_id": 7, "bbox": [5, 5, 0, 0]},
        {"id": 105, "image_id": 1, "category_id": 7, "bbox": [150, 140, 5, 5]},
    ]
    images = [{"id": 1, "file_name": "a.svs", "width": 200, "height": 150}]
    document = {"images": images, "annotations": items, "categories": [{"id": 7, "name": "Tumor"}]}
    command = ["annotate", str(tmp_path / "s"), "--annotations", str(save(tmp_path / "a.json", document)), "--polygons"]
    result = CliRunner().invoke(app, [*command, "--verbose"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    for line in (
        "scaled by 10",
        "that the file does not list, taken without a class (annotation 102)",
        "(iscrowd)",
        "left out: a: no area: annotation 104",
        "of an image that the file does not list: annotation 103",
        "1 of an image that the file does not list",
        "1 on no tile",
        "1 no area",
    ):
        assert line in result.output.replace("\n", " "), line
    with SlideFile(path) as file:
        assert file.boxes(0).tolist() == [[0, 0, 100, 100], [0, 0, 50, 50]]
        assert file.has_polygons


def test_what_is_said_of_many_slides_is_said_once(tmp_path: Path) -> None:
    classes = save(tmp_path / "map.yaml", MAP)
    for name in "abcd":
        slide_file(tmp_path / "s", name)
        items = ITEMS if name != "d" else [feature(RING, "fat"), POINT, POINT]
        save(tmp_path / "in" / f"{name}.geojson", items)
    command = ["annotate", str(tmp_path / "s"), "--annotations", str(tmp_path / "in"), "--classes", str(classes)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert "note: a and 3 more: classes that --classes does not name: fat" in lines
    assert "note: a and 3 more: 5 points skipped: give them an extent with --point-size 12um" in lines
    notes = [line for line in lines if line.startswith("note: ")]
    assert len(notes) == 3
    assert "note: a and 2 more: 1 objects lie outside the slide" in notes
    assert [line.strip() for line in lines].index("annotated, by class") > max(lines.index(note) for note in notes)


def test_what_reading_changed_is_told(tmp_path: Path) -> None:
    slide_file(tmp_path / "s")
    ring = [*RING[:2], [None, 7], [1e308, 3], *RING[2:]]
    item = {**feature(ring, "a"), "geometry": {"type": "Polygon", "coordinates": [ring, [[1, 1], [2, 2]]]}}
    (outcome,) = annotate(tmp_path / "s", save(tmp_path / "a.geojson", [item]))
    assert [str(note) for note in outcome.notes] == [
        "2 positions left out that are no numbers, or beyond any slide",
        "1 holes left out that are no rings, or in no region",
    ]


def test_confidence_is_stored_where_there_is_any_and_stays(tmp_path: Path) -> None:
    path = slide_file(tmp_path / "s")

    def stored() -> list | None:
        with h5py.File(path) as file:
            return file["objects/confidence"][...].tolist() if "objects/confidence" in file else None

    annotate(tmp_path / "s", save(tmp_path / "a_1.geojson", [feature(RING, "a")]))
    assert stored() is None
    boxes = [{"image_id": 1, "category_id": 3, "bbox": [x, 5, 10, 10], "score": x / 32} for x in (8, 24)]
    annotate(tmp_path / "s", save(tmp_path / "a_2.json", boxes), append=True)
    confidence = stored()
    assert confidence is not None
    assert np.array_equal(confidence, [np.nan, 0.25, 0.75], equal_nan=True)
    export_geojson(tmp_path / "s", tmp_path / "out", ["boxes"])
    again = read_annotations(tmp_path / "out" / "a.geojson")
    assert again.confidence is not None
    assert np.array_equal(again.confidence, confidence, equal_nan=True)


def test_coco_outlines_left_out_are_told_by_class(tmp_path: Path) -> None:
    slide_file(tmp_path / "s")
    flat = [value for position in BOW for value in position]
    shapes = [{"segmentation": [flat]}, {"bbox": [1, 1, 0, 5]}, {"segmentation": [[1, 1, 2, 2]]}, {}]
    document = {
        "images": [{"id": 1, "file_name": "a.svs", "width": 2000, "height": 1500}],
        "categories": [{"id": 1, "name": "gland"}],
        "annotations": [{"image_id": 1, "category_id": 1, **shape} for shape in shapes],
    }
    outcomes = annotate(tmp_path / "s", save(tmp_path / "a.json", document))
    (row,) = class_rows(read_results(tmp_path / "s", outcomes).values())
    assert row == ("gland", 1, 1, 1, 3, "1 no geometry, 1 fewer than 3 corners, 1 no area")


def test_hovernet_at_half_the_magnification(tmp_path: Path) -> None:
    path = slide_file(tmp_path / "s")
    nuclei = {"mag": 20, "nuc": {"4": {"contour": [[10, 10], [20, 10], [20, 20], [10, 20]], "type": 2, "type_prob": 0.5}}}
    source = save(tmp_path / "a.json", nuclei)
    (outcome,) = annotate(tmp_path / "s", source)
    assert "HoVer-Net at 20x, the slide taken as 40x: scaled by 2" in outcome.message
    with SlideFile(path) as file:
        assert file.boxes(0).tolist() == [[20, 20, 40, 40]]
        assert file.objects_table()["kind"].tolist() == [1]
    annotate(tmp_path / "s", source, annotation_mpp=1.0)
    with SlideFile(path) as file:
        assert file.boxes(0).tolist() == [[40, 40, 80, 80]]


def test_xml_masks_and_their_folders(tmp_path: Path) -> None:
    imagecodecs = pytest.importorskip("imagecodecs")
    path = slide_file(tmp_path / "s")
    region = "<Regions><Region><Vertices>{}</Vertices></Region></Regions>"
    xml = f"<Annotations><Annotation Name='x'>{region}</Annotation></Annotations>"
    save(tmp_path / "x" / "a.xml", xml.format("".join(f'<Vertex X="{x}" Y="{y}"/>' for x, y in RING)))
    (tmp_path / "x" / "a.png").write_bytes(b"a picture beside it")
    assert annotate(tmp_path / "s", tmp_path / "x")[0].info["objects"] == 1
    mask = np.zeros((150, 200), np.uint8)
    mask[0:2, 1:3] = 3
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "a.png").write_bytes(imagecodecs.png_encode(mask))
    sidecar = save(tmp_path / "m" / "a.classes.json", {"3": "gland"})
    assert annotate(tmp_path / "s", tmp_path / "m")[0].info["objects"] == 1
    with SlideFile(path) as file:
        assert file.boxes(0).tolist() == [[10, 0, 30, 20]]
        assert file.objects_table()["labels"] == ["gland"]
    sidecar.write_text('{"3": "vessel, renamed"}')
    assert not annotate(tmp_path / "s", tmp_path / "m")[0].skipped


def test_ndpa_needs_its_slide(tmp_path: Path) -> None:
    slide_file(tmp_path / "s")
    text = "<annotations><ndpviewstate><annotation type='pin'><x>1</x><y>1</y></annotation></ndpviewstate></annotations>"
    (outcome,) = annotate(tmp_path / "s", save(tmp_path / "a.ndpi.ndpa", text))
    assert not outcome.ok
    assert "bring the NDPI slide back" in outcome.message


def test_the_origin_that_was_taken_is_told(tmp_path: Path) -> None:
    slide_file(tmp_path / "s", bounds=(1000, 1000), offset=1000)
    (outcome,) = annotate(tmp_path / "s", save(tmp_path / "a.geojson", [feature(RING, "a")]))
    warning = "origin: the scanned area's corner, moved by (1000, 1000) (0 objects on tiles from the slide's corner, 1 so)"
    assert warning in outcome.message
    (outcome,) = annotate(tmp_path / "s", save(tmp_path / "a.geojson", [feature(shifted(RING, 1000, 1000), "a")]))
    assert "origin: the slide's corner (1 objects on tiles, 0 from the scanned area's corner)" in outcome.message


def test_annotations_off_the_tissue_are_told_with_both_extents(tmp_path: Path) -> None:
    slide_file(tmp_path / "s")
    (outcome,) = annotate(tmp_path / "s", save(tmp_path / "a.geojson", [feature(shifted(RING, 700), "a")]))
    for text in ("off the tissue: 0 of 1", "they span x 700..720, y 0..20", "the tiles x 0..400, y 0..200", "--annotation-mpp"):
        assert text in outcome.message


@pytest.mark.parametrize(
    ("corners", "side", "warning"),
    [
        ([(0, 0), (300, 100)], 90, ""),
        ([(0, 0), *((500 + 50 * i, 900) for i in range(20))], 20, "1 of 21 objects touch a tile, 5% of their area"),
        ([(10 * i, 0) for i in range(4)] + [(500 + 50 * i, 900) for i in range(6)], 9, "4 of 10 objects touch a tile, 40% of"),
        ([(300, 150)], 400, "1 of 1 objects touch a tile, 3% of their area is on tiles"),  # drawn for another place
        ([(0, 0)], 350, ""),  # drawn generously
    ],
)
def test_how_much_of_the_annotations_is_off_the_tissue_is_told(tmp_path: Path, corners: list, side: int, warning: str) -> None:
    slide_file(tmp_path / "s")
    items = [feature([[side / 20 * x + dx, side / 20 * y + dy] for x, y in RING], "a") for dx, dy in corners]
    # What has no area to speak of and lies off the tiles does not make a warning.
    items += [feature([[x / 20 + 900, y / 20] for x, y in RING], "crumb") for _ in range(3 * (side == 90))]
    (outcome,) = annotate(tmp_path / "s", save(tmp_path / "a.geojson", items))
    assert ("off the tissue" in outcome.message) == bool(warning)
    assert warning in outcome.message


def test_overlapping_tiles_do_not_count_an_object_twice(tmp_path: Path) -> None:
    coords = np.array([(x, 0) for x in range(0, 200, 25)])
    meta = SlideMeta("a", tmp_path / "none.svs", 2000, 1500, 0.25, 0.25, 100, overlap_px=75)
    (tmp_path / "s").mkdir()
    write_slide_file(tmp_path / "s" / "a.h5", meta=meta, coords=coords)
    items = [feature(shifted(RING, 100, 10), "on"), *(feature(shifted(RING, 600 + 30 * i, 10), "off") for i in range(3))]
    (outcome,) = annotate(tmp_path / "s", save(tmp_path / "a.geojson", items))
    assert (outcome.info["objects"], outcome.info["boxes"]) == (4, 4)
    assert "1 of 4 objects touch a tile, 25% of their area is on tiles" in outcome.message
