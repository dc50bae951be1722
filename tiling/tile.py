"""Slides -> slide files: find tissue, plan the grid, read, encode, write."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from annotations.errors import UserError
from tiling import codec
from tiling.claim import claim, same_settings
from tiling.cohort import Outcome, available_cpus, run_cohort
from tiling.grid import GridPlan, plan_grid
from tiling.manifest import SlideItem, id_of
from tiling.mpp import Mpp, settle_mpp
from tiling.overview import MASK_SUFFIXES, OUTLINE_SUFFIXES, Overview, look, pen_shares, region_file, remarks
from tiling.pixels import encoded_tiles, stored_level, unscanned
from tiling.quality import blur_score
from tiling.resume import before
from tiling.scan import slide_items
from tiling.slide import Slide, SlideInfo
from tiling.slidefile import SlideFile
from tiling.slidewrite import (
    FORMAT_VERSION,
    GroupContent,
    SlideMeta,
    parameters_hash,
    replace_groups,
    source_stamp,
    write_slide_file,
)
from tiling.tilesettings import TileSettings
from tiling.tissueout import clear_tissue, write_tissue
from tiling.urls import absolute, place, shown

THUMBNAIL_SIDE_PX = 1024
TISSUE_METHOD = 2  # raised whenever --tissue auto finds other tissue than before


def tile_cohort(
    inputs: Sequence[Path | str],
    out: Path | str,
    mpp: float,
    size_px: int,
    overlap_px: int = 0,
    min_tissue: float = 0.1,
    tissue: str | Path = "auto",
    pixels: bool | str = True,
    assume_mpp: float | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    quality: int = 90,
    exclude: str | Path = "",
    pen: str = "drop",
    tissue_out: str | Path = "",
    timeout: float | None = None,
    reader: str = "auto",
    resample: str = "fast",
) -> list[Outcome]:
    """Write `<out>/<slide_id>.h5` for every slide of a manifest, or of files, folders and globs.

    See `TileSettings` for the settings. pixels: True, False, or "copy" for the slide's own encoded tiles where they are the
    tiles wanted. Where there are more workers than slides, each slide gets several threads. A slide whose file is there with
    the same parameters and the same source is skipped. timeout: seconds after which a slide is given up. Raises UserError for
    inputs or settings that cannot be, and where another run is at work in `out` with other settings; a bad slide is a failed
    outcome.
    """
    if isinstance(pixels, str) and pixels != "copy":
        raise UserError(f"--pixels {pixels}: is copy, where it is more than a switch")
    more: dict[str, Any] = {"exclude": str(exclude), "pen": pen, "tissue_out": str(tissue_out)}
    more |= {"copy": pixels == "copy", "reader": reader, "resample": resample}
    first = (mpp, size_px, overlap_px, min_tissue, str(tissue), bool(pixels), assume_mpp, quality)
    settings = TileSettings(*first, **more).check().anywhere()
    items = [replace(item, path=absolute(item.path)) for item in slide_items(inputs)]
    out = _made(Path(out))
    if settings.tissue_out:
        _made(Path(settings.tissue_out), "--tissue-out")
    cores = 1 if scheduler else available_cpus() if workers is None else workers
    work = partial(tile_slide, out=out, settings=settings, threads=max(1, cores // max(1, len(items))))
    how: dict[str, Any] = {"workers": workers, "scheduler": scheduler, "timeout": timeout, "folder": out}
    with same_settings(out, "tile", asdict(settings)):
        return run_cohort(items, work, title="tile", name=str, **how)


def tile_slide(item: SlideItem, out: Path, settings: TileSettings, threads: int = 1) -> dict[str, Any]:
    """Tile one slide into `<out>/<slide_id>.h5`; returns tiles, bad_tiles, megapixels (of level 0), reader, `message`.

    The rows of tiles that could not be decoded whole are listed in `/bad_tiles`, int64 (K,); there is none without them.
    """
    path = out / f"{item.slide_id}.h5"
    with claim(path):
        outlines, exclude = _regions(settings, item)
        # With the manifest's mpp all parameters are known, and a slide that is done need not be opened.
        tiles = _done(path, _parameters(settings, item.mpp, outlines, exclude), item) if item.mpp is not None else None
        if tiles is None:
            with Slide.open(item.path, reader=settings.reader, resample=settings.resample) as slide:
                found = settle_mpp(item.path, slide.info.mpp_found, manifest_mpp=item.mpp, assume_mpp=settings.assume_mpp)
                assert found.value is not None
                tiles = _done(path, _parameters(settings, found.value, outlines, exclude), item) if item.mpp is None else None
                if tiles is None:
                    return _tiled(slide, item, path, settings, threads, found, outlines, exclude)
        write_tissue(settings.tissue_out, path, again=False)
    return {"skipped": True, "tiles": tiles, "megapixels": 0.0}


def _tiled(
    slide: Slide,
    item: SlideItem,
    path: Path,
    settings: TileSettings,
    threads: int,
    found: Mpp,
    outlines: Path | None,
    exclude: Path | None,
) -> dict[str, Any]:
    """Look, plan, read, write; returns what `tile_slide` does."""
    info, mpp_l0 = slide.info, found.value
    assert mpp_l0 is not None
    parameters = _parameters(settings, mpp_l0, outlines, exclude)
    keep = {"find": settings.tissue == "auto", "keep_pen": settings.pen == "keep"}
    overview = look(slide, mpp_l0, outlines, exclude, side_px=THUMBNAIL_SIDE_PX, **keep)
    plan = _plan(settings, info, mpp_l0, overview)
    blur = np.full(len(plan.coords), np.nan, np.float32)  # filled in while the tiles are encoded
    quality = {"pen": pen_shares(overview, plan)} | ({"blur": blur} if settings.pixels else {})
    redone, had_boxes = before(path, parameters, item.path)
    twin = _twin(path, item)
    clear_tissue(settings.tissue_out, path, overview, info.bounds_xy)
    groups: dict[str, GroupContent] = {
        "thumbnail": _overview(overview.thumb, overview.mask, overview.downsample),
        "quality": quality,
    }
    bad: dict[int, str] = {}
    write_slide_file(
        path,
        meta=_meta(item, info, settings, mpp_l0, parameters),
        coords=plan.coords,
        tissue_fraction=plan.tissue_fraction,
        pixels=_pixels(slide, plan, settings, threads, blur, bad, groups) if settings.pixels else None,
        groups=groups,
    )
    write_tissue(settings.tissue_out, path, again=True)
    said = [
        found.note if found.source != "--assume-mpp" else "",
        _why_empty(plan, info, overview),
        *remarks(overview, plan),
        *_about_pixels(slide, plan, settings, bad),
        twin,
        "its boxes are gone with the old tiles: run annotate again" if had_boxes else "",
        f"nothing of it in --exclude {settings.exclude}" if settings.exclude and exclude is None else "",
    ]
    message = "; ".join(remark for remark in said if remark)
    megapixels = len(plan.coords) * plan.size_l0**2 / 1e6 if settings.pixels else 0.0
    counts = {"tiles": len(plan.coords), "bad_tiles": len(bad), "megapixels": megapixels, "reader": info.reader}
    return {**counts, "mpp_source": found.source, "message": message, "redone": redone}


def _regions(settings: TileSettings, item: SlideItem) -> tuple[Path | None, Path | None]:
    """The files of a slide's tissue outlines and of what is excluded; None where the one is not asked for, the other not there.

    Raises UserError where outlines were asked for and there are none.
    """
    outlines = exclude = None
    if settings.tissue not in ("auto", "none"):
        outlines = region_file(Path(settings.tissue), item.slide_id, item.path, OUTLINE_SUFFIXES)
        if outlines is None:
            said = f"no outline {item.slide_id}.geojson in {settings.tissue}: draw it, or use --tissue auto"
            raise UserError(f"{item.path}: {said}")
    if settings.exclude:
        exclude = region_file(Path(settings.exclude), item.slide_id, item.path, (*OUTLINE_SUFFIXES, *MASK_SUFFIXES))
    return outlines, exclude


def _made(folder: Path, option: str = "--out") -> Path:
    """Make a folder for output; it is absolute, as a cluster's workers may run elsewhere."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {folder}: cannot be the output folder: {error.strerror}") from None
    return folder.absolute()


