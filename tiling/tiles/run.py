"""Slides -> slide files: find tissue, plan the grid, read, encode, write."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from annotations.errors import UserError
from tiling.cohort.manifest import SlideItem
from tiling.cohort.scan import slide_items
from tiling.grid import GridPlan, plan_grid
from tiling.jobs.outcome import ItemResult, Note, notes_of
from tiling.jobs.run import available_cpus, run_cohort
from tiling.jobs.summary import Outcomes
from tiling.slide_file.read import SlideFile
from tiling.slide_file.write import FORMAT_VERSION, Columns, SlideFileWriter, SlideMeta, replace_groups, source_stamp
from tiling.storage.checksums import DAMAGED
from tiling.storage.locks import lock_file, lock_settings
from tiling.storage.paths import absolute, display_path, path_key, url_of
from tiling.storage.slide_id import default_id
from tiling.tiles.encode import count_missing_tiles, encode_tiles, stored_level
from tiling.tiles.resume import ExistingFile, Stamp, check_same_slide, read_existing, reason_to_redo, up_to_date
from tiling.tiles.settings import TileSettings
from tiling.tissue.drawn_regions import MASK_SUFFIXES, OUTLINE_SUFFIXES, region_file
from tiling.tissue.outlines_out import clear_tissue, write_tissue
from tiling.tissue.overview import Overview, overview_warnings, pen_shares, read_overview
from tiling.wsi import codec
from tiling.wsi.level_alignment import describe_placements
from tiling.wsi.level_view import SlideInfo
from tiling.wsi.mpp import Mpp, settle_mpp
from tiling.wsi.slide import Slide

THUMBNAIL_SIDE_PX = 1024
TISSUE_METHOD = 3  # raised whenever --tissue auto finds other tissue than before


def tile(
    inputs: Path | str | Sequence[Path | str],
    out: Path | str,
    mpp: float | None = None,
    size: int = 224,
    overlap: int = 0,
    min_tissue: float = 0.1,
    tissue: Path | str = "auto",
    pixels: str = "jpeg",
    assume_mpp: float | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    *,
    mag: float | None = None,
    quality: int = 90,
    reader: str = "auto",
    resample: str = "fast",
    exclude: Path | str = "",
    pen: str = "drop",
    tissue_out: Path | str = "",
    timeout: float | None = None,
    settings: TileSettings | None = None,
) -> Outcomes:
    """Write `<out>/<slide_id>.h5` for every slide of a manifest, or of files, folders and globs.

    See `TileSettings` for the options, which may be given as one in their place; mag: magnification, for mpp = 10 / mag. Where
    there are more workers than slides, each slide gets several threads. A slide whose file is there with the same parameters
    and the same source is skipped. timeout: seconds after which a slide is given up. Raises UserError for inputs or settings
    that cannot be, and where another run is at work in `out` with other settings; a bad slide is a failed outcome.
    """
    wanted = TileSettings(
        mpp=_one_mpp(mpp, mag) if settings is None else settings.mpp,
        size=size,
        overlap=overlap,
        min_tissue=min_tissue,
        tissue=str(tissue),
        pixels=pixels,
        assume_mpp=assume_mpp,
        quality=quality,
        reader=reader,
        resample=resample,
        exclude=str(exclude),
        pen=pen,
        tissue_out=str(tissue_out),
    )
    if settings is not None:
        if (mpp, mag) != (None, None) or wanted != TileSettings(settings.mpp):
            raise UserError("tile: takes settings, or its options one by one: put all of them into settings")
        wanted = settings
    return _tile_all(inputs, out, wanted.check().anywhere(), workers, scheduler, timeout)


def _tile_all(
    inputs: Path | str | Sequence[Path | str],
    out: Path | str,
    settings: TileSettings,
    workers: int | None,
    scheduler: str | None,
    timeout: float | None,
) -> Outcomes:
    begun = perf_counter()
    items = [replace(item, path=absolute(item.path)) for item in slide_items(inputs)]
    folder = output_folder(Path(out))
    if settings.tissue_out:
        output_folder(Path(settings.tissue_out), "--tissue-out")
    cores = 1 if scheduler else available_cpus() if workers is None else workers
    with lock_settings(folder, "tile", asdict(settings)):
        outcomes = run_cohort(
            items,
            partial(tile_slide, out=folder, settings=settings, threads=max(1, cores // max(1, len(items)))),
            title="tile",
            workers=workers,
            scheduler=scheduler,
            timeout=timeout,
            folder=folder,
            wrote=partial(_file_of, out=folder),
        )
    return Outcomes(outcomes, "tile", out, ("tiles", "bad_tiles", "megapixels"), perf_counter() - begun)


def _one_mpp(mpp: float | None, mag: float | None) -> float:
    """Settle the resolution, asked for in one of two ways: micrometres per target pixel."""
    if (mpp is None) == (mag is None):
        raise UserError("give the resolution of the tiles once: --mpp 0.5, or --mag 20 for the same")
    if mag is not None and mag <= 0:
        raise UserError(f"--mag {mag}: is a number above 0, for instance 20")
    return mpp if mpp is not None else 10 / (mag or 1)


def _file_of(item: SlideItem, out: Path) -> Path:
    return out / f"{item.slide_id}.h5"


@dataclass(frozen=True)
class Task:
    """A slide and where its tiles go. outlines, exclude: files of regions that people drew, as `_regions` finds them.

    stamp: of the slide before it was opened; (-1, -1) behind a URL that is not tiled yet. existing: what `path` holds.
    """

    item: SlideItem
    path: Path
    settings: TileSettings
    outlines: Path | None
    exclude: Path | None
    stamp: Stamp
    existing: ExistingFile | None

    @classmethod
    def of(cls, item: SlideItem, path: Path, settings: TileSettings) -> Task:
        """Gather what is known before the slide is opened.

        Raises UserError where another slide's tiles, or no tiles at all, lie where this one's are to go.
        """
        outlines, exclude = _regions(settings, item)
        existing = read_existing(path)
        stamp = source_stamp(item.path) if existing is not None or not url_of(item.path) else (-1, -1)
        if existing is not None:
            check_same_slide(path, existing.source, existing.stamp, item.path, stamp)
        return cls(item, path, settings, outlines, exclude, stamp, existing)

    def parameters(self, mpp_level0: float) -> dict[str, Any]:
        """All that changes the result; the hash of it tells whether a file is up to date."""
        settings, tissue = self.settings, self.settings.tissue
        parameters: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "mpp": settings.mpp,
            "mpp_level0": mpp_level0,
            "size_px": settings.size,
            "overlap_px": settings.overlap,
            "min_tissue": settings.min_tissue,
            "tissue": tissue if self.outlines is None else f"outlines {_sha256(self.outlines)}",
            "pixels": settings.stores_pixels,
            "quality": settings.quality if settings.stores_pixels else None,
        }
        if tissue == "auto":
            parameters |= {"tissue_method": TISSUE_METHOD, "pen": settings.pen}
        if self.exclude is not None:
            parameters["exclude"] = _sha256(self.exclude)
        if settings.pixels == "copy":
            parameters["copy"] = True
        defaults = TileSettings(settings.mpp)
        if settings.reader != defaults.reader:
            parameters["reader"] = settings.reader
        if settings.resample != defaults.resample:
            parameters["resample"] = settings.resample
        return parameters

    def is_done(self, mpp_level0: float) -> bool:
        """Tell whether the slide file that is there is up to date; if so its patient_id is brought up to date."""
        item, existing = self.item, self.existing
        if existing is None or not up_to_date(existing, self.parameters(mpp_level0), item.path, self.stamp):
            return False
        if item.patient_id and item.patient_id != existing.patient_id:
            replace_groups(self.path, {}, root_attrs={"patient_id": item.patient_id})
        return True

    def meta(self, info: SlideInfo, mpp_level0: float, parameters: dict[str, Any]) -> SlideMeta:
        """The attributes of the slide file."""
        item, settings = self.item, self.settings
        return SlideMeta(
            slide_id=item.slide_id,
            source=item.path,
            width_l0=info.width_l0,
            height_l0=info.height_l0,
            mpp=settings.mpp,
            mpp_level0=mpp_level0,
            patch_px=settings.size,
            overlap_px=settings.overlap,
            patient_id=item.patient_id,
            bounds_xy=info.bounds_xy,
            parameters=parameters,
            stamp=None if url_of(item.path) else self.stamp,
        )


def tile_slide(item: SlideItem, out: Path, settings: TileSettings, threads: int = 1) -> ItemResult:
    """Tile one slide into `<out>/<slide_id>.h5`; info: tiles, bad_tiles, megapixels (of level 0), reader, mpp_source.

    The rows of tiles that could not be decoded whole are listed in `/bad_tiles`, int64 (K,); there is none without them.
    """
    path = _file_of(item, out)
    with lock_file(path):
        task = Task.of(item, path, settings)
        # With the manifest's mpp all parameters are known, and a slide that is done need not be opened.
        if item.mpp is None or not task.is_done(item.mpp):
            with Slide.open(item.path, reader=settings.reader, resample=settings.resample) as slide:
                mpp = settle_mpp(item.path, slide.info.stated_mpp, manifest_mpp=item.mpp, assume_mpp=settings.assume_mpp)
                assert mpp.value is not None
                if item.mpp is not None or not task.is_done(mpp.value):
                    return _tile(slide, task, threads, mpp, mpp.value)
        write_tissue(settings.tissue_out, path, again=False)
    assert task.existing is not None
    counts = {"tiles": task.existing.tiles, "bad_tiles": task.existing.bad_tiles, "megapixels": 0.0}
    return ItemResult(counts, notes_of(_unreadable(task.existing.unreadable)), skipped=True)


def _tile(slide: Slide, task: Task, threads: int, mpp: Mpp, mpp_l0: float) -> ItemResult:
    """Find the tissue, plan the grid, read, encode and write the tiles."""
    path, settings, info, existing = task.path, task.settings, slide.info, task.existing
    find, keep_pen = settings.tissue == "auto", settings.pen == "keep"
    overview = read_overview(
        slide, mpp_l0, task.outlines, task.exclude, find=find, keep_pen=keep_pen, side_px=THUMBNAIL_SIDE_PX
    )
    plan = _plan(settings, info, mpp_l0, overview)
    twin, parameters = _twin(path, task.item), task.parameters(mpp_l0)
    redone = reason_to_redo(existing, parameters, task.stamp) if existing is not None else DAMAGED if path.exists() else ""
    clear_tissue(settings.tissue_out, path, overview, info.bounds_xy)
    meta = task.meta(info, mpp_l0, parameters)
    with SlideFileWriter(path, meta, plan.coords, plan.tissue_fraction, has_pixels=settings.stores_pixels) as out:
        if settings.stores_pixels:
            copy = settings.pixels == "copy"
            for tile in encode_tiles(slide, plan, quality=settings.quality, copy=copy, threads=threads):
                out.add_tile(tile.data, blur=tile.blur, problem=tile.problem)
        unreadable = float(overview.unreadable.mean())
        out.add_group("thumbnail", thumbnail_group(overview.thumb, overview.tissue_mask, overview.downsample, unreadable))
        blur = {"blur": out.blur} if settings.stores_pixels else {}
        out.add_group("quality", {"pen": pen_shares(overview, plan)} | blur)
    write_tissue(settings.tissue_out, path, again=True)
    notes = notes_of(
        mpp.note if mpp.source != "--assume-mpp" else "",
        _why_empty(plan, info, overview),
        *overview_warnings(overview, plan, ink_dropped=find and not keep_pen),
        *_pixel_notes(slide, overview, plan, settings, out.problems),
        twin,
        "its boxes are gone with the old tiles: run annotate again" if existing is not None and existing.has_boxes else "",
        f"nothing of it in --exclude {settings.exclude}" if settings.exclude and task.exclude is None else "",
    )
    megapixels = len(plan.coords) * plan.size_l0**2 / 1e6 if settings.stores_pixels else 0.0
    counts = {"tiles": len(plan.coords), "bad_tiles": len(out.problems), "megapixels": megapixels}
    return ItemResult({**counts, "reader": info.reader, "mpp_source": mpp.source}, notes, redone)


def _regions(settings: TileSettings, item: SlideItem) -> tuple[Path | None, Path | None]:
    """Find the files of a slide's tissue outlines and of what is excluded; None where not asked for, or not there.

    Raises UserError where outlines were asked for and there are none.
    """
    outlines = exclude = None
    if settings.tissue not in ("auto", "none"):
        outlines = region_file(Path(settings.tissue), item.slide_id, item.path, OUTLINE_SUFFIXES)
        if outlines is None:
            missing = f"no outline {item.slide_id}.geojson in {settings.tissue}"
            raise UserError(f"{item.path}: {missing}: draw it, or use --tissue auto")
    if settings.exclude:
        exclude = region_file(Path(settings.exclude), item.slide_id, item.path, (*OUTLINE_SUFFIXES, *MASK_SUFFIXES))
    return outlines, exclude


def output_folder(folder: Path, option: str = "--out") -> Path:
    """Make a folder for output; it is absolute, as a cluster's workers may run elsewhere."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {folder}: cannot be the output folder: {error.strerror}") from None
    return folder.absolute()


