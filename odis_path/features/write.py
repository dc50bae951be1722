"""Write feature files: one HDF5 file per slide with its embeddings, and slides.parquet with one row per slide.

`/features` (N, D) and `/coords` (N, 2) are laid out as TRIDENT, Patho-Bench and CLAM read them; `/object_features` (M, D)
goes with the file's own `/boxes` and `/objects`; `/tile_label` (N,) is the tissue class of each tile. A file is complete
or absent at every moment. The reading half is odis_path.features.read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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
    view_attrs: Mapping[str, str | int] | None = None,
    pretraining: str = "",
    overwrite: bool = False,
) -> None:
    """Write the embeddings of one slide, or add them to its feature file; crash-safe.

    level "tile": features (N, D) in the order of /coords. level "object": features (M, D) in the order of the slide file's
    /boxes, or of its rows `box_rows` (ascending). view_attrs: further attributes, of how the encoder saw the tiles. What the
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
    with np.errstate(over="ignore"):  # refused below
        stored = features.astype(dtype)
    if not np.isfinite(stored).all():
        what = "larger than float16 can hold: say --dtype float32" if np.isfinite(features).all() else "NaN or infinite"
        raise UserError(f"{path}: embeddings of encoder {encoder} are {what}")
    text, digest = parameters_hash(parameters or {})
    attrs = {
        "encoder": encoder,
        "name": slide_file.slide_id,
        "mode": mode,
        **(view_attrs or {}),
        "parameters": text,
        "parameters_sha256": digest,
    }
    attrs |= {"pretraining": pretraining} if pretraining else {}
    content: dict[str, GroupContent] = {"coords": (slide_file.coords, slide_file.coords_attrs)}
    content[DATASETS[level]] = (stored, attrs)
    content["tile_label"] = _tile_label(slide_file)
    if level == "object":
        content |= {"boxes": _boxes(boxes, rows), "objects": _objects(slide_file)}
    digests = SlideDigests.of(slide_file)
    root = _root_attrs(slide_file, digests, text, digest)
    if not path.exists() or is_damaged(path):
        _write_new(path, content, root)
        return
    content |= dict.fromkeys(outdated_parts(path, level, digests, encoder, mode, overwrite=overwrite))
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
        attrs = file.attrs(DATASETS[level]) if DATASETS[level] in file else {}
        if attrs.get("parameters_sha256") != parameters_hash(parameters)[1]:
            return False
        stored = file.attrs()
        needs_objects = level != "tile" or attrs.get("mode") != "full" or DATASETS["object"] in file
    with SlideFile(slide_path) as slide_file:
        digests = SlideDigests.of(slide_file)
        root = _root_attrs(slide_file, digests, *parameters_hash(parameters))
        keys = ("tiles_sha256", "objects_sha256", "patient_id", "source")
        if all(str(stored.get(key, "")) == str(root[key]) for key in keys):
            return True
        if not digests.match(stored, with_objects=needs_objects):
            return False
        replace_groups(path, {"tile_label": _tile_label(slide_file)}, root_attrs=root, remedy=REMEDY)
    return True


def open_features(path: Path) -> CheckedFile:
    """Open a feature file; all that is read is compared with its checksum. Raises UserError where it cannot be opened."""
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


def _write_new(path: Path, content: Mapping[str, GroupContent], root: Mapping[str, str | int]) -> None:
    with new_h5(path) as file:
        file.attrs.update(root)
        for name, value in content.items():
            write_group(file, name, value)


