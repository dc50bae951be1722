"""Feature files: one HDF5 file per slide with its embeddings, and slides.parquet with one row per slide.

`/features` (N, D) and `/coords` (N, 2) are laid out as TRIDENT, Patho-Bench and CLAM read them; `/object_features` (M, D)
goes with the file's own `/boxes` and `/objects`; `/tile_label` (N,) is the tissue class of each tile. A file is complete
or absent at every moment.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from annotations.errors import UserError
from tiling.slidefile import SlideFile, tile_labels
from tiling.slidewrite import GroupContent, parameters_hash, replace_groups, software_version, write_group

FORMAT = "odis-path-features"
FORMAT_VERSION = 1
DATASETS = {"tile": "features", "object": "object_features"}
SLIDES_FILE = "slides.parquet"
_OBJECT_PARTS = ("object_features", "boxes", "objects")


@dataclass(frozen=True)
class FeatureSet:
    """Embeddings of n tiles, boxes or slides of a cohort, with what is known of each. Arrays are aligned by row.

    x: float32 (n, D). slide_id, patient_id (may be ""): object (str) (n,). coords: int64 (n, 2), the tile's top-left in
    level-0 pixels (-1 for slides). tile: int64 (n,), row of the tile in the file (-1 for slides). object: int64 (n,), row
    in /objects, -1 for tiles and slides. box: float32 (n, 4), x0 y0 x1 y1 in target pixels of the tile, NaN where none.
    visible: float32 (n,), share of the object in its box, 1 where there is none. label: int64 (n,) into `labels`, -1 none.
    mpp: micrometres per target pixel (NaN where not known). sources: slide_id -> slide file. parameters: of the embedding.
    """

    level: str
    x: np.ndarray
    slide_id: np.ndarray
    patient_id: np.ndarray
    coords: np.ndarray
    tile: np.ndarray
    object: np.ndarray
    box: np.ndarray
    visible: np.ndarray
    label: np.ndarray
    labels: tuple[str, ...]
    encoder: str
    mode: str
    mpp: float
    sources: Mapping[str, Path]
    parameters: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.slide_id)

    def take(self, rows: np.ndarray) -> FeatureSet:
        """The same with some rows, in the order given."""
        return replace(self, **{name: getattr(self, name)[rows] for name in _ROW_ARRAYS})


_ROW_ARRAYS = ("x", "slide_id", "patient_id", "coords", "tile", "object", "box", "visible", "label")


# --- writing


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
) -> None:
    """Write the embeddings of one slide, or add them to its feature file; crash-safe.

    level "tile": features (N, D) in the order of /coords. level "object": features (M, D) in the order of the slide
    file's /boxes, or of its rows `box_rows` (ascending). What the file holds at the other level stays when it is of
    the same tiles and boxes, and goes when it is not. Raises UserError where it is of another encoder or mode, and
    ValueError where the number of rows is wrong.
    """
    path, features = Path(path), np.asarray(features)
    boxes = slide_file.boxes_table()
    rows = np.arange(len(boxes["object"])) if box_rows is None else np.asarray(box_rows, dtype=np.int64)
    expected = len(slide_file) if level == "tile" else len(rows)
    if features.ndim != 2 or len(features) != expected:
        raise ValueError(f"{path}: features of shape {features.shape} for {expected} {level}s")
    stored = features.astype(dtype)
    if not np.isfinite(stored).all():
        what = "larger than float16 can hold: say --dtype float32" if np.isfinite(features).all() else "NaN or infinite"
        raise UserError(f"{path}: embeddings of encoder {encoder} are {what}")
    text, digest = parameters_hash(parameters or {})
    attrs = {"encoder": encoder, "name": slide_file.slide_id, "mode": mode, "parameters": text, "parameters_sha256": digest}
    content: dict[str, GroupContent] = {"coords": (slide_file.coords, slide_file.coords_attrs)}
    content[DATASETS[level]] = (stored, attrs)
    content["tile_label"] = _tile_label(slide_file)
    if level == "object":
        content |= {"boxes": _boxes(boxes, rows), "objects": _objects(slide_file)}
    root = _root_attrs(slide_file, text, digest)
    if not path.exists():
        _write_new(path, content, root)
        return
    content |= {name: None for name in _stale(path, level, root, encoder, mode)}
    replace_groups(path, content, root_attrs=root)


def embedded_already(path: Path, level: str, slide_path: Path, parameters: Mapping[str, Any]) -> bool:
    """Whether a feature file holds this level of this slide file, made with these parameters.

    Tiles embedded whole do not depend on the annotations: when only those have changed, the stored labels are brought up
    to date here and the embeddings stay.
    """
    path = Path(path)
    if not path.exists():
        return False
    try:
        with h5py.File(path, "r", locking=False) as file:
            dataset = file.get(DATASETS[level])
            if dataset is None or dataset.attrs.get("parameters_sha256") != parameters_hash(parameters)[1]:
                return False
            had = {key: str(file.attrs.get(key, "")) for key in ("tiles_sha256", "objects_sha256", "patient_id", "source")}
            other = level == "tile" and DATASETS["object"] in file
            mode = dataset.attrs.get("mode")
    except OSError:
        return False
    with SlideFile(slide_path) as slide_file:
        root = _root_attrs(slide_file, *parameters_hash(parameters))
        if had == {key: str(root[key]) for key in had}:
            return True
        objects_changed = had["objects_sha256"] != root["objects_sha256"]
        if had["tiles_sha256"] != root["tiles_sha256"] or (objects_changed and (level != "tile" or mode != "full" or other)):
            return False
        replace_groups(path, {"tile_label": _tile_label(slide_file)}, root_attrs=root)
    return True


def _write_new(path: Path, content: Mapping[str, GroupContent], root: Mapping[str, Any]) -> None:
    from tiling.atomic import atomic_path

    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        file.attrs.update(dict(root))
        for name, value in content.items():
            write_group(file, name, value)


def _root_attrs(slide_file: SlideFile, parameters: str, parameters_sha256: str) -> dict[str, Any]:
    tiles, boxes, objects = hashlib.sha256(), hashlib.sha256(), slide_file.objects_table()
    for key in ("parameters_sha256", "source_size", "source_mtime_ns"):
        tiles.update(str(slide_file.attrs.get(key, "")).encode() + b"\0")
    tiles.update(slide_file.coords.tobytes())
    for array in slide_file.boxes_table().values():
        boxes.update(np.ascontiguousarray(array).tobytes())
    for key in ("label", "kind", "area_um2"):
        boxes.update(np.ascontiguousarray(objects[key]).tobytes())
    boxes.update(json.dumps([objects["labels"], [str(i) for i in objects["id"]]]).encode())
    return {
        "format": FORMAT, "format_version": FORMAT_VERSION, "slide_id": slide_file.slide_id,
        "patient_id": slide_file.patient_id, "source": str(slide_file.path.absolute()), "parameters": parameters,
        "parameters_sha256": parameters_sha256, "software_version": software_version(),
        "tiles_sha256": tiles.hexdigest(), "objects_sha256": boxes.hexdigest(),
    }  # fmt: skip


def _tile_label(slide_file: SlideFile) -> GroupContent:
    """The tissue class of each tile; None where the slide has no annotated classes."""
    labels, names = tile_labels(slide_file)
    return (labels, {"labels": list(names)}) if names else None


def _boxes(boxes: Mapping[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    """/boxes with some of its rows."""
    kept = np.zeros(len(boxes["object"]), dtype=bool)
    kept[rows] = True
    before = np.concatenate([[0], np.cumsum(kept)])
    return {
        "xyxy": boxes["xyxy"][rows], "object": boxes["object"][rows], "visible": boxes["visible"][rows],
        "offsets": before[boxes["offsets"]].astype(np.int64),
    }  # fmt: skip


def _objects(slide_file: SlideFile) -> dict[str, Any]:
    table = slide_file.objects_table()
    values = {name: table[name] for name in ("label", "kind", "area_um2")}
    return {"id": [str(i) for i in table["id"]], **values, "attrs": {"labels": list(table["labels"])}}


def _stale(path: Path, level: str, root: Mapping[str, Any], encoder: str, mode: str) -> list[str]:
    """What of an existing feature file no longer goes with the slide file. UserError for another encoder or mode."""
    other = DATASETS["object" if level == "tile" else "tile"]
    try:
        with h5py.File(path, "r", locking=False) as file:
            if file.attrs.get("format") != FORMAT:
                raise UserError(f"{path}: exists and is not a feature file: give another --out")
            tiles_changed = file.attrs.get("tiles_sha256") != root["tiles_sha256"]
            objects_changed = file.attrs.get("objects_sha256") != root["objects_sha256"]
            found = {key: str(file[other].attrs.get(key)) for key in ("encoder", "mode")} if other in file else None
    except OSError as error:
        raise UserError(f"{path}: not a readable HDF5 file ({_line(error)}): remove it and embed again") from None
    if found is None:
        return []
    goes_with_objects = level == "tile" or found["mode"] != "full"
    if tiles_changed or (objects_changed and goes_with_objects):
        return list(_OBJECT_PARTS) if level == "tile" else [other]
    if found != {"encoder": encoder, "mode": mode}:
        raise UserError(
            f"{path}: holds /{other} of encoder {found['encoder']}, mode {found['mode']}, not {encoder}, mode {mode}: "
            "one folder holds one encoder and mode, so give another --out"
        )
    return []


# --- reading


def read_features(
    folder: Path, level: str, select: Callable[[FeatureSet], np.ndarray] | None = None
) -> FeatureSet:
    """Read one level ("tile", "object", "slide") of a folder of feature files, or of one file.

    select: given everything but the embeddings (x has no columns then), returns the ascending rows to read; only theirs
    are read and checked. Raises UserError naming the file for NaN, zero or constant embeddings, rows that do not match,
    mixed encoders, modes or mpp, a file that cannot be read, and a folder without embeddings of the level.
    """
    folder = Path(folder)
    if level == "slide":
        found = read_slides_parquet(folder / SLIDES_FILE if folder.is_dir() else folder)
        return found if select is None else found.take(select(replace(found, x=found.x[:, :0])))
    if level not in DATASETS:
        raise UserError(f"--level {level}: no such level; take tile, object or slide")
    paths, parts = [], []
    for path in feature_paths(folder):
        part = _read_index(path, level)
        if part is not None:
            paths.append(path)
            parts.append(part)
    if not parts:
        raise UserError(f"{folder}: no file holds {level} embeddings: run odis-path embed --level {level} first")
    _refuse_mixtures(paths, parts)
    index = _concatenate(parts)
    if select is not None:
        rows = np.asarray(select(index), dtype=np.int64)
        index = index.take(rows)
    else:
        rows = np.arange(len(index))
    starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
    bounds = np.searchsorted(rows, starts)
    blocks = [
        _read_rows(path, level, rows[bounds[i] : bounds[i + 1]] - starts[i])
        for i, path in enumerate(paths)
        if bounds[i + 1] > bounds[i]
    ]
    x = np.concatenate(blocks) if blocks else np.zeros((0, 0), dtype=np.float32)
    refuse_constant(x, str(folder))
    return replace(index, x=x)


def feature_paths(folder: Path) -> list[Path]:
    """The .h5 files of a folder sorted by name, or the one file given. Raises UserError where there are none."""
    if folder.is_file():
        return [folder]
    paths = sorted(p for p in folder.glob("*.h5") if not p.name.startswith(".")) if folder.is_dir() else []
    if not paths:
        what = "holds no feature file" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder}: {what}: give the folder that odis-path embed wrote")
    return paths


def levels_in(folder: Path) -> list[str]:
    """The levels a folder has embeddings of, in the order tile, object, slide."""
    found = set()
    for path in sorted(folder.glob("*.h5")) if folder.is_dir() else [folder]:
        try:
            with h5py.File(path, "r", locking=False) as file:
                found |= {level for level, name in DATASETS.items() if name in file}
        except OSError:
            continue
    if (folder / SLIDES_FILE).exists() or folder.suffix == ".parquet":
        found.add("slide")
    return [level for level in ("tile", "object", "slide") if level in found]


def _read_index(path: Path, level: str) -> FeatureSet | None:
    """Everything of one file but the embeddings; None where it has none of the level."""
    name = DATASETS[level]
    try:
        with h5py.File(path, "r", locking=False) as file:
            if file.attrs.get("format") != FORMAT:
                raise UserError(f"{path}: format {file.attrs.get('format')!r} is not {FORMAT}: give a folder that embed wrote")
            if name not in file:
                return None
            coords, shape = file["coords"][...], file[name].shape
            attrs, root = dict(file[name].attrs), dict(file.attrs)
            mpp = float(file["coords"].attrs.get("mpp", np.nan))
            columns = _tile_columns(file, coords) if level == "tile" else _object_columns(file, coords)
    except (OSError, KeyError) as error:
        raise UserError(f"{path}: not a readable feature file ({_line(error)}): embed this slide again") from None
    except (IndexError, ValueError) as error:
        raise UserError(f"{path}: rows do not match ({_line(error)}): embed this slide again") from None
    count = len(columns["tile"])
    if len(shape) != 2 or shape[0] != count:
        raise UserError(f"{path}: /{name} has shape {shape} for {count} {level}s: embed this slide again")
    slide_id = str(root["slide_id"]) if "slide_id" in root else path.stem
    return FeatureSet(
        level=level, x=np.zeros((count, 0), dtype=np.float32), slide_id=_repeat(slide_id, count),
        patient_id=_repeat(str(root.get("patient_id", "")), count), encoder=str(attrs.get("encoder", "")),
        mode=str(attrs.get("mode", "")), mpp=mpp, sources={slide_id: Path(str(root.get("source", "")))},
        parameters=json.loads(attrs.get("parameters") or root.get("parameters") or "{}"), **columns,
    )  # fmt: skip


def _tile_columns(file: h5py.File, coords: np.ndarray) -> dict[str, Any]:
    count = len(coords)
    label, names = np.full(count, -1, dtype=np.int64), ()
    if "tile_label" in file:
        label = file["tile_label"][...].astype(np.int64)
        names = tuple(str(n) for n in file["tile_label"].attrs["labels"])
        if len(label) != count:
            raise ValueError(f"{len(label)} tile labels for {count} tiles")
    return {
        "coords": coords, "tile": np.arange(count), "object": np.full(count, -1, dtype=np.int64), "label": label,
        "labels": names, "box": np.full((count, 4), np.nan, dtype=np.float32), "visible": np.ones(count, dtype=np.float32),
    }  # fmt: skip


def _object_columns(file: h5py.File, coords: np.ndarray) -> dict[str, Any]:
    offsets, row = file["boxes/offsets"][...], file["boxes/object"][...].astype(np.int64)
    if len(offsets) != len(coords) + 1 or offsets[-1] != len(row):
        raise ValueError(f"box offsets for {len(offsets) - 1} tiles and {offsets[-1]} boxes, with {len(coords)} and {len(row)}")
    tile = np.repeat(np.arange(len(coords)), np.diff(offsets))
    return {
        "coords": coords[tile], "tile": tile, "object": row, "label": file["objects/label"][...].astype(np.int64)[row],
        "labels": tuple(str(n) for n in file["objects"].attrs["labels"]), "box": file["boxes/xyxy"][...],
        "visible": file["boxes/visible"][...],
    }  # fmt: skip


def _read_rows(path: Path, level: str, rows: np.ndarray) -> np.ndarray:
    try:
        with h5py.File(path, "r", locking=False) as file:
            x = file[DATASETS[level]][...][rows].astype(np.float32)
    except (OSError, KeyError) as error:
        raise UserError(f"{path}: not a readable feature file ({_line(error)}): embed this slide again") from None
    refuse_bad_rows(x, str(path))
    return x


def refuse_bad_rows(x: np.ndarray, where: str) -> None:
    """UserError for NaN, infinite or all-zero embeddings."""
    bad = int((~np.isfinite(x).all(axis=1)).sum())
    if bad:
        raise UserError(f"{where}: {bad} of {len(x)} embeddings hold NaN or infinity: embed this slide again")
    zero = int((~x.any(axis=1)).sum())
    if zero:
        raise UserError(f"{where}: {zero} of {len(x)} embeddings are all zero: embed this slide again")
    if len(x) >= 8:
        refuse_constant(x, where)


def refuse_constant(x: np.ndarray, where: str) -> None:
    """UserError where all of several embeddings are the same."""
    if len(x) > 1 and np.ptp(x, axis=0).max(initial=0) <= 1e-6 * np.abs(x).max(initial=0):
        raise UserError(f"{where}: all {len(x)} embeddings are the same: the encoder has collapsed or was given blank tiles")


def _refuse_mixtures(paths: list[Path], parts: list[FeatureSet]) -> None:
    for name in ("encoder", "mode", "mpp"):
        first = getattr(parts[0], name)
        for path, part in zip(paths, parts, strict=True):
            value = getattr(part, name)
            same = value == first if name != "mpp" else bool(np.isclose(value, first, rtol=1e-4, equal_nan=True))
            if not same:
                raise UserError(f"{path}: {name} {value} beside {first} in {paths[0].name}: one folder holds one {name}")
    slides: dict[str, Path] = {}
    for path, part in zip(paths, parts, strict=True):
        slide = next(iter(part.sources))
        if slides.setdefault(slide, path) != path:
            raise UserError(f"{path}: slide_id {slide} is also in {slides[slide].name}: one slide, one file")


def _concatenate(parts: list[FeatureSet]) -> FeatureSet:
    names = sorted({name for part in parts for name in part.labels})
    number = {name: i for i, name in enumerate(names)}
    label = [np.array([*(number[n] for n in part.labels), -1], dtype=np.int64)[part.label] for part in parts]
    joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _ROW_ARRAYS if name != "label"}
    sources = {slide: path for part in parts for slide, path in part.sources.items()}
    return replace(parts[0], **joined, label=np.concatenate(label), labels=tuple(names), sources=sources)


def _repeat(text: str, count: int) -> np.ndarray:
    return np.full(count, text, dtype=object)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


# --- one row per slide


def write_slides_parquet(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """slides.parquet: slide_id, patient_id, n_tiles, encoder, mode, features (float32 (D,)) of each row; crash-safe."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tiling.atomic import atomic_path

    table = [{**row, "features": np.asarray(row["features"], dtype=np.float32).tolist()} for row in rows]
    schema = pa.schema([
        ("slide_id", pa.string()), ("patient_id", pa.string()), ("n_tiles", pa.int64()), ("encoder", pa.string()),
        ("mode", pa.string()), ("features", pa.list_(pa.float32())),
    ])  # fmt: skip
    with atomic_path(Path(path)) as temporary:
        pq.write_table(pa.Table.from_pylist(table, schema=schema), temporary)
    return Path(path)


