"""An id that is read from a file never leads out of the folder that a command was given."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from annotations.errors import UserError
from odis_path.cli.app import app
from odis_path.exporters.cohort import export_features
from odis_path.exporters.geojson import export_geojson, read_predictions
from odis_path.features.read import read_features
from odis_path.features.write import write_features, write_slides_parquet
from tests.png import encode_png
from tiling.images.run import import_images
from tiling.slide_file.read import SlideFile
from tiling.slide_file.write import SlideMeta, write_slide_file

ROOT = Path(__file__).parents[2]
BAD = ["../../../escaped", "/tmp/odis-escaped", "..", ".hidden", "a/b", "a\\b", "a\nb", "", " ", "x" * 201, "a\x1b[31mb"]


def slide_file(folder: Path, name: str) -> Path:
    meta = SlideMeta(name, folder / "none.svs", 64, 64, 0.5, 0.5, 32, patient_id="P")
    coords = np.array([[0, 0], [32, 0], [0, 32], [32, 32]])
    picture = encode_png(np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype(np.uint8))
    write_slide_file(folder / f"{name}.h5", meta=meta, coords=coords, pixels=[picture] * 4)
    return folder / f"{name}.h5"


def renamed(path: Path, slide_id: str) -> Path:
    with h5py.File(path, "r+") as file:
        file.attrs["slide_id"] = slide_id
        file["coords"].attrs["name"] = slide_id
    return path


def everything(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.fixture
def slides(tmp_path: Path) -> Path:
    """Two slide files, deep enough for `../../..` to stay in the folder of the test."""
    folder = tmp_path / "a" / "b" / "c" / "slides"
    for name in ("good", "bad"):
        slide_file(folder, name)
    return folder


def one_line_of(text: str, *words: str) -> bool:
    return any(all(word in line for word in words) for line in text.splitlines())


@pytest.mark.parametrize("slide_id", BAD)
def test_no_id_of_a_slide_file_leads_elsewhere(slide_id: str, slides: Path, tmp_path: Path) -> None:
    path = renamed(slides / "bad.h5", slide_id)
    out = slides.parent / "out"
    before = everything(tmp_path)
    result = CliRunner().invoke(
        app, ["export", str(slides), "--to", "geojson", "--out", str(out), "--workers", "1"], env={"COLUMNS": "700"}
    )
    assert result.exit_code == 1, result.output
    assert {path for path in everything(tmp_path) - before if path != out} == {out / "good.geojson"}
    assert not Path("/tmp/odis-escaped.geojson").exists()
    shown = "slide_id" if slide_id != "../../../escaped" else "slide_id ../../../escaped cannot be a file name"
    assert one_line_of(result.output, str(path), shown), result.output
    assert "\x1b[31m" not in result.output


def pretrained(slides: Path, out: Path) -> None:
    from odis_path.data.tile_index import index_tiles

    index_tiles(slides)


def embedded(slides: Path, out: Path) -> None:
    with SlideFile(slides / "bad.h5") as file:
        write_features(out / "bad.h5", level="tile", features=np.eye(4), slide_file=file, encoder="e", mode="full")


@pytest.mark.parametrize("work", [pretrained, embedded])
def test_who_reads_slide_files_names_the_file_and_the_id(work: Callable[[Path, Path], None], slides: Path) -> None:
    renamed(slides / "bad.h5", "../escaped")
    with pytest.raises(UserError, match=r"bad\.h5: slide_id \.\./escaped cannot be a file name"):
        work(slides, slides.parent / "out")
    assert {path.name for path in slides.parent.iterdir()} == {"slides"}


def test_the_report_tells_of_a_bad_id_and_goes_on(slides: Path, tmp_path: Path) -> None:
    renamed(slides / "bad.h5", "../../../escaped")
    before = everything(tmp_path)
    result = CliRunner().invoke(app, ["report", str(slides), "--out", str(slides.parent / "r" / "r.html")])
    assert result.exit_code == 1
    assert one_line_of(result.output, "bad.h5", "slide_id ../../../escaped cannot be a file name"), result.output
    assert all((slides.parent / "r") in (path, *path.parents) for path in everything(tmp_path) - before)


@pytest.mark.parametrize("slide_id", BAD)
def test_ids_of_feature_files_and_tables_are_checked_too(slide_id: str, slides: Path, tmp_path: Path) -> None:
    with SlideFile(slides / "good.h5") as file:
        write_features(tmp_path / "f" / "S.h5", level="tile", features=np.eye(4), slide_file=file, encoder="e", mode="full")
    with h5py.File(tmp_path / "f" / "S.h5", "r+") as file:
        file.attrs["slide_id"] = slide_id
    with pytest.raises(UserError, match=r"S\.h5: slide_id"):
        read_features(tmp_path / "f")
    for target in ("clam", "trident"):
        with pytest.raises(UserError, match=r"S\.h5: slide_id"):
            export_features(tmp_path / "f", target, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    row = {"slide_id": slide_id, "patient_id": "P", "n_tiles": 1, "encoder": "e", "mode": "full", "features": [1.0, 2.0]}
    write_slides_parquet(tmp_path / "f" / "slides.parquet", [row])
    assert pq.read_table(tmp_path / "f" / "slides.parquet").num_rows == 1
    with pytest.raises(UserError, match=r"slides\.parquet: slide_id"):
        read_features(tmp_path / "f", "slide")


def test_ids_of_predictions_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "predictions.csv"
    path.write_text("slide_id,x,y,object,label,predicted\n../../../escaped,0,0,-1,a,a\n")
    with pytest.raises(UserError, match=r"predictions\.csv: slide_id \.\./\.\./\.\./escaped cannot be a file name"):
        read_predictions(path)


def test_names_in_a_coco_file_and_names_of_images_stay_inside(tmp_path: Path) -> None:
    """A COCO name only ever finds an image that is there; what an image is called is made the name of a file."""
    import json

    images, out = tmp_path / "a" / "images", tmp_path / "a" / "out"
    images.mkdir(parents=True)
    picture = encode_png(np.full((64, 64, 3), 90, np.uint8))
    for name in ("plain.png", "back\\slash.png", "new\nline.png", f"{'n' * 230}.png"):
        (images / name).write_bytes(picture)
    names = ["../../../escaped.png", "/tmp/odis-escaped.png", "plain.png"]
    content: dict[str, Any] = {
        "images": [{"id": i, "file_name": name, "width": 64, "height": 64} for i, name in enumerate(names)],
        "annotations": [{"id": i, "image_id": i, "category_id": 1, "bbox": [1, 1, 20, 20]} for i in range(3)],
        "categories": [{"id": 1, "name": "../../x"}],
    }
    (tmp_path / "c.json").write_text(json.dumps(content))
    before = everything(tmp_path)
    outcomes = import_images(images, out, coco=tmp_path / "c.json", mpp=0.5, size=32)
    assert [outcome.message for outcome in outcomes if not outcome.ok] == []
    new = everything(tmp_path) - before - {out}
    assert {path.parent for path in new} == {out}
    assert len(new) == 4
    for path in new:
        with SlideFile(path) as file:
            assert file.slide_id == path.stem


def test_a_manifest_of_images_may_not_lead_elsewhere_either(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(encode_png(np.full((64, 64, 3), 90, np.uint8)))
    for slide_id in ("../up", "x" * 201, ".h"):
        (tmp_path / "m.csv").write_text(f"image,slide_id\na.png,{slide_id}\n")
        with pytest.raises(UserError, match=r"m\.csv: slide_id"):
            import_images(tmp_path / "images", tmp_path / "out", manifest=tmp_path / "m.csv", mpp=0.5)
    assert not (tmp_path / "out").exists()


# --- every place that builds a path

# What ids become names of files in, and why each of them can be one.
CHECKED = {
    "item.slide_id": "SlideItem: of a manifest (checked), of a file name (made safe)",
    "self.item.slide_id": "the ImageItem of a task of import: of a manifest (checked), of a file name (made safe)",
    "self.slide_id": "Shard: of a folder (made safe)",
    "file.slide_id": "SlideFile: checked as it is read",
    "slide.file_id": "ExportedSlide: of a feature file (checked), without the suffix of a slide",
    "tiles.slide.file_id": "the same",
    "job.slide_id": "SlideJob of the demo: drawn up there",
}


def id_expressions(tree: ast.AST) -> Iterator[str]:
    """Whatever ends in slide_id or file_id and is put into a text that is joined to a path."""
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            parts = [node.right]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            makes_paths = name in ("with_name", "with_stem", "joinpath", "Path", "open")
            parts = node.args if makes_paths or ast.unparse(node.func) == "os.path.join" else []
        else:
            continue
        for part in parts:
            for inner in ast.walk(part):
                is_value = isinstance(inner, ast.Attribute | ast.Name | ast.Subscript)
                if is_value and ast.unparse(inner).rstrip("'\"]").endswith(("slide_id", "file_id")):
                    yield ast.unparse(inner)


def test_every_path_made_of_an_id_is_made_of_one_that_is_checked() -> None:
    used = {
        expression
        for package in ("annotations", "tiling", "odis_path")
        for path in (ROOT / package).rglob("*.py")
        for expression in id_expressions(ast.parse(path.read_text()))
    }
    assert used == CHECKED.keys(), "a new place: see that its id is checked (tiling.storage.slide_id), then add it here"


def test_the_walk_sees_a_path_made_of_an_id() -> None:
    for text in ('out / f"{row.slide_id}.h5"', 'path.with_name(row["slide_id"])', "Path(out, slide_id)"):
        assert list(id_expressions(ast.parse(text))), text


def test_two_slide_files_of_one_id_do_not_end_as_one_export(slides: Path) -> None:
    shutil.copy(slides / "good.h5", slides / "zcopy.h5")
    with pytest.raises(UserError, match=r"zcopy\.h5: slide_id good is also in good\.h5"):
        export_geojson(slides, slides.parent / "out", workers=1)
    assert not (slides.parent / "out").exists()