def _parameters(settings: TileSettings, mpp_level0: float, outlines: Path | None, exclude: Path | None) -> dict[str, Any]:
    """All that changes the result; the hash of it tells whether a file is up to date."""
    tissue = settings.tissue if outlines is None else f"outlines {_sha256(outlines)}"
    extra: dict[str, Any] = {"tissue_method": TISSUE_METHOD, "pen": settings.pen} if tissue == "auto" else {}
    if exclude is not None:
        extra["exclude"] = _sha256(exclude)
    usual = TileSettings(settings.mpp, settings.size_px)
    extra |= {
        name: getattr(settings, name)
        for name in ("copy", "reader", "resample")
        if getattr(settings, name) != getattr(usual, name)
    }
    return {
        **extra,
        "format_version": FORMAT_VERSION,
        "mpp": settings.mpp,
        "mpp_level0": mpp_level0,
        "size_px": settings.size_px,
        "overlap_px": settings.overlap_px,
        "min_tissue": settings.min_tissue,
        "tissue": tissue,
        "pixels": settings.pixels,
        "quality": settings.quality if settings.pixels else None,
    }


def _sha256(path: Path) -> str:
    try:
        return f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}"
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}: ask for the right to read it") from None


def _done(path: Path, parameters: dict[str, Any], item: SlideItem) -> int | None:
    """Number of tiles of an existing file that is up to date (its patient_id is brought up to date), else None."""
    if not path.exists():
        return None
    try:
        with SlideFile(path) as file:
            count, attrs, patient_id = len(file), file.attrs, file.patient_id
            moved = not file.has_pixels and file.source != absolute(item.path)
    except (UserError, OSError, KeyError, RuntimeError):
        return None  # damaged, or not ours: made anew
    stamp = (int(attrs["source_size"]), int(attrs["source_mtime_ns"]))
    same = attrs["parameters_sha256"] == parameters_hash(parameters)[1] and stamp == source_stamp(item.path)
    if not same or moved:
        return None
    if item.patient_id and item.patient_id != patient_id:
        replace_groups(path, {}, root_attrs={"patient_id": item.patient_id})
    return count


