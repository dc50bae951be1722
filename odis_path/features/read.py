"""Feature files: read a folder of them into one table of embeddings, and refuse what would spoil a result silently."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from annotations.errors import UserError, one_line
from odis_path.features.pretraining import Pretraining, common_note, read_note
from odis_path.features.write import (
    DATASETS,
    FORMAT,
    SLIDES_FILE,
    open_features,
)
from tiling.slide_file.read import h5_files
from tiling.storage.checked_file import CheckedFile
from tiling.storage.slide_id import checked_id


@dataclass(frozen=True)
class FeatureSet:
    """Embeddings of n tiles, boxes or slides of a cohort, with what is known of each. Arrays are aligned by row.

    x: float32 (n, D). slide_id, patient_id (may be ""): object (str) (n,). coords: int64 (n, 2), the tile's top-left in
    level-0 pixels (-1 for slides). tile: int64 (n,), row of the tile in the file (-1 for slides). object: int64 (n,), row
    in /objects, -1 for tiles and slides. xyxy: float32 (n, 4), the box x0 y0 x1 y1 in target pixels of the tile, NaN
    where none. visible: float32 (n,), share of the object in its box, 1 where there is none. label: int64 (n,) into
    `labels`, -1 none.
    mpp: micrometres per target pixel (NaN where not known). sources: slide_id -> slide file. parameters: of the embedding.
    dim: D. pretraining: whom the encoder was trained on, to be read by `odis_path.features.pretraining`.
    """

    level: str
    x: np.ndarray
    slide_id: np.ndarray
    patient_id: np.ndarray
    coords: np.ndarray
    tile: np.ndarray
    object: np.ndarray
    xyxy: np.ndarray
    visible: np.ndarray
    label: np.ndarray
    labels: tuple[str, ...]
    encoder: str
    mode: str
    mpp: float
    sources: Mapping[str, Path]
    parameters: Mapping[str, Any]
    dim: int = 0
    pretraining: str = ""

    def __len__(self) -> int:
        return len(self.slide_id)

    def pretraining_in(self, folder: Path) -> Pretraining:
        """Read the pretraining of the encoder from these files and the folder that they lie in."""
        return read_note(self.pretraining, folder, str(self.parameters.get("checkpoint", "")))

    def take(self, rows: np.ndarray) -> FeatureSet:
        """Return the same with these rows, in their order."""
        return replace(self, **{name: getattr(self, name)[rows] for name in _ROW_ARRAYS})


_ROW_ARRAYS = ("x", "slide_id", "patient_id", "coords", "tile", "object", "xyxy", "visible", "label")


def read_features(
    folder: Path | str, level: str = "tile", select: Callable[[FeatureSet], np.ndarray] | None = None
) -> FeatureSet:
    """Read one level ("tile", "object", "slide") of a folder of feature files, or of one file.

    select: given everything but the embeddings (x has no columns then), returns the ascending rows to read; only theirs
    are read and checked. Raises UserError naming the file for NaN, zero or constant embeddings, rows that do not match,
    mixed encoders, modes or mpp, a file that cannot be read, and a folder without embeddings of the level.
    """
    folder = Path(folder)
    if level == "slide":
        slides = read_slides_parquet(folder)
        return slides if select is None else slides.take(select(replace(slides, x=slides.x[:, :0])))
    if level not in DATASETS:
        raise UserError(f"--level {level}: no such level; take tile, object or slide")
    paths, parts = [], []
    for path in feature_paths(folder):
        part = read_index(path, level)
        if part is not None:
            paths.append(path)
            parts.append(part)
    if not parts:
        raise UserError(f"{folder}: no file holds {level} embeddings: run odis-path embed --level {level} first")
    refuse_mixtures(paths, parts)
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
    """List the .h5 files of a folder sorted by name, or the one file given. Raises UserError where there are none."""
    if folder.is_file():
        return [folder]
    paths = h5_files(folder) if folder.is_dir() else []
    if not paths:
        what = "holds no feature file" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder}: {what}: give the folder that odis-path embed wrote")
    return paths


def levels_in(folder: Path) -> list[str]:
    """List the levels a folder has embeddings of, in the order tile, object, slide."""
    levels = set()
    for path in h5_files(folder) if folder.is_dir() else [folder]:
        with suppress(UserError), open_features(path) as file:  # reported where it is read
            levels |= {level for level, name in DATASETS.items() if name in file}
    if (folder / SLIDES_FILE).exists() or folder.suffix == ".parquet":
        levels.add("slide")
    return [level for level in ("tile", "object", "slide") if level in levels]


def read_index(path: Path, level: str) -> FeatureSet | None:
    """Read everything of one file but the embeddings; None where it has none of the level ("tile", "object").

    Raises UserError where the file is none of embed, or its rows do not match.
    """
    name = DATASETS[level]
    with open_features(path) as file:
        root = file.attrs()
        if root.get("format") != FORMAT:
            raise UserError(f"{path}: format {root.get('format')!r} is not {FORMAT}: give a folder that embed wrote")
        if name not in file:
            return None
        coords, attrs = file.array("coords"), file.attrs(name)
        with file.reading(name, f"/{name}"):
            shape, mpp = file.h5[name].shape, float(file.attrs("coords").get("mpp", np.nan))
            parameters = json.loads(attrs.get("parameters") or root.get("parameters") or "{}")
        try:
            columns = _tile_columns(file, coords) if level == "tile" else _object_columns(file, coords)
        except (IndexError, ValueError, KeyError) as error:
            raise UserError(f"{path}: rows do not match ({one_line(error)}): embed this slide again") from None
    count = len(columns["tile"])
    if len(shape) != 2 or shape[0] != count:
        raise UserError(f"{path}: /{name} has shape {shape} for {count} {level}s: embed this slide again")
    slide_id = checked_id(str(root["slide_id"]), path) if "slide_id" in root else path.stem
    return FeatureSet(
        level=level,
        x=np.zeros((count, 0), dtype=np.float32),
        slide_id=_repeat(slide_id, count),
        patient_id=_repeat(str(root.get("patient_id", "")), count),
        encoder=str(attrs.get("encoder", "")),
        mode=str(attrs.get("mode", "")),
        mpp=mpp,
        sources={slide_id: Path(str(root.get("source", "")))},
        parameters=parameters,
        dim=shape[1],
        pretraining=str(attrs.get("pretraining", "")),
        **columns,
    )


class _Columns(TypedDict):
    coords: np.ndarray
    tile: np.ndarray
    object: np.ndarray
    label: np.ndarray
    labels: tuple[str, ...]
    xyxy: np.ndarray
    visible: np.ndarray


def _tile_columns(file: CheckedFile, coords: np.ndarray) -> _Columns:
    count = len(coords)
    label = np.full(count, -1, dtype=np.int64)
    names: tuple[str, ...] = ()
    if "tile_label" in file:
        label = file.array("tile_label").astype(np.int64)
        names = tuple(str(n) for n in file.attrs("tile_label")["labels"])
        if len(label) != count:
            raise ValueError(f"{len(label)} tile labels for {count} tiles")
        _refuse_labels(label, names)
    return {
        "coords": coords,
        "tile": np.arange(count),
        "object": np.full(count, -1, dtype=np.int64),
        "label": label,
        "labels": names,
        "xyxy": np.full((count, 4), np.nan, dtype=np.float32),
        "visible": np.ones(count, dtype=np.float32),
    }


def _object_columns(file: CheckedFile, coords: np.ndarray) -> _Columns:
    offsets, row = file.array("boxes/offsets"), file.array("boxes/object").astype(np.int64)
    if len(offsets) != len(coords) + 1 or offsets[-1] != len(row):
        raise ValueError(f"box offsets for {len(offsets) - 1} tiles and {offsets[-1]} boxes, with {len(coords)} and {len(row)}")
    tile = np.repeat(np.arange(len(coords)), np.diff(offsets))
    label, names = file.array("objects/label").astype(np.int64), tuple(str(n) for n in file.attrs("objects")["labels"])
    _refuse_labels(label, names)
    return {
        "coords": coords[tile],
        "tile": tile,
        "object": row,
        "label": label[row],
        "labels": names,
        "xyxy": file.array("boxes/xyxy"),
        "visible": file.array("boxes/visible"),
    }


def _refuse_labels(label: np.ndarray, names: tuple[str, ...]) -> None:
    """Raise ValueError where a label, int64 (n,), is not -1 and names no class."""
    wrong = label[(label < -1) | (label >= len(names))]
    if len(wrong):
        raise ValueError(f"label {wrong[0]}, where there are {len(names)} classes")


def _read_rows(path: Path, level: str, rows: np.ndarray) -> np.ndarray:
    with open_features(path) as file:
        x = np.asarray(file.array(DATASETS[level])[rows], dtype=np.float32)
    refuse_bad_rows(x, str(path))
    return x


def refuse_bad_rows(x: np.ndarray, where: str) -> None:
    """Raise UserError for NaN, infinite or all-zero embeddings."""
    bad = int((~np.isfinite(x).all(axis=1)).sum())
    if bad:
        raise UserError(f"{where}: {bad} embeddings hold NaN or infinity: embed this slide again")
    zero = np.flatnonzero(~x.any(axis=1))
    if len(zero):
        raise UserError(f"{where}: the embedding in row {zero[0]} is all zeros ({len(zero)} are): embed this slide again")
    if len(x) >= 8:
        refuse_constant(x, where)


def refuse_constant(x: np.ndarray, where: str) -> None:
    """Raise UserError where all of several embeddings are the same."""
    if len(x) > 1 and np.ptp(x, axis=0).max(initial=0) <= 1e-6 * np.abs(x).max(initial=0):
        raise UserError(f"{where}: all {len(x)} embeddings are the same: the encoder has collapsed or was given blank tiles")


def refuse_mixtures(paths: list[Path], parts: list[FeatureSet]) -> None:
    """Raise UserError where files, and what was read of each, are of several encoders, modes, mpp, widths, or of one slide."""
    for name in ("encoder", "mode", "mpp"):
        first = getattr(parts[0], name)
        for path, part in zip(paths, parts, strict=True):
            value = getattr(part, name)
            same = value == first if name != "mpp" else bool(np.isclose(value, first, rtol=1e-4, equal_nan=True))
            if not same:
                raise UserError(f"{path}: {name} is {value}, but {first} in {paths[0].name}: one folder holds one {name}")
    filled = [(path, part.dim) for path, part in zip(paths, parts, strict=True) if len(part)]
    for path, dim in filled:
        if dim != filled[0][1]:
            raise UserError(
                f"{path}: its embeddings are {dim} wide, but {filled[0][1]} in {filled[0][0].name}: "
                "embed all slides with one encoder"
            )
    slides: dict[str, Path] = {}
    for path, part in zip(paths, parts, strict=True):
        slide = next(iter(part.sources))
        if slides.setdefault(slide, path) != path:
            raise UserError(f"{path}: slide_id {slide} is also in {slides[slide].name}: one slide, one file")


def _concatenate(parts: list[FeatureSet]) -> FeatureSet:
    names = list(dict.fromkeys(name for part in parts for name in part.labels))
    number = {name: i for i, name in enumerate(names)}
    label = [np.array([*(number[n] for n in part.labels), -1], dtype=np.int64)[part.label] for part in parts]
    joined: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in _ROW_ARRAYS if name != "label"
    }
    sources = {slide: path for part in parts for slide, path in part.sources.items()}
    pretraining = common_note(part.pretraining for part in parts)
    return replace(
        parts[0], **joined, label=np.concatenate(label), labels=tuple(names), sources=sources, pretraining=pretraining
    )


def _repeat(text: str, count: int) -> np.ndarray:
    return np.full(count, text, dtype=object)


def read_slides_parquet(path: Path) -> FeatureSet:
    """Read slides.parquet (or its folder) as a FeatureSet of level "slide"; `sources` are of the feature files beside it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path) / SLIDES_FILE if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file: run odis-path embed --level slide first")
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        rows = table.to_pylist()
    except (OSError, pa.ArrowException, ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable parquet file ({one_line(error)}): embed --level slide again") from None
    columns = {"slide_id", "patient_id", "encoder", "mode", "features"}
    if not rows or not columns <= set(rows[0]):
        raise UserError(f"{path}: needs rows with the columns {', '.join(sorted(columns))}: embed --level slide again")
    for name in ("encoder", "mode"):
        values = sorted({str(row[name]) for row in rows})
        if len(values) > 1:
            raise UserError(f"{path}: mixed {name}s: {', '.join(values)}: embed all slides with one")
    if len({len(row["features"]) for row in rows}) > 1:
        raise UserError(f"{path}: embeddings of different lengths: embed all slides with one encoder")
    for row in rows:
        checked_id(str(row["slide_id"] or ""), path)
    x = np.array([row["features"] for row in rows], dtype=np.float32)
    refuse_bad_rows(x, str(path))
    refuse_constant(x, str(path))
    count = len(rows)
    none = np.full(count, -1, dtype=np.int64)
    return FeatureSet(
        level="slide",
        x=x,
        slide_id=np.array([row["slide_id"] for row in rows], dtype=object),
        patient_id=np.array([row["patient_id"] or "" for row in rows], dtype=object),
        coords=np.stack([none, none], 1),
        tile=none,
        object=none,
        xyxy=np.full((count, 4), np.nan, dtype=np.float32),
        visible=np.ones(count, dtype=np.float32),
        label=none,
        labels=(),
        encoder=str(rows[0]["encoder"]),
        mode=str(rows[0]["mode"]),
        mpp=float("nan"),
        sources=_sources_beside(path.parent),
        parameters={},
        dim=x.shape[1],
        pretraining=((table.schema.metadata or {}).get(b"pretraining") or b"").decode(),
    )


def _sources_beside(folder: Path) -> dict[str, Path]:
    return dict(source for path in h5_files(folder) if (source := source_of(path)) is not None)


def source_of(path: Path) -> tuple[str, Path] | None:
    """Return slide_id and slide file of which a feature file was made; None for any other file."""
    with suppress(UserError), open_features(path) as file:
        attrs = file.attrs()
        if attrs.get("format") == FORMAT:
            return str(attrs.get("slide_id", path.stem)), Path(str(attrs["source"]))
    return None
