"""Export the tile features of a cohort: one slide after the other, what is done is skipped, nothing is half-written."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from math import isnan
from pathlib import Path
from time import perf_counter
from typing import Any, cast

from annotations.errors import UserError
from odis_path.exporters.tile_features import ExportedSlide, Format, content_digest, read_tile_features
from odis_path.features.read import FeatureSet, feature_paths, levels_in, read_index, refuse_mixtures
from odis_path.features.write import SLIDES_FILE, open_features
from tiling.jobs.outcome import ItemResult
from tiling.jobs.run import run_cohort
from tiling.jobs.summary import Outcomes
from tiling.slide_file.read import SlideFile, h5_files
from tiling.storage.atomic import atomic_path
from tiling.storage.locks import describe_changes, lock_file, lock_settings, sweep

RECORDS = ".odis-export"  # folder of what was exported, one JSON a slide
SETTINGS_FILE = ".settings.json"  # no slide_id begins with a dot
Item = tuple[Path, ExportedSlide | None]  # None: cannot be read, which its outcome tells


def export_features(folder: Path | str, target: str, out: Path | str, workers: int | None = None) -> Outcomes:
    """Write the tile features of every slide of a folder below `out`, as `target` of `exporters.targets` has them.

    folder: of feature files, or one of them. What was exported from the same features is skipped. Raises UserError where
    there are no tile features, for features of several encoders, modes or mpp, and for an `out` with another export.
    """
    begun = perf_counter()
    form = _format(target)
    if form.check is not None:
        form.check()
    folder, out = Path(folder), Path(out).absolute()
    items, index = _items(folder, target, form)
    mpp = None if isnan(index.mpp) else round(index.mpp, 3)
    settings = {"to": target, "encoder": index.encoder, "mode": index.mode, "mpp": mpp}
    with lock_settings(out, "export", settings):
        _refuse_other(out, settings)
        _sweep(out)
        work = partial(export_slide, target=target, out=out)
        outcomes = run_cohort(items, work, title=f"export ({target})", workers=workers, name=_name, folder=out)
        done = [slide for (_, slide), outcome in zip(items, outcomes, strict=True) if outcome.ok and slide is not None]
        if form.write_tables is not None and done:
            form.write_tables(done, out)
        _sweep(out)
    return Outcomes(outcomes, "export", out, ("tiles",), perf_counter() - begun)


def export_slide(item: Item, target: str, out: Path) -> ItemResult:
    """Export one feature file; info: the number of its tiles."""
    path, slide = item
    if slide is None:
        read_index(path, "tile")  # tells why
        raise UserError(f"{path}: holds no tile embeddings: run odis-path embed --level tile")
    record = out / RECORDS / f"{slide.file_id}.json"
    with lock_file(record):
        digest = content_digest(path)
        before = _read_json(record)
        redone = _why_again(before, digest, out)
        if before is not None and not redone:
            return ItemResult({"tiles": int(before.get("tiles", 0))}, skipped=True)
        tiles = read_tile_features(path, slide)
        outputs = _format(target).write_slide(tiles, out)
        stamps = {file.relative_to(out).as_posix(): _stamp(file) for file in outputs}
        _write_json(record, {"digest": digest, "tiles": len(tiles), "outputs": stamps})
    return ItemResult({"tiles": len(tiles)}, redone=redone)


def _format(target: str) -> Format:
    return cast(Format, importlib.import_module(f"odis_path.exporters.formats.{target}").FORMAT)


def _items(folder: Path, target: str, form: Format) -> tuple[list[Item], FeatureSet]:
    """List the feature files with their slides, and what is known of the first. Raises UserError where none has tiles."""
    if folder.suffix == ".parquet" or (folder.is_dir() and (folder / SLIDES_FILE).exists() and not h5_files(folder)):
        raise UserError(f"{folder}: {_other_level('slide', target)}")
    paths = feature_paths(folder)
    items: list[Item] = []
    parts: list[tuple[Path, FeatureSet]] = []
    for path in paths:
        try:
            index = read_index(path, "tile")
        except UserError:  # a failure of its own
            index = None
        items.append((path, None if index is None else _slide(path, index, form)))
        if index is not None:
            parts.append((path, index))
    if not parts:
        raise UserError(_without_tiles(folder, target, paths))
    refuse_mixtures([path for path, _ in parts], [index for _, index in parts])
    _refuse_twins(items)
    return items, parts[0][1]


def _without_tiles(folder: Path, target: str, paths: Sequence[Path]) -> str:
    """Say what there is in place of tile features. Raises UserError where that cannot be read."""
    levels = levels_in(folder)
    if levels and "tile" not in levels:
        return f"{folder}: {_other_level(levels[0], target)}"
    for path in paths:
        with suppress(UserError), SlideFile(path):
            return f"{folder}: holds slide files, not features: run odis-path embed, and give the folder it wrote"
    for path in paths:
        read_index(path, "tile")
    return f"{folder}: no file holds tile embeddings: run odis-path embed --level tile"


def _other_level(level: str, target: str) -> str:
    return f"holds {level} embeddings alone, and --to {target} takes those of tiles: run odis-path embed --level tile"


def _slide(path: Path, index: FeatureSet, form: Format) -> ExportedSlide:
    slide_id = next(iter(index.sources))
    with open_features(path) as file:  # a slide without tiles has no row that names its patient
        patient_id = str(file.attrs().get("patient_id", ""))
    return ExportedSlide(slide_id, form.file_id(slide_id), patient_id)


def _refuse_twins(items: Sequence[Item]) -> None:
    """Raise UserError where two slides would be written under one name."""
    owners: dict[str, Path] = {}
    for path, slide in items:
        if slide is not None and (first := owners.setdefault(slide.file_id, path)) != path:
            raise UserError(f"{path}: would be written as {slide.file_id}, as {first.name} is: one slide, one name")


def _refuse_other(out: Path, settings: Mapping[str, Any]) -> None:
    """Note the settings of an export in its folder. Raises UserError where slides of other settings are there."""
    path = out / RECORDS / SETTINGS_FILE
    before = _read_json(path)
    if before == settings:
        return
    records = [file for file in path.parent.glob("*.json") if file.name != SETTINGS_FILE]
    if before is not None and records:
        changes = describe_changes(before, settings)
        raise UserError(f"{out}: holds another export ({changes}): one folder holds one, so give another --out")
    _write_json(path, settings)


def _why_again(before: Mapping[str, Any] | None, digest: str, out: Path) -> str:
    """Say why a slide that was exported is exported again; empty where it was not, or need not be."""
    if before is None:
        return ""
    if before.get("digest") != digest:
        return "its features changed"
    outputs = before.get("outputs") or {}
    if not outputs or any(_stamp(out / name) != stamp for name, stamp in outputs.items()):
        return "what was written is gone or changed"
    return ""


def _stamp(path: Path) -> list[int] | None:
    """Return size and time of a file; of a folder, whose readers may add to it, that it is there; None where it is not."""
    try:
        status = path.stat()
    except OSError:
        return None
    return [0, 0] if path.is_dir() else [status.st_size, status.st_mtime_ns]


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content), encoding="utf-8")


def _sweep(out: Path) -> None:
    """Remove what killed runs left in the folders of an export."""
    for folder in _folders(out):
        sweep(folder)


def _folders(out: Path) -> Iterator[Path]:
    for place, names, _ in os.walk(out):
        yield Path(place)
        names[:] = [name for name in names if not name.endswith((".zarr", ".tmp"))]


def _name(item: Item) -> str:
    return item[0].stem
