"""The notebooks of examples/ run from top to bottom on the slides that they draw, and are stored without outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ("embeddings_to_map", "slides_to_boxes")
MAX_BYTES = 20_000
Execute = Callable[[nbformat.NotebookNode], Path]


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "examples" / f"{name}.ipynb", as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture
def execute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Execute:
    """Runs a notebook in a kernel of its own, which writes below tmp_path only; returns the notebook's OUT."""
    for name in ("TMPDIR", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(notebook: nbformat.NotebookNode) -> Path:
        NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
        (out,) = (tmp_path / "TMPDIR").glob("odis-path-*")
        return out

    return run


def shown(notebook: nbformat.NotebookNode, mime: str) -> list[str]:
    """What its cells show in one form, such as image/png."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return [output.data[mime] for output in outputs if mime in output.get("data", {})]


def test_every_notebook_is_looked_at() -> None:
    assert sorted(path.stem for path in (ROOT / "examples").glob("*.ipynb")) == sorted(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_stored_small_and_without_outputs(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    assert (ROOT / "examples" / f"{name}.ipynb").stat().st_size < MAX_BYTES
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code_cells(notebook))


def test_slides_become_boxes(execute: Execute) -> None:
    notebook = read("slides_to_boxes")
    out = execute(notebook)
    scan, tile, annotate = shown(notebook, "text/html")
    assert "scan" in scan
    assert "tile" in tile
    assert "lymphocyte" in annotate
    assert len(shown(notebook, "image/png")) == 1
    assert len(list((out / "tiles").glob("*.h5"))) == 2


def test_embeddings_become_a_map_and_a_score(execute: Execute) -> None:
    notebook = read("embeddings_to_map")
    out = execute(notebook)
    annotate, trained, embed, evaluated = shown(notebook, "text/html")
    assert "lymphocyte" in annotate
    assert "token spread" in trained
    assert "embed" in embed
    assert "balanced accuracy" in evaluated
    assert "untrained" in evaluated
    assert len(shown(notebook, "image/png")) == 1
    assert (out / "evaluation" / "results.json").is_file()


def test_slides_of_ones_own_take_the_place_of_the_drawn_ones(execute: Execute, tmp_path: Path) -> None:
    from odis_path.synthetic.slides import write_cohort

    write_cohort(tmp_path / "own", patients=1, slides_per_patient=1, side_px=640, workers=1)
    notebook = read("slides_to_boxes")
    (parameters,) = (cell for cell in code_cells(notebook) if cell.source.startswith("SLIDES = None"))
    slides, annotations = str(tmp_path / "own" / "slides"), str(tmp_path / "own" / "annotations")
    parameters.source = parameters.source.replace("SLIDES = None", f"SLIDES = {slides!r}")
    parameters.source = parameters.source.replace("ANNOTATIONS = None", f"ANNOTATIONS = {annotations!r}")
    out = execute(notebook)
    assert not (out / "cohort").exists()
    assert [path.stem for path in (out / "tiles").glob("*.h5")] == ["SYN-P01-S1"]
