"""Embed a cohort: slide files in, feature files out, one slide at a time."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from annotations.errors import UserError
from annotations.objects import Kind
from odis_path.embedding.request import EmbedJob, check_options, other_encoder, parse_kinds
from odis_path.features.pretraining import FILE as PRETRAINING_FILE
from odis_path.features.pretraining import of_encoder
from odis_path.features.read import read_features
from odis_path.features.write import (
    DATASETS,
    SLIDES_FILE,
    embedded_already,
    is_damaged,
    open_features,
    refuse_other_encoder,
    write_features,
    write_slides_parquet,
)
from odis_path.model.source import fingerprint, is_checkpoint, settled_source
from tiling.jobs.outcome import ItemResult, Note, Outcome, describe_error
from tiling.jobs.run import run_cohort
from tiling.jobs.summary import Outcomes
from tiling.slide_file.read import SlideFile, list_slide_files
from tiling.slide_file.window import TileWindows
from tiling.storage.atomic import check_writable
from tiling.storage.checksums import DAMAGED
from tiling.storage.locks import lock_file, lock_settings

if TYPE_CHECKING:
    from odis_path.embedding.encoder import FrozenEncoder

Pixels = TypeVar("Pixels")
MOST_TORN = 0.5  # share of tiles that cannot be read; a slide with more of them fails
OBJECTS_A_PASS = 64  # objects that share one pass over the patches of a tile


def embed(
    folder: Path | str,
    checkpoint: str | os.PathLike[str],
    out: Path | str,
    *,
    level: str = "tile",
    mode: str = "full",
    kinds: str = "all",
    batch: int = 64,
    dtype: str = "float16",
    random_weights: bool = False,
    device: str = "auto",
    scheduler: str | None = None,
    pool: str | None = None,
    resize: int | None = None,
    overwrite: bool = False,
    window_um: float | None = None,
) -> Outcomes:
    """Write `<out>/<slide_id>.h5` (level tile, object) or `<out>/slides.parquet` (level slide: the mean over tiles).

    checkpoint: a run of `pretrain` or its folder (the newest checkpoint as embedding begins), a checkpoint file, a timm
    name, or a folder in the form of the hub. pool: cls, mean or cls+mean; None: as trained. resize: side in px to resize to.
    window_um: side of the windows of mode window; None: as trained. pretraining.csv in `out` names the slides that the encoder
    was trained on. Raises UserError for a wrong option or encoder before any slide is opened, where another run embeds into
    `out` with other settings, and where `out` holds embeddings of another encoder, which are replaced with `overwrite` only;
    what fails on a slide is that slide's outcome.
    """
    begun = perf_counter()
    model = os.fspath(checkpoint)
    check_options(model, level=level, mode=mode, kinds=kinds, dtype=dtype, pool=pool, resize=resize, window_um=window_um)
    files, target = [path.absolute() for path in list_slide_files(folder)], Path(out).absolute()  # workers may run elsewhere
    source = checkpoint_file(model)
    trained = of_encoder(source, random_weights=random_weights)
    job = EmbedJob(
        source, target, level, mode, parse_kinds(kinds), batch, dtype, random_weights, device,  # type: ignore[arg-type]
        checkpoint_stamp(source), pool, resize, trained.note(), overwrite, window_um,
    )  # fmt: skip
    another = other_encoder(target, job)
    if another and not overwrite:
        raise UserError(another)
    encoder = None if scheduler else shared_encoder(source, job.stamp, device, random_weights, pool, resize)
    if encoder is not None:  # loaded here too, so that a wrong checkpoint is one error, not one a slide
        tell_size(encoder, files, job)
    if level == "slide":
        check_writable(target / SLIDES_FILE)
    with lock_settings(target, "embed", job.settings()):
        if another:
            for name in (SLIDES_FILE, PRETRAINING_FILE):
                (target / name).unlink(missing_ok=True)
        with suppress(UserError):  # each slide tells that the folder cannot be written
            trained.write(target)
        outcomes = run_cohort(
            files, partial(embed_slide, job), title=f"embed ({level}, {mode})", workers=1, scheduler=scheduler,
            name=lambda path: path.stem, folder=target, wrote=partial(feature_file, target),
        )  # fmt: skip
        if level == "slide":
            write_slide_rows(target, files, outcomes, job.pretraining)
        if any(outcome.ok for outcome in outcomes):
            trained.write(target)
    return Outcomes(outcomes, "embed", out, ("objects",) if level == "object" else ("tiles",), perf_counter() - begun)


def tell_size(encoder: FrozenEncoder, files: list[Path], job: EmbedJob) -> None:
    """Print how the encoder pools, and the size it sees tiles at against the size it was trained at; once a size of tile.

    For windows the same of them; UserError where nothing says how large they are.
    """
    from odis_path.embedding.windows import window_encoder, window_px, window_um

    if job.mode == "window":
        window_um(encoder, job)
    sizes = set()
    for path in files:
        with suppress(UserError), SlideFile(path) as file:  # the slide's own failure, told with it
            sizes.add(window_px(encoder, file, job) if job.mode == "window" else file.patch_size)
    if job.mode == "window":
        encoder = window_encoder(encoder)
    for size in sorted(sizes):
        print(f"embed: {encoder.about(size, 'windows' if job.mode == 'window' else 'tiles')}", file=sys.stderr)


def checkpoint_file(source: str) -> str:
    """The absolute path of a checkpoint, of a run folder its newest, of a folder in the form of the hub as `local-dir:PATH`.

    A timm name as it is. UserError where there is none.
    """
    from odis_path.checkpoint import latest_checkpoint, load_checkpoint

    if not is_checkpoint(source):
        return settled_source(source)
    path = Path(source).absolute()
    found = latest_checkpoint(path) if path.is_dir() else path
    if found is None or not found.exists():
        found = load_checkpoint(Path(source)).path  # says what is missing
    return str(found)


def checkpoint_stamp(checkpoint: str) -> str:
    """Name, sizes and times of the files of a checkpoint or model (the name alone without any): others mean embed again."""
    state, path = fingerprint(checkpoint), Path(checkpoint)
    name = str(path.resolve()) if path.is_file() else checkpoint
    return f"{name}:{state}" if state else checkpoint


def shared_encoder(
    checkpoint: str, stamp: str, device: str, random_weights: bool, pool: str | None = None, resize: int | None = None
) -> FrozenEncoder:
    """The encoder, loaded once a process and again when its stamp is another; by one thread, as its seed is the process's.

    Raises UserError where the checkpoint is not that of the stamp.
    """
    with _loading:
        return _loaded(checkpoint, stamp, device, random_weights, pool, resize)


_loading = Lock()


@lru_cache(maxsize=1)
def _loaded(
    checkpoint: str, stamp: str, device: str, random_weights: bool, pool: str | None, resize: int | None
) -> FrozenEncoder:
    from odis_path.embedding.encoder import load_encoder  # torch: not before all that does without it is checked

    _refuse_another(checkpoint, stamp)
    encoder = load_encoder(checkpoint, device=device, random_weights=random_weights, pool=pool, resize=resize)
    _refuse_another(checkpoint, stamp)  # it may have been replaced meanwhile
    return encoder


def _refuse_another(checkpoint: str, stamp: str) -> None:
    """UserError where what has this name here is not what the stamp is of: it was replaced, or is of another machine."""
    state = fingerprint(checkpoint)
    if state and not stamp.endswith(f":{state}"):
        raise UserError(f"{checkpoint}: is not the file that this run began with (changed since?): run the same command again")


def feature_file(out: Path, path: Path) -> Path:
    """The path of the features of a slide file."""
    return out / path.name


def embed_slide(job: EmbedJob, path: Path) -> ItemResult:
    """Embed one slide file; info: the number of its embeddings."""
    target = feature_file(job.out, path)
    with lock_file(target):
        return _embedded(job, path, target)


def _embedded(job: EmbedJob, path: Path, target: Path) -> ItemResult:
    level = "tile" if job.level == "slide" else job.level
    damaged = target.exists() and is_damaged(target)
    counted, had = f"{level}s", None if damaged else _rows_in(target, level)
    if not damaged and embedded_already(target, level, path, job.parameters()):
        return ItemResult({counted: had}, skipped=True)
    check_writable(target)
    encoder = shared_encoder(job.checkpoint, job.stamp, job.device, job.random_weights, job.pool, job.resize)
    file = TornSlideFile(path)
    with file:
        if target.exists() and not damaged and not job.overwrite:
            refuse_other_encoder(target, level, file, encoder.name, job.mode)
        rows = None
        if level == "object":
            rows = object_rows(file, job.kinds)
            features = embed_objects(encoder, file, rows, job)
        else:
            features = embed_tiles(encoder, file, job)
        write_features(
            target, level=level, features=features, slide_file=file, encoder=encoder.name, mode=job.mode, dtype=job.dtype,
            parameters=job.parameters(), box_rows=rows if job.kinds else None, seen=seen_as(encoder, file.patch_size),
            pretraining=job.pretraining, overwrite=job.overwrite,
        )  # fmt: skip
    redone = "the tiles, their boxes or what is asked changed" if had is not None else DAMAGED if damaged else ""
    notes = []
    if file.torn:
        text = f"tiles cannot be read from its slide (the first, row {min(file.torn)}): black"
        notes.append(Note(text, len(file.torn)))
    return ItemResult({counted: len(features)}, notes, redone)


def seen_as(encoder: FrozenEncoder, tile_px: int) -> dict[str, Any]:
    """Attributes of the features: how they are pooled, the side that tiles were seen at, the side trained at (0: not known)."""
    return {"pool": encoder.pool, "size_px": encoder.size_px(tile_px), "trained_px": encoder.trained_px or 0}


class TornSlideFile(SlideFile):
    """A slide file of which tiles that cannot be read from its slide are black, as `tile` stores them, and kept in `torn`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.torn: set[int] = set()

    def region(self, i: int, x: int, y: int, side_px: int) -> np.ndarray:
        """As `SlideFile.region`. Raises UserError where more than half of all cannot be read, or the slide is gone."""
        try:
            return super().region(i, x, y, side_px)
        except UserError:
            if self.has_pixels or len(self.torn) > MOST_TORN * len(self):
                raise
            self.check_source()
            self.torn.add(i)
            return np.zeros((side_px, side_px, 3), np.uint8)

    def tiles(self, numbers: np.ndarray) -> np.ndarray:
        """As `SlideFile.tiles`."""
        try:
            return super().tiles(numbers)
        except UserError:
            return np.stack([self.tile(int(i)) for i in numbers])