@dataclass(frozen=True)
class SlideDigests:
    """Hashes of the tiles of a slide file (and the slide they are of), and of its boxes and objects."""

    tiles_sha256: str
    objects_sha256: str

    @staticmethod
    def of(slide_file: SlideFile) -> SlideDigests:
        """Hash the tables of an open slide file."""
        tiles, boxes, objects = hashlib.sha256(), hashlib.sha256(), slide_file.objects_table()
        for key in ("parameters_sha256", "source_size", "source_mtime_ns"):
            tiles.update(str(slide_file.attrs.get(key, "")).encode() + b"\0")
        tiles.update(slide_file.coords.tobytes())
        for array in (*slide_file.boxes_table().values(), objects["label"], objects["kind"], objects["area_um2"]):
            boxes.update(np.ascontiguousarray(array).tobytes())
        boxes.update(json.dumps([objects["labels"], [str(i) for i in objects["id"]]]).encode())
        return SlideDigests(tiles.hexdigest(), boxes.hexdigest())

    def match(self, root: Mapping[str, Any], *, with_objects: bool) -> bool:
        """Tell whether a feature file with these attributes was made of the same tiles, and of the same objects too."""
        same_objects = root.get("objects_sha256") == self.objects_sha256
        return root.get("tiles_sha256") == self.tiles_sha256 and (same_objects or not with_objects)


def _root_attrs(slide_file: SlideFile, digests: SlideDigests, parameters: str, parameters_sha256: str) -> dict[str, str | int]:
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "slide_id": slide_file.slide_id,
        "patient_id": slide_file.patient_id,
        "source": str(slide_file.path.absolute()),
        "parameters": parameters,
        "parameters_sha256": parameters_sha256,
        "software_version": software_version(),
        "tiles_sha256": digests.tiles_sha256,
        "objects_sha256": digests.objects_sha256,
    }


def _tile_label(slide_file: SlideFile) -> GroupContent:
    """Return the tissue class of each tile; None where the slide has no annotated classes."""
    labels, names = tile_labels(slide_file)
    return (labels, {"labels": list(names)}) if names else None


def _boxes(boxes: BoxTable, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Choose rows of /boxes."""
    kept = np.zeros(len(boxes["object"]), dtype=bool)
    kept[rows] = True
    n_kept = np.concatenate([[0], np.cumsum(kept)])  # rows kept among the first i
    return {
        "xyxy": boxes["xyxy"][rows],
        "object": boxes["object"][rows],
        "visible": boxes["visible"][rows],
        "offsets": n_kept[boxes["offsets"]].astype(np.int64),
    }


def _objects(slide_file: SlideFile) -> dict[str, Any]:
    table = slide_file.objects_table()
    values = {name: table[name] for name in ("label", "kind", "area_um2")}
    return {"id": [str(i) for i in table["id"]], **values, "attrs": {"labels": list(table["labels"])}}


def outdated_parts(
    path: Path, level: str, digests: SlideDigests, encoder: str, mode: str, *, overwrite: bool = False
) -> list[str]:
    """Return the parts of an existing feature file that do not go with new embeddings of `level`, and go as these are written.

    They are those of the other level, where its tiles or objects have changed. Raises UserError where they are still good, but
    of another encoder or mode; with `overwrite` they go too.
    """
    held_level = "object" if level == "tile" else "tile"
    dataset = DATASETS[held_level]
    with open_features(path) as file:
        root = file.attrs()
        if root.get("format") != FORMAT:
            raise UserError(f"{path}: exists and is not a feature file: give another --out")
        if dataset not in file:
            return []
        attrs = file.attrs(dataset)
    held_encoder, held_mode = str(attrs.get("encoder")), str(attrs.get("mode"))
    outdated = not digests.match(root, with_objects=held_level == "object" or held_mode != "full")
    same_encoder = (held_encoder, held_mode) == (encoder, mode)
    if outdated or (overwrite and not same_encoder):
        return ["object_features", "boxes", "objects"] if held_level == "object" else [dataset]
    if not same_encoder:
        raise UserError(
            f"{path}: holds /{dataset} of encoder {held_encoder}, mode {held_mode}, not {encoder}, mode {mode}: "
            "one folder holds one encoder and mode, so give another --out"
        )
    return []


def write_slides_parquet(path: Path, rows: Iterable[Mapping[str, Any]], pretraining: str = "") -> Path:
    """Write slides.parquet: slide_id, patient_id, n_tiles, encoder, mode, features (float32 (D,)) of each row; crash-safe.

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