def _has_boxes(path: Path) -> bool:
    try:
        with SlideFile(path) as file:
            return file.has_boxes
    except (UserError, OSError):
        return False


def _meta(item: SlideItem, info: SlideInfo, settings: TileSettings, mpp_level0: float, parameters: dict[str, Any]) -> SlideMeta:
    return SlideMeta(
        slide_id=item.slide_id,
        source=item.path,
        width_l0=info.width_l0,
        height_l0=info.height_l0,
        mpp=settings.mpp,
        mpp_level0=mpp_level0,
        patch_px=settings.size_px,
        overlap_px=settings.overlap_px,
        patient_id=item.patient_id,
        bounds_xy=info.bounds_xy,
        parameters=parameters,
    )


def _plan(settings: TileSettings, info: SlideInfo, mpp_level0: float, overview: Overview) -> GridPlan:
    size = (info.width_l0, info.height_l0, mpp_level0, settings.mpp, settings.size_px, settings.overlap_px)
    try:
        return plan_grid(*size, overview.mask, overview.downsample, settings.min_tissue)
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


def _pixels(
    slide: Slide,
    plan: GridPlan,
    settings: TileSettings,
    threads: int,
    blur: np.ndarray,
    bad: dict[int, str],
    groups: dict[str, Any],
) -> Iterator[bytes]:
    """The tiles as JPEG; blur and bad are filled in on the way, and at the end bad_tiles among the groups, written later."""
    if not len(plan.coords):  # a tile may be wider than any memory, where it is wider than the slide
        return
    how: dict[str, Any] = {"quality": settings.quality, "copy": settings.copy, "threads": threads}
    yield from encoded_tiles(slide, plan, **how, judge=blur_score, scores=blur, bad=bad)
    if bad:
        groups["bad_tiles"] = np.array(sorted(bad), np.int64)


def _about_pixels(slide: Slide, plan: GridPlan, settings: TileSettings, bad: dict[int, str]) -> list[str]:
    """What there is to say of the pixels."""
    said = [slide.info.note]
    if bad:
        row, problem = next(iter(bad.items()))
        said.append(f"{len(bad)} tiles cannot be decoded and are marked in /bad_tiles (the first, row {row}: {problem})")
    if slide.undecoded:
        said.append(f"{slide.undecoded:.2%} of the overview cannot be decoded and counts as no tissue")
    if count := unscanned(slide, plan):
        said.append(f"{count} tiles reach into what was not scanned: background colour there")
    if slide.left_out:
        sizes = ", ".join(f"1/{slide.info.level_downsamples[level]:.0f}" for level in sorted(slide.left_out))
        said.append(f"its level of {sizes} is no average of level 0, so a finer one is read")
    if settings.pixels and settings.copy and len(plan.coords) and stored_level(slide, plan) is None:
        said.append(f"recoded at quality {settings.quality}: its stored tiles are not the tiles wanted")
    return said


def _overview(thumb: np.ndarray, mask: np.ndarray | None, downsample: float) -> dict[str, GroupContent]:
    """The group /thumbnail: what reports draw heatmaps on."""
    jpeg = np.frombuffer(codec.encode_jpeg(thumb, 85), np.uint8)
    group: dict[str, Any] = {"jpeg": jpeg, "attrs": {"downsample": float(downsample)}}
    if mask is not None:
        group["tissue"] = mask.astype(np.uint8)
    return group


def _twin(path: Path, item: SlideItem) -> str:
    """A warning where the slide's tiles lie in the folder under its plain name too: its id got a folder in front since."""
    other = path.with_name(f"{id_of(item.path)}.h5")
    if path.exists() or not other.exists():
        return ""
    try:
        with SlideFile(other) as file:
            same = place(file.source) == place(item.path)
    except (UserError, OSError, KeyError, RuntimeError):
        return ""
    return f"warning: {other} and {path} are of the same slide, {shown(item.path)}: remove one of them" if same else ""
