"""Corpora of the study: slide files to train on, and objects of held-out patients to judge by.

cells: BRCA-M2C, 12 um boxes around classed cells, seen in windows of 25 um; 40 % of the patients are held out, others by seed.
mosaic-D: 2 x 2 rectangles cut from crc5 tiles, the cut lines anywhere from 0.35 to 0.65, the rectangles as boxes; in a share D
of the training tiles the four are of other tiles and classes, in the rest they are one tile. crc5: the tiles as they are, with
proposed boxes. Any other name is a folder of annotated slide files, for instance those of `odis-path demo`.

crc5 tells no slides: tiles of a class that are alike in colour (k-means on mean and spread of the optical density) stay
together, and 40 % of these groups are held out. They stand in for patients.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import odis_path as op
from odis_path.data.tile_index import held_out_patients, index_tiles
from tiling.slide_file.read import SlideFile, list_slide_files
from tiling.slide_file.window import TileWindows
from tiling.slide_file.write import SlideMeta, write_slide_file
from tiling.wsi.codec import encode_jpeg

WINDOW_UM = 25.0
HELD_OUT = 0.4
MOSAIC_PX = 96
GROUPS_A_CLASS = 15
CLASSES = ("AC", "H", "S", "T", "V")
SIZES = {  # tiles a class read, mosaics to train on, to compare with, to judge by
    "smoke": (12, 24, 8, 6),
    "cpu": (700, 1500, 300, 250),
    "gpu": (900, 2000, 500, 400),
}
COMPARED = {"smoke": (150, 100), "cpu": (2500, 2000), "gpu": (8000, 6000)}  # cells to compare with, cells judged


@dataclass(frozen=True)
class Objects:
    """Objects in what an encoder sees of them: pixels uint8 (n, S, S, 3), boxes (n, 4), labels and patients int (n,)."""

    pixels: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    groups: np.ndarray


@dataclass(frozen=True)
class Corpus:
    """A folder of slide files to train on, what a run of it overrides, objects to compare with and objects judged."""

    tiles: Path
    overrides: list[str]
    compared: Objects
    judged: Objects
    classes: int


def corpus(name: str, data: Path | None, work: Path, size: str, seed: int) -> Corpus:
    """Make a corpus, or take what is there. data: the folder of raw data; without it only what was made or packed is used."""
    if name == "cells":
        return _annotated(cells(data, work, size), size, seed, ["cell"], WINDOW_UM)
    if name.startswith("mosaic-"):
        return mosaics(data, work, size, seed, float(name.removeprefix("mosaic-")))
    if name == "crc5":
        return _annotated(crc5(data, work, size), size, seed, ["proposal"], 0.0, whole=True)
    return _annotated(Path(name), size, seed, ["tissue"], 0.0)


def _annotated(folder: Path, size: str, seed: int, kinds: list[str], window_um: float, *, whole: bool = False) -> Corpus:
    """Patients of a folder of annotated slide files, apart. whole: whole tiles are judged, by the class of their slide."""
    index = index_tiles(folder)
    away = held_out_patients(index, HELD_OUT, [], seed)
    limits = COMPARED[size]
    sets = [
        _objects(folder, away, inside, kinds[0], window_um, limit, seed, whole=whole)
        for inside, limit in zip((False, True), limits, strict=True)
    ]
    overrides = [f"data.holdout_patients={sorted(away)}", f"data.kinds={kinds}", "data.boxless=drop"]
    if window_um:
        overrides.append(f"views.window_um={window_um}")
    return Corpus(folder, overrides, *sets, classes=int(max(s.labels.max() for s in sets)) + 1)


def _objects(
    folder: Path, away: set[str], inside: bool, kind: str, window_um: float, limit: int, seed: int, *, whole: bool
) -> Objects:
    """Labelled objects of patients, each once by its largest part; at most `limit`, drawn by seed."""
    from annotations.objects import Kind

    rows: list[tuple[int, int, int, str]] = []  # file, tile, row of /boxes or -1 for the whole tile, class
    files = [SlideFile(path) for path in list_slide_files(folder)]
    classes: set[str] = set()
    for number, file in enumerate(files):
        table, objects = file.boxes_table(), file.objects_table(ids=False)
        classes |= {_class_of(file)} if whole else set(objects["labels"])
        if (file.patient_id in away) != inside:
            continue
        if whole:
            rows += [(number, tile, -1, _class_of(file)) for tile in range(len(file))]
            continue
        order = np.lexsort((-table["visible"], table["object"]))
        first = order[np.unique(table["object"][order], return_index=True)[1]]
        for row in np.sort(first).tolist():
            label = int(objects["label"][table["object"][row]])
            if label >= 0 and objects["kind"][table["object"][row]] == Kind[kind.upper()]:
                rows.append((number, int(file.box_tiles[row]), row, objects["labels"][label]))
    code = {name: i for i, name in enumerate(sorted(classes))}
    chosen = np.sort(np.random.default_rng([seed, inside]).permutation(len(rows))[:limit])
    patients = {name: code for code, name in enumerate(sorted({file.patient_id for file in files}))}
    pixels, boxes = [], []
    windows: dict[int, TileWindows] = {}
    for number, tile, row, _ in (rows[i] for i in chosen):
        file = files[number]
        if row < 0:
            pixels.append(file.tile(tile))
            boxes.append(np.array([0, 0, file.patch_size, file.patch_size], float))
        elif window_um:
            side = round(window_um / file.mpp)
            view = windows.setdefault(number, TileWindows(file))
            box = view.whole_boxes(side)[row]
            corner = view.corner(tile, box, side)
            pixels.append(view.read(tile, *corner, side))
            boxes.append(np.clip(box - np.tile(corner, 2), 0, side))
        else:
            pixels.append(file.tile(tile))
            boxes.append(file.boxes_table()["xyxy"][row].astype(float))
    labels = np.array([code[rows[i][3]] for i in chosen])
    groups = np.array([patients[files[rows[i][0]].patient_id] for i in chosen])
    for file in files:
        file.close()
    return Objects(np.stack(pixels), np.stack(boxes), labels, groups)


def _class_of(file: SlideFile) -> str:
    """The class that a slide of crc5 is named after."""
    return file.patient_id.split("-")[0]


def cells(data: Path | None, work: Path, size: str) -> Path:
    """Slide files of BRCA-M2C; for smoke a few images drawn here, with round dark and long pale cells."""
    folder = work / "cells"
    if folder.exists():
        return folder
    if size == "smoke":
        _drawn_cells(folder)
        return folder
    source = _raw(data, "brca_m2c")
    op.import_images(source / "images", folder, mpp=0.5, size=112, manifest=source / "manifest.csv", workers=1)
    op.annotate(folder, source / "geojson", point_size="12um", workers=1)
    return folder


def _raw(data: Path | None, name: str) -> Path:
    if data is None or not (data / name).is_dir():
        raise SystemExit(
            f"{name}: not there: give the folder that holds it with --data, or unpack what --pack made into --work"
        )
    return data / name


def _drawn_cells(folder: Path, patients: int = 10, tiles: int = 3, side: int = 112, cells_a_tile: int = 8) -> None:
    """Tiles of dark round and pale long cells on pink, each patient with a shade of its own."""
    folder.mkdir(parents=True)
    y, x = np.mgrid[:side, :side]
    for number in range(patients):
        rng = np.random.default_rng([number, 5])
        shade = rng.uniform(0, 30, 3)
        images, boxes = [], []
        label = np.arange(cells_a_tile) % 2
        for _ in range(tiles):
            image = np.clip(rng.normal((225, 190, 215), 8, (side, side, 3)) - shade, 0, 255)
            corners = rng.uniform(0, side - 24, (cells_a_tile, 2))
            for (left, top), kind in zip(corners, label, strict=True):
                a, b = (7, 7) if kind == 0 else (11, 4)
                inside = ((x - left - 12) / a) ** 2 + ((y - top - 12) / b) ** 2 < 1
                image[inside] = (90, 50, 130) if kind == 0 else (150, 110, 170)
            images.append(image.astype(np.uint8))
            boxes.append(np.concatenate([corners, corners + 24], axis=1))
        _write(folder, f"D{number}", f"P{number}", images, boxes, [label] * tiles, "cell")


def crc5_tiles(source: Path, a_class: int, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tiles uint8 (n, side, side, 3), their class and their colour group, int (n,)."""
    from sklearn.cluster import KMeans

    pixels, labels, groups = [], [], []
    for label, name in enumerate(CLASSES):
        paths = sorted((source / name).glob("*.jpg"))[:a_class]
        read = [np.asarray(Image.open(path).convert("RGB").resize((side, side), Image.Resampling.BOX)) for path in paths]
        tiles = np.stack(read)
        density = -np.log((tiles.reshape(len(tiles), -1, 3).astype(np.float32) + 1) / 256)
        colour = np.concatenate([density.mean(1), density.std(1)], axis=1)
        count = min(GROUPS_A_CLASS, len(tiles) // 3)
        clusters = KMeans(count, n_init=3, random_state=0).fit_predict((colour - colour.mean(0)) / colour.std(0))
        pixels.append(tiles)
        labels += [label] * len(tiles)
        groups += (label * GROUPS_A_CLASS + clusters).tolist()
    return np.concatenate(pixels), np.array(labels), np.array(groups)


@lru_cache(maxsize=1)
def _tiles_of(source: Path | None, size: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    count = SIZES[size][0]
    if size != "smoke":
        assert source is not None
        return crc5_tiles(source, count, MOSAIC_PX)
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:MOSAIC_PX, :MOSAIC_PX]
    labels = np.repeat(np.arange(len(CLASSES)), count)
    waves = [np.sin((x * np.cos(k) + y * np.sin(k)) * (0.3 + 0.1 * k)) for k in range(len(CLASSES))]
    shades = rng.uniform(-25, 25, (len(labels), 1, 1, 3))
    tiles = np.stack([170 + 40 * waves[label] for label in labels])[..., None] + shades
    noisy = np.clip(tiles + rng.normal(0, 8, (*tiles.shape[:3], 3)), 0, 255).astype(np.uint8)
    return noisy, labels, np.arange(len(labels)) // 3


def crc5(data: Path | None, work: Path, size: str) -> Path:
    """crc5 as slide files, one a colour group, with proposed boxes."""
    folder = work / "crc5"
    if not folder.exists():
        tiles, labels, groups = _tiles_of(_raw(data, "crc5") if size != "smoke" else None, size)
        folder.mkdir(parents=True)
        for group in np.unique(groups):
            rows = np.flatnonzero(groups == group)
            name = f"{CLASSES[labels[rows[0]]]}-{group:03d}"
            _write(folder, name, name, list(tiles[rows]), None, None, "tissue")
        op.propose(folder, workers=1)
    return folder


def mosaics(data: Path | None, work: Path, size: str, seed: int, dial: float) -> Corpus:
    """The mosaics of a seed: other groups are held out by each."""
    folders = [work / f"mosaic-s{seed}" / name for name in (f"train-{dial:g}", "compared", "judged")]
    missing = [folder for folder in folders if not folder.exists()]
    if missing:
        tiles, labels, groups = _tiles_of(_raw(data, "crc5") if size != "smoke" else None, size)
        away = _held_out_groups(labels, groups, seed)
        counts = SIZES[size][1:]
        for number, (folder, count) in enumerate(zip(folders, counts, strict=True)):
            rows = np.flatnonzero(np.isin(groups, away) == (number == 2))
            if not folder.exists():
                share = dial if number == 0 else 1.0
                _write_mosaics(
                    folder, tiles[rows], labels[rows], groups[rows], count, share, np.random.default_rng([seed, number])
                )
    compared, judged = (_mosaic_objects(folder) for folder in folders[1:])
    return Corpus(folders[0], ["data.holdout=0", "data.kinds=[tissue]"], compared, judged, len(CLASSES))


def _held_out_groups(labels: np.ndarray, groups: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, 99])
    per_class = [rng.permutation(np.unique(groups[labels == label])) for label in np.unique(labels)]
    return np.concatenate([groups_of_class[: max(1, round(HELD_OUT * len(groups_of_class)))] for groups_of_class in per_class])


