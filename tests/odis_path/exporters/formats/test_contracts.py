"""What each program asks of its files, read without odis-path: h5py, torch, numpy and pyarrow alone."""

from __future__ import annotations

import csv
from itertools import combinations
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow.dataset as ds
import pytest
import torch

from odis_path.exporters.cohort import export_features
from tests.odis_path.exporters.conftest import DIM, WriteSlide


def exported(source: Path, target: str, out: Path) -> Path:
    outcomes = export_features(source.parent, target, out, workers=1)
    assert not outcomes.failed, outcomes.summary()
    return out


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, Any]]:
    """Arrays of a flat h5 file, the attributes of its root, those of its coords."""
    with h5py.File(path) as file:
        return {name: node[...] for name, node in file.items()}, dict(file.attrs), dict(file["coords"].attrs)


def eight_neighbours(positions: list[tuple[int, int]]) -> set[tuple[int, int]]:
    """Pairs of rows whose places in the grid touch, at a side or a corner."""
    return {(i, j) for (i, a), (j, b) in combinations(enumerate(positions), 2) if max(abs(a[0] - b[0]), abs(a[1] - b[1])) == 1}


def test_trident_finds_patches_and_features_of_an_encoder(write_slide: WriteSlide, tmp_path: Path) -> None:
    source = write_slide("a", overlap_px=8)
    out = exported(source, "trident", tmp_path / "out")
    grid = out / "20x_32px_8px_overlap"
    ours, _, _ = read(source)
    patches, _, attrs = read(grid / "patches" / "a_patches.h5")
    assert np.array_equal(patches["coords"], ours["coords"])
    assert (attrs["patch_size"], attrs["patch_size_level0"], attrs["overlap"], attrs["name"]) == (32, 64, 8, "a")
    assert (attrs["level0_magnification"], attrs["target_magnification"]) == (40, 20)
    features, _, attrs = read(grid / "features_vit_tiny_step_10_" / "a.h5")
    assert np.array_equal(features["features"], ours["features"])
    assert attrs["patch_size_level0"] == 64
    with h5py.File(grid / "features_vit_tiny_step_10_" / "a.h5") as file:
        assert (file["features"].attrs["encoder"], file["features"].attrs["name"]) == ("vit_tiny (step 10)", "a")


def test_pathobench_finds_features_and_the_side_of_a_tile(write_slide: WriteSlide, tmp_path: Path) -> None:
    source = write_slide("a")
    arrays, _, attrs = read(exported(source, "pathobench", tmp_path / "out") / "a.h5")
    assert np.array_equal(arrays["features"], read(source)[0]["features"])
    assert np.array_equal(arrays["coords"], read(source)[0]["coords"])
    assert attrs["patch_size_level0"] == 64


def test_clam_loads_a_float32_tensor_by_a_bare_id(write_slide: WriteSlide, tmp_path: Path) -> None:
    source = write_slide("a.svs")
    write_slide("b", patient="", seed=1)
    out = exported(source, "clam", tmp_path / "out")
    tensor = torch.load(out / "pt_files" / "a.pt", weights_only=True)
    assert isinstance(tensor, torch.Tensor)
    assert (tensor.dtype, tuple(tensor.shape)) == (torch.float32, (18, DIM))
    arrays, _, _ = read(out / "h5_files" / "a.h5")
    assert (arrays["features"].dtype, arrays["coords"].dtype) == (np.float32, np.int32)
    assert np.array_equal(arrays["features"], tensor.numpy())
    assert np.array_equal(arrays["features"], read(source)[0]["features"].astype(np.float32))
    assert np.array_equal(arrays["coords"], read(source)[0]["coords"])
    assert rows(out / "slides.csv") == [{"case_id": "P1", "slide_id": "a"}, {"case_id": "b", "slide_id": "b"}]


