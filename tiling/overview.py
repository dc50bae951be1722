"""Where a slide is to be tiled: its tissue, found or drawn, less what is excluded; outlines in and out; what gets lost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from annotations.errors import UserError
from tiling.grid import GridPlan, tissue_fractions
from tiling.readers import MAX_IMAGE_PIXELS
from tiling.slide import Slide, SlideInfo
from tiling.slideid import slide_stem
from tiling.tissue import BLACK_OVERVIEW, check_brightness, is_black, is_dark, rasterise, tissue_mask, tissue_outlines
from tiling.upright import TURNS, exif_orientation
from tiling.urls import file_name

OUTLINE_SUFFIXES = (".geojson", ".json", ".geojson.gz", ".json.gz", ".geojson.zip", ".zip")
MASK_SUFFIXES = (".png", ".tif", ".tiff")
MASK_SHAPE_TOLERANCE = 0.03  # of the proportions of a mask and of its slide
MOST = 0.5  # from this share on, what is lost is worth a word


@dataclass(frozen=True)
class Overview:
    """A slide at low resolution. thumb: uint8 (h, w, 3); downsample: level-0 pixels per pixel of it.

    tissue, pen, excluded: bool (h, w); tissue is None where every tile is wanted, excluded where nothing is.
    """

    thumb: np.ndarray
    downsample: float
    tissue: np.ndarray | None
    pen: np.ndarray
    excluded: np.ndarray | None

    @property
    def mask(self) -> np.ndarray | None:
        """bool (h, w): where tiles are wanted; None where everywhere."""
        if self.excluded is None:
            return self.tissue
        return ~self.excluded if self.tissue is None else self.tissue & ~self.excluded


def look(
    slide: Slide, mpp_l0: float, outlines: Path | None, exclude: Path | None, *, find: bool, keep_pen: bool, side_px: int = 1024
) -> Overview:
    """Read a slide's overview, its longer side `side_px`, in bands whatever the slide's size, and find its tissue.

    mpp_l0: micrometres per level-0 pixel. outlines: GeoJSON of the tissue, in place of the search; exclude: GeoJSON or mask
    of what is not wanted. find: search for tissue where there are no outlines. keep_pen: ink counts as tissue.
    Raises UserError for files that do not fit and for pictures in which nothing can be told from black.
    """
    from tiling.quality import pen_mask

    info = slide.info
    thumb = slide.thumbnail(side_px)
    shape = (thumb.shape[0], thumb.shape[1])
    downsample = info.width_l0 / shape[1]
    um_per_px = mpp_l0 * downsample
    pen = np.zeros(shape, bool) if is_dark(thumb) else pen_mask(thumb, um_per_px)
    tissue = None
    if outlines is not None:
        tissue = read_outlines(outlines, info, shape, downsample)
    elif find:
        try:
            check_brightness(thumb)
        except UserError as error:
            raise UserError(f"{info.path}: {error}") from None
        tissue = tissue_mask(thumb, um_per_px, np.zeros(shape, bool) if keep_pen else pen)
    excluded = None
    if exclude is not None and exclude.suffix.lower() in MASK_SUFFIXES:
        excluded = read_mask(exclude, info, shape)
    elif exclude is not None:
        excluded = read_outlines(exclude, info, shape, downsample, may_be_empty=True)
    return Overview(thumb, downsample, tissue, pen, excluded)


def region_file(folder: Path, slide_id: str, slide: Path, suffixes: tuple[str, ...]) -> Path | None:
    """The file of a folder that is named after a slide: by its id, its stem or its whole name; None where there is none."""
    for stem in dict.fromkeys((slide_id, slide_stem(slide), file_name(slide))):
        for suffix in suffixes:
            if (candidate := folder / f"{stem}{suffix}").is_file():
                return candidate
    return None


def read_outlines(
    path: Path, info: SlideInfo, shape: tuple[int, int], downsample: float, *, may_be_empty: bool = False
) -> np.ndarray:
    """QuPath GeoJSON -> bool `shape`, a pixel of which covers `downsample` level-0 pixels.

    Raises UserError without polygons; may_be_empty: a file in which nothing at all is drawn gives False everywhere.
    """
    from annotations.read import read_annotations

    table = read_annotations(path, kind="tissue")
    if not len(table.geometry):
        if may_be_empty and table.counts.get("features", 0) == table.counts.get("ignored", 0):
            return np.zeros(shape, bool)
        raise UserError(f"{path}: holds no polygon: draw one for {info.slide_id}, or take the file away")
    if any(info.bounds_xy):
        # QuPath counts from the corner of the scanned area where a slide has one.
        table = table.shifted(*info.bounds_xy)
    return rasterise(table.geometry, shape, downsample)


def read_mask(path: Path, info: SlideInfo, shape: tuple[int, int]) -> np.ndarray:
    """An image of the whole slide, not 0 where a pixel is marked -> bool `shape`. Raises UserError for other proportions."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = MAX_IMAGE_PIXELS
    try:
        with Image.open(path) as image:
            turn = TURNS[exif_orientation(image)]
            marked = np.asarray(image if image.mode in ("1", "L", "P", "I", "I;16", "F") else image.convert("RGB")) != 0
            marked = turn.array(marked)
    except Image.DecompressionBombError:
        most = f"{2 * MAX_IMAGE_PIXELS:,} pixels"  # up to which Pillow warns
        raise UserError(f"{path}: a mask of more than {most}: save it smaller, it may have any size") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable mask: {' '.join(str(error).split())}") from None
    marked = marked.any(axis=2) if marked.ndim == 3 else marked
    stretch = (marked.shape[1] / marked.shape[0]) / (info.width_l0 / info.height_l0)
    if abs(stretch - 1) > MASK_SHAPE_TOLERANCE:
        size, whole = f"{marked.shape[1]} x {marked.shape[0]}", f"{info.width_l0} x {info.height_l0}"
        raise UserError(f"{path}: {size} pixels are not in proportion to the slide's {whole}: a mask shows the whole slide")
    picture = Image.fromarray(marked.astype(np.uint8) * 255)
    return np.asarray(picture.resize((shape[1], shape[0]), Image.Resampling.BOX)) >= 128