def _rows_in(target: Path, level: str) -> int | None:
    """The number of features of this level in a feature file; None where there are none yet."""
    if not target.exists():
        return None
    with open_features(target) as file:
        return len(file.h5[DATASETS[level]]) if DATASETS[level] in file else None


def object_rows(file: SlideFile, kinds: tuple[str, ...] | None) -> np.ndarray:
    """Rows of /boxes to embed, int64 (m,). Raises UserError where the slide has no boxes."""
    if not file.has_boxes:
        raise UserError(f"{file.path}: has no boxes: run odis-path annotate or odis-path propose on its folder first")
    rows = file.boxes_table()["object"]
    if kinds is None:
        return np.arange(len(rows))
    kind = file.objects_table(ids=False)["kind"][rows]
    return np.flatnonzero(np.isin(kind, [number for number in Kind if number.word in kinds]))


def embed_objects(encoder: FrozenEncoder, file: SlideFile, rows: np.ndarray, job: EmbedJob) -> np.ndarray:
    """One embedding a box: float32 (m, D), in the order of `rows`."""
    return encode_rows(encoder, file, file.box_tiles[rows], boxes_seen(encoder, file, job)[rows], job)


def boxes_seen(encoder: FrozenEncoder, file: SlideFile, job: EmbedJob) -> np.ndarray:
    """The boxes of /boxes that a mode takes: the part in their tile or, for windows, the whole object; float (M, 4)."""
    from odis_path.embedding.windows import window_px

    if job.mode != "window":
        return file.boxes_table()["xyxy"]
    return TileWindows(file).whole_boxes(window_px(encoder, file, job))


