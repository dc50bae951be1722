"""Write feature files: one HDF5 file per slide with its embeddings, and slides.parquet with one row per slide.

`/features` (N, D) and `/coords` (N, 2) are laid out as TRIDENT, Patho-Bench and CLAM read them; `/object_features` (M, D)
goes with the file's own `/boxes` and `/objects`; `/tile_label` (N,) is the tissue class of each tile. A file is complete
or absent at every moment. The reading half is odis_path.features.read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from annotations.errors import UserError
from tiling.slide_file.read import BoxTable, SlideFile
from tiling.slide_file.tile_labels import tile_labels
from tiling.slide_file.write import GroupContent, parameters_hash, replace_groups, software_version, write_group
from tiling.storage.atomic import atomic_path
from tiling.storage.checked_file import CheckedFile
from tiling.storage.checksums import DamagedError
from tiling.storage.hdf5 import new_h5
from tiling.storage.touched import was_touched

FORMAT = "odis-path-features"
FORMAT_VERSION = 1
DATASETS = {"tile": "features", "object": "object_features"}
SLIDES_FILE = "slides.parquet"
_OBJECT_PARTS = ("object_features", "boxes", "objects")
REMEDY = "run odis-path embed again: it is made anew"


def write_features(
    path: Path,
    *,
    level: str,
    features: np.ndarray,
    slide_file: SlideFile,
    encoder: str,
    mode: str,
    dtype: str = "float16",
    parameters: Mapping[str, Any] | None = None,
    box_rows: np.ndarray | None = None,
    seen: Mapping[str, Any] | None = None,
    pretraining: str = "",
    overwrite: bool = False,
) -> None:
    """Write the embeddings of one slide, or add them to its feature file; crash-safe.

    level "tile": features (N, D) in the order of /coords. level "object": features (M, D) in the order of the slide
    file's /boxes, or of its rows `box_rows` (ascending). seen: further attributes, of how the encoder saw the tiles. What the
    file holds at the other level stays when it is of the same tiles and boxes, and goes when it is not. pretraining: whom the
    encoder was trained on (`features.pretraining`). Raises UserError where the other level is of another encoder or mode
    (overwrite: it goes), and ValueError where the number of rows is wrong.
    """
    path, features = Path(path), np.asarray(features)
    boxes = slide_file.boxes_table()
    rows = np.arange(len(boxes["object"])) if box_rows is None else np.asarray(box_rows, dtype=np.int64)
    expected = len(slide_file) if level == "tile" else len(rows)
    if features.ndim != 2 or len(features) != expected:
        raise ValueError(f"{path}: features of shape {features.shape} for {expected} {level}s")
    with np.errstate(over="ignore"):  # told below, in words
        stored = features.astype(dtype)
    if not np.isfinite(stored).all():
        what = "larger than float16 can hold: say --dtype float32" if np.isfinite(features).all() else "NaN or infinite"
        raise UserError(f"{path}: embeddings of encoder {encoder} are {what}")
    text, digest = parameters_hash(parameters or {})
    attrs = {
        "encoder": encoder,
        "name": slide_file.slide_id,
        "mode": mode,
        **(seen or {}),
        "parameters": text,
        "parameters_sha256": digest,
    }
    attrs |= {"pretraining": pretraining} if pretraining else {}
    content: dict[str, GroupContent] = {"coords": (slide_file.coords, slide_file.coords_attrs)}
    content[DATASETS[level]] = (stored, attrs)
    content["tile_label"] = _tile_label(slide_file)
    if level == "object":
        content |= {"boxes": _boxes(boxes, rows), "objects": _objects(slide_file)}
    root = _root_attrs(slide_file, text, digest)
    if not path.exists() or is_damaged(path):
        _write_new(path, content, root)
        return
    content |= dict.fromkeys(_stale(path, level, root, encoder, mode, overwrite=overwrite))
    replace_groups(path, content, root_attrs=root, remedy=REMEDY)


def embedded_already(path: Path, level: str, slide_path: Path, parameters: Mapping[str, Any]) -> bool:
    """Tell whether a feature file holds this level of this slide file, made with these parameters.

    Tiles embedded whole do not depend on the annotations: when only those have changed, the stored labels are brought up
    to date here and the embeddings stay.
    """
    path = Path(path)
    if not path.exists():
        return False
    with open_features(path) as file:
        stored = file.attrs(DATASETS[level]) if DATASETS[level] in file else {}
        if stored.get("parameters_sha256") != parameters_hash(parameters)[1]:
            return False
        attrs = file.attrs()
        had = {key: str(attrs.get(key, "")) for key in ("tiles_sha256", "objects_sha256", "patient_id", "source")}
        other = level == "tile" and DATASETS["object"] in file
        mode = stored.get("mode")
    with SlideFile(slide_path) as slide_file:
        root = _root_attrs(slide_file, *parameters_hash(parameters))
        if had == {key: str(root[key]) for key in had}:
            return True
        objects_changed = had["objects_sha256"] != root["objects_sha256"]
        if had["tiles_sha256"] != root["tiles_sha256"] or (objects_changed and (level != "tile" or mode != "full" or other)):
            return False
        replace_groups(path, {"tile_label": _tile_label(slide_file)}, root_attrs=root, remedy=REMEDY)
    return True


def open_features(path: Path) -> CheckedFile:
    """A feature file, open for reading: what is read is compared with its checksum. UserError where it cannot be opened."""
    try:
        return CheckedFile(path, lambda _: REMEDY)
    except FileNotFoundError:
        raise UserError(f"{path}: no such feature file: make it with odis-path embed") from None
    except PermissionError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}: ask for the right to read it") from None
    except OSError:
        raise DamagedError(f"{path}: not a readable feature file, damaged or cut off: {REMEDY}") from None


def is_damaged(path: Path) -> bool:
    """Tell whether a feature file is damaged. It is read whole where something touched it since it was written."""
    try:
        with open_features(path) as file:
            if was_touched(path):
                file.check()
            file.attrs()
    except DamagedError:
        return True
    return False


def _write_new(path: Path, content: Mapping[str, GroupContent], root: Mapping[str, Any]) -> None:
    with new_h5(path) as file:
        file.attrs.update(dict(root))
        for name, value in content.items():
            write_group(file, name, value)


def _root_attrs(slide_file: SlideFile, parameters: str, parameters_sha256: str) -> dict[str, Any]:
    tiles, boxes, objects = hashlib.sha256(), hashlib.sha256(), slide_file.objects_table()
    for key in ("parameters_sha256", "source_size", "source_mtime_ns"):
        tiles.update(str(slide_file.attrs.get(key, "")).encode() + b"\0")
    tiles.update(slide_file.coords.tobytes())
    table = slide_file.boxes_table()
    for column in (table["xyxy"], table["offsets"], table["object"], table["visible"]):
        boxes.update(np.ascontiguousarray(column).tobytes())
    for column in (objects["label"], objects["kind"], objects["area_um2"]):
        boxes.update(np.ascontiguousarray(column).tobytes())
    boxes.update(json.dumps([objects["labels"], [str(i) for i in objects["id"]]]).encode())
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "slide_id": slide_file.slide_id,
        "patient_id": slide_file.patient_id,
        "source": str(slide_file.path.absolute()),
        "parameters": parameters,
        "parameters_sha256": parameters_sha256,
        "software_version": software_version(),
        "tiles_sha256": tiles.hexdigest(),
        "objects_sha256": boxes.hexdigest(),
    }


def _tile_label(slide_file: SlideFile) -> GroupContent:
    """The tissue class of each tile; None where the slide has no annotated classes."""
    labels, names = tile_labels(slide_file)
    return (labels, {"labels": list(names)}) if names else None


def _boxes(boxes: BoxTable, rows: np.ndarray) -> dict[str, np.ndarray]:
    """/boxes with some of its rows."""
    kept = np.zeros(len(boxes["object"]), dtype=bool)
    kept[rows] = True
    before = np.concatenate([[0], np.cumsum(kept)])
    return {
        "xyxy": boxes["xyxy"][rows],
        "object": boxes["object"][rows],
        "visible": boxes["visible"][rows],
        "offsets": before[boxes["offsets"]].astype(np.int64),
    }


def _objects(slide_file: SlideFile) -> dict[str, Any]:
    table = slide_file.objects_table()
    values = {name: table[name] for name in ("label", "kind", "area_um2")}
    return {"id": [str(i) for i in table["id"]], **values, "attrs": {"labels": list(table["labels"])}}


def refuse_other_encoder(path: Path, level: str, slide_file: SlideFile, encoder: str, mode: str) -> None:
    """UserError where features of another encoder or mode stay in the feature file at `path` beside those of `level`."""
    _stale(path, level, _root_attrs(slide_file, "", ""), encoder, mode)


def _stale(path: Path, level: str, root: Mapping[str, Any], encoder: str, mode: str, *, overwrite: bool = False) -> list[str]:
    """The parts of an existing feature file that no longer go with the slide file. UserError for another encoder or mode, which
    goes where `overwrite` is given."""
    other = DATASETS["object" if level == "tile" else "tile"]
    with open_features(path) as file:
        attrs = file.attrs()
        if attrs.get("format") != FORMAT:
            raise UserError(f"{path}: exists and is not a feature file: give another --out")
        tiles_changed = attrs.get("tiles_sha256") != root["tiles_sha256"]
        objects_changed = attrs.get("objects_sha256") != root["objects_sha256"]
        found = {key: str(file.attrs(other).get(key)) for key in ("encoder", "mode")} if other in file else None
    if found is None:
        return []
    goes_with_objects = level == "tile" or found["mode"] != "full"
    another = found != {"encoder": encoder, "mode": mode}
    if tiles_changed or (objects_changed and goes_with_objects) or (another and overwrite):
        return list(_OBJECT_PARTS) if level == "tile" else [other]
    if another:
        raise UserError(
            f"{path}: holds /{other} of encoder {found['encoder']}, mode {found['mode']}, not {encoder}, mode {mode}: "
            "one folder holds one encoder and mode, so give another --out"
        )
    return []


def write_slides_parquet(path: Path, rows: Iterable[Mapping[str, Any]], pretraining: str = "") -> Path:
    """slides.parquet: slide_id, patient_id, n_tiles, encoder, mode, features (float32 (D,)) of each row; crash-safe.

    pretraining: as in the feature files, kept in the metadata of the schema.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = [{**row, "features": np.asarray(row["features"], dtype=np.float32).tolist()} for row in rows]
    schema = pa.schema(
        [
            ("slide_id", pa.string()),
            ("patient_id", pa.string()),
            ("n_tiles", pa.int64()),
            ("encoder", pa.string()),
            ("mode", pa.string()),
            ("features", pa.list_(pa.float32())),
        ],
        metadata={"pretraining": pretraining},
    )
    with atomic_path(Path(path)) as temporary:
        pq.write_table(pa.Table.from_pylist(table, schema=schema), temporary, write_page_checksum=True)
    return Path(path)