def read_slides_parquet(path: Path) -> FeatureSet:
    """slides.parquet as a FeatureSet of level "slide". `sources` are the slide files named by feature files beside it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file: run odis-path embed --level slide first")
    try:
        rows = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path}: not a readable parquet file ({_line(error)}): embed --level slide again") from None
    columns = {"slide_id", "patient_id", "encoder", "mode", "features"}
    if not rows or not columns <= set(rows[0]):
        raise UserError(f"{path}: needs rows with the columns {', '.join(sorted(columns))}: embed --level slide again")
    for name in ("encoder", "mode"):
        values = sorted({str(row[name]) for row in rows})
        if len(values) > 1:
            raise UserError(f"{path}: mixed {name}s: {', '.join(values)}: embed all slides with one")
    if len({len(row["features"]) for row in rows}) > 1:
        raise UserError(f"{path}: embeddings of different lengths: embed all slides with one encoder")
    x = np.array([row["features"] for row in rows], dtype=np.float32)
    refuse_bad_rows(x, str(path))
    refuse_constant(x, str(path))
    count = len(rows)
    none = np.full(count, -1, dtype=np.int64)
    return FeatureSet(
        level="slide", x=x, slide_id=np.array([row["slide_id"] for row in rows], dtype=object),
        patient_id=np.array([row["patient_id"] or "" for row in rows], dtype=object), coords=np.stack([none, none], 1),
        tile=none, object=none, box=np.full((count, 4), np.nan, dtype=np.float32), visible=np.ones(count, dtype=np.float32),
        label=none, labels=(), encoder=str(rows[0]["encoder"]), mode=str(rows[0]["mode"]), mpp=float("nan"),
        sources=_sources_beside(path.parent), parameters={},
    )  # fmt: skip


def _sources_beside(folder: Path) -> dict[str, Path]:
    sources = {}
    for path in sorted(folder.glob("*.h5")):
        with h5py.File(path, "r", locking=False) as file:
            if file.attrs.get("format") == FORMAT:
                sources[str(file.attrs["slide_id"])] = Path(str(file.attrs["source"]))
    return sources