def embed_tiles(encoder: FrozenEncoder, file: SlideFile, job: EmbedJob) -> np.ndarray:
    """One embedding a tile: float32 (N, D). In a box mode the mean over its boxes; a tile without a box is seen whole."""
    if job.mode == "full":
        return encode_rows(encoder, file, np.arange(len(file)), None, job)
    rows = object_rows(file, job.kinds)
    tile_of = file.box_tiles[rows]
    side = float(file.patch_size)
    bare = np.setdiff1d(np.arange(len(file)), tile_of)
    boxes = np.concatenate([boxes_seen(encoder, file, job)[rows], np.tile([0, 0, side, side], (len(bare), 1))])
    owner = np.concatenate([tile_of, bare])
    order = np.argsort(owner, kind="stable")
    each = encode_rows(encoder, file, owner[order], boxes[order], job)
    total = np.zeros((len(file), encoder.dim), dtype=np.float64)
    np.add.at(total, owner[order], each)
    return (total / np.bincount(owner, minlength=len(file))[:, None]).astype(np.float32)


def encode_rows(
    encoder: FrozenEncoder, file: SlideFile, tile_of: np.ndarray, boxes: np.ndarray | None, job: EmbedJob
) -> np.ndarray:
    """Embed tile tile_of[i] (with boxes[i]) for every i: float32 (n, D). Tiles of the next batch are read meanwhile."""
    from odis_path.embedding.encoder import batches, encode_objects

    if job.mode == "window":
        assert boxes is not None
        return encode_windows(encoder, file, tile_of, boxes, job)
    features = np.zeros((len(tile_of), encoder.dim), dtype=np.float32)
    if boxes is not None and job.mode == "masked" and encoder.module.shares_passes:
        for rows, tiles in shared_passes(file, tile_of, job.batch):
            features[np.concatenate(rows)] = encode_objects(encoder, tiles, [boxes[some] for some in rows])
        return features

    def read(part: slice) -> np.ndarray:
        numbers, back = np.unique(tile_of[part], return_inverse=True)
        return file.tiles(numbers)[back]

    for part, tiles in read_ahead(list(batches(len(tile_of), job.batch)), read):
        features[part] = encoder.encode(tiles, None if boxes is None else boxes[part], job.mode)
    return features