@pytest.mark.parametrize(("mpp", "mpp_l0"), [(0.5, 0.25), (0.5, 0.2431), (1.0, 0.5)])
def test_stamp_reads_micrometres(write_slide: WriteSlide, tmp_path: Path, mpp: float, mpp_l0: float) -> None:
    source = write_slide("a", mpp=mpp, mpp_l0=mpp_l0)
    out = exported(source, "stamp", tmp_path / "out")
    arrays, root, _ = read(out / "a.h5")
    assert arrays["coords"].dtype == np.float32
    assert np.allclose(arrays["coords"], read(source)[0]["coords"] * mpp_l0, atol=1e-3)
    assert np.array_equal(arrays["feats"], read(source)[0]["features"])
    assert root["tile_size_um"] / root["tile_size_px"] == pytest.approx(mpp)  # how STAMP finds the mpp of a slide
    assert {key: root[key] for key in ("unit", "feat_type", "extractor", "tile_size_px")} == {
        "unit": "um",
        "feat_type": "tile",
        "extractor": "vit_tiny (step 10)",
        "tile_size_px": 32,
    }
    assert not {"stamp_version", "encoder"} & root.keys()
    assert [path.name for path in out.rglob("*.h5")] == ["a.h5"]  # STAMP takes every h5 below the folder
    assert rows(out / "slides.csv") == [{"PATIENT": "P1", "FILENAME": "a.h5"}]


