"""Slides -> slide files: find tissue, plan the grid, read, encode, write."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from annotations.errors import UserError
from tiling import codec
from tiling.cohort import Outcome, run_cohort
from tiling.grid import GridPlan, plan_grid
from tiling.mpp import check_mpp, settle_mpp
from tiling.scan import SlideItem, slide_items
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
from tiling.tissue import rasterise, tissue_mask

THUMBNAIL_SIDE_PX = 1024
OUTLINE_SUFFIXES = (".geojson", ".json", ".geojson.gz", ".json.gz", ".geojson.zip", ".zip")


@dataclass(frozen=True)
class TileSettings:
    """What is asked of every slide of a cohort.

    mpp: micrometres per target pixel. size_px, overlap_px: target pixels. min_tissue: least share of tissue in a tile.
    tissue: "auto", "none", or a folder of outlines named by slide. pixels: store encoded tiles. assume_mpp: level-0 mpp
    for slides that have none. quality: of the JPEGs.
    """

    mpp: float
    size_px: int
    overlap_px: int = 0
    min_tissue: float = 0.1
    tissue: str = "auto"
    pixels: bool = True
    assume_mpp: float | None = None
    quality: int = 90

    def check(self) -> TileSettings:
        """Raises UserError for a value that cannot be."""
        check_mpp(self.mpp, "--mpp")
        check_mpp(self.assume_mpp, "--assume-mpp")
        if not 0 <= self.min_tissue <= 1:
            raise UserError(f"--min-tissue {self.min_tissue}: is a share between 0 and 1")
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality {self.quality}: JPEG quality lies between 1 and 100")
        if self.tissue not in ("auto", "none") and not Path(self.tissue).is_dir():
            raise UserError(f"--tissue {self.tissue}: is neither auto, none nor a folder of GeoJSON outlines")
        plan_grid(self.size_px, self.size_px, self.mpp, self.mpp, self.size_px, self.overlap_px)
        return self


def tile_cohort(
    inputs: Sequence[Path | str],
    out: Path | str,
    mpp: float,
    size_px: int,
    overlap_px: int = 0,
    min_tissue: float = 0.1,
    tissue: str | Path = "auto",
    pixels: bool = True,
    assume_mpp: float | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    quality: int = 90,
) -> list[Outcome]:
    """Write `<out>/<slide_id>.h5` for every slide of a manifest, or of files, folders and globs.

    See `TileSettings` for the settings. A slide whose file is there with the same parameters and the same source is
    skipped. Raises UserError for inputs or settings that cannot be; a bad slide is a failed outcome.
    """
    settings = TileSettings(mpp, size_px, overlap_px, min_tissue, str(tissue), pixels, assume_mpp, quality).check()
    items = slide_items(inputs)
    out = _made(Path(out))
    work = partial(tile_slide, out=out, settings=settings)
    return run_cohort(items, work, title="tile", workers=workers, scheduler=scheduler, name=str)


def tile_slide(item: SlideItem, out: Path, settings: TileSettings) -> dict[str, Any]:
    """Tile one slide into `<out>/<slide_id>.h5`; returns tiles, megapixels (of level 0), `message`."""
    path = out / f"{item.slide_id}.h5"
    with Slide.open(item.path) as slide:
        info = slide.info
        found = settle_mpp(item.path, info.mpp_found, manifest_mpp=item.mpp, assume_mpp=settings.assume_mpp)
        assert found.value is not None
        outlines = _outline_file(Path(settings.tissue), item, info) if settings.tissue not in ("auto", "none") else None
        parameters = _parameters(settings, found.value, outlines)
        if (tiles := _done(path, parameters, item)) is not None:
            return {"skipped": True, "tiles": tiles, "megapixels": 0.0}
        thumb = slide.thumbnail(THUMBNAIL_SIDE_PX)
        downsample = info.width_l0 / thumb.shape[1]
        mask = _mask(settings, outlines, thumb, downsample, info)
        plan = _plan(settings, info, found.value, mask, downsample)
        meta = _meta(item, info, settings, found.value, parameters)
        had_boxes = _has_boxes(path)
        write_slide_file(
            path,
            meta=meta,
            coords=plan.coords,
            tissue_fraction=plan.tissue_fraction,
            pixels=_encoded(slide, plan, settings.quality) if settings.pixels else None,
            groups={"thumbnail": _overview(thumb, mask, downsample)},
        )
    megapixels = len(plan.coords) * plan.size_l0**2 / 1e6 if settings.pixels else 0.0
    remarks = [found.note if found.source != "--assume-mpp" else "", _why_empty(plan, info)]
    remarks.append("its boxes are gone with the old tiles: run annotate again" if had_boxes else "")
    message = "; ".join(remark for remark in remarks if remark)
    return {"tiles": len(plan.coords), "megapixels": megapixels, "mpp_source": found.source, "message": message}


def _made(out: Path) -> Path:
    """Make the output folder; it is absolute, as a cluster's workers may run elsewhere."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be the output folder: {error.strerror}") from None
    return out.absolute()