def encode_windows(
    encoder: FrozenEncoder, file: SlideFile, tile_of: np.ndarray, boxes: np.ndarray, job: EmbedJob
) -> np.ndarray:
    """Masked embeddings of boxes[i] of tile tile_of[i], each in a window around it: float32 (n, D)."""
    from odis_path.embedding.encoder import batches
    from odis_path.embedding.windows import ObjectWindows, window_encoder, window_px

    features = np.zeros((len(tile_of), encoder.dim), dtype=np.float32)
    windows, encoder = ObjectWindows(file, window_px(encoder, file, job)), window_encoder(encoder)

    def read(part: slice) -> tuple[np.ndarray, np.ndarray]:
        return windows.around(tile_of[part], boxes[part])

    for part, (pixels, inside) in read_ahead(list(batches(len(tile_of), job.batch)), read):
        features[part] = encoder.encode(pixels, inside, "masked")
    return features


def shared_passes(file: SlideFile, tile_of: np.ndarray, batch: int) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
    """Batches of (rows of each pass, their tiles): rows of one tile go together, up to OBJECTS_A_PASS.

    Passes of like length go together, so that little is filled up.
    """
    from odis_path.embedding.encoder import batches

    order = np.argsort(tile_of, kind="stable")
    by_tile = np.split(order, np.flatnonzero(np.diff(tile_of[order])) + 1) if len(order) else []
    passes = [some[i : i + OBJECTS_A_PASS] for some in by_tile for i in range(0, len(some), OBJECTS_A_PASS)]
    passes.sort(key=len)

    def read(part: slice) -> np.ndarray:
        return np.stack([file.tile(int(tile_of[rows[0]])) for rows in passes[part]])

    for part, tiles in read_ahead(list(batches(len(passes), batch)), read):
        yield passes[part], tiles


def read_ahead(parts: list[slice], read: Callable[[slice], Pixels]) -> Iterator[tuple[slice, Pixels]]:
    """Yield each part with its pixels, the next one being read in a thread."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending = pool.submit(read, parts[0]) if parts else None
        for number, part in enumerate(parts):
            assert pending is not None
            tiles = pending.result()
            if number + 1 < len(parts):
                pending = pool.submit(read, parts[number + 1])
            yield part, tiles


def write_slide_rows(out: Path, files: list[Path], outcomes: list[Outcome], pretraining: str) -> None:
    """slides.parquet: one row a slide that is done, the mean of its tile features; one that cannot be used has failed.

    Raises UserError where no slide has a tile although none failed.
    """
    rows = []
    for path, outcome in zip(files, outcomes, strict=True):
        if not outcome.ok:
            continue
        try:
            one = read_features(feature_file(out, path), "tile")
        except UserError as error:
            outcome.ok, outcome.skipped, outcome.error = False, False, describe_error(error)
            continue
        if len(one.x):
            rows.append({
                "slide_id": path.stem, "patient_id": str(one.patient_id[0]), "n_tiles": len(one.x), "encoder": one.encoder,
                "mode": one.mode, "features": one.x.mean(0),
            })  # fmt: skip
    if rows:
        write_slides_parquet(out / SLIDES_FILE, rows, pretraining)
    elif all(outcome.ok for outcome in outcomes):
        raise UserError(f"{out}: no slide has a tile, so there is no slide embedding; look at the tiling first")