def write_outlines(path: Path, mask: np.ndarray, downsample: float, bounds_xy: tuple[int, int] = (0, 0)) -> None:
    """bool (h, w) -> GeoJSON that QuPath opens: an annotation of class Tissue for each piece, as `read_outlines` reads them.

    downsample: level-0 pixels per pixel of the mask; bounds_xy: the corner that QuPath counts from, in level-0 pixels.
    """
    import shapely

    from annotations.write import feature_collection, write_geojson

    pieces = [shapely.transform(each, lambda xy: xy - bounds_xy) for each in tissue_outlines(mask, downsample)]
    found = feature_collection(pieces, labels=["Tissue"] * len(pieces), colors={"Tissue": (0, 160, 80)})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_geojson(path, found)


def pen_shares(overview: Overview, plan: GridPlan) -> np.ndarray:
    """Share of each tile under ink: float32 (N,)."""
    return tissue_fractions(plan.coords, plan.size_l0, overview.pen, overview.downsample)


def remarks(overview: Overview, plan: GridPlan, *, ink_dropped: bool) -> Iterator[str]:
    """A line where the picture is black, where most tissue came into no tile, where ink makes up most of what is not glass.

    ink_dropped: tissue was looked for, and what has the colours of ink was not taken for it.
    """
    if is_black(overview.thumb):
        yield f"warning: {BLACK_OVERVIEW}"
    wanted = overview.mask
    if wanted is None:
        return
    found = overview.tissue if overview.tissue is not None else np.ones_like(wanted)
    total = int(found.sum())
    kept = int((wanted & _covered(plan, wanted.shape, overview.downsample)).sum()) / max(1, total)
    if total and kept < MOST:
        excluded = int((found & ~wanted).sum()) / total
        small = max(0.0, 1 - kept - excluded)
        whole = "tissue" if overview.tissue is not None else "slide"
        yield (
            f"warning: {kept:.0%} of the {whole} is in tiles: {excluded:.0%} is under --exclude, {small:.0%} in tiles below "
            "--min-tissue or at the border"
        )
    if not ink_dropped:
        return
    excluded_too = overview.excluded if overview.excluded is not None else np.zeros_like(wanted)
    marked, other = int((overview.pen & ~found & ~excluded_too).sum()), int(wanted.sum())
    if marked > MOST * (other + marked):
        share = marked / (other + marked)
        yield f"warning: {share:.0%} of what is not glass has the colours of pen ink and was left out: --pen keep takes it in"


def _covered(plan: GridPlan, shape: tuple[int, ...], downsample: float) -> np.ndarray:
    """bool `shape`: pixels of the overview that some tile covers."""
    height, width = shape
    edges = np.concatenate([plan.coords, plan.coords + plan.size_l0], axis=1) / downsample
    x0, y0, x1, y1 = np.rint(edges).astype(np.int64).clip(0, [width, height, width, height]).T
    change = np.zeros((height + 1, width + 1), np.int32)
    for row, column, step in ((y0, x0, 1), (y0, x1, -1), (y1, x0, -1), (y1, x1, 1)):
        np.add.at(change, (row, column), step)
    return change.cumsum(axis=0).cumsum(axis=1)[:height, :width] > 0
