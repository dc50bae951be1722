"""A small folder of everything that a report shows, made from generated slides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely

SIDE_PX, TILE_PX = 768, 64
TISSUES = ["lymphoid infiltrate", "necrosis", "normal glands", "stroma", "tumour"]


def add_boxes(slide_file: Path, geojson: Path) -> None:
    """Clip the regions and cells of a GeoJSON to the tiles of a slide file, one by one and plainly."""
    from tiling.slide_file.read import SlideFile
    from tiling.slide_file.write import replace_groups

    features = json.loads(geojson.read_text())["features"]
    shapes = [shapely.make_valid(shapely.geometry.shape(f["geometry"])) for f in features]
    names = [f["properties"]["classification"]["name"] for f in features]
    labels = sorted(set(names))
    with SlideFile(slide_file) as file:
        coords, size = file.coords, file.size_l0
    tree, xyxy, owner, visible, offsets = shapely.STRtree(shapes), [], [], [], [0]
    for x, y in coords:
        tile = shapely.box(x, y, x + size, y + size)
        for i in sorted(tree.query(tile)):
            part = shapely.intersection(shapes[i], tile)
            if part.area > 1:
                xyxy.append(np.subtract(part.bounds, [x, y, x, y]))
                owner.append(i)
                visible.append(part.area / shapes[i].area)
        offsets.append(len(owner))
    replace_groups(
        slide_file,
        {
            "boxes": {
                "xyxy": np.array(xyxy, np.float32),
                "offsets": np.array(offsets, np.int64),
                "object": np.array(owner, np.int32),
                "visible": np.array(visible, np.float32),
            },
            "objects": {
                "id": [f["id"] for f in features],
                "label": np.array([labels.index(n) for n in names], np.int16),
                "kind": np.array([f["properties"]["objectType"] != "annotation" for f in features], np.uint8),
                "area_um2": (shapely.area(shapes) * 0.25).astype(np.float32),
                "attrs": {"labels": labels},
            },
        },
    )


def write_features(tiles: Path, out: Path) -> None:
    """Feature files whose embedding is noise around a mean of the tile's class."""
    from odis_path.features.write import write_features as write
    from tiling.slide_file.read import SlideFile, list_slide_files
    from tiling.slide_file.tile_labels import tile_labels

    rng = np.random.default_rng(0)
    means = rng.normal(size=(10, 16))
    for path in list_slide_files(tiles):
        with SlideFile(path) as file:
            labels, _ = tile_labels(file)
            data = means[labels] + 0.3 * rng.normal(size=(len(labels), 16))
            write(out / path.name, level="tile", features=data, slide_file=file, encoder="tiny", mode="full")


def example_results(probe: str = "knn") -> dict[str, Any]:
    """Return the content of a results.json as `evaluate` writes it."""

    def interval(point: float) -> dict[str, float]:
        return {"point": point, "low": point - 0.05, "high": point + 0.05}

    counts = (np.eye(5, dtype=int) * 30 + 2).tolist()
    return {
        "probe": probe,
        "level": "tile",
        "labels": TISSUES,
        "n": 190,
        "n_patients": 3,
        "groups": "patient_id",
        "headline": {"balanced_accuracy": interval(0.8), "macro_f1": interval(0.79), "auroc": interval(0.95)},
        "baselines": {
            "random weights": {"balanced_accuracy": interval(0.31), "difference": interval(0.49), "standardise": "whiten"},
            "rgb_mean": {"balanced_accuracy": interval(0.22), "difference": interval(0.58)},
        },
        "confusion": counts,
        "per_k": {"5": 0.75, "20": 0.8},
        "chosen_k": 20,
        "warnings": ["two patients lack necrosis"],
        "standardise": {"asked": "auto", "chosen": "zscore"},
        "pretraining": {"in_words": "the encoder was pretrained on 1 of the 3 tested patients"},
        "split": "5 folds",
        "settings": {"k": 20, "seed": 0},
        "data_sha256": "ab" * 32,
    }


def write_run(out: Path, tiles: Path) -> None:
    """A run folder with a checkpoint, from two steps of training."""
    from odis_path.config import parse_config
    from odis_path.training.loop import pretrain

    values = {
        "name": "tiny",
        "data": {"tiles": str(tiles), "workers": 0, "holdout": 0.34, "kinds": ["tissue"]},
        "target": {"whole_tile_p": 0.5},
        "views": {"global_size": 32, "local_count": 1, "local_size": 16},
        "model": {
            "name": "vit_tiny_patch16_224",
            "kwargs": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
        },
        "head": {"out_dim": 32, "hidden_dim": 16, "bottleneck_dim": 8},
        "optim": {"batch_size": 16, "epochs": 0.3, "warmup_epochs": 0.1},
        "eval": {"every_epochs": 0},
        "run": {"out": str(out), "log_every_steps": 1, "device": "cpu"},
    }
    pretrain(parse_config(values, "test"))
    with (out / "train.jsonl").open("a") as file:
        for epoch, score in ((0.1, 0.3), (0.3, 0.6)):
            file.write(json.dumps({"step": 3, "epoch": epoch, "knn_balanced_accuracy": score}) + "\n")


@pytest.fixture(scope="session")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of slides, tiles, boxes, a run, features and two evaluations; the tests only read it."""
    from odis_path.synthetic.slides import write_cohort
    from tiling.tiles.run import tile

    folder = tmp_path_factory.mktemp("everything")
    write_cohort(folder / "cohort", patients=3, slides_per_patient=1, side_px=SIDE_PX, workers=1)
    tile([folder / "cohort" / "manifest.csv"], folder / "tiles", 0.5, TILE_PX, workers=1)
    for path in sorted((folder / "tiles").glob("*.h5")):
        add_boxes(path, folder / "cohort" / "annotations" / f"{path.stem}.geojson")
    write_run(folder / "runs" / "tiny", folder / "tiles")
    write_features(folder / "tiles", folder / "features")
    for probe in ("knn", "linear"):
        (folder / "evaluation" / probe).mkdir(parents=True)
        (folder / "evaluation" / probe / "results.json").write_text(json.dumps(example_results(probe)))
    return folder
