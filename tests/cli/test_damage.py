"""Damaged files in the commands: one line or one row with the file and the remedy, never a traceback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from odis_path.cli.app import app
from odis_path.features.write import write_features
from odis_path.verification import count_kinds, verify
from tests.cli.conftest import Run
from tiling.slide_file.read import SlideFile


def zeroed(path: Path, dataset: str, size: int = 20_000) -> None:
    """Zero bytes of a dataset in the file."""
    with h5py.File(path, locking=False) as file:
        node = file[dataset]
        at = int(node.id.get_offset() if node.chunks is None else node.id.get_chunk_info(0).byte_offset)
        size = min(size, node.id.get_storage_size())
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes(size))


@pytest.fixture
def features(tiles: Path, tmp_path: Path) -> Path:
    """Feature files of the slide files, tile and object level."""
    rng = np.random.default_rng(0)
    for path in sorted(tiles.glob("*.h5")):
        with SlideFile(path) as file:
            count = {"tile": len(file), "object": len(file.boxes_table()["object"])}
            for level, rows in count.items():
                values = rng.normal(size=(rows, 8))
                write_features(
                    tmp_path / "f" / path.name, level=level, features=values, slide_file=file, encoder="e", mode="full"
                )
    return tmp_path / "f"


def test_doctor_looks_through_a_cohort(tiles: Path, features: Path, run: Run) -> None:
    folder = tiles.parent
    (folder / "run").mkdir()
    well = run("doctor", folder)
    assert well.returncode == 0, well.stdout
    assert "does not match" not in well.stdout
    slides, embedded = sorted(tiles.glob("*.h5")), sorted(features.glob("*.h5"))
    zeroed(slides[0], "pixels/data")
    zeroed(slides[1], "boxes/xyxy", 8)
    zeroed(embedded[0], "features", 16)
    (folder / "run" / "checkpoint-00000001.pt").write_bytes(b"PK\x03\x04 cut off")
    ill = run("doctor", folder)
    assert ill.returncode == 1
    assert "Traceback" not in ill.stderr
    for what, remedy in (
        ("tile 0", "run odis-path tile again"),
        ("/boxes/xyxy", "run odis-path annotate (or propose) again"),
        ("/features", "run odis-path embed again"),
        ("checkpoint-00000001.pt", "copy it again, or take an older checkpoint"),
    ):
        assert any(what in line and remedy in line for line in ill.stdout.splitlines()), what
    counts = {row.kind: (row.files, row.damaged, row.unchecked) for row in count_kinds(verify(folder, workers=1))}
    n = len(slides)
    assert counts == {"slide files": (n, 2, 0), "feature files": (n, 1, 0), "checkpoints": (1, 1, 0)}


def test_doctor_of_nothing_is_one_line(tmp_path: Path) -> None:
    for folder, says in ((tmp_path / "none", "no such folder"), (tmp_path, "holds no slide file")):
        done = CliRunner().invoke(app, ["doctor", str(folder)])
        assert says in str(done.exception)


def test_evaluate_on_damaged_features_is_one_line(features: Path, run: Run, tmp_path: Path) -> None:
    names = sorted(path.name for path in features.glob("*.h5"))
    for name, dataset in zip(names, ("features", "coords", "tile_label"), strict=False):
        broken = Path(shutil.copytree(features, tmp_path / dataset))
        zeroed(broken / name, dataset, 16)
        words = [
            "--labels",
            "annotations",
            "--probe",
            "knn",
            "--level",
            "tile",
            "--groups",
            "slide_id",
            "--out",
            tmp_path / "out",
        ]
        done = run("evaluate", broken, *words)
        assert done.returncode == 2
        assert done.stderr.strip().splitlines()[-1].startswith(f"error: {broken / name}: damaged")
        assert "run odis-path embed again: it is made anew" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("text", ["- a\n- b\n", "[]", "just text", "5", "a: \xff"])
def test_a_config_that_is_no_mapping_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(text.encode("latin-1"))
    done = CliRunner().invoke(app, ["pretrain", str(tmp_path / "c.yaml"), "optim.lr=0.1"])
    assert str(done.exception).startswith(str(tmp_path / "c.yaml"))
    assert type(done.exception).__name__ == "UserError"


def test_a_log_with_a_byte_that_is_no_text_is_read_without_that_line(tmp_path: Path) -> None:
    from odis_path.config import PretrainConfig
    from odis_path.reporting.inventory import find_outputs
    from odis_path.training.log.rows import read_log
    from odis_path.training.log.run_log import RunLog

    rows = [json.dumps({"step": step, "epoch": step / 10, "loss": 5.0}).encode() for step in range(1, 6)]
    rows[2] = rows[2].replace(b"loss", b"lo\xffs")
    (tmp_path / "train.jsonl").write_bytes(b"\n".join(rows) + b"\n")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(PretrainConfig().model_dump(mode="json")))
    inventory = find_outputs(tmp_path)
    assert [row["step"] for row in inventory.runs[0].rows] == [1, 2, 4, 5]
    assert any("train.jsonl: line 3 is not JSON" in problem for problem in inventory.problems)
    assert len(read_log(tmp_path)) == 4
    RunLog(tmp_path, 10, active=True, first_step=4, title="t").close()  # what a run that goes on does first
    assert [row["step"] for row in read_log(tmp_path)] == [1, 2, 4]


def test_dollars_in_names_are_dollars(tmp_path: Path) -> None:
    from odis_path.figures.scores import draw_confusion, draw_roc
    from odis_path.figures.style import save_png

    names = ["cost $1$ \\frac", "$\\unknown{", "a_b^c$"]
    save_png(draw_confusion(np.eye(3) * 4, names), tmp_path / "confusion.png")
    scores = np.random.default_rng(0).uniform(size=(30, 3))
    roc = draw_roc(np.arange(30) % 3, scores, names)
    assert roc is not None
    save_png(roc, tmp_path / "roc.png")


def test_report_goes_on_past_damaged_files(tiles: Path, run: Run) -> None:
    paths = sorted(tiles.glob("*.h5"))
    zeroed(paths[0], "coords", 16)
    zeroed(paths[1], "pixels/data")
    done = run("report", tiles)
    assert "Traceback" not in done.stderr
    page = (tiles / "report.html").read_text()
    assert f"{paths[0].name}: damaged (/coords does not match its checksum)" in page
    assert "run odis-path tile again" in page