@pytest.mark.parametrize(
    ("mpp", "mpp_l0", "overlap_px"), [(0.5, 0.25, 0), (0.5, 0.5, 0), (0.5, 0.2431, 0), (0.5, 0.25, 8), (1.0, 0.2527, 11)]
)
def test_the_torchmil_graph_is_the_grid_of_eight_neighbours_at_any_magnification(
    write_slide: WriteSlide, tmp_path: Path, mpp: float, mpp_l0: float, overlap_px: int
) -> None:
    drop = (3, 7, 12)
    source = write_slide("a", mpp=mpp, mpp_l0=mpp_l0, overlap_px=overlap_px, drop=drop)
    out = exported(source, "torchmil", tmp_path / "out")
    features, coords = np.load(out / "features" / "a.npy"), np.load(out / "coords" / "a.npy")
    assert features.dtype == np.float32
    assert np.array_equal(features, read(source)[0]["features"].astype(np.float32))
    grid = [(i % 5, i // 5) for i in range(20) if i not in drop]  # by the way that the slide was drawn
    assert coords.tolist() == [list(place) for place in grid]
    distance = np.linalg.norm(coords[:, None] - coords[None], axis=-1)
    edges = {(int(i), int(j)) for i, j in np.argwhere((distance > 0) & (distance <= 1.5)) if i < j}
    assert edges == eight_neighbours(grid)


def test_torchmil_itself_builds_that_graph_and_trains(write_slide: WriteSlide, tmp_path: Path) -> None:
    datasets = pytest.importorskip("torchmil.datasets", reason="torchmil is not installed")
    from torchmil.models import ABMIL

    drop = (3, 7)
    source = write_slide("a", drop=drop)
    write_slide("b", seed=1, drop=drop)
    out = exported(source, "torchmil", tmp_path / "out")
    (out / "labels").mkdir()
    for name, label in (("a", 0), ("b", 1)):
        np.save(out / "labels" / f"{name}.npy", np.array(label))
    paths = {f"{name}_path": str(out / name) for name in ("features", "labels", "coords")}
    bags = datasets.ProcessedMILDataset(**paths, bag_keys=["X", "Y", "adj", "coords"], norm_adj=False)
    assert bags.bag_names == ["a", "b"]
    edges = {(int(i), int(j)) for i, j in bags[0]["adj"].coalesce().indices().T.tolist() if i < j}
    assert edges == eight_neighbours([(i % 5, i // 5) for i in range(20) if i not in drop])
    torch.manual_seed(0)
    model = ABMIL(in_shape=(DIM,))
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(20):
        optimiser.zero_grad()
        scores = torch.cat([model(bags[i]["X"][None]) for i in range(2)])
        loss = torch.nn.functional.binary_cross_entropy_with_logits(scores, torch.tensor([0.0, 1.0]))
        loss.backward()
        optimiser.step()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]


def test_arrow_reads_the_folder_as_one_table(write_slide: WriteSlide, tmp_path: Path) -> None:
    source = write_slide("a", labelled=True)
    write_slide("b", seed=1, patient="", labelled=True)
    out = exported(source, "arrow", tmp_path / "out")
    table = ds.dataset(out, format="parquet").to_table()
    assert table.column_names == ["patient_id", "slide_id", "x", "y", "label", "embedding"]
    assert str(table.schema.field("embedding").type) == f"fixed_size_list<element: float>[{DIM}]"
    assert table["slide_id"].to_pylist() == ["a"] * 18 + ["b"] * 18
    assert table["patient_id"].to_pylist() == ["P1"] * 18 + [None] * 18
    arrays, _, _ = read(source)
    assert np.array_equal(np.array(table["embedding"].to_pylist()[:18], np.float32), arrays["features"].astype(np.float32))
    assert np.array_equal(np.stack([table["x"], table["y"]], 1)[:18], arrays["coords"])
    assert table["label"].to_pylist()[:18] == [*(["gland", "stroma"] * 9)[:17], None]
    assert table.schema.metadata[b"encoder"] == b"vit_tiny (step 10)"
    assert (table.schema.metadata[b"mpp"], table.schema.metadata[b"mpp_level0"]) == (b"0.5", b"0.25")


def test_a_store_of_spatialdata_has_squares_in_level_0_and_a_table_of_them(write_slide: WriteSlide, tmp_path: Path) -> None:
    spatialdata = pytest.importorskip("spatialdata", reason="the extra spatialdata is not installed")
    source = write_slide("a", labelled=True)
    out = exported(source, "spatialdata", tmp_path / "out")
    store = spatialdata.read_zarr(out / "a.zarr")
    arrays, _, _ = read(source)
    assert np.array_equal(store["tiles"][["x", "y"]].to_numpy(), arrays["coords"])
    assert np.array_equal(store["tiles"].geometry.bounds.to_numpy()[:, 2:], arrays["coords"] + 64)
    table = store["features_tiles"]
    assert np.array_equal(np.asarray(table.X), arrays["features"].astype(np.float32))
    assert table.uns["spatialdata_attrs"] == {"region": "tiles", "region_key": "library_id", "instance_key": "tile_id"}
    assert table.obs["tile_id"].tolist() == list(range(18))
    assert table.obs["label"].tolist()[:2] == ["gland", "stroma"]
    spec = store.attrs["tile_spec"]["tiles"]
    assert (spec["width"], spec["stride_width"], spec["mpp"], spec["base_downsample"]) == (32, 32, 0.5, 2.0)


def test_wsidata_opens_a_store_beside_its_slide(write_slide: WriteSlide, tmp_path: Path) -> None:
    wsidata = pytest.importorskip("wsidata", reason="wsidata is not installed")
    import tifffile

    out = exported(write_slide("a"), "spatialdata", tmp_path / "out")
    picture = np.full((256, 320, 3), 200, np.uint8)
    resolution = {"resolution": (40000, 40000), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(tmp_path / "a.tiff", picture, tile=(64, 64), photometric="rgb", **resolution)
    slide = wsidata.open_wsi(tmp_path / "a.tiff", store=out / "a.zarr")
    spec = slide.tile_spec("tiles")
    assert (spec.width, spec.mpp, spec.base_width) == (32, 0.5, 64)
    assert len(slide.shapes["tiles"]) == 18
    assert slide.fetch.features_anndata("features").shape == (18, DIM)


def test_a_slide_without_tiles_is_exported_as_one(write_slide: WriteSlide, tmp_path: Path) -> None:
    source = write_slide("empty", columns=1, rows=1, drop=(0,))
    for target in ("trident", "clam", "stamp", "torchmil", "pathobench", "arrow"):
        exported(source, target, tmp_path / target)
    assert torch.load(tmp_path / "clam" / "pt_files" / "empty.pt", weights_only=True).shape == (0, DIM)
    assert np.load(tmp_path / "torchmil" / "coords" / "empty.npy").shape == (0, 2)
    assert ds.dataset(tmp_path / "arrow", format="parquet").count_rows() == 0