def _parameters(settings: TileSettings, mpp_level0: float, outlines: Path | None) -> dict[str, Any]:
    """All that changes the result; the hash of it tells whether a file is up to date."""
    tissue = settings.tissue
    if outlines is not None:
        tissue = f"outlines sha256 {hashlib.sha256(outlines.read_bytes()).hexdigest()}"
    return {
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


def _done(path: Path, parameters: dict[str, Any], item: SlideItem) -> int | None:
    """Number of tiles of an existing file that is up to date (its patient_id is brought up to date), else None."""
    if not path.exists():
        return None
    try:
        with SlideFile(path) as file:
            count, attrs, patient_id = len(file), file.attrs, file.patient_id
            moved = not file.has_pixels and file.source != item.path.absolute()
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


def _plan(settings: TileSettings, info: SlideInfo, mpp_level0: float, mask: np.ndarray | None, downsample: float) -> GridPlan:
    size = (info.width_l0, info.height_l0, mpp_level0, settings.mpp, settings.size_px, settings.overlap_px)
    try:
        return plan_grid(*size, mask, downsample, settings.min_tissue)
    except UserError as error:
        raise UserError(f"{info.path}: {error}") from None


def _why_empty(plan: GridPlan, info: SlideInfo) -> str:
    if len(plan.coords):
        return ""
    if plan.size_l0 > min(info.width_l0, info.height_l0):
        return f"no tiles: one is {plan.size_l0:.0f} level-0 pixels wide, the slide {info.width_l0} x {info.height_l0}"
    return "no tiles: no tissue found (see --tissue and --min-tissue)"


def _encoded(slide: Slide, plan: GridPlan, quality: int) -> Iterator[bytes]:
    for tile in slide.read_tiles(plan.coords, plan.size_l0, plan.patch_px):
        yield codec.encode_jpeg(tile, quality)


def _overview(thumb: np.ndarray, mask: np.ndarray | None, downsample: float) -> dict[str, GroupContent]:
    """The group /thumbnail: what reports draw heatmaps on."""
    jpeg = np.frombuffer(codec.encode_jpeg(thumb, 85), np.uint8)
    group: dict[str, Any] = {"jpeg": jpeg, "attrs": {"downsample": float(downsample)}}
    if mask is not None:
        group["tissue"] = mask.astype(np.uint8)
    return group


def _mask(
    settings: TileSettings, outlines: Path | None, thumb: np.ndarray, downsample: float, info: SlideInfo
) -> np.ndarray | None:
    """bool mask on the thumbnail's grid; None where every tile is wanted."""
    if settings.tissue == "none":
        return None
    if outlines is None:
        return tissue_mask(thumb)
    from annotations.read import read_annotations

    table = read_annotations(outlines, kind="tissue")
    if not len(table.geometry):
        raise UserError(f"{outlines}: holds no polygon: draw the tissue of {info.slide_id}, or use --tissue auto")
    if any(info.bounds_xy):
        # QuPath counts from the corner of the scanned area where a slide has one.
        table = table.shifted(*info.bounds_xy)
    return rasterise(table.geometry, (thumb.shape[0], thumb.shape[1]), downsample)


def _outline_file(folder: Path, item: SlideItem, info: SlideInfo) -> Path:
    for stem in dict.fromkeys((item.slide_id, info.slide_id, info.path.name)):
        for suffix in OUTLINE_SUFFIXES:
            if (candidate := folder / f"{stem}{suffix}").is_file():
                return candidate
    raise UserError(f"{info.path}: no outline {item.slide_id}.geojson in {folder}: draw it, or use --tissue auto")