def _sha256(path: Path) -> str:
    try:
        return f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}"
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}: ask for the right to read it") from None


def _plan(settings: TileSettings, info: SlideInfo, mpp_level0: float, overview: Overview) -> GridPlan:
    size = (info.width_l0, info.height_l0, mpp_level0, settings.mpp, settings.size, settings.overlap)
    try:
        return plan_grid(*size, overview.tissue_mask, overview.downsample, settings.min_tissue)
    except UserError as error:
        raise UserError(f"{info.path}: {error}") from None


def _why_empty(plan: GridPlan, info: SlideInfo, overview: Overview) -> str:
    if len(plan.coords):
        return ""
    if plan.size_l0 > min(info.width_l0, info.height_l0):
        return f"no tiles: one is {plan.size_l0:.0f} level-0 pixels wide, the slide {info.width_l0} x {info.height_l0}"
    if overview.tissue is None or overview.tissue.any():
        return "no tiles: none holds enough tissue (see --min-tissue and --exclude)"
    return "no tiles: no tissue found (see --tissue and --min-tissue)"


def _pixel_notes(
    slide: Slide, overview: Overview, plan: GridPlan, settings: TileSettings, problems: dict[int, str]
) -> list[Note | str]:
    """Collect notes on what was read otherwise than from whole stored tiles of the level that fits."""
    notes: list[Note | str] = [slide.info.note, describe_placements(slide)]
    if problems:
        row, problem = next(iter(problems.items()))
        text = f"tiles cannot be decoded and are marked in /bad_tiles (the first, row {row}: {problem})"
        notes.append(Note(text, len(problems)))
    notes.append(_unreadable(float(overview.unreadable.mean())))
    if count := count_missing_tiles(slide, plan):
        notes.append(Note("tiles reach into what was not scanned: background colour there", count))
    if slide.skipped_levels:
        sizes = ", ".join(f"1/{slide.downsample(level):.0f}" for level in sorted(slide.skipped_levels))
        notes.append(f"its level of {sizes} is no average of level 0, so a finer one is read")
    if settings.pixels == "copy" and len(plan.coords) and stored_level(slide, plan) is None:
        notes.append(f"recoded at quality {settings.quality}: its stored tiles are not the tiles wanted")
    return notes


