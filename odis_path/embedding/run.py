"""Embed a cohort: slide files in, feature files out, one slide at a time."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import TYPE_CHECKING, cast

from annotations.errors import UserError
from odis_path.embedding.request import EmbedJob, EncoderRequest, Mode, check_options, other_encoder, parse_kinds
from odis_path.features.pretraining import FILE as PRETRAINING_FILE
from odis_path.features.pretraining import Pretraining, of_encoder
from odis_path.features.read import read_features
from odis_path.features.write import (
    DATASETS,
    SLIDES_FILE,
    SlideDigests,
    embedded_already,
    is_damaged,
    open_features,
    outdated_parts,
    write_features,
    write_slides_parquet,
)
from odis_path.model.source import fingerprint, is_checkpoint, settled_source
from tiling.jobs.outcome import ItemResult, Note, Outcome, describe_error
from tiling.jobs.run import run_cohort
from tiling.jobs.summary import Outcomes
from tiling.slide_file.read import SlideFile, list_slide_files
from tiling.storage.atomic import check_writable
from tiling.storage.checksums import DAMAGED
from tiling.storage.locks import lock_file, lock_settings

if TYPE_CHECKING:
    from odis_path.embedding.encoder import FrozenEncoder


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
    pretraining = of_encoder(source, random_weights=random_weights)
    job = EmbedJob(
        encoder=EncoderRequest(source, checkpoint_stamp(source), device, random_weights, pool, resize),
        out=target,
        level=level,
        mode=cast(Mode, mode),
        kinds=parse_kinds(kinds),
        batch=batch,
        dtype=dtype,
        pretraining=pretraining.note(),
        overwrite=overwrite,
        window_um=window_um,
    )
    outcomes = _embed_cohort(job, files, pretraining, scheduler)
    return Outcomes(outcomes, "embed", out, ("objects",) if level == "object" else ("tiles",), perf_counter() - begun)


def _embed_cohort(job: EmbedJob, files: list[Path], pretraining: Pretraining, scheduler: str | None) -> list[Outcome]:
    replaced = other_encoder(job.out, job)
    if replaced and not job.overwrite:
        raise UserError(replaced)
    if scheduler is None:  # a wrong checkpoint is one error, not one a slide
        encoder = shared_encoder(job.encoder)
        if encoder is not None:
            tell_size(encoder, files, job)
    if job.level == "slide":
        check_writable(job.out / SLIDES_FILE)
    with lock_settings(job.out, "embed", job.settings()):
        if replaced:
            for name in (SLIDES_FILE, PRETRAINING_FILE):
                (job.out / name).unlink(missing_ok=True)
        with suppress(UserError):  # each slide tells that the folder cannot be written
            pretraining.write(job.out)
        outcomes = run_cohort(
            files,
            partial(embed_slide, job),
            title=f"embed ({job.level}, {job.mode})",
            workers=1,
            scheduler=scheduler,
            name=lambda path: path.stem,
            folder=job.out,
            wrote=partial(feature_file, job.out),
        )
        if job.level == "slide":
            write_slide_rows(job.out, files, outcomes, job.pretraining)
        if any(outcome.ok for outcome in outcomes):
            pretraining.write(job.out)
    return outcomes


def tell_size(encoder: FrozenEncoder, files: list[Path], job: EmbedJob) -> None:
    """Print how the encoder pools, and the size it sees tiles at against the size it was trained at; once a size of tile.

    For windows the same of them; UserError where nothing says how large they are.
    """
    from odis_path.embedding.windows import window_encoder, window_px, window_um

    if job.mode == "window":
        window_um(encoder, job)
    sizes = set()
    for path in files:
        with suppress(UserError), SlideFile(path) as file:  # reported as the slide's own failure
            sizes.add(window_px(encoder, file, job) if job.mode == "window" else file.patch_size)
    if job.mode == "window":
        encoder = window_encoder(encoder)
    for size in sorted(sizes):
        print(f"embed: {encoder.about(size, 'windows' if job.mode == 'window' else 'tiles')}", file=sys.stderr)


def checkpoint_file(source: str) -> str:
    """Return the absolute path of a checkpoint, or of the newest of a run folder.

    A folder in the form of the hub becomes `local-dir:PATH`, a timm name stays as it is. Raises UserError where there is none.
    """
    from odis_path.checkpoint import latest_checkpoint, load_checkpoint

    if not is_checkpoint(source):
        return settled_source(source)
    path = Path(source).absolute()
    checkpoint = latest_checkpoint(path) if path.is_dir() else path
    if checkpoint is None or not checkpoint.exists():
        checkpoint = load_checkpoint(Path(source)).path  # its error tells what is missing
    return str(checkpoint)


def checkpoint_stamp(checkpoint: str) -> str:
    """Return name, sizes and times of the files of a checkpoint or model (the name without any); a change: embed again."""
    state, path = fingerprint(checkpoint), Path(checkpoint)
    name = str(path.resolve()) if path.is_file() else checkpoint
    return f"{name}:{state}" if state else checkpoint


def shared_encoder(request: EncoderRequest) -> FrozenEncoder:
    """Load the encoder, once a process and again when its stamp changes; by one thread, as its seed is the process's.

    Raises UserError where the checkpoint is not that of the stamp.
    """
    with _loading:
        return _load(request)


_loading = Lock()


@lru_cache(maxsize=1)
def _load(request: EncoderRequest) -> FrozenEncoder:
    from odis_path.embedding.encoder import load_encoder  # torch: not before all that does without it is checked

    _check_stamp(request)
    encoder = load_encoder(
        request.checkpoint,
        device=request.device,
        random_weights=request.random_weights,
        pool=request.pool,
        resize=request.resize,
    )
    _check_stamp(request)  # it may have been replaced meanwhile
    return encoder


def _check_stamp(request: EncoderRequest) -> None:
    """Raise UserError where the checkpoint here is not that of the stamp: it was replaced, or is of another machine."""
    state = fingerprint(request.checkpoint)
    if state and not request.stamp.endswith(f":{state}"):
        raise UserError(
            f"{request.checkpoint}: is not the file that this run began with (changed since?): run the same command again"
        )


def feature_file(out: Path, path: Path) -> Path:
    """Return the path of the features of a slide file."""
    return out / path.name


def embed_slide(job: EmbedJob, path: Path) -> ItemResult:
    """Embed one slide file; info: the number of its embeddings."""
    target = feature_file(job.out, path)
    with lock_file(target):
        return _embed_locked(job, path, target)


def _embed_locked(job: EmbedJob, path: Path, target: Path) -> ItemResult:
    from odis_path.embedding.slide import TornSlideFile, embed_objects, embed_tiles, object_rows  # torch

    level = "tile" if job.level == "slide" else job.level
    damaged = target.exists() and is_damaged(target)
    earlier_rows = None if damaged else _rows_in(target, level)
    if not damaged and embedded_already(target, level, path, job.parameters()):
        return ItemResult({f"{level}s": earlier_rows}, skipped=True)
    check_writable(target)
    encoder = shared_encoder(job.encoder)
    file = TornSlideFile(path)
    with file:
        if target.exists() and not damaged and not job.overwrite:  # refused before the work, not after it
            outdated_parts(target, level, SlideDigests.of(file), encoder.name, job.mode)
        rows = object_rows(file, job.kinds) if level == "object" else None
        features = embed_tiles(encoder, file, job) if rows is None else embed_objects(encoder, file, rows, job)
        write_features(
            target,
            level=level,
            features=features,
            slide_file=file,
            encoder=encoder.name,
            mode=job.mode,
            dtype=job.dtype,
            parameters=job.parameters(),
            box_rows=rows if job.kinds else None,
            view_attrs=view_attrs(encoder, file.patch_size),
            pretraining=job.pretraining,
            overwrite=job.overwrite,
        )
    redone = "the tiles, their boxes or what is asked changed" if earlier_rows is not None else DAMAGED if damaged else ""
    notes = []
    if file.torn:
        notes.append(Note(f"tiles cannot be read from its slide (the first, row {min(file.torn)}): black", len(file.torn)))
    return ItemResult({f"{level}s": len(features)}, notes, redone)


def view_attrs(encoder: FrozenEncoder, tile_px: int) -> dict[str, str | int]:
    """Return attributes of the features: pooling, side that tiles were seen at, side trained at (0: unknown)."""
    return {"pool": encoder.pool, "size_px": encoder.size_px(tile_px), "trained_px": encoder.trained_px or 0}


def _rows_in(target: Path, level: str) -> int | None:
    """Count the features of this level in a feature file; None where there are none yet."""
    if not target.exists():
        return None
    with open_features(target) as file:
        return len(file.h5[DATASETS[level]]) if DATASETS[level] in file else None


def write_slide_rows(out: Path, files: list[Path], outcomes: list[Outcome], pretraining: str) -> None:
    """Write slides.parquet: one row a slide that is done, the mean of its tile features.

    A slide whose features cannot be read has failed. Raises UserError where no slide has a tile although none failed.
    """
    rows = []
    for path, outcome in zip(files, outcomes, strict=True):
        if not outcome.ok:
            continue
        try:
            tiles = read_features(feature_file(out, path), "tile")
        except UserError as error:
            outcome.ok, outcome.skipped, outcome.error = False, False, describe_error(error)
            continue
        if len(tiles):
            names = {
                "slide_id": path.stem,
                "patient_id": str(tiles.patient_id[0]),
                "encoder": tiles.encoder,
                "mode": tiles.mode,
            }
            rows.append({**names, "n_tiles": len(tiles), "features": tiles.x.mean(0)})
    if rows:
        write_slides_parquet(out / SLIDES_FILE, rows, pretraining)
    elif all(outcome.ok for outcome in outcomes):
        raise UserError(f"{out}: no slide has a tile, so there is no slide embedding; look at the tiling first")