def _write_mosaics(
    folder: Path, tiles: np.ndarray, labels: np.ndarray, groups: np.ndarray, count: int, share: float, rng: np.random.Generator
) -> None:
    """count mosaics, 25 a row; the group of each rectangle is the confidence of its object, times a thousand."""
    side = MOSAIC_PX
    images, boxes, classes, origin = [], [], [], []
    for _ in range(count):
        cut_x, cut_y = rng.integers(round(0.35 * side), round(0.65 * side) + 1, 2)
        mixed = rng.random() < share
        if mixed:
            kinds = rng.permutation(np.unique(labels))[:4]
            rows = [int(rng.choice(np.flatnonzero(labels == kind))) for kind in kinds]
        else:
            rows = [int(rng.integers(len(tiles)))] * 4
        image = np.empty((side, side, 3), np.uint8)
        spans = [(0, 0, cut_x, cut_y), (cut_x, 0, side, cut_y), (0, cut_y, cut_x, side), (cut_x, cut_y, side, side)]
        for row, (x0, y0, x1, y1) in zip(rows, spans, strict=True):
            image[y0:y1, x0:x1] = tiles[row, y0:y1, x0:x1]
        images.append(image)
        boxes.append(np.array(spans, float))
        classes.append(labels[rows])
        origin.append(groups[rows])
    folder.mkdir(parents=True)
    _write(folder, "mosaics", "all", images, boxes, classes, "tissue", np.concatenate(origin) / 1000)


