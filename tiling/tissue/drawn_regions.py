"""Regions that people drew, read from GeoJSON or masks, and tissue outlines for them to correct."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from annotations.errors import UserError
from tiling.storage.paths import file_name
from tiling.storage.slide_id import slide_stem
from tiling.tissue.mask import rasterise, tissue_outlines
from tiling.wsi.backends.base import MAX_IMAGE_PIXELS
from tiling.wsi.backends.upright import TURNS, exif_orientation
from tiling.wsi.level_view import SlideInfo

OUTLINE_SUFFIXES = (".geojson", ".json", ".geojson.gz", ".json.gz", ".geojson.zip", ".zip")
MASK_SUFFIXES = (".png", ".tif", ".tiff")
MASK_SHAPE_TOLERANCE = 0.03  # of the proportions of a mask and of its slide


def region_file(folder: Path, slide_id: str, slide: Path, suffixes: tuple[str, ...]) -> Path | None:
    """Find the file of a folder that is named after a slide: by its id, its stem or its whole name; None: there is none."""
    for stem in dict.fromkeys((slide_id, slide_stem(slide), file_name(slide))):
        for suffix in suffixes:
            if (candidate := folder / f"{stem}{suffix}").is_file():
                return candidate
    return None


def read_outlines(
    path: Path, info: SlideInfo, shape: tuple[int, int], downsample: float, *, may_be_empty: bool = False
) -> np.ndarray:
    """Read QuPath GeoJSON as a mask, bool `shape`, a pixel of which covers `downsample` level-0 pixels.

    Raises UserError without polygons; may_be_empty: a file in which nothing at all is drawn gives False everywhere.
    """
    from annotations.readers.read import read_annotations

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
    """Read an image of the whole slide, in which marked pixels are not 0, as bool `shape`.

    Raises UserError where it cannot be read or has other proportions than the slide.
    """
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = MAX_IMAGE_PIXELS
    try:
        with Image.open(path) as image:
            turn = TURNS[exif_orientation(image)]
            marked = np.asarray(image if image.mode in ("1", "L", "P", "I", "I;16", "F") else image.convert("RGB")) != 0
            marked = turn.array(marked)
    except Image.DecompressionBombError:
        limit = f"{2 * MAX_IMAGE_PIXELS:,} pixels"  # up to which Pillow warns
        raise UserError(f"{path}: a mask of more than {limit}: save it smaller, it may have any size") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable mask: {' '.join(str(error).split())}") from None
    marked = marked.any(axis=2) if marked.ndim == 3 else marked
    stretch = (marked.shape[1] / marked.shape[0]) / (info.width_l0 / info.height_l0)
    if abs(stretch - 1) > MASK_SHAPE_TOLERANCE:
        size, whole = f"{marked.shape[1]} x {marked.shape[0]}", f"{info.width_l0} x {info.height_l0}"
        raise UserError(f"{path}: {size} pixels are not in proportion to the slide's {whole}: a mask shows the whole slide")
    picture = Image.fromarray(marked.astype(np.uint8) * 255)
    return np.asarray(picture.resize((shape[1], shape[0]), Image.Resampling.BOX)) >= 128


def outlines_geojson(mask: np.ndarray, downsample: float, bounds_xy: tuple[int, int] = (0, 0)) -> bytes:
    """Encode a mask, bool (h, w), as GeoJSON for QuPath: an annotation of class Tissue a piece, as `read_outlines` reads it.

    downsample: level-0 pixels per pixel of the mask; bounds_xy: the corner that QuPath counts from, in level-0 pixels.
    """
    import shapely

    from annotations.geojson_writer import encode_geojson, feature_collection

    pieces = [shapely.transform(piece, lambda xy: xy - bounds_xy) for piece in tissue_outlines(mask, downsample)]
    return encode_geojson(feature_collection(pieces, labels=["Tissue"] * len(pieces), colors={"Tissue": (0, 160, 80)}))