def _unreadable(share: float) -> str:
    return f"{share:.2%} of the overview cannot be decoded: tissue there is told by what lies around it" if share else ""


def thumbnail_group(thumb: np.ndarray, mask: np.ndarray | None, downsample: float, undecoded: float = 0.0) -> Columns:
    """Make the group /thumbnail: what reports draw heatmaps on. undecoded: share of it that could not be decoded."""
    jpeg = np.frombuffer(codec.encode_jpeg(thumb, 85), np.uint8)
    attrs = {"downsample": float(downsample)} | ({"undecoded": float(undecoded)} if undecoded else {})
    group: Columns = {"jpeg": jpeg, "attrs": attrs}
    if mask is not None:
        group["tissue"] = mask.astype(np.uint8)
    return group


def _twin(path: Path, item: SlideItem) -> str:
    """Warn where the slide's tiles lie in the folder under its plain name too: its id got a folder in front since."""
    plain = path.with_name(f"{default_id(item.path)}.h5")
    if path.exists() or not plain.exists():
        return ""
    try:
        with SlideFile(plain) as file:
            same = path_key(file.source) == path_key(item.path)
    except (UserError, OSError, KeyError, RuntimeError):
        return ""
    return f"warning: {plain} and {path} are of the same slide, {display_path(item.path)}: remove one of them" if same else ""