def _mosaic_objects(folder: Path) -> Objects:
    with SlideFile(folder / "mosaics.h5") as file:
        table, objects = file.boxes_table(), file.objects_table(ids=False)
        tiles = file.tiles(np.arange(len(file)))
        groups = np.rint(objects["confidence"] * 1000).astype(int)
        return Objects(tiles[file.box_tiles], table["xyxy"].astype(float), objects["label"].astype(int), groups)


def _write(
    folder: Path,
    name: str,
    patient: str,
    images: list[np.ndarray],
    boxes: list[np.ndarray] | None,
    labels: list[np.ndarray] | None,
    kind: str,
    confidence: np.ndarray | None = None,
) -> None:
    """A slide file of tiles side by side, with a gap so that none is its neighbour's continuation."""
    from annotations.objects import Kind

    side, columns = len(images[0]), 25
    coords = np.array([(i % columns * 2 * side, i // columns * 2 * side) for i in range(len(images))], np.int64)
    rows = -(-len(images) // columns)
    meta = SlideMeta(name, folder / name, columns * 2 * side, rows * 2 * side, 0.5, 0.5, side, patient_id=patient)
    groups: dict[str, Any] = {}
    if boxes is not None and labels is not None:
        flat, codes = np.concatenate(boxes), np.concatenate(labels)
        groups["objects"] = {
            "id": [str(i) for i in range(len(flat))],
            "label": codes.astype(np.int16),
            "kind": np.full(len(flat), Kind[kind.upper()], np.uint8),
            "area_um2": ((flat[:, 2:] - flat[:, :2]).prod(1) * 0.25).astype(np.float32),
            **({} if confidence is None else {"confidence": confidence.astype(np.float32)}),
            "attrs": {"labels": [str(i) for i in range(int(codes.max()) + 1)]},
        }
        groups["boxes"] = {
            "xyxy": flat.astype(np.float32),
            "offsets": np.cumsum([0, *(len(b) for b in boxes)]).astype(np.int64),
            "object": np.arange(len(flat), dtype=np.int32),
            "visible": np.ones(len(flat), np.float32),
        }
    jpeg = [encode_jpeg(image, 92) for image in images]
    write_slide_file(folder / f"{name}.h5", meta=meta, coords=coords, pixels=jpeg, groups=groups)
